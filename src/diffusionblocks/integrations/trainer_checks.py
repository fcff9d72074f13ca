"""What of a Trainer's arguments blocks cannot follow: refused at once, with the reason and a way out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from transformers import DataCollatorForLanguageModeling, Trainer

from ..core.model import DiffusionBlocks
from ..targets import LabelTarget

#: Launchers name their own way of sharding in the environment.
_LAUNCHED = {"fsdp": "ACCELERATE_USE_FSDP", "deepspeed": "ACCELERATE_USE_DEEPSPEED"}
#: Optimizers that count steps for all parameters together, so that a block that starts later makes other updates.
_COUNT_TOGETHER = ("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd", "stable_adamw")
#: Optimizers whose state Trainer does not write, and then goes on without.
_STATE_UNSAVED = (
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "apollo_adamw_layerwise",
    "adalomo",
    "grokadamw",
)
#: Optimizers whose state Trainer writes with objects in it, and then refuses to read.
_STATE_UNREADABLE = ("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw")


def check_class(trainer: type, first: type) -> None:
    """Refuse a class that joins BlocksTrainer with a trainer of another loss, or in the wrong order.

    Args:
        trainer: the class.
        first: BlocksTrainer.

    Raises:
        TypeError: it names the other class.
    """
    bases = trainer.__mro__
    for base in bases[: bases.index(first)]:
        if issubclass(base, Trainer) and not issubclass(base, first):
            raise TypeError(
                f"{trainer.__name__} names {base.__name__} before BlocksTrainer, whose methods are then not used: "
                f"write class {trainer.__name__}(BlocksTrainer, {base.__name__})"
            )
    for base in bases[bases.index(first) + 1 :]:
        if base is not Trainer and base.__name__ != "SFTTrainer" and "compute_loss" in vars(base):
            raise TypeError(
                f"{base.__name__} has a loss of its own, of a whole model's outputs, and blocks have theirs: "
                "BlocksTrainer goes together with transformers.Trainer and trl's SFTTrainer only"
            )


def check_arguments(args: Any, resident: str) -> None:
    """Refuse TrainingArguments that no converted model can follow.

    Raises:
        ValueError: it names the argument, and the way out.
    """
    if args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel = True rewrites whole models of transformers, not blocks of them: leave it out"
        )
    for name, variable in _LAUNCHED.items():
        launched = os.environ.get(variable, "false").lower() in ("1", "true", "yes", "on", "y", "t")
        if getattr(args, name, None) or launched:
            raise ValueError(
                f"{name} shards all blocks together, though only one trains at a step: leave it out"
                f"{f' of the launcher ({variable})' if launched else ''}; with resident='active' a device holds one "
                "block"
            )
    parallel = getattr(args, "parallelism_config", None)
    for name in ("tp", "cp", "sp", "dp_shard"):
        if getattr(parallel, f"{name}_enabled", False):
            raise ValueError(
                f"parallelism_config with {name}_size > 1 splits what a block computes, which blocks do not follow: "
                "leave it out; several processes each train on batches of their own"
            )
    if getattr(args, "loss_type", "nll") != "nll":  # of trl
        raise ValueError(
            f"loss_type = {args.loss_type!r} is computed from a whole model's logits: a block's loss is its own; leave "
            "it out"
        )
    if getattr(args, "predict_with_generate", False):  # of Seq2SeqTrainer
        raise ValueError(
            "predict_with_generate = True calls generate as models of transformers have it: leave it out, and call the "
            "model's own generate"
        )
    if args.push_to_hub:
        raise ValueError(
            "push_to_hub = True uploads files that a converted model does not have: leave it out, and call "
            "push_to_hub of the trainer when it has trained"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process copy the model at every step: start a process for each GPU, with "
            "accelerate launch or torchrun, or set CUDA_VISIBLE_DEVICES to one"
        )
    if args.world_size > 1:
        _check_processes(args, resident)


def _check_processes(args: Any, resident: str) -> None:
    if resident == "active":
        raise ValueError(
            f"resident = 'active' with {args.world_size} processes: DistributedDataParallel keeps all blocks and their "
            "gradients on every device; set resident to 'all', or start one process"
        )
    if args.ddp_find_unused_parameters is False:
        raise ValueError(
            "ddp_find_unused_parameters = False: blocks that wait have no gradients, for which "
            "DistributedDataParallel would wait without end; leave it out"
        )
    if getattr(args, "ddp_static_graph", False):
        raise ValueError(
            "ddp_static_graph = True: another block trains at each step, so the graph is not the same; leave it out"
        )


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of a trainer that are for whole models.

    Raises:
        ValueError: it names the option, and the way out.
    """
    if options.get("compute_loss_func") is not None:
        raise ValueError(
            "compute_loss_func cannot be followed: a block's loss is of levels and noise that are drawn inside of "
            "it; leave it out"
        )
    for name in ("peft_config", "quantization_config"):  # of trl
        if options.get(name) is not None:
            raise ValueError(
                f"{name} wraps a whole model, and blocks are trained as they are: leave it out; with "
                "resident='active' a device holds one block"
            )


def check_with_model(args: Any, blocks: DiffusionBlocks, *, metrics: bool) -> None:
    """Refuse what this kind of model cannot follow.

    Args:
        args: TrainingArguments.
        blocks: the model.
        metrics: whether there is a `compute_metrics`.

    Raises:
        ValueError: it names the argument, and the way out.
    """
    classifies = isinstance(blocks.target, LabelTarget)
    if args.label_smoothing_factor and not classifies:
        raise ValueError(
            f"label_smoothing_factor = {args.label_smoothing_factor} is for classifiers: a {blocks.model_class} has no "
            "label; leave it out"
        )
    if metrics and not classifies:
        raise ValueError(
            f"compute_metrics is for classifiers: evaluation of a {blocks.model_class} gives its loss alone; leave it "
            "out, and read eval_loss"
        )
    if args.neftune_noise_alpha is not None:
        blocks.input_embeddings()  # refuses models that have none


def check_collator(collator: Any, blocks: DiffusionBlocks) -> None:
    """Refuse a collator whose batches this kind of model does not read.

    Args:
        collator: of the trainer.
        blocks: the model.

    Raises:
        ValueError: it says what is wrong, and the way out.
    """
    if not isinstance(collator, DataCollatorForLanguageModeling):
        return
    if "labels" not in blocks.block(0).entries:
        raise ValueError(
            f"data_collator gives labels, and a {blocks.model_class} reads none: its blocks mask tokens and predict "
            "them; leave the collator out"
        )
    if collator.mlm:
        raise ValueError(
            "data_collator masks tokens (mlm=True), and blocks of this model predict the next one: set mlm=False"
        )


def check_optimizer(args: Any, many_blocks: bool) -> None:
    """Refuse an optimizer, by its name in TrainingArguments, that trains blocks otherwise than one model, or whose runs
    cannot be resumed.

    Args:
        args: TrainingArguments.
        many_blocks: whether there are several.

    Raises:
        ValueError: it names the optimizer, and the way out.
    """
    name = getattr(args.optim, "value", args.optim)
    if many_blocks and name in _COUNT_TOGETHER:
        raise ValueError(
            f"optim = {name!r} counts steps for all parameters together, so blocks that start later would make other "
            "updates: set optim to 'adamw_torch', or train one block at a time"
        )
    if name in _STATE_UNSAVED:
        raise ValueError(
            f"optim = {name!r} has its state where Trainer does not save it, so a resumed run would go on without: set "
            "optim to 'adamw_torch', 'adafactor' or 'adamw_torch_8bit'"
        )
    saves = getattr(args.save_strategy, "value", args.save_strategy) != "no" and not args.save_only_model
    if saves and name in _STATE_UNREADABLE:
        raise ValueError(
            f"optim = {name!r} has objects in its state, which Trainer saves and does not read again, so no checkpoint "
            "could be resumed: set save_only_model=True, or optim to 'adamw_torch_8bit'"
        )
