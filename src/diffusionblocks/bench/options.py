"""The command line of the benchmarks: diffusionblocks bench memory | speed | depth | gather."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .methods import METHODS, Spec, check_names, current_name, rows_of

_MODELS = ["dit-l-2", "vit-h"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the commands and options of `bench`."""
    kinds = parser.add_subparsers(required=True, metavar="memory | speed | depth | gather")

    memory = _measuring(kinds, "memory", _memory, "peak memory by kind and speed, of every method")
    _models(memory)
    memory.add_argument(
        "--methods",
        nargs="+",
        type=current_name,
        default=list(METHODS),
        metavar="METHOD",
        help=", ".join(METHODS),
    )
    memory.add_argument("--figure", type=Path, help="draw the memory of the rows to this PNG")
    memory.add_argument("--shard", default="0/1", metavar="I/N", help="only rows I, I + N, ...: several GPUs share")
    memory.add_argument("--captured", action="store_true", help="time captured steps (CUDA graphs) as well")
    _predict(memory, "the planner's figures beside the rows, at the end; it takes about ten seconds a row, and no GPU")
    _windows(memory)

    speed = _measuring(kinds, "speed", _speed, "a step of blocks, of switching and of the trainer, in device time")
    _models(speed)
    speed.add_argument(
        "--offload", nargs="+", choices=("host", "disk"), default=["host"], help="where the other blocks wait"
    )
    speed.add_argument(
        "--methods",
        nargs="+",
        type=current_name,
        default=["resident-active"],
        choices=[name for name, method in METHODS.items() if method.train.get("resident") == "active"],
        help="whose switches are timed (default resident-active)",
    )
    speed.add_argument("--cuda-graph", action="store_true", help="capture steps, but not those of the bare loop")
    speed.add_argument(
        "--switching-steps",
        "--dwells",
        type=int,
        nargs="+",
        default=[1, 10, 50],
        metavar="N",
        help="steps per switch that are timed (default 1 10 50); --dwells is its former name",
    )
    speed.add_argument("--shard", default="0/1", metavar="I/N", help="only rows I, I + N, ...: several GPUs share")
    _windows(speed)

    depth = _measuring(kinds, "depth", _depth, "the deepest models that train within budgets of memory")
    depth.add_argument(
        "--models",
        "--model",
        nargs="+",
        default=["dit-l-2"],
        metavar="MODEL",
        help="the models whose layers are counted (default dit-l-2)",
    )
    depth.add_argument(
        "--budget",
        nargs="+",
        required=True,
        metavar="BYTES",
        help="of the allocator, for example 8GiB 16GiB (CUDA's context is extra)",
    )
    depth.add_argument("--blocks", type=int, default=4, metavar="B", help="number of blocks (default 4)")
    depth.add_argument(
        "--methods",
        nargs="+",
        type=current_name,
        default=["end-to-end-all-optimisations", "resident-active-all-optimisations"],
        metavar="METHOD",
        help="of `bench memory` (default: all memory optimisations, end to end and with the active block resident)",
    )
    depth.add_argument(
        "--host-memory", metavar="BYTES", help="what waiting blocks may take (default: what is free on this host)"
    )
    depth.add_argument("--figure", type=Path, help="draw depth by budget to this PNG")

    _predict(
        depth,
        "begin each search where the planner says that the end is (takes no GPU; without, one or two more trials, and "
        "host memory is not looked at)",
    )

    gather = kinds.add_parser("gather", help="join the files of shards", description="join the files of shards")
    gather.set_defaults(run=_gather)
    gather.add_argument("parts", type=Path, nargs="+", help="JSON files of `bench memory`")
    gather.add_argument("--out", type=Path, required=True, help="the joined file")
    gather.add_argument("--predict", action="store_true", help="put the planner's figures beside the rows (again)")
    gather.add_argument("--figure", type=Path, help="draw the memory of the rows to this PNG")


def _measuring(kinds: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = kinds.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    command.add_argument("--out", type=Path, required=True, help="JSON file; rows that it has already are kept")
    command.add_argument("--batch-size", type=int, help="instead of the model's own")
    command.add_argument("--limit", type=float, default=180.0, metavar="SECONDS", help="of a row (default 180)")
    command.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu goes with --tiny, to try it out"
    )
    command.add_argument("--tiny", action="store_true", help="models of toy size")
    command.add_argument(
        "--lock",
        type=Path,
        metavar="FILE",
        help="benches of one GPU that name the same file take turns on it: each prepares while another measures",
    )
    # Every depth is a graph of its own, which takes longer to compile than to try.
    compile_it = name != "depth"
    text = f"torch.compile (default: {'yes' if compile_it else 'no'})"
    command.add_argument("--compile", action=argparse.BooleanOptionalAction, default=compile_it, help=text)
    return command


def _models(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--models", nargs="+", default=_MODELS, help="dit-l-2, vit-h, dit-s-2, llama-7b (default: the first two)"
    )
    command.add_argument("--blocks", type=int, nargs="+", default=[2, 3, 4, 6], metavar="B", help="numbers of blocks")


def _predict(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument("--predict", action=argparse.BooleanOptionalAction, default=True, help=text)


def _windows(command: argparse.ArgumentParser) -> None:
    command.add_argument("--windows", type=int, default=5, help="timed windows, of which the median counts (default 5)")
    command.add_argument("--iterations", type=int, default=5, help="steps of each block in a window (default 5)")
    command.add_argument(
        "--steps-per-switch",
        "--dwell",
        type=int,
        default=10,
        metavar="N",
        help="steps over which a row spreads a switch of blocks (default 10); --dwell is its former name",
    )


def _base(options: argparse.Namespace, models: list[str], blocks: list[int]) -> Spec:
    """What all specifications of a command have in common, checked before anything is measured."""
    import dataclasses

    from .bench_models import MODELS, recipe_of
    from .rows import check_device

    check_names("model", models, list(MODELS))
    for name in ("windows", "iterations", "steps_per_switch", "batch_size"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not options.limit > 0:
        raise ValueError(f"--limit must be above 0 seconds, got {options.limit}")
    if min(blocks) < 2:
        raise ValueError(f"--blocks must be at least 2, got {min(blocks)}: one block is the row end-to-end")
    names = (
        "batch_size",
        "device",
        "tiny",
        "compile",
        "cuda_graph",
        "captured",
        "windows",
        "iterations",
        "steps_per_switch",
    )
    base = Spec(models[0], **{name: getattr(options, name) for name in names if hasattr(options, name)})
    for model in models:
        for count in blocks:
            if options.run is not _depth:  # whose models are as deep as it takes
                recipe_of(dataclasses.replace(base, model=model, method="resident-all", blocks=count))
    check_device(options.device)
    return base


def _memory(options: argparse.Namespace) -> None:
    from .plots import draw_memory
    from .rows import measure_all, memory_table, shard, with_predictions, write_table
    from .server import server

    base = _base(options, options.models, options.blocks)
    specs = shard(rows_of(options.models, options.blocks, options.methods, base), options.shard)
    with server(options.lock) as measurer:
        rows = measure_all(specs, options.out, options.limit, measurer)
    if options.predict:
        rows = with_predictions(rows)
        write_table(options.out, rows)
    print(memory_table(rows))
    if options.figure:
        draw_memory(rows, options.figure)


def _speed(options: argparse.Namespace) -> None:
    import dataclasses

    from ..reports.tables import format_table
    from .rows import shard
    from .server import server
    from .speed import specs_of, speed

    base = _base(options, options.models, options.blocks)
    if min(options.switching_steps) < 1:
        raise ValueError(f"--switching-steps must be at least 1, got {min(options.switching_steps)}")
    base = dataclasses.replace(base, switching_steps=tuple(options.switching_steps))
    specs = shard(specs_of(options.models, options.blocks, options.methods, options.offload, base), options.shard)
    with server(options.lock) as measurer:
        ratios = speed(specs, options.out, options.limit, measurer)
    if ratios:
        print(format_table([row | {"ratio": f"{row['ratio']:.3f}"} for row in ratios]))


def _depth(options: argparse.Namespace) -> None:
    import dataclasses

    from ..common.machine import free_host_memory
    from ..planning import parse_budget
    from .depth import depth, depth_table
    from .plots import draw_depth
    from .server import server

    budgets = [parse_budget(text) for text in options.budget]
    host = parse_budget(options.host_memory) if options.host_memory else free_host_memory()
    check_names("method", options.methods, [name for name, m in METHODS.items() if m.kind in ("whole", "blocks")])
    base = _base(options, options.models, [options.blocks])
    bases = [dataclasses.replace(base, model=model) for model in options.models]
    # Fragments of memory would decide otherwise; the same for all.
    segments = "expandable_segments:True"
    with server(options.lock, {"PYTORCH_ALLOC_CONF": segments, "PYTORCH_CUDA_ALLOC_CONF": segments}) as measurer:
        rows = depth(
            bases,
            options.methods,
            budgets,
            options.blocks,
            options.out,
            options.limit,
            measurer,
            host=host,
            predict=options.predict,
        )
    print(depth_table(rows))
    if options.figure:
        draw_depth(rows, options.figure)


def _gather(options: argparse.Namespace) -> None:
    from .plots import draw_memory
    from .rows import gather, memory_table

    rows = gather(options.parts, options.out, predict=options.predict)
    print(memory_table(rows))
    if options.figure:
        draw_memory(rows, options.figure)
