"""Command line: diffusionblocks train | evaluate | sample | inspect | compare RECIPE [--set a.b=v]; branch, merge."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from .. import __version__
from ..bench.options import add_bench
from ..common.fields import MOST_LAYERS, MOST_LENGTH, MOST_LEVELS, MOST_SAMPLES, MOST_SEED
from ..common.files import check_writable
from ..common.messages import STATUSES, OneLineParser, one_line, reported
from ..experiments.recipe import Recipe, explain, load_recipe
from ..noise import GRIDS, PARTITION_STRATEGIES, grid_name
from ..sampling import SOLVERS

if TYPE_CHECKING:
    from ..core.model import DiffusionBlocks

#: Options of `sample` that only one kind of model has.
_SAMPLE_OPTIONS = {
    "images": ("labels", "solver", "guidance"),
    "masked text": ("infill",),
    "continued text": ("prompt", "new_tokens", "top_p", "feedback"),
    "text": ("temperature",),
}

#: Upper bounds of options; lower ones are checked where they are used, with what else goes there.
_MOST = {
    "count": MOST_SAMPLES,
    "seed": MOST_SEED,
    "steps": MOST_LEVELS,
    "new_tokens": MOST_LENGTH,
    "blocks": MOST_LAYERS,
    "examples": 10**12,
}

_EXAMPLES = """\
examples:
  diffusionblocks inspect recipes/vit/cifar100.yaml
      what each block holds: layers, noise levels, parameters, bytes; trains nothing
  diffusionblocks plan recipes/dit/imagenet-latents.yaml --budget 24GiB
      bytes of a training step by kind, predicted on any machine, and how many blocks or how large a batch fits
  diffusionblocks train recipes/vit/digits.yaml --out runs/digits
      train block by block; run it again to resume after an interruption
  diffusionblocks evaluate recipes/vit/digits.yaml --model runs/digits/model --set 'evaluate.steps=[1,2,4]'
      test accuracy for every pair of denoising steps and noise seeds
  diffusionblocks sample recipes/dit/digits.yaml --model runs/dit-digits/model --out samples --labels 3 --count 16
      images of a trained diffusion model: PNG files, a grid, a chain over its steps
  diffusionblocks sample recipes/text/masked_topics.yaml --model runs/masked-topics/model --infill 'the _____ of'
      texts of a trained text model, or the gaps of one filled in
  diffusionblocks branch runs/trunk/model --blocks 3 --out runs/branched
      copy a trained trunk (one block on all levels) into three blocks
  diffusionblocks merge runs/first runs/second --out runs/whole
      one model of blocks that were trained apart, each run with its own --set 'train.blocks=[0, 2]'
  diffusionblocks compare recipes/vit/digits.yaml --out runs/demo
      DiffusionBlocks beside its end-to-end baselines, in one table and a figure
  diffusionblocks bench memory --models dit-l-2 --blocks 3 --out memory.json --figure memory.png
      on a CUDA GPU: memory and speed beside end-to-end training and other ways to save memory

Any field of a recipe can be overridden: --set train.lr=1e-3 --set blocks.num_blocks=4 --set method=end-to-end
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status (`messages.STATUSES`).
    """
    options = _parser().parse_args(arguments)

    def run() -> None:
        _quieten_libraries()
        try:
            _check_options(options)
            if "recipe" in options:
                options.run(load_recipe(options.recipe, options.set), options)
            else:
                options.run(options)
        except ValidationError as error:
            raise ValueError(f"not allowed: {explain(error)}") from error

    return reported(run, lambda: _way_on(options))


def _quieten_libraries() -> None:
    """Errors of libraries are told as ours; their remarks and bars would stand between the lines that are."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # both are read when the library is imported
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()  # of saving a few small files; ours shows the training


def _way_on(options: argparse.Namespace) -> str:
    """How to go on with a run that was stopped: what of it is saved."""
    from ..training.checkpoint import checkpoints

    folder = getattr(options, "folder", None)
    if folder is None:
        return ""
    phases = {path.parent for path in folder.rglob("checkpoints")} if folder.is_dir() else set()
    saved = [newest for phase in sorted(phases) for newest in checkpoints(phase / "checkpoints")[-1:]]
    if not saved:
        return "nothing was saved yet; run the same command again to start"
    newest = max(saved, key=lambda path: path.stat().st_mtime)
    return f"run the same command again to resume from {newest}"


def _check_options(options: argparse.Namespace) -> None:
    """Refuse before any work numbers beyond all use, and places that nothing can be written to."""
    for name, most in _MOST.items():
        value = getattr(options, name, None)
        if isinstance(value, int) and abs(value) > most:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at most {most:,}")
    a_folder = any(name in options for name in ("recipe", "folders", "overlap"))  # of the bench it is a file
    if a_folder and getattr(options, "out", None) is not None:
        check_writable(options.out, "--out")
    for name in ("json", "figure"):
        path = getattr(options, name, None)
        if path is not None:
            if path.is_dir():
                raise ValueError(f"--{name} {path} is a folder; name a file")
            check_writable(path.parent, f"--{name}")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="diffusionblocks",
        description="Train a deep network one block at a time, as independent denoisers (arXiv 2506.14202).",
        epilog=f"{_EXAMPLES}\n{STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")

    train = _command(commands, "train", _train, "train a recipe, save the model and evaluate it")
    train.add_argument("--out", type=Path, help="folder of the run (default runs/<name>); an unfinished run resumes")
    train.add_argument("--restart", action="store_true", help="start anew, removing the checkpoints in the folder")
    train.add_argument("--tensorboard", action="store_true", help="also log to <out>/tensorboard (extra: tensorboard)")
    train.add_argument("--quiet", action="store_true", help="no progress bar")

    evaluate = _command(
        commands, "evaluate", _evaluate, "measure a trained model: accuracy, samples, or bits per character"
    )
    evaluate.add_argument("--model", type=Path, help="folder of the model (default runs/<name>/model)")
    evaluate.add_argument("--json", type=Path, help="also write the rows to this file")
    evaluate.add_argument(
        "--by-level", action="store_true", help="of a classifier, also each block's accuracy by level"
    )

    sample = _command(commands, "sample", _sample, "samples of a trained diffusion model: images or text")
    sample.add_argument("--model", type=Path, help="folder of the model (default runs/<name>/model)")
    sample.add_argument("--out", type=Path, help="folder of the files (default runs/<name>/samples)")
    sample.add_argument(
        "--count", type=int, help="number of samples (default: one for each of --labels, or what evaluate says)"
    )
    sample.add_argument("--labels", type=int, nargs="+", help="images: class labels, in turn (default: all classes)")
    sample.add_argument("--seed", type=int, help="seed of the first sample (default: evaluate.seed); the next count up")
    sample.add_argument(
        "--solver",
        choices=tuple(SOLVERS),
        help="images (default: the recipe's first; euler is the paper's)",
    )
    sample.add_argument("--steps", type=int, help="solver steps (default: the recipe's first)")
    sample.add_argument(
        "--grid",
        type=grid_name,
        choices=tuple(GRIDS),
        help="levels, those that suit the noise process: of EDM the first two (default: the recipe's)",
    )
    sample.add_argument("--guidance", type=float, help="images: classifier-free guidance (default: the recipe's first)")
    sample.add_argument("--temperature", type=float, help="text: divides the logits (default: the recipe's)")
    sample.add_argument("--prompt", action="append", metavar="TEXT", help="continued text: go on from this; repeatable")
    sample.add_argument("--new-tokens", type=int, help="continued text: how many tokens (default: the recipe's)")
    sample.add_argument("--top-p", type=float, help="continued text: draw from this share only (default: the recipe's)")
    sample.add_argument(
        "--feedback",
        "--bridge",
        choices=("soft", "hard", "sampled", "top-k"),
        help="continued text: what a prediction feeds to the next step (default: the model's)",
    )
    sample.add_argument("--infill", metavar="TEXT", help="text: fill in the gaps of this, as in 'the _____ of'")
    sample.add_argument("--quiet", action="store_true", help="no progress bar")

    inspect = _command(commands, "inspect", _inspect, "show the blocks of a recipe before any training")
    inspect.add_argument("--figure", type=Path, help="draw the noise partition to this PNG")

    plan = _command(commands, "plan", _plan, "predict the memory of a recipe's training step, and what fits a budget")
    plan.add_argument("--budget", help="device memory, as 12GiB, 16GB or 800MiB (default: only the ledger)")
    plan.add_argument("--vary", choices=("blocks", "batch"), help="fit only the number of blocks or the batch size")
    plan.add_argument(
        "--examples", type=int, metavar="N", help="count N examples of the data (default: those of local images)"
    )
    plan.add_argument("--json", type=Path, help="also write the plan to this file")

    compare = _command(commands, "compare", _compare, "train a recipe and its end-to-end baselines; table and figure")
    compare.add_argument("--out", type=Path, help="folder (default runs/<name>-compare)")
    compare.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows, for example end-to-end-4")
    compare.add_argument(
        "--equal",
        choices=["updates", "seconds"],
        default="updates",
        help="what the rows have in common: updates of layers, or seconds of training",
    )
    compare.add_argument("--quiet", action="store_true", help="no progress bar")

    text = "copy a trained trunk, a model of one block on all levels, into several blocks"
    branch = commands.add_parser("branch", help=text, description=text)
    branch.set_defaults(run=_branch)
    branch.add_argument("model", type=Path, help="folder of the trunk")
    branch.add_argument("--blocks", type=int, required=True, metavar="B", help="number of blocks")
    branch.add_argument("--out", type=Path, required=True, help="folder of the branched model")
    branch.add_argument(
        "--overlap", type=float, help="gamma: how far the blocks' training levels overlap (default 0.05)"
    )
    branch.add_argument("--partition", choices=PARTITION_STRATEGIES, help="default: the trunk's")

    text = "make one model of folders whose blocks were trained apart"
    merge = commands.add_parser("merge", help=text, description=text)
    merge.set_defaults(run=_merge)
    merge.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="saved models, or folders of runs")
    merge.add_argument("--out", type=Path, required=True, help="folder of the merged model")
    merge.add_argument(
        "--prefer",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="take this one's copy of a block that several folders hold; repeatable, the first that holds it wins",
    )
    add_bench(commands)
    return parser


def _command(commands, name, run, text):  # type: ignore[no-untyped-def]
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    command.add_argument("recipe", help="a YAML recipe, see the folder recipes/")
    command.add_argument(
        "--set", action="append", metavar="a.b=v", help="override a field of the recipe; the value is YAML; repeatable"
    )
    return command


def _train(recipe: Recipe, options: argparse.Namespace) -> None:
    from ..experiments.run import train
    from ..reports.tables import format_table
    from ..training.run_log import TensorBoard

    options.folder = folder = options.out or Path("runs") / recipe.name
    loggers = (TensorBoard(folder / "tensorboard"),) if options.tensorboard else ()
    result = train(recipe, folder, loggers=loggers, resume=not options.restart, progress=not options.quiet)
    if result.rows:
        print(format_table([_rounded(row.to_dict()) for row in result.rows]))
    if recipe.train.blocks is not None:
        print(
            f"only blocks {', '.join(map(str, recipe.train.blocks))}; join them with the others: diffusionblocks merge"
        )
    print(f"{result.iterations} iterations in {result.seconds:.1f} s; model in {folder / 'model'}")


def _evaluate(recipe: Recipe, options: argparse.Namespace) -> None:
    from ..core.model import DiffusionBlocks
    from ..experiments.recipe import AccuracyConfig
    from ..experiments.scores import check_evaluation, diagnose, evaluate
    from ..experiments.sources import load_data, load_model, with_saved_tokenizer
    from ..reports.results import write_results
    from ..reports.tables import format_table

    place = options.model or Path("runs") / recipe.name / "model"
    recipe = with_saved_tokenizer(recipe, place)
    model = load_model(recipe, place)
    if options.by_level and not isinstance(model, DiffusionBlocks):
        raise ValueError("--by-level is for method: diffusionblocks; an end-to-end model has no noise levels")
    if options.by_level and not isinstance(recipe.evaluate, AccuracyConfig):
        raise ValueError(f"--by-level is for classifiers; {recipe.model.type} generates {_made(recipe)}")
    splits = {"test": load_data(recipe, "test")}
    check_evaluation(recipe, model, splits)
    rows = [row.to_dict() for row in evaluate(recipe, model, splits)]
    print(format_table([_rounded(row) for row in rows]))
    for row in rows:
        if row.get("by_level"):
            print(format_table([_rounded(level) for level in row["by_level"]]))
    more = {}
    if isinstance(model, DiffusionBlocks) and options.by_level:
        more["by_level"] = [row.to_dict() for row in diagnose(recipe, model, splits)]
        print(format_table(more["by_level"]))
    if options.json:
        write_results(options.json, rows, **more)


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    def shown(value: Any) -> Any:
        if isinstance(value, tuple):
            return " ".join(map(str, map(shown, value)))
        if isinstance(value, dict):
            return ", ".join(f"{name} {shown(part)}" for name, part in value.items())
        return f"{value:.4g}" if isinstance(value, float) else value

    return {name: shown(value) for name, value in row.items() if name != "by_level"}  # that is a table of its own


def _made(recipe: Recipe) -> str:
    from ..experiments.recipe import BitsConfig, LanguageConfig

    kinds = {BitsConfig: "masked text", LanguageConfig: "continued text"}
    return kinds.get(type(recipe.evaluate), "images")


def _sample(recipe: Recipe, options: argparse.Namespace) -> None:
    from ..core.model import DiffusionBlocks
    from ..experiments.recipe import AccuracyConfig
    from ..experiments.sources import load_model, with_saved_tokenizer

    if isinstance(recipe.evaluate, AccuracyConfig):
        raise ValueError(f"sample is for diffusion models; {recipe.model.type} classifies images: use evaluate")
    made = _made(recipe)
    allowed = {*_SAMPLE_OPTIONS[made], *(_SAMPLE_OPTIONS["text"] if made != "images" else ())}
    for name in {name for names in _SAMPLE_OPTIONS.values() for name in names} - allowed:
        if getattr(options, name) is not None:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is not for {recipe.model.type}, which generates {made}; leave it out")
    place = options.model or Path("runs") / recipe.name / "model"
    recipe = with_saved_tokenizer(recipe, place)
    model = load_model(recipe, place)
    folder = options.out or Path("runs") / recipe.name / "samples"
    if made == "continued text":
        _continue_text(recipe, model, folder, options)
        return
    assert isinstance(model, DiffusionBlocks)
    (_sample_text if made == "masked text" else _sample_images)(recipe, model, folder, options)


def _continue_text(recipe: Recipe, model: Any, folder: Path, options: argparse.Namespace) -> None:
    from ..data import TextChunks
    from ..experiments.language import write_continuations
    from ..experiments.sources import load_data

    data = None if options.prompt else load_data(recipe, "test")
    assert data is None or isinstance(data, TextChunks)
    names = ("count", "seed", "steps", "grid", "temperature", "new_tokens", "top_p", "feedback")
    given = {name: getattr(options, name) for name in names}
    path = write_continuations(
        recipe, model, folder, prompts=options.prompt, data=data, progress=not options.quiet, **given
    )
    print(path.read_text(encoding="utf-8"), end="")
    print(path)


def _sample_text(recipe: Recipe, model: DiffusionBlocks, folder: Path, options: argparse.Namespace) -> None:
    from ..experiments.texts import write_texts

    names = ("count", "seed", "steps", "grid", "temperature", "infill")
    given = {name: getattr(options, name) for name in names}
    path = write_texts(recipe, model, folder, **given, progress=not options.quiet)
    print(path.read_text(), end="")
    print(path)


def _sample_images(recipe: Recipe, model: DiffusionBlocks, folder: Path, options: argparse.Namespace) -> None:
    import dataclasses

    from ..experiments.recipe import SamplesConfig
    from ..experiments.samples import draw_samples
    from ..experiments.scores import settings_of

    assert isinstance(recipe.evaluate, SamplesConfig)
    given = {name: getattr(options, name) for name in ("solver", "steps", "grid", "guidance")}
    setting = dataclasses.replace(
        settings_of(recipe.evaluate)[0], **{name: value for name, value in given.items() if value is not None}
    )
    written = draw_samples(
        recipe,
        model,
        folder,
        count=options.count,
        labels=options.labels,
        setting=setting,
        seed=options.seed,
        files=True,
        progress=not options.quiet,
    )
    for path in written:
        print(path)


def _branch(options: argparse.Namespace) -> None:
    from ..common.tokenizer_file import tokenizer_in
    from ..core.branching import branch
    from ..core.loading import load
    from ..core.saving import check_out, save
    from ..reports.tables import block_table, format_table

    given = {name: getattr(options, name) for name in ("overlap", "partition")}
    check_out(options.out, [options.model], "branched")
    trunk = load(options.model)
    model = branch(trunk, options.blocks, **{name: value for name, value in given.items() if value is not None})
    tokenizer = tokenizer_in(options.model)
    save(model, options.out, tokenizer=None if tokenizer is None else tokenizer.read_bytes())
    print(format_table(block_table(model)))
    print(f"{options.blocks} blocks of {trunk.partition.num_layers} layers in {options.out}")


def _merge(options: argparse.Namespace) -> None:
    from ..core.merging import merge
    from ..experiments.run import trained_differently
    from ..reports.tables import format_bytes, format_table

    origins = merge(options.folders, options.out, options.prefer)
    for line in trained_differently(options.folders):
        print(one_line(f"warning: {line}"), file=sys.stderr)
    rows = [
        {
            "block": origin.block,
            "layers": f"{origin.layers[0]}-{origin.layers[-1]}",
            "taken from": origin.folder,
            "size": format_bytes(origin.size),
            "passed over": ", ".join(map(str, origin.passed_over)) or None,
        }
        for origin in origins
    ]
    print(format_table(rows))
    print(f"{len(origins)} blocks in {options.out}")


def _inspect(recipe: Recipe, options: argparse.Namespace) -> None:
    from ..core.materialise import empty
    from ..experiments.sources import weight_source
    from ..reports.figures import draw_partition
    from ..reports.tables import block_table, format_table, partition_sketch

    source = weight_source(recipe)
    model = empty(source, recipe.blocks)
    total = sum(p.numel() for p in source.outline().parameters())
    print(f"{recipe.name}: {recipe.model.type}, {model.partition.num_layers} layers, {total:,} parameters")
    print(f"blocks: {json.dumps(model.blocks_config.model_dump(mode='json', exclude={'noise'}))}")
    print(format_table(block_table(model)))
    print("bytes: AdamW in the weights' precision, of one block and its shared parameters, without activations")
    print(partition_sketch(model.partition, model.noise))
    print(f"{model.noise.symbol} is read, and told, from {model.noise.read_min:.4g} to {model.noise.read_max:.4g}")
    if options.figure:
        draw_partition(model.partition, model.noise, options.figure)
        print(f"partition drawn to {options.figure}")


def _plan(recipe: Recipe, options: argparse.Namespace) -> None:
    from ..planning import Predictor, parse_budget, plan_with
    from ..planning.report import describe, ledger_table, remarks
    from ..reports.results import write_results

    predictor, plan = Predictor(recipe, options.examples), None
    if options.budget is not None:
        plan = plan_with(predictor, parse_budget(options.budget), vary=options.vary)
    elif options.vary:
        raise ValueError(f"--vary {options.vary} needs a budget to fit: give --budget, as 12GiB")
    ledger = plan.ledger if plan else predictor.forecast().ledger
    notes = remarks(predictor, plan)
    print(ledger_table(recipe, ledger))
    for line in notes:
        print(line)
    if plan:
        print(describe(plan, options.vary))
    if options.json:
        write_results(options.json, [ledger.to_dict()], remarks=notes, **({"plan": plan.to_dict()} if plan else {}))


def _compare(recipe: Recipe, options: argparse.Namespace) -> None:
    from ..experiments.compare import compare

    options.folder = folder = options.out or Path("runs") / f"{recipe.name}-compare"
    print(compare(recipe, folder, rows=options.rows, equal=options.equal, progress=not options.quiet))
    print(f"table: {folder / 'table.json'}")
    drawn = [path for name in ("samples/grid.png", "levels.png") for path in sorted(folder.glob(f"*/{name}"))]
    for figure in [folder / "figure.png", *drawn]:
        if figure.is_file():
            print(f"figure: {figure}")


if __name__ == "__main__":
    sys.exit(main())
