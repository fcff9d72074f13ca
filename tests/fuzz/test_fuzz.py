"""The fuzz suite, small: some inputs of each kind, the same ones each time. `make fuzz` tries thousands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import contract
import pytest
from contract import Case
from kinds import KINDS, Bench
from long import drawn
from sandbox import Sandbox, sandbox

COUNT = 6
EMPTY: tuple[dict[str, str], dict[str, str], set[str]] = ({}, {}, set())


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    with sandbox(tmp_path_factory.mktemp("sandbox")) as server:
        yield server


@pytest.fixture(scope="session")
def bench(box: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), box)


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_ends_in_success_or_one_clear_line(bench: Bench, kind: str) -> None:
    bench.prepare(kind)
    failures = []
    for place, one in enumerate(drawn(bench, kind, 0, COUNT)):
        verdict = bench.judge(kind, one)
        if verdict.fault is not None:
            one, verdict = bench.smallest(kind, one, verdict)
            failures.append(
                f"{kind}/0/{place}: {verdict.fault}: {verdict.detail}\n  {json.dumps({'kind': kind} | one)}"
            )
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        ("hang", "time"),
        ("wait", "time"),
        ("take memory", "traceback"),
        ("crash", "crash"),
        ("leave a temporary", "temporaries"),
        ("write and refuse", "output left"),
        ("change and refuse", "input changed"),
        ("refuse at length", "length"),
        ("refuse in two lines", "lines"),
        ("refuse in silence", "lines"),
        ("warn", "spill"),
        ("exit with 7", "status"),
        ("answer otherwise", "silent difference"),
        ("answer", None),
    ],
)
def test_what_breaks_the_contract_is_noticed(box: Sandbox, tmp_path: Path, how: str, fault: str | None) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x")
    case = Case([{"do": "misbehave", "how": how}], inputs=("recipe.yaml",), outputs=("out",), same=True, seconds=1)

    def seen() -> tuple[dict[str, str], dict[str, str], set[str]]:
        names = (case.inputs, case.outputs)
        return (*(contract.listing(tmp_path, of) for of in names), contract.hidden(tmp_path))  # type: ignore[return-value]

    before = seen()
    outcome = box.run(case.actions, tmp_path, seconds=case.seconds)
    assert contract.judge(outcome, case, before, seen(), {"answer": "answer"}).fault == fault
