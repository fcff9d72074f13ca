"""The benchmarks' parts, at toy size on the CPU: what is built and counted, what alternatives move, the depth found."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import resource
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusionblocks.bench import bus, host_need
from diffusionblocks.bench.alternatives import BAdamRunner, alternative_runner
from diffusionblocks.bench.bench_models import MODELS, build, recipe_of, splits_of
from diffusionblocks.bench.depth import largest_depth
from diffusionblocks.bench.host_need import check_host, host_bytes_of
from diffusionblocks.bench.measurements import runner_of
from diffusionblocks.bench.methods import METHODS, Spec, rows_of
from diffusionblocks.bench.peak_memory import at_peak, measure_memory
from diffusionblocks.bench.plain_loop import AlternativeRunner, Plain
from diffusionblocks.bench.plots import draw_depth, draw_memory
from diffusionblocks.bench.rows import gather, in_current_terms, memory_table, prediction, rows_in, shard, summary
from diffusionblocks.bench.runners import Runner, TrainerRunner, bytes_of, plain
from diffusionblocks.bench.speed import ratios_of
from diffusionblocks.bench.timing import LOCK, alone, steady_times, switching_times, warm_up
from diffusionblocks.bench.worker import answer, isolated, server_command
from diffusionblocks.core.model import DiffusionBlocks
from diffusionblocks.core.partition import even_layers
from diffusionblocks.experiments.experiment import Experiment

#: 8-bit AdamW compiles its step, which takes a C++ compiler and about a minute on a CPU.
EIGHT_BIT = [name for name, method in METHODS.items() if method.train.get("optimizer") == "adamw-8bit"]
ON_GPU = [f"end-to-end-{name}" for name in ("cpu-offload", "group-offloading", "ramtorch", "megatrain")]
#: It makes a process group, which its own test ends.
GROUPED = "end-to-end-fsdp-offload"
#: Options of torch.compile, which the rows of these tests do without (`test_compilation.py` runs them).
COMPILED = [name for name, method in METHODS.items() if "activation_memory_budget" in method.train]
ON_CPU = [name for name in METHODS if name not in (*EIGHT_BIT, *ON_GPU, *COMPILED, GROUPED)]
MODEL_NAMES = ("dit-l-2", "vit-h")


def spec(model: str = "dit-l-2", method: str = "end-to-end", blocks: int = 1, **changes: Any) -> Spec:
    values: dict[str, Any] = {"device": "cpu", "tiny": True, "compile": False, "windows": 1, "iterations": 1}
    return Spec(model, method, blocks, **(values | changes))


def blocks_of(method: str) -> int:
    return 2 if METHODS[method].kind in ("short", "blocks") else 1


# ---- rows --------------------------------------------------------------------------------------------------


def test_every_method_has_its_rows_for_every_number_of_blocks() -> None:
    rows = rows_of(["dit-l-2", "vit-h"], [2, 3], list(METHODS), spec(compile=True))
    for model in MODEL_NAMES:
        for method in METHODS:
            found = [row.blocks for row in rows if row.model == model and row.method == method]
            assert found == ([2, 3] if blocks_of(method) == 2 else [1])
    assert len({row.key for row in rows}) == len(rows)
    eager = rows_of(["dit-l-2"], [2], list(METHODS), spec())
    assert {row.method for row in eager} == METHODS.keys() - set(COMPILED)


def test_a_specification_survives_json() -> None:
    given = spec(method="resident-active", blocks=3, switching_steps=(1, 7), budget=5)
    assert Spec.from_dict(json.loads(json.dumps(given.to_dict()))) == given


def test_shards_share_all_rows() -> None:
    rows = rows_of(["dit-l-2"], [2, 3], list(METHODS), spec())
    parts = [shard(rows, f"{i}/3") for i in range(3)]
    assert sorted(row.key for part in parts for row in part) == sorted(row.key for row in rows)
    for text in ("3/3", "1", "-1/2", "a/b", "0/0"):
        with pytest.raises(ValueError, match="0/2"):
            shard(rows, text)


@given(st.integers(1, 50), st.integers(1, 50))
def test_layers_are_split_evenly(layers: int, blocks: int) -> None:
    if blocks <= layers:
        parts = even_layers(layers, blocks)
        assert sum(parts) == layers
        assert len(parts) == blocks
        assert max(parts) - min(parts) <= 1


def test_unknown_names_and_too_many_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown method badma; allowed: .*end-to-end-badam"):
        rows_of(["dit-l-2"], [2], ["badma"], spec())
    with pytest.raises(ValueError, match="unknown model dit-xl"):
        recipe_of(spec("dit-xl"))
    with pytest.raises(ValueError, match="blocks = 13: dit-l-2 has 12 layers"):
        recipe_of(spec(method="resident-all", blocks=13))


# ---- models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODEL_NAMES)
@pytest.mark.parametrize("method", ["end-to-end", "end-to-end-short", "resident-all"])
def test_the_model_is_the_recipes_but_for_its_weights(model: str, method: str) -> None:
    recipe = recipe_of(spec(model, method, blocks_of(method)))
    built, reference = build(recipe, torch.device("cpu")), Experiment(recipe).build()
    shapes = [{n: (t.shape, t.dtype) for n, t in m.state_dict().items()} for m in (built, reference)]
    assert shapes[0] == shapes[1]
    assert type(built) is type(reference)
    assert [p.requires_grad for p in built.parameters()] == [p.requires_grad for p in reference.parameters()]
    for parameter in built.parameters():
        assert parameter.isfinite().all()
        assert bool(parameter.any())


@pytest.mark.parametrize("model", [*MODEL_NAMES, "llama-7b"])
def test_models_have_the_size_that_they_are_named_for(model: str) -> None:
    found = build(recipe_of(Spec(model, device="cpu")), torch.device("meta"))
    count = sum(p.numel() for p in found.parameters())
    assert count == pytest.approx({"dit-l-2": 457e6, "vit-h": 632e6, "llama-7b": 6.74e9}[model], rel=0.01)


def test_layers_that_do_not_divide_make_unequal_blocks() -> None:
    model = build(recipe_of(spec("vit-h", "resident-all", 3)), torch.device("cpu"))
    assert isinstance(model, DiffusionBlocks)
    assert model.partition.layers == (3, 3, 2)
    short = build(recipe_of(spec("vit-h", "end-to-end-short", 3)), torch.device("cpu"))
    assert len(short.get_submodule("model.vit.layers")._modules) == 3  # the largest block's


# ---- rows run ----------------------------------------------------------------------------------------------


def needs_apollo() -> None:
    if importlib.util.find_spec("apollo_torch") is None:
        pytest.skip("apollo-torch is not installed (extra: bench); it brings bitsandbytes, which is large")


@pytest.mark.each_value
@pytest.mark.parametrize("model", MODEL_NAMES)
@pytest.mark.parametrize("method", ON_CPU)
def test_every_row_runs(model: str, method: str) -> None:
    if "apollo" in method:
        needs_apollo()
    row = answer(spec(model, method, blocks_of(method)))
    assert "error" not in row
    assert sum(row["bytes"].values()) == row["peak_bytes"]
    assert all(value >= 0 for value in row["bytes"].values())
    assert row["bytes"]["gradients"] > 0
    assert row["bytes"]["activations"] > 0
    assert row["step_ms"]["min"] <= row["step_ms"]["median"] <= row["step_ms"]["max"]
    share = blocks_of(method) if METHODS[method].kind == "blocks" else 1
    assert row["epoch_samples_per_second"] == pytest.approx(row["samples_per_second"] / share)
    assert (row["host_bytes"] > 0) == method.startswith("resident-active")
    json.dumps(row)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dit-l-2", "llama-7b"])
def test_fsdp_offload_trains_the_same_model(model: str) -> None:
    """On a CPU nothing is offloaded: weights and state are counted as those of the same model, and losses are equal."""
    try:
        row = answer(spec(model, GROUPED))
        assert "error" not in row
        with runner_of(spec(model, GROUPED)) as grouped, runner_of(spec(model, "end-to-end")) as whole:
            assert isinstance(grouped, AlternativeRunner)
            assert grouped.module.activation_checkpointing
            plain_loop = Plain(spec(model))
            losses = [float(each.loss(0, 0).detach()) for each in (grouped.plain, plain_loop)]
            assert losses[0] == pytest.approx(losses[1], rel=1e-2)
            kinds = ("parameters", "buffers")
            assert {k: row["bytes"][k] for k in kinds} == {k: whole.persistent_bytes()[k] for k in kinds}
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", ON_GPU)
def test_what_streams_to_a_gpu_says_so(method: str) -> None:
    assert "does not run on device cpu" in answer(spec("llama-7b", method))["error"]


def test_host_memory_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = 2 * 6_738_415_616  # of Llama 7B, in bfloat16
    for method, copies in (("end-to-end-megatrain", 5), ("end-to-end-fsdp-offload", 4), ("end-to-end", 0)):
        assert host_bytes_of(Spec("llama-7b", method)) == copies * weights
    blocks = Spec("llama-7b", "resident-active-all-optimisations", 8)
    assert 3 * weights < host_bytes_of(blocks) < 5 * weights  # weights and 8-bit state of all, and the model
    monkeypatch.setattr(host_need, "free_host_memory", lambda: 4 * weights)
    check_host(Spec("llama-7b", "end-to-end-fsdp-offload"))
    with pytest.raises(ValueError, match=r"end-to-end-megatrain of llama-7b keeps about 62\.76 GiB in host memory, of"):
        check_host(Spec("llama-7b", "end-to-end-megatrain"))
    check_host(spec("llama-7b", "end-to-end-megatrain"))  # a CPU has one memory


def test_bytes_over_the_bus_are_those_of_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = [("Memcpy HtoD (Pinned -> Device)", 7), ("Memcpy DtoH (Device -> Pinned)", 5), ("Memcpy DtoD", 100)]
    events = [{"cat": "gpu_memcpy", "name": name, "args": {"bytes": size}} for name, size in copies]
    assert bus.bytes_over_bus([*events, {"cat": "kernel", "name": "HtoD"}, {"name": "no category"}]) == 12

    class Switching:
        device, turns, switches = torch.device("cuda"), 3, True

    def recorded(runner: Any, turns: list[int]) -> int:
        """10 bytes a step, and 1,000 a switch."""
        return 10 * len(turns) + 1000 * sum(a != b for a, b in zip([turns[-1], *turns], turns, strict=False))

    monkeypatch.setattr(bus, "_recorded", recorded)
    assert bus.bus_bytes_of_step(Switching(), 50) == 10 + 1000 / 50  # type: ignore[arg-type]
    Switching.switches = False
    monkeypatch.setattr(bus, "_recorded", lambda runner, turns: 10 * len(turns))
    assert bus.bus_bytes_of_step(Switching(), 50) == 10  # type: ignore[arg-type]
    Switching.device = torch.device("cpu")
    assert bus.bus_bytes_of_step(Switching(), 50) is None  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("method", EIGHT_BIT)
def test_rows_of_8_bits_run(method: str) -> None:
    row = answer(spec("dit-l-2", method, blocks_of(method)))
    assert "error" not in row
    full = answer(spec("dit-l-2", "end-to-end" if blocks_of(method) == 1 else "resident-active", blocks_of(method)))
    assert row["bytes"]["optimizer"] < 0.6 * full["bytes"]["optimizer"]
    # One parameter's gradient at a time.
    assert row["most_gradients_bytes"] < 0.1 * full["most_gradients_bytes"]


def test_what_is_held_is_what_the_arithmetic_says() -> None:
    with runner_of(spec(method="end-to-end")) as runner:
        warm_up(runner)
        weights = sum(4 * p.numel() for p in runner.parameters())
        steps = 4 * len(runner.parameters())  # AdamW counts the steps of each parameter
        memory = measure_memory(runner)
    assert memory.kinds["parameters"] == weights
    assert memory.kinds["optimizer"] == 2 * weights + steps
    assert memory.most_gradients == weights


def test_gradients_at_the_peak_are_read_off_the_allocators_history() -> None:
    def events(*entries: tuple[str, int, int]) -> list[dict[str, Any]]:
        return [{"action": action, "addr": addr, "size": size} for action, addr, size in entries]

    # Activations 1 and 2, the gradient of 2 at address 30, activation 2 freed, a smaller gradient, all freed.
    backward = events(
        ("alloc", 10, 4 * 2**20),
        ("segment_alloc", 0, 2**30),
        ("alloc", 20, 4 * 2**20),
        ("alloc", 30, 2**20),
        ("free_requested", 20, 4 * 2**20),
        ("free_completed", 20, 4 * 2**20),
        ("alloc", 40, 2**19),
    )
    places = {30: 2**20 - 100, 40: 2**19}
    assert at_peak(backward, places) == 2**20 - 100
    assert at_peak([*backward, *events(("alloc", 50, 8 * 2**20))], places) == 2**20 - 100 + 2**19
    # The address once held something of another size, which was no gradient.
    assert at_peak(events(("alloc", 30, 64 * 2**20), ("free_requested", 30, 64 * 2**20)), places) == 0


@pytest.mark.slow
def test_blocks_and_memory_optimisations_need_less() -> None:
    peaks = {}
    methods = ("end-to-end", "end-to-end-checkpointing", "resident-all", "resident-active", "end-to-end-short")
    for method in methods:
        peaks[method] = answer(spec(method=method, blocks=3 if blocks_of(method) == 2 else 1))["peak_bytes"]
    assert peaks["end-to-end-checkpointing"] < peaks["end-to-end"]
    assert peaks["resident-active"] < 0.5 * peaks["resident-all"]
    assert peaks["resident-active"] == pytest.approx(peaks["end-to-end-short"], rel=0.02)


@pytest.mark.slow
def test_a_bigger_batch_has_bigger_activations_and_data() -> None:
    small, large = (answer(spec(batch_size=size))["bytes"] for size in (4, 8))
    grows = {"activations", "data"}
    assert {k: v for k, v in small.items() if k not in grows} == {k: v for k, v in large.items() if k not in grows}
    assert large["data"] == 2 * small["data"]
    assert large["activations"] > 1.5 * small["activations"]


@pytest.mark.slow
@pytest.mark.parametrize("fork", [True, False])
def test_measurements_are_processes_of_their_own(fork: bool) -> None:
    """A fork, and the fresh process that takes its place where a library has started CUDA at its import."""
    reply = isolated({"spec": spec(method="resident-active", blocks=2).to_dict(), "limit": 120.0}, fork)
    assert "error" not in reply
    assert reply["process_seconds"] > reply["seconds"]
    assert reply["method"] == "resident-active"


@pytest.mark.slow
def test_the_server_imports_nothing_that_starts_cuda() -> None:
    """torchao does, and diffusers imports it: no fork could use the GPU. The rows that need it import it themselves."""
    pytest.importorskip("torchao")
    python, dash_c, code = server_command()
    checks = (
        "from diffusionblocks.bench.worker import _preload; _preload();"
        "assert 'diffusers' in sys.modules and 'torchao' not in sys.modules;"
        "import torchao; assert torchao.__version__"
    )
    code = code.replace("serve()", checks)
    subprocess.run([python, dash_c, code], check=True, capture_output=True)


@pytest.mark.slow
def test_a_measurement_that_takes_too_long_is_ended() -> None:
    started = time.perf_counter()
    reply = isolated({"spec": spec(windows=10**6).to_dict(), "limit": 1.5}, True)
    assert reply == {"error": "timed out after 1.5 s"}
    assert time.perf_counter() - started < 30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("row", {}),
        ("overhead", {}),
        ("fits", {"budget": 2**30}),
        ("switching", {"method": "resident-active", "blocks": 2, "switching_steps": (1,)}),
    ],
)
def test_benches_of_one_gpu_take_turns(
    task: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOCK, str(tmp_path / "lock"))
    rows: list[dict[str, Any]] = []
    other = threading.Thread(target=lambda: rows.append(answer(spec(task=task, **changes))))
    with alone():
        other.start()
        other.join(timeout=3)
        assert other.is_alive()
    other.join(timeout=60)
    assert "error" not in rows[0]


# ---- alternatives ------------------------------------------------------------------------------------------------


def moved_by(runner: Runner, turn: int, module: torch.nn.Module) -> set[str]:
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    runner.step(turn)
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("model", MODEL_NAMES)
def test_badam_moves_one_layer_at_a_time_and_all_in_the_end(model: str) -> None:
    runner = BAdamRunner(spec(model, "end-to-end-badam"))
    names = [name for name, _ in runner.module.named_parameters()]
    layers = {"dit-l-2": "network.layers.", "vit-h": "model.vit.layers."}[model]
    assert {p.dtype for p in runner.parameters()} == {torch.bfloat16}
    depth = runner.turns - 1
    assert depth == MODELS[model].tiny_layers
    seen: set[str] = set()
    for turn in range(runner.turns):
        trained = {name for name, p in runner.module.named_parameters() if p.requires_grad} if turn == 0 else None
        moved = moved_by(runner, turn, runner.module)
        wanted = f"{layers}{turn}."
        assert moved
        if turn < depth:
            assert all(name.startswith(wanted) for name in moved)
            assert trained is None or trained == {name for name in names if name.startswith(wanted)}
        else:
            assert not any(name.startswith(layers) for name in moved)
        seen |= {name for name, p in runner.module.named_parameters() if p.requires_grad}
    assert seen == set(names)


def test_badam_keeps_a_float32_copy_and_moments_of_one_layer() -> None:
    runner = BAdamRunner(spec(method="end-to-end-badam"))
    runner.step(1)
    own = [p for p in runner.parameters() if p.requires_grad]
    numbers, steps = sum(p.numel() for p in own), len(own)
    assert runner.persistent_bytes()["optimizer"] == 3 * 4 * numbers + 4 * steps
    assert runner.persistent_bytes()["parameters"] == sum(2 * p.numel() for p in runner.parameters())


@pytest.mark.parametrize("model", MODEL_NAMES)
def test_apollo_mini_keeps_little_for_the_layers_matrices(model: str) -> None:
    needs_apollo()
    runner: Any = alternative_runner(spec(model, "end-to-end-apollo-mini"))
    runner.step(0)
    rest, low_rank = runner.optimizer.param_groups
    assert (low_rank["rank"], low_rank["scale"], low_rank["scale_type"]) == (1, 128, "tensor")
    matrices = MODELS[model].tiny_layers * {"dit-l-2": 5, "vit-h": 6}[model]
    assert len(low_rank["params"]) == matrices
    assert len(rest["params"]) + matrices == len(runner.parameters())
    full = 2 * bytes_of(rest["params"])
    # Two moments and a projection of one row or column a matrix.
    assert full < runner.persistent_bytes()["optimizer"] < full + 0.2 * bytes_of(low_rank["params"])
    assert moved_by(runner, 0, runner.module) == {name for name, _ in runner.module.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["end-to-end-badam", "end-to-end-apollo-mini"])
def test_alternatives_learn(method: str) -> None:
    if "apollo" in method:
        needs_apollo()
    runner = alternative_runner(spec(method=method))
    assert isinstance(runner, AlternativeRunner)

    def loss() -> float:
        runner.plain.generator.manual_seed(0)
        with torch.no_grad():
            return sum(runner.plain.loss(0, step).item() for step in range(4))

    before = loss()
    for turn in range(runner.turns):
        for _ in range(30 // runner.turns + 1):
            runner.step(turn)
    assert loss() < before


@pytest.mark.parametrize(
    ("method", "module"),
    [("end-to-end-badam", "badam"), ("end-to-end-apollo-mini", "apollo_torch")],
)
def test_a_missing_package_is_named(method: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, module, None)  # as Python marks what cannot be imported
    row = answer(spec(method=method))
    assert set(row) == {"error"}
    assert f"{module} is missing" in row["error"]
    assert "diffusionblocks[bench]" in row["error"]


def test_offload_to_the_cpu_needs_a_gpu() -> None:
    assert "from a GPU" in answer(spec(method="end-to-end-cpu-offload"))["error"]


def test_out_of_memory_is_an_answer() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, hard))
    try:
        row = answer(spec(batch_size=10**7))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert row["error"] == "out of memory"
    assert "allocate" in row["detail"]


def test_tensors_made_of_others_are_counted_as_those() -> None:
    from torchao.optim.subclass_8bit import OptimState8bit

    state = OptimState8bit.zeros((256, 4))
    parts = list(plain(state))
    assert all(type(part) is torch.Tensor for part in parts)
    assert 1024 <= bytes_of([state]) < 4096
    assert bytes_of([parts[0], parts[0]]) == parts[0].numel() * parts[0].element_size()


# ---- time --------------------------------------------------------------------------------------------------


class Recorder(Runner):
    """Notes its steps."""

    def __init__(self, turns: int, switches: bool) -> None:
        self.turns, self.switches, self.device = turns, switches, torch.device("cpu")
        self.steps: list[tuple[int, int | None]] = []

    def step(self, turn: int, following: int | None = None) -> None:
        self.steps.append((turn, following))

    def parameters(self) -> list[torch.nn.Parameter]:
        return []

    def persistent_bytes(self) -> dict[str, int]:
        return {}

    def check(self) -> None: ...


def test_steady_windows_do_not_time_switches_and_switching_ones_do() -> None:
    runner = Recorder(2, switches=True)
    steady_times(runner, windows=1, iterations=3)
    assert [turn for turn, _ in runner.steps] == [0] * 4 + [1] * 4  # the first of each brings it in
    free = Recorder(2, switches=False)
    steady_times(free, windows=2, iterations=2)
    assert [turn for turn, _ in free.steps] == [0, 1] * 4
    runner.steps.clear()
    switching_times(runner, windows=1, steps_per_switch=5)
    assert runner.steps == ([(0, 1)] * 5 + [(1, 0)] * 5) * 2


def test_blocks_take_turns_in_the_trainer() -> None:
    with runner_of(spec(method="resident-active", blocks=3)) as runner:
        assert isinstance(runner, TrainerRunner)
        warm_up(runner)
        measure_memory(runner)
        counts = {name: owned.steps for name, owned in runner.trainer.sets.items()}
    assert len(set(counts.values())) == 1
    assert min(counts.values()) >= 4


@pytest.mark.slow
def test_overhead_compares_two_loops() -> None:
    row = answer(spec(method="resident-all", blocks=2, task="overhead", iterations=2))
    assert "error" not in row
    assert row["trainer_ms"]["median"] > 0
    assert row["trainer_over_bare"] == pytest.approx(row["trainer_ms"]["median"] / row["bare_ms"]["median"], rel=1e-6)


def test_of_captured_steps_only_the_time_is_told() -> None:
    row = answer(spec(cuda_graph=True))  # where there is no GPU nothing is captured
    assert "peak_bytes" not in row
    assert row["step_ms"]["median"] > 0
    assert spec(cuda_graph=True).key != spec().key


@pytest.mark.slow
@pytest.mark.parametrize("method", ["resident-active", "end-to-end", "end-to-end-all-optimisations"])
def test_captured_steps_are_timed_beside_the_others(method: str) -> None:
    if "all-optimisations" in method:
        pytest.importorskip("torchao")
    blocks = 2 if method.startswith("resident") else 1
    row = answer(spec(method=method, blocks=blocks, captured=True, compile=False))
    assert row["peak_bytes"] > 0
    assert row["step_ms"]["median"] > 0
    assert row["captured_ms"]["median"] > 0


def test_a_row_outlives_its_captured_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Spec) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr("diffusionblocks.bench.measurements._captured_times", fails)
    row = answer(spec(captured=True, compile=False))
    assert row["peak_bytes"] > 0
    assert "error" not in row
    assert summary(row).endswith("captured: RuntimeError: operation not permitted when stream is capturing")
    assert "failed" in memory_table([row | {"key": "x"}])


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["host", "disk"])
def test_steps_per_switch_are_timed(offload: str) -> None:
    row = answer(spec(method="resident-active", blocks=2, task="switching", switching_steps=(1, 3), offload=offload))
    assert "error" not in row
    assert [entry["steps_per_switch"] for entry in row["switching"]] == [1, 3]
    assert all(entry["ratio"] > 0 and entry["steady_ms"]["median"] > 0 for entry in row["switching"])


def test_ratios_are_of_equal_epochs() -> None:
    common = {"model": "m", "task": "row"}
    times = {"median": 30.0}
    rows = [
        common | {"method": "end-to-end", "blocks": 1, "step_ms": {"median": 100.0}},
        common | {"method": "resident-all", "blocks": 3, "step_ms": times},
        common
        | {
            "method": "resident-active",
            "blocks": 3,
            "task": "switching",
            "offload": "host",
            "step_ms": {"median": 32.0},
        }
        | {"switching": [{"steps_per_switch": 10, "step_ms": {"median": 48.0}}]},
        common | {"method": "end-to-end-badam", "blocks": 1, "error": "x"},
    ]
    found = {(r["what"]): r["ratio"] for r in ratios_of(rows)}
    assert found == {
        "blocks over end to end": pytest.approx(0.9),
        "resident-active, 10 steps per switch, host, over no switch": pytest.approx(1.5),
        "resident-active, 10 steps per switch, host, over resident all": pytest.approx(1.6),
    }


# ---- depth -------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 2000),
    st.integers(1, 60),
    st.integers(1, 5000),
    st.sampled_from([1, 4]),
    st.none() | st.integers(-9, 9999),
)
def test_the_deepest_model_is_found(fixed: int, slope: int, budget: int, stride: int, guess: int | None) -> None:
    def fits(depth: int) -> dict[str, Any]:
        peak = fixed + slope * depth
        return {"depth": depth, "fits": peak <= budget} | ({"peak_bytes": peak} if peak <= budget else {})

    found, trials = largest_depth(fits, stride, budget, guess)
    best = max(0, (budget - fixed) // slope if budget >= fixed else 0)
    assert found == min(best, 4096) // stride * stride
    assert len({trial["depth"] for trial in trials}) == len(trials)
    if guess is None and found >= 4 * stride:
        assert len(trials) <= 5  # two that fit, and the line through them


def test_a_good_guess_takes_few_trials() -> None:
    def fits(depth: int) -> dict[str, Any]:
        return {"depth": depth, "fits": depth <= 103, "peak_bytes": 10 * depth}

    found, trials = largest_depth(fits, 4, 1030, guess=102)
    assert found == 100
    assert trials[0]["depth"] == 100
    assert len(trials) <= 4


def test_peaks_that_are_known_save_trials() -> None:
    def fits(depth: int) -> dict[str, Any]:
        return {"depth": depth, "fits": depth <= 103, "peak_bytes": 7 + 10 * depth}

    first, trials = largest_depth(fits, 4, 1037, guess=92, slope=10.0)
    assert (first, [trial["depth"] for trial in trials]) == (100, [92, 100])
    second, trials = largest_depth(fits, 4, 1037, peaks=[(8, 87), (20, 207)])
    assert (second, [trial["depth"] for trial in trials]) == (100, [100])
    assert largest_depth(fits, 4, 1037, guess=92, slope=10.0, deepest=41)[0] == 40
    near, trials = largest_depth(fits, 1, 1046, peaks=[(8, 87), (20, 207)])  # the next is too near: it is tried
    assert (near, [trial["depth"] for trial in trials]) == (103, [103, 104])


def test_a_model_that_is_too_big_for_the_budget_does_not_fit() -> None:
    fitting, failing = (answer(spec(task="fits", budget=size)) for size in (2**30, 2**20))
    assert (fitting["fits"], failing["fits"]) == (True, False)
    assert fitting["peak_bytes"] == failing["peak_bytes"]


# ---- what older versions wrote -------------------------------------------------------------------------------


def test_rows_of_older_versions_are_read_under_todays_names(tmp_path: Path) -> None:
    spec_then = {"model": "dit-l-2", "method": "end-to-end-all-savers", "blocks": 1, "task": "dwell"}
    spec_then |= {"dwell": 10, "dwells": [1, 10], "offload": "host", "budget": None}
    row = {"key": "dit-l-2 end-to-end-all-savers blocks=1 task=dwell", "method": "end-to-end-all-savers"}
    row |= {"task": "dwell", "dwell": 10, "dwells": [{"dwell": 10, "step_ms": {"median": 1.0}}], "spec": spec_then}
    now = in_current_terms(row)
    assert now["key"] == Spec.from_dict(spec_then).key == "dit-l-2 end-to-end-all-optimisations blocks=1 task=switching"
    assert (now["method"], now["task"], now["steps_per_switch"]) == ("end-to-end-all-optimisations", "switching", 10)
    assert now["switching"] == [{"steps_per_switch": 10, "step_ms": {"median": 1.0}}]
    assert Spec.from_dict(now["spec"]).switching_steps == (1, 10)
    assert in_current_terms(now) == now
    (tmp_path / "old.json").write_text(json.dumps({"rows": [row]}))
    assert list(rows_in(tmp_path / "old.json").values()) == [now]


def test_the_tables_of_the_project_are_read() -> None:
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "memory.json"
    rows = rows_in(file)
    assert len(rows) > 50
    for row in rows.values():
        assert row["method"] in METHODS
        assert Spec.from_dict(row["spec"]).method == row["method"]
    assert "resident-active-all-optimisations" in memory_table(list(rows.values()))


# ---- tables and figures ------------------------------------------------------------------------------------


def test_gather_takes_the_row_without_an_error(tmp_path: Path) -> None:
    about = {"device": "A", "torch": "2", "commit": "c"}
    first = [
        {"key": "b", "model": "m", "method": "resident-all", "blocks": 2, "error": "x"},
        {"key": "a", "model": "m", "method": "end-to-end", "blocks": 1, "peak_bytes": 5},
    ]
    second = [{"key": "b", "model": "m", "method": "resident-all", "blocks": 2, "peak_bytes": 3}]
    parts = []
    for name, rows in (("1", first), ("2", second)):
        parts.append(tmp_path / f"{name}.json")
        parts[-1].write_text(json.dumps(about | {"command": name, "rows": rows}))
    found = gather(parts, tmp_path / "all.json")
    assert [(row["key"], row.get("peak_bytes")) for row in found] == [("a", 5), ("b", 3)]
    written = json.loads((tmp_path / "all.json").read_text())
    assert (written["command"], written["rows"]) == ("1 && 2", found)


@pytest.mark.slow
def test_the_figure_shows_rows_and_errors(tmp_path: Path) -> None:
    row = answer(spec())
    failed = {"model": "dit-l-2", "method": "end-to-end-badam", "blocks": 1, "error": "out of memory"}
    draw_memory([row, row | {"predicted_bytes": 10**6}, failed], tmp_path / "figure.png")
    content = (tmp_path / "figure.png").read_bytes()
    assert content[:4] == b"\x89PNG"
    assert len(content) < 100_000


def test_the_figure_of_depths_leaves_out_errors(tmp_path: Path) -> None:
    row = {"model": "dit-l-2", "method": "end-to-end", "blocks": 1, "budget_bytes": 2**33, "layers": 7}
    failed = {"model": "llama-7b", "method": "end-to-end", "blocks": 1, "budget_bytes": 2**33, "error": "x"}
    draw_depth([row, row | {"budget_bytes": 2**34, "layers": 15}, failed], tmp_path / "depth.png")
    assert (tmp_path / "depth.png").read_bytes()[:4] == b"\x89PNG"


def test_texts_are_of_the_models_length() -> None:
    recipe = recipe_of(Spec("llama-7b", batch_size=2))
    data = splits_of(recipe)["train"]
    assert (data.length, data.num_classes, len(data)) == (1024, 32_000, 5)  # type: ignore[attr-defined]
    assert recipe.train.weights == "bfloat16"


def test_the_data_fit_the_recipe() -> None:
    for model in MODEL_NAMES:
        recipe = recipe_of(dataclasses.replace(spec(model), tiny=False, batch_size=2))
        data = splits_of(recipe)["train"]
        assert len(data) == 4
        assert data.image_shape == {"dit-l-2": (4, 32, 32), "vit-h": (3, 224, 224)}[model]
        assert data.num_classes == 1000


def test_a_stack_of_two_kinds_of_layers_takes_what_is_predicted() -> None:
    """Flux's, at toy size: the first block has a layer of two streams and one that both share."""
    of_blocks = spec("flux", "resident-active-checkpointing", 3, batch_size=1)
    recipe = recipe_of(of_blocks)
    assert [recipe.model.config[name] for name in ("num_layers", "num_single_layers")] == [2, 4]
    data = splits_of(recipe)["train"]
    assert {name: tuple(value.shape) for name, value in data.empty.items()} == {  # type: ignore[attr-defined]
        "encoder_hidden_states": (512, 16),
        "pooled_projections": (16,),
    }
    predicted = prediction(of_blocks)["predicted"]
    with runner_of(of_blocks) as runner:
        runner.step(0)
        runner.check()
        persistent = runner.persistent_bytes()
    assert {name: predicted[name] for name in persistent} == persistent
