"""Command line: diffusionblocks train | evaluate | inspect | compare RECIPE [--set a.b=v ...]."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .recipes import Recipe, load_recipe

_EXAMPLES = """\
examples:
  diffusionblocks inspect recipes/vit/cifar100.yaml
      what each block holds: layers, noise levels, parameters, bytes; trains nothing
  diffusionblocks train recipes/vit/digits.yaml --out runs/digits
      train block by block; run it again to resume after an interruption
  diffusionblocks evaluate recipes/vit/digits.yaml --model runs/digits/model --set 'evaluate.steps=[1,2,4]'
      test accuracy for every pair of denoising steps and noise seeds
  diffusionblocks compare recipes/vit/digits.yaml --out runs/demo
      DiffusionBlocks beside its end-to-end controls, in one table and a figure

Any field of a recipe can be overridden: --set train.lr=1e-3 --set blocks.num_blocks=4 --set method=end-to-end
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 on success; 2 for bad input; 3 when training diverged; 128 + signal when it was interrupted and saved.
    """
    options = _parser().parse_args(arguments)
    from transformers.utils.logging import disable_progress_bar

    from .training import Diverged, Interrupted

    disable_progress_bar()  # of saving a few small files; ours shows the training
    try:
        recipe = load_recipe(options.recipe, options.set)
        options.run(recipe, options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except Interrupted as error:
        print(str(error), file=sys.stderr)
        return 128 + error.signum
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffusionblocks",
        description="Train a deep network one block at a time, as independent denoisers (arXiv 2506.14202).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")

    train = _command(commands, "train", _train, "train a recipe, save the model and evaluate it")
    train.add_argument("--out", type=Path, help="folder of the run (default runs/<name>); an unfinished run resumes")
    train.add_argument("--restart", action="store_true", help="start anew, removing the checkpoints in the folder")
    train.add_argument("--tensorboard", action="store_true", help="also log to <out>/tensorboard (extra: tensorboard)")
    train.add_argument("--quiet", action="store_true", help="no progress bar")

    evaluate = _command(commands, "evaluate", _evaluate, "test accuracy of a trained model over steps and seeds")
    evaluate.add_argument("--model", type=Path, help="folder of the model (default runs/<name>/model)")
    evaluate.add_argument("--json", type=Path, help="also write the rows to this file")
    evaluate.add_argument("--by-level", action="store_true", help="also each block's accuracy at its own noise levels")

    inspect = _command(commands, "inspect", _inspect, "show the blocks of a recipe before any training")
    inspect.add_argument("--figure", type=Path, help="draw the noise partition to this PNG")

    compare = _command(commands, "compare", _compare, "train a recipe and its end-to-end controls; table and figure")
    compare.add_argument("--out", type=Path, help="folder (default runs/<name>-compare)")
    compare.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows, for example end-to-end-4")
    compare.add_argument("--quiet", action="store_true", help="no progress bar")
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
    from .evaluation.tables import format_table
    from .runs import train
    from .training.logging import TensorBoard

    folder = options.out or Path("runs") / recipe.name
    loggers = (TensorBoard(folder / "tensorboard"),) if options.tensorboard else ()
    result = train(recipe, folder, loggers=loggers, resume=not options.restart, progress=not options.quiet)
    print(format_table([row.to_dict() for row in result.accuracies]))
    print(f"{result.iterations} iterations in {result.seconds:.1f} s; model in {folder / 'model'}")


def _evaluate(recipe: Recipe, options: argparse.Namespace) -> None:
    from .evaluation.tables import format_table, write_results
    from .model import DiffusionBlocks
    from .runs import diagnose, evaluate, load_data, load_model

    model = load_model(recipe, options.model or Path("runs") / recipe.name / "model")
    if options.by_level and not isinstance(model, DiffusionBlocks):
        raise ValueError("--by-level is for method: diffusionblocks; an end-to-end model has no noise levels")
    data = load_data(recipe, "test")
    rows = [row.to_dict() for row in evaluate(recipe, model, data)]
    print(format_table(rows))
    more = {}
    if isinstance(model, DiffusionBlocks) and options.by_level:
        more["by_level"] = [row.to_dict() for row in diagnose(recipe, model, data)]
        print(format_table(more["by_level"]))
    if options.json:
        write_results(options.json, rows, **more)


def _inspect(recipe: Recipe, options: argparse.Namespace) -> None:
    from .convert import convert
    from .evaluation.figures import draw_partition
    from .evaluation.tables import block_table, format_table, partition_sketch
    from .runs import build_original

    original = build_original(recipe)
    model = convert(original, recipe.blocks)
    total = sum(p.numel() for p in original.parameters())
    print(f"{recipe.name}: {recipe.model.type}, {model.partition.num_layers} layers, {total:,} parameters")
    print(f"blocks: {json.dumps(model.blocks_config.model_dump(mode='json', exclude={'noise'}))}")
    print(format_table(block_table(model)))
    print("bytes: AdamW in the weights' precision, of one block and its shared parts, without activations")
    print(partition_sketch(model.partition, model.noise))
    if options.figure:
        draw_partition(model.partition, model.noise, options.figure)
        print(f"partition drawn to {options.figure}")


def _compare(recipe: Recipe, options: argparse.Namespace) -> None:
    from .compare import compare

    folder = options.out or Path("runs") / f"{recipe.name}-compare"
    print(compare(recipe, folder, rows=options.rows, progress=not options.quiet))
    print(f"table: {folder / 'table.json'}")
    if (folder / "figure.png").is_file():
        print(f"figure: {folder / 'figure.png'}")


if __name__ == "__main__":
    sys.exit(main())
