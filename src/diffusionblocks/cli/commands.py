"""The command line: its commands, in one table, and what runs the one that is given.

Nothing here imports torch before a command works: help and wrong options are told at once.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from .. import __version__
from ..common.fields import MOST_LAYERS, MOST_LENGTH, MOST_LEVELS, MOST_SAMPLES, MOST_SEED
from ..common.files import check_writable
from ..common.interpreter import on_a_large_stack, uncollected
from ..common.messages import STATUSES, OneLineParser, one_line, report_errors
from .command import Command

COMMANDS = {
    "recipes": Command("list the recipes that ship, or print one", ".recipes", uses_models=False),
    "train": Command("train a recipe, save the model and evaluate it", ".train", shared=True),
    "evaluate": Command("measure a trained model: accuracy, samples, or bits per character", ".evaluate", shared=True),
    "predict": Command("the classes of pictures, by a trained classifier", ".predict"),
    "sample": Command("samples of a trained diffusion model: images or text", ".sample", shared=True),
    "boundaries": Command(
        "how neighbouring blocks of a diffusion model differ at their boundary, and what moving it changes", ".boundary"
    ),
    "encode": Command(
        "encode images by an autoencoder into a folder of latents, to train a diffusion model on", ".encode_images"
    ),
    "init": Command("write a commented recipe for data of your own", ".init"),
    "inspect": Command("show the blocks of a recipe before any training", ".inspect"),
    "plan": Command("predict the memory of a recipe's training step, and what fits a budget", ".plan"),
    "compare": Command("train a recipe and its baselines; table and figure", ".compare", shared=True),
    "ablate": Command(
        "train a recipe with other values in some of its fields, over several seeds; one table", ".ablate"
    ),
    "status": Command("how far a run is, from another shell: each block, whether it runs, what is missing", ".status"),
    "report": Command("one HTML page about runs: losses, levels, results, samples, memory, time, recipes", ".report"),
    "jobs": Command("write a command for each block, for machines that share nothing; merge joins them", ".jobs"),
    "branch": Command("copy a trained trunk, a model of one block on all levels, into several blocks", ".branch"),
    "average": Command("average the weights of branched blocks with those of their trunk", ".average"),
    "merge": Command("make one model of folders whose blocks, or members of an ensemble, were trained apart", ".merge"),
    "push": Command("upload a trained model to the Hugging Face hub, with its model card", ".push"),
    "export": Command("one block of a trained model as an ordinary model that its library loads", ".export"),
    "doctor": Command("what of this machine can be used, what is missing, what is an option", ".doctor"),
    "completion": Command(
        "print a script by which a shell completes commands and options", ".completion", uses_models=False
    ),
    "bench": Command(
        "measure memory, speed and depth beside end-to-end training and other ways to save memory, on a CUDA GPU",
        "..bench.options",
    ),
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
  diffusionblocks recipes
      the recipes that ship, by name; with a name, its text to copy and change
  diffusionblocks inspect vit/cifar100
      what each block holds: layers, noise levels, parameters, bytes; trains nothing
  diffusionblocks init cats photos/
      cats.yaml, for a folder of pictures for each class (or parquet files, or a text); edit it, or train it as it is
  diffusionblocks encode --source imagenette --vae taef2 --size 224 --out latents --figure check.png
      latents in shards, of parquet files, of folders of pictures by class, or of a data set on the hub
  diffusionblocks plan dit/imagenet-latents --budget 24GiB
      bytes of a training step by kind, predicted on any machine, and how many blocks or how large a batch fits
  diffusionblocks plan dit/imagenet-latents --gpus 4x24GiB
      how several GPUs share the blocks, with peaks and bytes between them, beside DDP and FSDP2
  diffusionblocks train vit/digits --out runs/digits
      train block by block; run it again to resume after an interruption
  diffusionblocks train vit/digits --dry-run
      check all that the run needs, predict its memory, time a few steps; write nothing. Of compare, too
  eval "$(diffusionblocks completion bash)"
      commands and options by the Tab key (extra: completion)
  diffusionblocks doctor
      GPU, kernels, extras, disk, data and cache: what is there, and the fix for what is missing
  diffusionblocks evaluate runs/digits --set 'evaluate.combine=[mean, chain]'
      test accuracy, NLL and calibration error, by the ways to combine what the blocks say
  diffusionblocks predict runs/cats holiday/ photo.jpg --top 3
      classes of pictures in any sizes, with their probabilities
  diffusionblocks sample runs/dit-digits --out samples --labels 3 --count 16
      images of a trained diffusion model: PNG files, a grid, a chain over its steps
  diffusionblocks sample runs/masked-topics --infill 'the _____ of'
      texts of a trained text model, or the gaps of one filled in
  diffusionblocks boundaries runs/dit-digits --moved -10 -5 0 5 10
      distance of neighbouring blocks' velocities at each boundary; samples with the boundary moved, as a figure
  diffusionblocks branch runs/trunk/model --blocks 3 --out runs/branched
      copy a trained trunk (one block on all levels) into three blocks
  diffusionblocks average runs/dit/model --trunk runs/dit/trunk/model --shares 0.5 0 0 --out runs/averaged
      the block of the highest noise half way back to the trunk that it was copied from
  diffusionblocks merge runs/first runs/second --out runs/whole
      one model of blocks that were trained apart, each run with its own --set 'train.blocks=[0, 2]'
  diffusionblocks export runs/digits --block 1 --out exported
      one block as an ordinary model, for transformers, diffusers, ONNX
  diffusionblocks compare vit/digits --out runs/demo
      DiffusionBlocks beside end-to-end networks and an ensemble, in one table and a figure
  diffusionblocks ablate vit/digits --over blocks.overlap=0,0.05,0.2 --seeds 0,1,2
      a row for each value, with mean and spread over the seeds; --preset partition block-count overlap: the paper's
  diffusionblocks jobs vit/digits --out jobs --format slurm
      a script for each block, for machines that share nothing, and a Slurm array; merge joins what comes back
  diffusionblocks status runs/digits
      steps, loss and time left of each block of a run that goes on, or was stopped; --json for scripts
  diffusionblocks report runs/demo --out report.html
      one page about runs, comparisons and ablations; with --watch it follows them while they train
  diffusionblocks push runs/digits --repo user/digits --private
      upload the run's model in one commit; diffusionblocks.from_pretrained("user/digits") loads it
  diffusionblocks bench memory --models dit-l-2 --blocks 3 --out memory.json --figure memory.png
      on a CUDA GPU: memory and speed beside end-to-end training and other ways to save memory

Any field of a recipe can be overridden: --set train.lr=1e-3 --set blocks.num_blocks=4 --set method=end-to-end
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status (`messages.STATUSES`).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    name = next((name for name in arguments if name in COMMANDS), "")
    _quieten_imports()
    options = parser(name).parse_args(arguments)
    return report_errors(lambda: on_a_large_stack(lambda: _run(name, options)), lambda: _way_on(options))


def _run(name: str, options: argparse.Namespace) -> None:
    _check_one_process(name, options)
    if COMMANDS[name].uses_models:
        with uncollected():
            _quieten_libraries()
    from pydantic import ValidationError

    try:
        _check_options(options)
        if "recipe" in options:
            with uncollected():
                from ..experiments.experiment import Experiment
                from ..experiments.recipe import load_recipe
            options.run(Experiment(load_recipe(options.recipe, options.set)), options)
        else:
            options.run(options)
    except ValidationError as error:
        from ..common.schema_errors import explain
        from ..experiments.recipe import Recipe

        raise ValueError(f"not allowed: {explain(error, Recipe)}") from error


def _check_one_process(name: str, options: argparse.Namespace) -> None:
    """Refuse several processes of torchrun for what one process does: they would write the same files."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
        return
    alone = [f"--{option.replace('_', '-')}" for option in ("dry_run", "before_blocks") if getattr(options, option, 0)]
    alone += [f"--engine {options.engine}"] if getattr(options, "engine", None) else []
    if COMMANDS[name].shared and not alone:
        return
    raise OfOneProcess(
        f"{' '.join([name, *alone])} is the work of one process: start it without torchrun "
        f"({', '.join(each for each in COMMANDS if COMMANDS[each].shared)} are shared by ranks)"
    )


class OfOneProcess(ValueError):
    """Several processes of torchrun, for what one process does; the first of them tells."""

    exit_status = 2

    @property
    def quiet(self) -> bool:
        """Whether another process tells."""
        return os.environ.get("RANK") != "0"


def _quieten_imports() -> None:
    """Silence what libraries say while they are imported; the choices of an option can import them as it is read."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # all are read when the library is imported
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it tells of each time that it asks again
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _quieten_libraries() -> None:
    """Errors of libraries are told as ours; their remarks and bars would stand between the lines that are."""
    _quieten_imports()
    from transformers.utils import logging as of_transformers

    warnings.formatwarning = lambda message, *_, **__: f"{one_line(f'warning: {message}')}\n"  # without a line of code
    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()  # of saving a few small files; ours shows the training


def _way_on(options: argparse.Namespace) -> str:
    """How to go on with a run that was stopped: what of it is saved."""
    folder = getattr(options, "folder", None)
    if folder is None:
        return str(getattr(options, "way_on", ""))
    from ..training.checkpoint import checkpoints

    phases = {path.parent for path in folder.rglob("checkpoints")} if folder.is_dir() else set()
    newest_of_phases = [newest for phase in sorted(phases) for newest in checkpoints(phase / "checkpoints")[-1:]]
    if not newest_of_phases:
        return "nothing was saved yet; run the same command again to start"
    newest = max(newest_of_phases, key=lambda path: path.stat().st_mtime)
    if folder not in newest.parents[1:3]:  # not of a run or its trunk, but of a row or block, maybe another process's
        return f"run the same command again to resume what is unfinished in {folder}"
    return f"run the same command again to resume from {newest}"


def _check_options(options: argparse.Namespace) -> None:
    """Refuse before any work numbers beyond all use, and places that nothing can be written to."""
    for name, most in _MOST.items():
        value = getattr(options, name, None)
        if isinstance(value, int) and abs(value) > most:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at most {most:,}")
    a_folder = any(
        name in options for name in ("recipe", "folders", "overlap", "shard_rows")
    )  # of the others it is a file
    if a_folder and getattr(options, "out", None) is not None:
        check_writable(options.out, "--out")
    for name in ("json", "figure", *(() if a_folder else ("out",))):
        path = getattr(options, name, None)
        if path is not None:
            if path.is_dir():
                raise ValueError(f"--{name} {path} is a folder; name a file")
            check_writable(path.parent, f"--{name}")


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command line.

    Args:
        command: the one whose options are added, for a quick start; None adds those of all.
    """
    whole = OneLineParser(
        prog="diffusionblocks",
        description="Train a deep network one block at a time, as independent denoisers (arXiv 2506.14202).",
        epilog=f"{_EXAMPLES}\n{STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=__version__)
    commands = whole.add_subparsers(required=True, metavar="command")
    for name, about in COMMANDS.items():
        part = commands.add_parser(name, help=about.help, description=about.help)
        if command in (None, name):
            importlib.import_module(about.module, __package__).add_options(part)
    return whole
