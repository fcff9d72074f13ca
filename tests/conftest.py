"""Settings of the whole test suite: one thread, quiet libraries, property tests that repeat exactly."""

import gc
import os
from collections import Counter, defaultdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from hypothesis import settings

from diffusionblocks.common.seeds import seed_global

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: its kernels run on the CPU

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("suite")


#: folders of tests that train, save and load, or run commands: `make test-fast` leaves them out
WHOLE_RUNS = {"fuzz", "journey", "seam", "training"}


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of whole runs as slow, and of tests marked `each_value` what only `make test-all` runs."""
    crossed: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if Path(item.path).parent.name in WHOLE_RUNS:
            item.add_marker("slow")
        if isinstance(item, pytest.Function) and item.get_closest_marker("each_value"):
            crossed[item.nodeid.partition("[")[0]].append(item)
    for cases in crossed.values():
        chosen = showing_each_value(cases)
        for case in cases:
            if case not in chosen:
                case.add_marker("exhaustive")


def showing_each_value(cases: list[pytest.Function]) -> list[pytest.Function]:
    """Few cases of a test that between them have each value of each parameter, in as different company as can be."""
    # One id for each `parametrize` of the test: what stands in one row of it stays together.
    values = {case: set(enumerate(case.callspec._idlist)) for case in cases}
    shown: Counter[tuple[int, str]] = Counter()
    chosen: list[pytest.Function] = []
    while unshown := set.union(*values.values()) - shown.keys():
        best = max(cases, key=lambda case: (len(values[case] & unshown), -sum(shown[v] for v in values[case])))
        chosen.append(best)
        shown.update(values[best])
    return chosen


@pytest.fixture(scope="module", autouse=True)
def _without_the_libraries() -> None:
    """Collecting garbage looks at no object of the libraries, of which there are half a million."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def _caches_of_the_tests(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What commands cache for their user is not written among the caches of who runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests pass explicit generators; what still draws from the global one starts the same in every order."""
    seed_global(0)
