"""transformers.Trainer for converted models: block schedules, checkpoints that `load` opens, fixed evaluation noise."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.trainer import OPTIMIZER_NAME

from ..common.formats import read_json, write_json
from ..common.modules import tensors_of
from ..common.seeds import keyed_generator
from ..core.hub import Upload, push_to_hub
from ..core.loading import load
from ..core.model import DiffusionBlocks
from ..targets import LabelLoss
from ..targets.next_token import NextTokenTarget
from ..training.schedules import block_schedule
from ..training.shared_module import in_several, move_tensors
from .packed_texts import UnpackingCollator
from .trainer_checks import (
    check_arguments,
    check_class,
    check_collator,
    check_optimizer,
    check_options,
    check_with_model,
)

#: The folder of a checkpoint that holds the model, as `DiffusionBlocks.save_pretrained` writes it.
MODEL = "model"
#: The file of a checkpoint that says in which order the blocks took turns.
TURNS = "turns.json"

Schedule = Literal["random", "round-robin", "sequential"]
Residency = Literal["all", "active"]


class BlocksCallback(TrainerCallback):  # type: ignore[misc]
    """Save a converted model in its own format, too, in the folder `model` of every checkpoint of any Trainer.

    `BlocksTrainer` does so by itself; this is for those who must keep their Trainer.
    """

    def on_save(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **_: Any
    ) -> None:
        """Write `checkpoint-N/model`, which `load` opens, with the tokenizer or processor in it."""
        if state.is_world_process_zero:
            _write(model, processing_class, Path(args.output_dir) / f"checkpoint-{state.global_step}" / MODEL)


class BlocksTrainer(Trainer):  # type: ignore[misc]
    """transformers.Trainer that trains one block at each optimizer step.

    Everything that is drawn follows from (seed, block, step of that block), so a run that is resumed has the bits of
    one that was not interrupted. The learning rate of a block follows its own steps: its schedule is the one that
    TrainingArguments name, however the blocks take turns.

    - Checkpoints hold the model in the folder `model`, which `diffusionblocks.load` opens.
    - `eval_loss` is of noise that follows from each example alone: the same twice, in batches of any size and order.
    - Under several processes all train the same block, each with noise of its own.
    - Texts that a collator packs into a row, told apart by `position_ids`, get rows of their own again.
    - `auto_find_batch_size` starts over: what batches that were too large have trained is undone.
    - `label_smoothing_factor` is of classifiers, with what z says of the label taken into account.
    - `neftune_noise_alpha` is of language models, with noise on the embeddings of the tokens that are read.
    - `compute_metrics` is given a classifier's log-probabilities by `predict`.

    Args:
        model: what `convert`, `load` or `branch` made.
        args: transformers.TrainingArguments.
        schedule: `random`, `round-robin` or `sequential`. Blocks step equally often; what `max_steps` leaves over goes
            to the first.
        steps_per_switch: steps of a block in a row, >= 1.
        resident: `all` blocks on the device, or only the `active` one with its optimizer state; the others wait on the
            host. Parameters that all blocks share stay.
        options: of transformers.Trainer, by name.

    Raises:
        ImportError: the package of `optim` is not installed.
        TypeError: the model was not converted, or the class joins another trainer that has a loss of its own.
        ValueError: an argument out of range, or one that blocks cannot follow.
    """

    optimizer: Any  # transformers' own attributes
    label_names: list[str]
    data_collator: Any

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *,
        schedule: Schedule = "random",
        steps_per_switch: int = 1,
        resident: Residency = "all",
        **options: Any,
    ) -> None:
        _check_choice("schedule", schedule, get_args(Schedule))
        _check_choice("resident", resident, get_args(Residency))
        if isinstance(steps_per_switch, bool) or not isinstance(steps_per_switch, int) or steps_per_switch < 1:
            raise ValueError(f"steps_per_switch must be a whole number >= 1, got {steps_per_switch!r}")
        self.schedule, self.steps_per_switch, self.resident = schedule, steps_per_switch, resident
        self._waiting: dict[int, dict[nn.Parameter, dict[str, Any]]] = {}  # optimizer state, block by block
        self._active: int | None = None
        self._turns = self._own_steps = np.zeros(0, dtype=np.int64)
        self._call = (-1, 0)  # (optimizer step, batches of it so far)
        self._start: dict[str, Any] | None = None  # of a training whose batches may turn out to be too large
        self._label_loss: LabelLoss | None = None
        self._hooks: list[Any] = []
        check_class(type(self), BlocksTrainer)
        if model is not None:
            _blocks_of(model)
        if args is not None:
            check_arguments(args, resident)
        check_options(options)
        super().__init__(model, args, **options)
        vars(self.blocks).pop("forward", None)  # trl's, which reads what blocks do not give
        check_with_model(self.args, self.blocks, metrics=self.compute_metrics is not None)
        check_collator(self.data_collator, self.blocks)
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            check_optimizer(self.args, len(self.blocks.blocks) > 1)
            self.get_optimizer_cls_and_kwargs(self.args, self.blocks)  # raises where its package is not installed
        if self.args.activation_checkpointing:
            options_of_torch = self.args.activation_checkpointing_kwargs or {}
            self.blocks.activation_checkpointing_enable(**_options_of_checkpointing(options_of_torch))
        self.label_smoother = None  # the library's takes the labels out of the batch
        self.neftune_noise_alpha = None  # the library's is of one embedding
        if self.can_return_loss:
            self.label_names = []  # where labels were named and not there, no loss would be reported
        if isinstance(self.blocks.target, NextTokenTarget):
            self.data_collator = UnpackingCollator(self.data_collator)

    @property
    def blocks(self) -> DiffusionBlocks:
        """The model."""
        return _blocks_of(self.model)

    # ---- training ------------------------------------------------------------------------------------------

    def train(self, *args: Any, **options: Any) -> Any:
        """As transformers' own, with label smoothing and NEFTune for as long as it trains."""
        self._start = None
        try:
            return super().train(*args, **options)
        finally:
            self._start = None
            self._set_label_loss(None)
            while self._hooks:
                self._hooks.pop().remove()

    def _set_label_loss(self, loss: LabelLoss | None) -> None:
        if loss is not None or self._label_loss is not None:
            for b in range(len(self.blocks.blocks)):
                self.blocks.block(b).label_loss = loss
        self._label_loss = loss

    def _add_neftune(self) -> None:
        if self.args.neftune_noise_alpha is not None and not self._hooks:
            for embedding in dict.fromkeys(self.blocks.input_embeddings()):
                embedding.neftune_noise_alpha = self.args.neftune_noise_alpha  # type: ignore[assignment]
                self._hooks.append(embedding.register_forward_hook(neftune_post_forward_hook))

    def _inner_training_loop(self, *args: Any, **options: Any) -> Any:
        if self.args.auto_find_batch_size:
            self._start_over()
        return super()._inner_training_loop(*args, **options)

    def _start_over(self) -> None:
        """Note how the training starts; the next time, with smaller batches, go back there."""
        self._gather_states()
        if self._start is None:
            self._start = {
                "weights": {name: value.detach().cpu().clone() for name, value in self.blocks.state_dict().items()},
                "optimizer": copy.deepcopy(self.optimizer.state_dict()) if self.optimizer is not None else None,
                "random": torch.get_rng_state(),
            }
            return
        self.blocks.load_state_dict(self._start["weights"])
        torch.set_rng_state(self._start["random"])
        if self._start["optimizer"] is None:
            self.optimizer = None
        else:
            self.optimizer.load_state_dict(self._start["optimizer"])

    def _turns_of(self, max_steps: int, schedule: str, steps_per_switch: int, seed: int) -> Any:
        """The block of each optimizer step."""
        many = len(self.blocks.blocks)
        steps = [max_steps // many + (b < max_steps % many) for b in range(many)]
        return block_schedule(schedule, steps, steps_per_switch, seed).astype(np.int64)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None, **options: Any
    ) -> Any:
        check_with_model(self.args, self.blocks, metrics=self.compute_metrics is not None)  # of a search's trial, too
        self._turns = self._turns_of(max_steps, self.schedule, self.steps_per_switch, self.args.seed)
        self._own_steps = np.zeros(max_steps, dtype=np.int64)
        for b in range(len(self.blocks.blocks)):
            mine = self._turns == b
            self._own_steps[mine] = np.arange(mine.sum())
        if resume_from_checkpoint is not None:
            self._check_resumable(Path(resume_from_checkpoint))
        self._gather_states()
        self._call = (-1, 0)
        smoothing = self.args.label_smoothing_factor
        self._set_label_loss(LabelLoss(smoothing=smoothing) if smoothing else None)
        self._add_neftune()
        with self._placed():
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint, **options)

    def _check_resumable(self, checkpoint: Path) -> None:
        """Refuse a checkpoint from which this run would not go on as the one that wrote it."""
        opening = f"diffusionblocks.load({str(checkpoint / MODEL)!r})"
        if not (checkpoint / OPTIMIZER_NAME).is_file():
            raise ValueError(
                f"{checkpoint} has no optimizer state (save_only_model), so its run cannot go on: start another one "
                f"from {opening}"
            )
        if not (checkpoint / TURNS).is_file():  # of a plain Trainer
            return
        past, step = read_json(checkpoint / TURNS), self.state.global_step
        if not np.array_equal(self._turns_of(**past)[:step], self._turns[:step]):
            now = {"max_steps": len(self._turns), "schedule": self.schedule}
            now |= {"steps_per_switch": self.steps_per_switch, "seed": self.args.seed}
            other = ", ".join(
                f"{name} = {past[name]!r} and not {now[name]!r}" for name in now if past[name] != now[name]
            )
            raise ValueError(
                f"in the run of {checkpoint} blocks took turns in another order ({other}): go on with the same "
                f"values, or start another run from {opening}"
            )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As transformers' own, of each block's own steps."""
        fresh = self.lr_scheduler is None  # not one that was given
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if fresh and isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            scheduler.lr_lambdas = [self._of_own_steps(factor) for factor in scheduler.lr_lambdas]
        return scheduler

    def _of_own_steps(self, factor: Any) -> Any:
        many, own_steps = len(self.blocks.blocks), self._own_steps

        def of_step(step: int) -> float:
            return float(factor(int(own_steps[step]) * many if step < len(own_steps) else step))

        return of_step

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **options: Any) -> Tensor:
        """One batch of the block whose turn it is."""
        step = self.state.global_step
        self._activate(int(self._turns[step]))
        self._call = (step, self._call[1] + 1 if self._call[0] == step else 0)
        return super().training_step(model, inputs, *args, **options)  # type: ignore[no-any-return]

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """The loss of the block whose turn it is; in evaluation mode the model's own."""
        if model.training:
            step, batch = self._call
            block = int(self._turns[step])
            purpose = f"noise {batch} of rank {self.args.process_index}"
            generator = keyed_generator(self.args.seed, block, int(self._own_steps[step]), purpose, self.args.device)
            inputs = {**inputs, "block": block, "generator": generator}
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    # ---- evaluation ----------------------------------------------------------------------------------------

    def prediction_step(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """As transformers' own, with noise that follows from each example alone."""
        inputs = self._prepare_inputs(inputs)
        of_examples = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        generators = self.blocks.example_generators(of_examples)
        return super().prediction_step(model, {**inputs, "generator": generators}, *args, **options)

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """As transformers' own. Under `resident: active` all blocks' weights are on the device meanwhile."""
        self._move_all()
        with self._placed():
            return super().evaluation_loop(*args, **options)

    # ---- which block is on the device ----------------------------------------------------------------------

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self.resident == "all":
            super()._move_model_to_device(model, device)
        else:
            blocks = _blocks_of(model)
            move_tensors(blocks, _shared(blocks), device)

    @contextlib.contextmanager
    def _placed(self) -> Iterator[None]:
        """Keep accelerate from moving the whole model to the device."""
        before = self.accelerator.device_placement
        self.accelerator.device_placement = before and self.resident == "all"
        try:
            yield
        finally:
            self.accelerator.device_placement = before

    def _activate(self, block: int) -> None:
        """Have only one block, with its optimizer state, on the device."""
        if self.resident == "all" or block == self._active:
            return
        shared, host = _shared(self.blocks), torch.device("cpu")
        for b in range(len(self.blocks.blocks)):
            if b != block:
                self._put_aside(b, shared)
                _move(self.blocks.block(b), shared, host)
        _move(self.blocks.block(block), shared, self.args.device)
        with_steps = any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)
        for parameter, state in self._waiting.pop(block, {}).items():
            self.optimizer.state[parameter] = _on_device(state, parameter.device, with_steps=with_steps)
        self._active = block

    def _put_aside(self, block: int, shared: set[int]) -> None:
        states = self.optimizer.state
        own = [p for p in self.blocks.block(block).parameters() if id(p) not in shared and p in states]
        if own:
            self._waiting[block] = {p: _on_device(states.pop(p), torch.device("cpu")) for p in own}

    def _gather_states(self) -> None:
        """Let the optimizer hold the state of all blocks again."""
        if self.optimizer is not None:  # else of a model that is no more, as in a search
            for states in self._waiting.values():
                self.optimizer.state.update(states)
        self._waiting, self._active = {}, None

    def _move_all(self) -> None:
        """Bring the weights of all blocks to the device, for what needs them all."""
        if self.resident == "active":
            self._active = None
            _move(self.blocks, set(), self.args.device)

    # ---- files ---------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        _write(self.blocks, self.processing_class, folder / MODEL)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def push_to_hub(
        self,
        commit_message: str | None = None,
        *,
        token: str | bool | None = None,
        private: bool | None = None,
    ) -> Upload | None:
        """Save the model in the output folder, and upload it with its tokenizer: see `diffusionblocks.push_to_hub`.

        The repository is `hub_model_id` of the arguments, else one named as the output folder.

        Returns:
            Where it is; None in processes other than the first.
        """
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        folder = Path(self.args.output_dir).resolve()
        return push_to_hub(
            folder / MODEL,
            self.args.hub_model_id or folder.name,
            private=private,
            token=token or self.args.hub_token,
            commit_message=commit_message,
        )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._gather_states()
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            order = {"schedule": self.schedule, "steps_per_switch": self.steps_per_switch, "seed": self.args.seed}
            write_json(Path(output_dir) / TURNS, {"max_steps": len(self._turns), **order})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._gather_states()
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if (Path(resume_from_checkpoint) / MODEL).exists():
            self._read(resume_from_checkpoint)
        else:  # of a plain Trainer
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._read(self.state.best_model_checkpoint)

    def _read(self, checkpoint: str) -> None:
        model, blocks = load(Path(checkpoint) / MODEL), self.blocks
        if (model.blocks_config, model.model_class) != (blocks.blocks_config, blocks.model_class):
            raise ValueError(
                f"{Path(checkpoint) / MODEL} is of another conversion than the trainer's model: a "
                f"{model.model_class} with {model.blocks_config}; give the trainer diffusionblocks.load of that folder"
            )
        blocks.load_state_dict(model.state_dict())


def _blocks_of(model: Any) -> DiffusionBlocks:
    if not isinstance(model, DiffusionBlocks):
        raise TypeError(f"BlocksTrainer trains what diffusionblocks.convert makes, not a {type(model).__name__}")
    return model


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} = {value!r}; allowed: {', '.join(choices)}")


def _write(blocks: Any, processing: Any, folder: Path) -> None:
    """Write a model, and beside it what turns texts or pictures into its input, as `sample` and `evaluate` look for."""
    _blocks_of(blocks).save_pretrained(folder)
    if processing is not None:
        processing.save_pretrained(folder)


def _options_of_checkpointing(options: Mapping[str, Any]) -> dict[str, Any]:
    """What TrainingArguments say of activation checkpointing, as the model takes it."""
    own = {name: options[name] for name in ("every_n_layers", "offload") if name in options}
    return own | {"activation_checkpointing_kwargs": {name: v for name, v in options.items() if name not in own}}


def _shared(blocks: DiffusionBlocks) -> set[int]:
    """Identities of the tensors that several blocks hold."""
    return in_several([blocks.block(b) for b in range(len(blocks.blocks))])


def _move(module: nn.Module, but: set[int], device: torch.device) -> None:
    """Move a module's parameters and buffers, in place, to a device; by identity all but some."""
    move_tensors(module, {id(tensor) for tensor in tensors_of(module)} - but, device)


def _on_device(state: Mapping[str, Any], device: torch.device, *, with_steps: bool = False) -> dict[str, Any]:
    """Optimizer state of a parameter on a device; `with_steps`: and its count of steps, which else stays."""
    return {
        name: value.to(device) if isinstance(value, Tensor) and (value.dim() or with_steps) else value
        for name, value in state.items()
    }
