"""An experiment: a recipe resolved once, with its device, family, task, data and models."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.files import recover
from ..common.formats import read_json
from ..common.messages import announcer
from ..common.modules import computes_on
from ..config import BlocksConfig
from ..core.conversion import assemble
from ..core.loading import load
from ..core.materialise import build, empty, materialise
from ..core.model import DiffusionBlocks
from ..core.model_card import card_text, remove_generated_card, write_card
from ..core.saved_model import INDEX, MODEL_FILES, outline_saved, read_saved
from ..core.saving import save
from ..data import TextCodec
from ..data.dataset import BatchMaker, Dataset, ReadBatches
from ..evaluation.work import ALONE, Work
from ..families import Family, check_attention, family_named, rebuild_config
from ..training import Baseline, RunDescription, Trainer
from ..training.early_stopping import HeldOut
from ..training.ranks import Group
from ..training.run_log import Logger
from .baseline_kinds import BASELINE_KINDS, BaselineKind, outline_of
from .card_notes import card_notes
from .identity import check_same_run, check_same_scale, data_identity, describe_run, learned_from
from .original import Original, complete
from .recipe import Recipe
from .recipe_changes import with_train
from .shipped_recipes import RECIPE
from .tasks import Task


class Experiment:
    """A recipe resolved once: what is trained, on what, where, and how it is measured.

    Nothing is read or built before it is asked for, and nothing is read or resolved twice.

    Args:
        recipe: what is trained.
        splits: data that are read already, by split: `train`, `test`.
        origin: the recipe that the run was started with, where this is one of its phases; a run resumes only as that.

    Attributes:
        work: who computes which batch of an evaluation, and which samples.
    """

    def __init__(
        self, recipe: Recipe, splits: Mapping[str, Dataset] | None = None, *, origin: Recipe | None = None
    ) -> None:
        self.recipe = complete(recipe)
        self.origin = origin or self.recipe
        self.work = ALONE
        self._data = _Data(splits or {})

    def derive(self, recipe: Recipe, *, same_run: bool = False) -> Experiment:
        """The experiment of a changed recipe, on the same data.

        Args:
            recipe: with changes.
            same_run: whether it is a phase of this run, which resumes as what this one was started with.
        """
        return self._with_same_data(Experiment(recipe, origin=self.origin if same_run else None))

    def _with_same_data(self, other: Experiment) -> Experiment:
        other._data, other.work = self._data, self.work
        return other

    def shared(self, work: Work) -> Experiment:
        """The experiment, whose evaluation and samples are the work of several ranks."""
        other = self.derive(self.recipe, same_run=True)
        other.work = work
        return other

    def on(self, device: str) -> Experiment:
        """The experiment on a device; what it leaves says what the recipe says."""
        return self.derive(self.recipe.model_copy(update={"device": device}), same_run=True)

    def part(self, index: int) -> Experiment:
        """The experiment of one block, or member of an ensemble, alone: a run of its own, on the same data."""
        changed = (with_train(recipe, blocks=(index,)) for recipe in (self.recipe, self.origin))
        return self._with_same_data(Experiment(next(changed), origin=next(changed)))

    @functools.cached_property
    def device(self) -> torch.device:
        """Where to compute.

        Raises:
            ValueError: a GPU is asked for and there is none.
        """
        name = self.recipe.device
        if name == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device: {name}, but torch sees no GPU; use device: cpu or auto")
        return device

    @functools.cached_property
    def family(self) -> Family:
        """The family of the recipe's class.

        Raises:
            ValueError: it is not supported.
        """
        return family_named(self.recipe.model.type)

    @property
    def task(self) -> Task[Any]:
        """What is measured, drawn and sampled."""
        return self.recipe.task

    @property
    def of_method_blocks(self) -> bool:
        """Whether blocks are trained, and not the end-to-end baseline."""
        return self.recipe.method == "diffusionblocks"

    @property
    def baseline(self) -> BaselineKind | None:
        """What makes the model where nothing is converted; None where it is blocks, or one block on all levels."""
        return BASELINE_KINDS[self.recipe.method] if not self.of_method_blocks and self.task.plain_training else None

    @property
    def blocks(self) -> BlocksConfig:
        """How the model is split.

        The end-to-end training of a model that denoises anyway, of images or text, is that of one block on all levels:
        nothing is added to it or taken away. Boundaries that are still to be measured are, until then, those of equal
        probability.
        """
        blocks = self.recipe.blocks
        return blocks.until_measured() if self.of_method_blocks else blocks.as_one_block()

    # ---- data ----------------------------------------------------------------------------------------------------

    @property
    def splits(self) -> Mapping[str, Dataset]:
        """The data that are read already, by split."""
        return self._data.splits

    def data(self, split: str) -> Any:
        """The `train` or `test` data, read when they are first asked for."""
        count = self.task.test_examples(self) if split == "test" else None
        if not self._data.has(split, count):
            self._data.put(split, self._load(split, count), count)
        return self._data.splits[split]

    def _load(self, split: str, count: int | None) -> Dataset:
        if split == "test":
            return self.recipe.data.load_first(split, count)
        if split != "valid":
            return self.recipe.data.load(split)
        try:
            return self.recipe.data.load(split)
        except (FileNotFoundError, KeyError, ValueError) as error:
            raise ValueError(
                "train.early_stopping measures on a split that is neither trained nor tested on, data.valid_split, and "
                f"these data have none: {error}; set train.early_stopping to null, or give data with such a split"
            ) from None

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        """The splits that evaluation reads: none where a run trains some blocks, or only draws pictures."""
        return () if self.recipe.train.blocks is not None else self.task.splits(self.recipe.evaluate)

    @property
    def training_splits(self) -> tuple[str, ...]:
        """The splits that training reads."""
        return ("train",) if self.origin.train.early_stopping is None else ("train", "valid")

    def batches(self) -> BatchMaker:
        """What makes training batches on the device."""
        batches = self.recipe.data.batches(self.data("train"), self.device)
        return batches if self._batch_of is None else ReadBatches(batches, self._batch_of)

    def conditions_without_prompt(self, data: Dataset) -> Mapping[str, torch.Tensor]:
        """What the data tell the model's class of one example, beside image and label: with the empty prompt."""
        conditions = self.recipe.data.conditions_without_prompt(data, 1, torch.device("cpu"))
        return self.batch_of(conditions) if conditions else {}  # the class may be of a folder that is gone

    def batch_of(self, batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """A batch of the data as the model's class reads it."""
        return batch if self._batch_of is None else self._batch_of(batch)

    @functools.cached_property
    def _batch_of(self) -> Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]] | None:
        return self.family.batch_of(self.config_of(self.outline))

    def held_out(self) -> HeldOut | None:
        """What makes the batches that early stopping measures on, without augmentation; None where it does not."""
        options, size = self.recipe.train.early_stopping, self.recipe.train.batch_size
        if options is None:
            return None
        data = self.data("valid")
        # Whole batches, which are compiled once; of fewer examples than one batch what there is.
        most = len(data) if options.examples is None else min(options.examples, len(data))
        count = max(1, most // size)
        part = data.part(count * size)

        def batches() -> Iterator[Mapping[str, torch.Tensor]]:
            every = self.recipe.data.evaluation_batches(part, batch_size=size, device=self.device)
            return map(self.batch_of, itertools.islice(every, count))

        return batches

    @functools.cached_property
    def codec(self) -> TextCodec:
        """What turns text into ids and back: see `DataSection.codec`."""
        return self.recipe.data.codec()

    def with_processing_of(self, folder: Path) -> Experiment:
        """The experiment with the tokenizer or image processor in a model's folder: see `DataSection`."""
        data = self.recipe.data.with_processing_of(folder)
        return self.derive(self.recipe.model_copy(update={"data": data}), same_run=True)

    def describe(self) -> dict[str, Any]:
        """What the run trains, as JSON values: see `identity.describe_run`."""
        for split in self.training_splits:
            self.data(split)
        identity = self._data.identity("train")
        if "valid" in self.training_splits:
            identity = identity | {"held_out": self._data.identity("valid")["content"]}
        return describe_run(self.origin, identity)

    # ---- models --------------------------------------------------------------------------------------------------

    @property
    def original(self) -> Original:
        """The ordinary model."""
        options, weights = self.recipe.model, self.recipe.train.weights
        if weights is not None:
            options = options.model_copy(update={"dtype": weights})
        return Original(options, self.recipe.train.seed, self.task.new_head)

    def build(self, blocks: Sequence[int] | None = None) -> nn.Module:
        """The model on the CPU: its blocks, built one after another, or a baseline.

        Args:
            blocks: build only these (of a baseline its parts), and leave the others on the meta device; default
                `train.blocks` (None builds all).

        Raises:
            ValueError: a class or config that is not supported, or no such block.
        """
        indices = self.recipe.train.blocks if blocks is None else blocks
        if self.baseline is not None:
            return self.baseline.make(self.recipe, self.original, Original.build, indices)
        if indices and max(indices) >= self.blocks.num_blocks:
            raise ValueError(f"train.blocks = {list(indices)}: the model has blocks 0 to {self.blocks.num_blocks - 1}")
        return build(self.original.weights(), self.blocks, blocks=indices)

    def build_empty(self) -> tuple[nn.Module, Callable[[int], None] | None]:
        """As `build`, for a trainer: blocks are on the meta device, and the function gives one its weights."""
        if self.baseline is not None:
            return self.build(), None
        source = self.original.weights()
        model = empty(source, self.blocks)
        return model, lambda index: materialise(model, index, source)

    @functools.cached_property
    def outline(self) -> nn.Module:
        """As `build`, on the meta device: structure, names, shapes and dtypes, without memory for the weights.

        Raises:
            ValueError: a class or config that is not supported.
        """
        if self.baseline is not None:
            return self.baseline.make(self.recipe, self.original, outline_of)
        return assemble(outline_of(self.original), self.blocks, take=True)

    @staticmethod
    def of_blocks(model: nn.Module) -> bool:
        """Whether a model is a `DiffusionBlocks`, and not a baseline."""
        return isinstance(model, DiffusionBlocks)

    @staticmethod
    def blocks_of(model: nn.Module) -> DiffusionBlocks:
        """A model that is a `DiffusionBlocks`."""
        assert isinstance(model, DiffusionBlocks)
        return model

    @staticmethod
    def config_of(model: nn.Module) -> Any:
        """The config object of the original, of a model that `build` or `outline` made."""
        assert isinstance(model, (DiffusionBlocks, Baseline))
        return model.config

    def precision(self, model: nn.Module) -> torch.autocast:
        """The training's precision, for evaluation."""
        enabled = self.recipe.train.precision == "bfloat16"
        return torch.autocast(computes_on(model).type, torch.bfloat16, enabled=enabled)

    def trainer(
        self,
        folder: Path | None = None,
        *,
        model: nn.Module | None = None,
        loggers: tuple[Logger, ...] = (),
        progress: bool = True,
        group: Group | None = None,
        name: str | None = None,
    ) -> Trainer:
        """Model (default: the recipe's, fresh), data and trainer, checked and on the device.

        Args:
            folder: of the run, where snapshots go to `folder`/snapshots, and pictures to `folder`/samples; None keeps
                nothing.
            model: what to train, instead of the recipe's.
            loggers: further receivers of the log.
            progress: show progress bars.
            group: ranks that train the one unit together.
            name: what progress and messages call that one unit, of a trunk; None: its name in logs.
        """
        device, data, fill = self.device, self.data("train"), None
        fresh = model is None and self.recipe.model.pretrained is None
        if model is None:
            model, fill = self.build_empty()
        self.task.check_examples(self, model, data)
        if (held_out := self.held_out()) is not None:
            self.task.check_examples(self, model, self.data("valid"))
        check_attention(self.config_of(model), "model.config.", device)
        self.task.settle(self, model)
        self.task.check(self, model)
        if self.recipe.train.sample_every is not None and folder is not None:
            announcer(progress)(self.task.cost_of_pictures(self))
        description = None if folder is None else RunDescription(self.describe(), check_same_run)

        def snapshot(model: nn.Module, iteration: int) -> None:
            if folder is not None and description is not None:
                provenance = learned_from(description.values)
                self.save(model, folder / "snapshots" / f"iteration-{iteration:09d}", provenance=provenance)

        def draw(model: DiffusionBlocks, iteration: int, with_steps: Sequence[int]) -> Path | None:
            last = self._last_to_draw(model, with_steps) if fresh else None
            if folder is None or last == -1:
                return None
            path = folder / "samples" / f"step-{iteration:09d}.png"
            self.task.draw_in_training(self, model, path, last_block=last)
            return path

        return Trainer(
            model,
            self.batches(),
            self.recipe.train,
            device=device,
            fill=fill,
            folder=folder,
            loggers=loggers,
            progress=progress,
            snapshot=snapshot,
            draw=draw,
            description=description,
            group=group,
            held_out=held_out,
            name=name,
        )

    @staticmethod
    def _last_to_draw(model: DiffusionBlocks, with_steps: Sequence[int]) -> int | None:
        """The last block of a chain through blocks that have learned something; None: all have, -1: block 0 has not."""
        count = model.partition.num_blocks
        first_untrained = next((block for block in range(count) if block not in with_steps), None)
        return None if first_untrained is None else first_untrained - 1

    # ---- saved models --------------------------------------------------------------------------------------------

    def save(self, model: nn.Module, path: Path, *, provenance: dict[str, Any] | None = None) -> None:
        """Save a model to a folder: its `train.blocks` in our format, a baseline in its own library's.

        What was read with the data of how they are made, as the tokenizer of a text, goes with it (`processing_files`).

        Args:
            model: a `DiffusionBlocks`, or a baseline.
            path: the folder.
            provenance: what its blocks learned from, for their index (`identity.learned_from`).
        """
        data = self.splits.get("train")
        processing = {} if data is None else data.processing
        if isinstance(model, DiffusionBlocks):
            save(model, path, self.recipe.train.blocks, processing, provenance, card_notes(self.origin, data))
        elif isinstance(model, Baseline):
            model.save(path, processing=processing, provenance=provenance)
            remove_generated_card(path)  # of blocks that were there before

    def note_results(self, path: Path, rows: Sequence[Mapping[str, Any]], metric: float | None = None) -> None:
        """Write results into the card of a saved model of blocks, unless a person edited it.

        Args:
            path: the model's folder; of a baseline, which has no card, nothing is written.
            rows: the printed columns of its results, and after them of its baselines'.
            metric: the value of the task's score.
        """
        if not (path / INDEX).is_file():
            return
        score = None
        if self.task.score and metric is not None and math.isfinite(metric):
            score = self.task.score, metric
        notes = card_notes(self.origin, self.splits.get("train"), rows, score)
        source = read_saved(path)
        write_card(path, card_text(outline_saved(source), source.blocks, notes))

    def load(self, path: Path) -> nn.Module:
        """Load what `save` wrote, on the recipe's device; of blocks under `resident: active` the one that runs.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: a model of the other method, or of another family.
        """
        class_name = self._check_saved(path)
        device, train = self.device, self.recipe.train
        if self.baseline is not None:
            return self.baseline.load(class_name, path).to(device)
        one_at_a_time = train.resident == "active" and device.type == "cuda"
        model = load(path, device="cpu" if one_at_a_time else device)
        self._check_shape(model, path)
        if one_at_a_time:  # what was too large to train at once may be too large to stand there at once
            model.run_one_at_a_time(device)
        elif train.compile and device.type == "cuda" and not self.task.plain_training:
            model.compile_layers()
        return model

    def _check_saved(self, path: Path) -> str:
        """The class of a saved model; refuses one of another recipe."""
        recipe = self.recipe
        recover(path, MODEL_FILES)
        if not path.is_dir():
            if (path.parent / RECIPE).is_file():
                raise FileNotFoundError(
                    f"no model at {path}: the run in {path.parent} has not come to its end (diffusionblocks status "
                    f"{path.parent}); go on with it: diffusionblocks train {path.parent}"
                )
            train = f"diffusionblocks train RECIPE --out {path.parent}"
            raise FileNotFoundError(
                f"no model at {path}; train first: {train}; or name a trained one with --model RUN/model"
            )
        marks = {"diffusionblocks": INDEX} | {name: kind.mark for name, kind in BASELINE_KINDS.items()}
        method = next((name for name, mark in marks.items() if (path / mark).is_file()), None)
        if method is None:
            raise FileNotFoundError(f"{path} holds no model; of a run, give the folder RUN/model")
        index = read_json(path / marks[method])
        class_name = str(index.get("model_class") or (index.get("architectures") or [recipe.model.type])[0])
        if family_named(class_name) is not self.family:
            raise ValueError(
                f"{path} holds a {class_name}, the recipe describes a {recipe.model.type}: give the recipe that the "
                "model was trained with"
            )
        # Methods that train one class in one format share a mark.
        if marks[method] != (INDEX if self.baseline is None else self.baseline.mark):
            raise ValueError(f"{path} holds a model of method {method}, the recipe says method: {recipe.method}")
        check_same_scale(path, recipe.data, str(path))
        return class_name

    def _check_shape(self, model: DiffusionBlocks, path: Path) -> None:
        if not self.of_method_blocks and model.partition.num_blocks > 1:
            raise ValueError(
                f"{path} holds {model.partition.num_blocks} blocks, the recipe says method: end-to-end, which is one "
                "block on all levels"
            )
        options = self.recipe.model
        if options.pretrained is None:
            expected_shape = self.family.example_shape(rebuild_config(options.type, options.config))
            own_shape = self.family.example_shape(model.config)
            if own_shape != expected_shape:
                raise ValueError(
                    f"{path} holds a model of {self.task.examples} {own_shape}, the recipe describes one of "
                    f"{expected_shape}: give the recipe that the model was trained with"
                )


class _Data:
    """The data of an experiment and of those that are derived from it."""

    def __init__(self, splits: Mapping[str, Dataset]) -> None:
        self.splits: dict[str, Dataset] = dict(splits)
        self._counts: dict[str, int] = {}  # of splits whose first examples alone were read
        self._identities: dict[str, dict[str, Any]] = {}

    def has(self, split: str, count: int | None) -> bool:
        """Whether the first so many examples of a split are read; None: all."""
        most = self._counts.get(split)
        return split in self.splits and (most is None or (count is not None and count <= most))

    def put(self, split: str, data: Dataset, count: int | None) -> None:
        """Keep a split, or its first so many examples."""
        self.splits[split] = data
        self._counts.pop(split, None)
        self._identities.pop(split, None)
        if count is not None:
            self._counts[split] = count

    def identity(self, split: str) -> dict[str, Any]:
        """What tells the data of a split, which is read, apart: digested once."""
        if split not in self._identities:
            self._identities[split] = data_identity(self.splits[split])
        return self._identities[split]
