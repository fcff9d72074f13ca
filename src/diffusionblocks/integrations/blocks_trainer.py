"""transformers.Trainer for converted models: block schedules, checkpoints that `load` opens, fixed evaluation noise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainerCallback
from transformers.integrations.neftune import neftune_post_forward_hook

from ..common.modules import tensors_of
from ..common.seeds import keyed_generator
from ..core.loading import load
from ..core.model import DiffusionBlocks
from ..targets import LabelLoss, LabelTarget
from ..training.schedules import block_schedule
from ..training.shared_module import in_several, move_tensors

#: The folder of a checkpoint that holds the model, as `DiffusionBlocks.save_pretrained` writes it.
MODEL = "model"

Schedule = Literal["random", "round-robin", "sequential"]
Residency = Literal["all", "active"]


class BlocksCallback(TrainerCallback):  # type: ignore[misc]
    """Save a converted model in its own format, too, in the folder `model` of every checkpoint of any Trainer.

    `BlocksTrainer` does so by itself; this is for those who must keep their Trainer.
    """

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Write `checkpoint-N/model`, which `load` opens."""
        if state.is_world_process_zero:
            _blocks_of(model).save_pretrained(Path(args.output_dir) / f"checkpoint-{state.global_step}" / MODEL)


class BlocksTrainer(Trainer):  # type: ignore[misc]
    """transformers.Trainer that trains one block at each optimizer step.

    Everything that is drawn follows from (seed, block, step of that block), so a run that is resumed has the bits of
    one that was not interrupted. The learning rate of a block follows its own steps: its schedule is the one that
    TrainingArguments name, however the blocks take turns.

    - Checkpoints hold the model in the folder `model`, which `diffusionblocks.load` opens.
    - `eval_loss` is of noise that follows from each example alone: the same twice, in batches of any size and order.
    - Under several processes all train the same block, each with noise of its own.
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
        TypeError: the model was not converted.
        ValueError: an argument out of range, or one that blocks cannot follow.
    """

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
        if model is not None:
            _blocks_of(model)
        if args is not None:
            _check_arguments(args, resident)
        if options.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func cannot be followed: a block's loss is of levels and noise that are drawn inside of "
                "it; leave it out"
            )
        super().__init__(model, args, **options)
        tokenizer = isinstance(self.processing_class, (PreTrainedTokenizerBase, ProcessorMixin))
        if tokenizer and not hasattr(self.blocks.config, "get_text_config"):
            raise ValueError(
                f"processing_class is for models of transformers, whose config has special tokens; a "
                f"{self.blocks.model_class} has none: leave it out, and give a data_collator"
            )
        self._label_loss: LabelLoss | None = None
        self._neftune: float | None = None
        self._hooks: list[Any] = []
        target = self.blocks.target
        if self.args.label_smoothing_factor:
            if not isinstance(target, LabelTarget):
                raise ValueError(
                    f"label_smoothing_factor = {self.args.label_smoothing_factor} is for classifiers: a "
                    f"{self.blocks.model_class} has no label; leave it out"
                )
            self._label_loss = LabelLoss(smoothing=self.args.label_smoothing_factor)
            self.label_smoother = None  # the library's takes the labels out of the batch
        if self.args.neftune_noise_alpha is not None:
            self.blocks.input_embeddings()  # refuses models that have none
            self._neftune = self.args.neftune_noise_alpha
            self.neftune_noise_alpha = None  # the library's is of one embedding

    @property
    def blocks(self) -> DiffusionBlocks:
        """The model."""
        return _blocks_of(self.model)

    # ---- training ------------------------------------------------------------------------------------------

    def train(self, *args: Any, **options: Any) -> Any:
        """As transformers' own, with label smoothing and NEFTune for as long as it trains."""
        try:
            return super().train(*args, **options)
        finally:
            self._set_label_loss(None)
            while self._hooks:
                self._hooks.pop().remove()

    def _set_label_loss(self, loss: LabelLoss | None) -> None:
        if self._label_loss is not None:
            for b in range(len(self.blocks.blocks)):
                self.blocks.block(b).label_loss = loss

    def _add_neftune(self) -> None:
        if self._neftune is not None and not self._hooks:
            for embedding in dict.fromkeys(self.blocks.input_embeddings()):
                embedding.neftune_noise_alpha = self._neftune  # type: ignore[assignment]
                self._hooks.append(embedding.register_forward_hook(neftune_post_forward_hook))

    def _prepare_for_training(self, max_steps: int, *args: Any, **options: Any) -> Any:
        many = len(self.blocks.blocks)
        steps = [max_steps // many + (b < max_steps % many) for b in range(many)]
        self._turns = block_schedule(self.schedule, steps, self.steps_per_switch, self.args.seed).astype(np.int64)
        self._own_steps = np.zeros(max_steps, dtype=np.int64)
        for b in range(many):
            self._own_steps[self._turns == b] = np.arange(steps[b])
        self._waiting, self._active = {}, None
        self._set_label_loss(self._label_loss)
        self._add_neftune()
        with self._placed():
            return super()._prepare_for_training(max_steps, *args, **options)

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
        self.blocks.save_pretrained(folder / MODEL)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._gather_states()
        super()._save_optimizer_and_scheduler(output_dir)

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


def _check_arguments(args: Any, resident: Residency) -> None:
    """Refuse what blocks cannot follow.

    Raises:
        ValueError: it names the argument, and the way out.
    """
    if args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel = True rewrites whole models of transformers, not blocks of them: leave it out"
        )
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name, None):
            raise ValueError(
                f"{name} shards all blocks together, though only one trains at a step: leave it out; with "
                "resident='active' a device holds one block"
            )
    if getattr(args, "loss_type", "nll") != "nll":  # of trl
        raise ValueError(
            f"loss_type = {args.loss_type!r} is computed from a whole model's logits: a block's loss is its own; leave "
            "it out"
        )
    flattened = getattr(args, "packing", False) and getattr(args, "packing_strategy", "") != "wrapped"
    if flattened or getattr(args, "padding_free", False):  # of trl
        raise ValueError(
            "packing by bins, and padding_free, put several texts in one row, told apart by position_ids that blocks "
            "do not read: use packing=True with packing_strategy='wrapped', or pad"
        )
    if args.push_to_hub:
        raise ValueError(
            "push_to_hub = True uploads files that a converted model does not have: leave it out, and upload the "
            f"folder checkpoint-N/{MODEL} when it has trained"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process copy the model at every step: start a process for each GPU, with "
            "accelerate launch or torchrun, or set CUDA_VISIBLE_DEVICES to one"
        )
    if resident == "active" and args.world_size > 1:
        raise ValueError(
            f"resident = 'active' with {args.world_size} processes: DistributedDataParallel keeps all blocks and their "
            "gradients on every device; set resident to 'all', or start one process"
        )


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
