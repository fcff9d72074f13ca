"""Units: what the trainer steps. A block is a unit; so is a whole unconverted model, the end-to-end baseline."""

from __future__ import annotations

import abc
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.finite import FiniteCheck
from ..common.modules import evaluating
from ..core.block import Block, rows_of
from ..core.end_to_end import save_end_to_end
from ..core.model import DiffusionBlocks
from ..families import Family, family_for
from ..sampling import Prediction
from ..targets import (
    AUTO,
    LabelLoss,
    LossChunk,
    check_entries,
    check_label_loss,
    check_loss_chunk,
    cross_entropies,
    in_chunks,
    label_losses,
    mean_of_counted,
    positions_at_once,
    resolve_texts,
)
from .train_config import TrainConfig


@dataclass(frozen=True)
class Unit:
    """Something that is trained on its own.

    Attributes:
        index: of the block, or of the part of a baseline (0 for an end-to-end model); keys its randomness.
        name: for logs and messages.
        module: has `loss(batch, generator) -> (batch,)`; its call runs the network.
        shared: identities of the parameters that other units move as well.
        reads: identities of the parameters that it only reads, and that other units move.
    """

    index: int
    name: str
    module: nn.Module
    shared: frozenset[int] = frozenset()
    reads: frozenset[int] = frozenset()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters that this unit moves."""
        return [p for p in trainable(self.module) if id(p) not in self.reads]

    @property
    def own(self) -> list[nn.Parameter]:
        """The trainable parameters that only this unit moves."""
        return [p for p in self.parameters if id(p) not in self.shared]


class Baseline(nn.Module, abc.ABC):
    """What is trained beside blocks by the same trainer: a model that is not converted, in one unit or several."""

    @property
    @abc.abstractmethod
    def config(self) -> Any:
        """The config object of the original class."""

    @abc.abstractmethod
    def units(self, blocks: Sequence[int] | None = None) -> list[Unit]:
        """What of it is trained on its own.

        Args:
            blocks: only the units of these indices; None takes all.

        Raises:
            ValueError: no such unit, or units that cannot be trained apart.
        """

    @abc.abstractmethod
    def answers(self, pixel_values: Tensor) -> Mapping[str | None, Tensor]:
        """Logits (batch, num_classes) of every way to read a label off, by its name; the first is the default one."""

    @abc.abstractmethod
    def save(
        self,
        path: Path,
        *,
        processing: Mapping[str, bytes] | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        """Write it to a folder, whole or not at all.

        Args:
            path: the folder; an older model there is replaced.
            processing: files that say how its input is made (`processing_files`), content by name.
            provenance: what it was trained on, as JSON values: parts of different trainings are not merged.
        """

    def predictions(self, pixel_values: Tensor) -> dict[str | None, Prediction]:
        """The predictions of one pass in evaluation mode, by the name of how they are read off (`answers`).

        Raises:
            ValueError: logits are not finite.
        """
        check = FiniteCheck(self._name)
        with torch.no_grad(), evaluating(self):
            logits = {name: check.values(x.float(), "logits") for name, x in self.answers(pixel_values).items()}
        check.read()
        return {name: Prediction(x.softmax(-1), x.log_softmax(-1), levels=()) for name, x in logits.items()}

    def predict(self, pixel_values: Tensor, *, combine: str | None = None, **_: Any) -> Prediction:
        """Class probabilities of one pass in evaluation mode; denoising options do not apply and are ignored.

        Args:
            pixel_values: images (batch, channels, height, width).
            combine: how parts of a model are brought together, one of the names of `answers`; None takes the first.
                A model of one part ignores it.

        Raises:
            ValueError: no such way, or logits are not finite.
        """
        predictions = self.predictions(pixel_values)
        if combine is None or len(predictions) == 1:
            return next(iter(predictions.values()))
        if combine not in predictions:
            raise ValueError(f"combine = {combine!r}; allowed: {', '.join(map(str, predictions))}")
        return predictions[combine]

    @property
    def _name(self) -> str:
        return type(self).__name__


class OneModel(Baseline):
    """A baseline that is one unconverted model, with one way to read a label off, saved as its library saves it.

    Args:
        model: the model; it is trained in place.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        """The config object of the model."""
        return self.model.config

    def answers(self, pixel_values: Tensor) -> Mapping[str | None, Tensor]:
        """The logits of the model."""
        return {None: self(pixel_values)}

    def save(
        self,
        path: Path,
        *,
        processing: Mapping[str, bytes] | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        """Write the model in the format of its own library."""
        save_end_to_end(self.model, path, processing)


class EndToEnd(OneModel):
    """An unconverted classifier or language model with the interface of a block: the end-to-end baseline.

    Args:
        model: the model; it is trained in place.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._loss_chunk: LossChunk = None
        self._label_loss: LabelLoss | None = None

    @functools.cached_property
    def family(self) -> Family:
        """The family of the model's class."""
        return family_for(self.model)

    @property
    def activation_checkpointing(self) -> bool:
        """Whether the layers keep only their inputs for the backward pass (the library's own way)."""
        return bool(getattr(self.model, f"is_{self._library_word}_checkpointing"))

    @activation_checkpointing.setter
    def activation_checkpointing(self, value: bool) -> None:
        model: Any = self.model
        if self.trains_itself:
            if value:
                raise ValueError(
                    f"train.activation_checkpointing = true: a {type(model).__name__} trained end to end has no "
                    "checkpointing of its layers; set it to false, and backprop_depth lower to save memory"
                )
            return
        word = self._library_word
        if value:
            options = {f"{word}_checkpointing_kwargs": {"use_reentrant": False}}
            getattr(model, f"{word}_checkpointing_enable")(**options)
        else:
            getattr(model, f"{word}_checkpointing_disable")()

    @property
    def _library_word(self) -> str:
        """What transformers calls checkpointing: newer versions warn of the older word."""
        return "activation" if hasattr(self.model, "activation_checkpointing_enable") else "gradient"

    @property
    def loss_chunk(self) -> LossChunk:
        """As of a block: positions of each sequence whose logits `loss` has in memory at a time, or `auto`; None: all
        at once."""
        return self._loss_chunk

    @loss_chunk.setter
    def loss_chunk(self, value: LossChunk) -> None:
        if value not in (None, AUTO):  # which any model takes, one of no family too
            of_text = self.family.target == "next-token"
            check_loss_chunk(value, f"a {type(self.model).__name__}", of_text=of_text)
        self._loss_chunk = value

    @property
    def label_loss(self) -> LabelLoss | None:
        """As of a block: label smoothing and distillation of a classifier; None without either."""
        return self._label_loss

    @label_loss.setter
    def label_loss(self, value: LabelLoss | None) -> None:
        if value is not None:
            check_label_loss(value, f"a {type(self.model).__name__}", of_labels=self.family.target == "label")
        self._label_loss = value

    def layer_groups(self) -> list[list[nn.Module]]:
        """As of a block: each layer, for FSDP to gather."""
        return [[self.model.get_submodule(path)] for path in self.family.layer_paths(self.model)]

    @property
    def trains_itself(self) -> bool:
        """Whether the class brings a training loss of its own (`RecurrentDepth`); none of a library does."""
        return hasattr(type(self.model), "loss")

    def forward(self, inputs: Tensor) -> Tensor:
        """Images (batch, channels, height, width) -> logits (batch, num_classes); or tokens (batch, length) -> logits
        (batch, length, vocab_size) of those after them."""
        if inputs.is_floating_point():
            return self.model(pixel_values=inputs).logits  # type: ignore[no-any-return]
        if self.trains_itself:
            return self.model(inputs)  # type: ignore[no-any-return]
        return self.model(input_ids=inputs, use_cache=False).logits  # type: ignore[no-any-return]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile part by part, as blocks are: all layers share one graph, so it takes seconds at any depth."""
        family = self.family
        for path in (*family.layer_paths(self.model), *family.shared_paths(self.model)):
            owner, _, name = path.rpartition(".")
            part = getattr(self.model.get_submodule(owner), name)
            if isinstance(part, nn.ModuleList):  # the layers, and what recurrent depth has before and behind them
                for layer in part:
                    layer.compile(*args, **kwargs)
            elif isinstance(part, nn.Module):  # else a bare parameter
                part.compile(*args, **kwargs)

    def loss(
        self,
        batch: Mapping[str, Tensor],
        generator: torch.Generator | None = None,
        *,
        rows: slice | None = None,
    ) -> Tensor:
        """Cross-entropy of each sample, float32, shape (batch,): of the label, or the mean over the next tokens.

        Args:
            batch: images and labels, or tokens; of these `labels` and `attention_mask` say which count, as of blocks
                (`NextTokenTarget.resolve`).
            generator: of what a class with a training of its own draws.
            rows: compute only these examples; None: all.

        Raises:
            ValueError: texts of fewer than two tokens, or an entry that nothing reads.
        """
        more = () if self.label_loss is None else self.label_loss.entries
        of_text = ("input_ids",) if self.trains_itself else ("input_ids", "labels", "attention_mask")
        names = of_text if "input_ids" in batch else ("pixel_values", "labels", *more)
        check_entries(batch, names, type(self.model).__name__)
        if "input_ids" in batch:
            batch = resolve_texts(batch, 1)
        if rows is not None:
            batch = rows_of(batch, rows)
        if self.trains_itself:
            return self.model.loss(batch, generator, self._chunk(batch["input_ids"]))  # type: ignore[operator, no-any-return]
        if "input_ids" in batch:
            tokens = batch["input_ids"]
            if tokens.dim() != 2 or tokens.shape[1] < 2:
                shape = tuple(tokens.shape)
                raise ValueError(f"input_ids must be of shape (batch, length), length >= 2; got {shape}")
            chunk = self._chunk(tokens)
            losses = in_chunks(self._token_losses, self._states(tokens), tokens[:, 1:], chunk)
            return mean_of_counted(losses, batch["loss_mask"][:, 1:]) if "loss_mask" in batch else losses.mean(dim=1)
        logits = self.forward(batch["pixel_values"])  # a call would let FSDP scatter weights that `loss` still needs
        loss = label_losses(logits, batch["labels"]) if self.label_loss is None else self.label_loss(logits, batch)
        assert loss.shape == batch["labels"].shape
        return loss

    def auto_chunk(self, tokens: Tensor) -> int | None:
        """Positions of each text whose logits `loss_chunk = "auto"` makes together: see `Block.auto_chunk`."""
        return self._chunk(tokens, AUTO)

    def _chunk(self, tokens: Tensor, chunk: LossChunk = None) -> int | None:
        """Positions whose logits are made together, of a language model's tokens (batch, length)."""
        batch, length = tokens.shape
        chunk = self.loss_chunk if chunk is None else chunk
        return positions_at_once(chunk, (batch, length - 1), int(self.model.config.vocab_size))  # type: ignore[union-attr, arg-type]

    def _states(self, tokens: Tensor) -> Tensor:
        """What the head of a language model is given: tokens (batch, length) -> (batch, length, dim)."""
        family: Any = self.family  # of a library's language model, the only one that comes here
        return family.whole_states(self.model, tokens)  # type: ignore[no-any-return]

    def _token_losses(self, states: Tensor, tokens: Tensor) -> Tensor:
        family: Any = self.family  # which knows what the class makes of what its head gives
        return cross_entropies(family.head_logits(self.model, states), tokens)

    def heaviest_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """As `loss`, of the step that takes most memory, whatever the batch's values: for predicting that memory.

        A class that draws how much of itself it runs (`RecurrentDepth`) runs as many iterations as the gradient goes
        through and one before them: more of those take time, and no memory.
        """
        if self.trains_itself:
            model: Any = self.model
            tokens = batch["input_ids"]
            return model.loss_after(model.backprop_depth + 1, tokens, chunk=self._chunk(tokens))  # type: ignore[no-any-return]
        return self.loss(batch)

    def units(self, blocks: Sequence[int] | None = None) -> list[Unit]:
        """One, of the whole model; ValueError: blocks are named."""
        if blocks is not None:
            raise ValueError(f"train.blocks = {list(blocks)}: an end-to-end model has no blocks; leave it out")
        return [Unit(0, "end-to-end", self)]

    @property
    def _name(self) -> str:
        return type(self.model).__name__


def units_of(model: nn.Module, blocks: Sequence[int] | None = None) -> tuple[list[Unit], list[nn.Parameter]]:
    """The units of a model, and the trainable parameters that several units move (the `joint` policy).

    Args:
        model: a `DiffusionBlocks` or a `Baseline`.
        blocks: only these blocks, or units of a baseline; None takes all.

    Raises:
        TypeError: neither of the two.
        ValueError: nothing to train, no such block, or blocks that cannot be trained apart.
    """
    if isinstance(model, Baseline):
        return _require_parameters(model.units(blocks), [])
    if not isinstance(model, DiffusionBlocks):
        raise TypeError(f"cannot train a {type(model).__name__}: wrap it in EndToEnd, or convert it first")
    many = model.partition.num_blocks
    indices = list(range(many)) if blocks is None else list(blocks)
    if indices[-1] >= many:
        raise ValueError(f"train.blocks = {indices}: the model has blocks 0 to {many - 1}")
    shared = [p for p in model.shared_parameters() if p.requires_grad]
    if shared and len(indices) < many:
        raise ValueError(
            f"train.blocks = {indices}: under shared = joint all blocks move the shared parameters and cannot train "
            "apart; use blocks.shared: replicated or frozen"
        )
    common = frozenset(id(p) for p in shared)
    return _require_parameters([Unit(b, f"block {b}", model.block(b), common) for b in indices], shared)


def set_label_loss(units: Sequence[Unit], config: TrainConfig) -> None:
    """Let units train with the label smoothing and the distillation of a configuration.

    Raises:
        ValueError: their losses know of neither.
    """
    for unit in units:
        if hasattr(unit.module, "label_loss"):
            unit.module.label_loss = config.label_loss  # type: ignore[assignment]
        else:
            check_label_loss(config.label_loss, f"a {type(unit.module).__name__}", of_labels=False)


def check_readers(config: TrainConfig) -> None:
    """Refuse settings under which no unit can read what another one moves.

    Raises:
        ValueError: only some units are trained, or are on the device at a time, or their steps overlap.
    """
    reason = "each module of local learning runs those before it"
    if config.blocks is not None:
        raise ValueError(f"train.blocks = {list(config.blocks)}: {reason}, so they train in one run; leave it out")
    if config.resident == "active":
        raise ValueError(f"train.resident = active: {reason}, so all are on the device; set train.resident to all")
    if config.concurrent:
        raise ValueError(f"train.concurrent = true: {reason}, which must stand still; set train.concurrent to false")


def takes_rows(module: nn.Module) -> bool:
    """Whether the examples of a batch can be computed apart, by several ranks: nothing is made of a whole batch."""
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()):
        return False
    return isinstance(module, Block) or (isinstance(module, EndToEnd) and not module.trains_itself)


def _require_parameters(units: list[Unit], shared: list[nn.Parameter]) -> tuple[list[Unit], list[nn.Parameter]]:
    for unit in units:
        if not unit.own and not shared:
            raise ValueError(f"{unit.name} has no trainable parameter")
    return units, shared


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient."""
    return [p for p in module.parameters() if p.requires_grad]
