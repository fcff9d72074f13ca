"""Tasks: what is measured, drawn, sampled and printed of the models of one kind of target; one object each.

A task's modules import torch only where it works: the command line reads its options and its words for `--help`.
"""

from __future__ import annotations

import abc
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Protocol, TypeVar, cast

from ...common.by_kind import ByKind, kind_of
from ...common.choices import NameOf
from ...common.config_model import ConfigModel
from ...common.fields import MANY_CALLS, MOST_CALLS
from ...common.messages import warn_once
from ...common.processing_files import read_files
from ...common.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...core.model import DiffusionBlocks
    from ...data.dataset import Dataset
    from ..experiment import Experiment
    from ..recipe import Recipe


def level_grids() -> Collection[str]:
    """Names of all level grids."""
    from ...noise.grids import GRIDS

    return GRIDS


def level_grid(name: str) -> str:
    """The name of a level grid; older names become those of today.

    Raises:
        ValueError: there is none of that name.
    """
    from ...noise.grids import GRIDS, grid_name

    return GRIDS.check(grid_name(name))


#: The name of a level grid, as a field of a config; which of them suit a process, `NoiseProcess.check_grid` says.
LevelGrid = Annotated[str, NameOf(level_grids, level_grid)]


class EvaluateSection(ConfigModel):
    """Base class of the kinds of `evaluate` section; a task has one, with a field `kind: Literal["its name"]`."""

    if TYPE_CHECKING:
        kind: str


class Row(Protocol):
    """What one setting gave."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""


@dataclass(frozen=True)
class RunResult:
    """What a run left: the model, its measures, and what training took (a fit of its levels and a trunk included).

    Of a run in parts that trains some of the blocks, the model is an outline on the meta device.

    Attributes:
        device_seconds: of training, those of all devices added up, where several trained one unit; None: `seconds`.
    """

    model: nn.Module
    rows: list[Row]
    seconds: float
    iterations: int
    device_seconds: float | None = None


@dataclass(frozen=True)
class SampleOption:
    """An option of `diffusionblocks sample` that not every task has.

    Attributes:
        name: as Python has it: `top_p` is the option --top-p.
        help: one line.
        parsed: how it is parsed: further arguments of `argparse.ArgumentParser.add_argument`.
        aliases: other spellings, without the dashes.
    """

    name: str
    help: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()


#: Of texts that are generated.
TEMPERATURE = SampleOption("temperature", "text: divides the logits (default: the recipe's)", {"type": float})

#: What is to be seen, or how a text begins.
PROMPT = SampleOption(
    "prompt",
    "continued text: go on from this; images: what is to be seen (default: the data's prompts); repeatable",
    {"action": "append", "metavar": "TEXT"},
)

Options = TypeVar("Options", bound=EvaluateSection)


class Task(abc.ABC, Generic[Options]):
    """What an experiment measures of one kind of model. Stateless; a subclass is added by `register_task`."""

    #: kind of the target that the models denoise
    target: ClassVar[str]
    #: the schema of the recipe's `evaluate` section; its `kind` names the task
    section: ClassVar[type[EvaluateSection]]
    #: what an example may be (`DataSection.examples`)
    takes: ClassVar[tuple[str, ...]]
    #: what a model does, for messages
    does: ClassVar[str]
    #: what `diffusionblocks sample` makes; "" where there is nothing to sample
    makes: ClassVar[str] = ""
    #: what examples are called, and what is counted in them
    examples: ClassVar[str] = "images"
    classes: ClassVar[str] = "classes"
    #: whether examples are texts, whose loss can be read off in chunks
    of_text: ClassVar[bool] = False
    #: of what equal probability can be equal where noise levels are fitted (`fit.equal`); none: they cannot be
    fits_levels: ClassVar[tuple[str, ...]] = ()
    #: whether z follows a probability-flow ODE in the data's own space
    has_trajectories: ClassVar[bool] = False
    #: whether the model can be drawn while it trains (`train.sample_every`)
    draws_in_training: ClassVar[bool] = False
    #: whether the class has an end-to-end training of its own; else it denoises anyway, on all levels at once
    plain_training: ClassVar[bool] = False
    #: whether `evaluate --by-level` measures each block at levels of its own
    by_level: ClassVar[bool] = False
    #: whether a trained model may have another number of labels, with a new head
    new_head: ClassVar[bool] = False
    #: test examples that the measures need
    least_examples: ClassVar[int] = 1
    #: the entry of `summary` whose spread over seeds is told; "" for none
    score: ClassVar[str] = ""
    #: whether `measure`, `measure_by_level` and `sample` are the work of several ranks (`experiment.work`): all call
    #: them, and the first one has the results; else it is alone
    shares_work: ClassVar[bool] = False
    #: options of `diffusionblocks sample`, beside those that all tasks have
    sample_options: ClassVar[tuple[SampleOption, ...]] = ()

    @property
    def kind(self) -> str:
        """The name: `evaluate.kind`."""
        return kind_of(self.section)

    def options(self, experiment: Experiment) -> Options:
        """The recipe's `evaluate` section."""
        return cast(Options, experiment.recipe.evaluate)

    def spread_text(self, deviation: float) -> str:
        """The standard deviation of `score` over seeds, in the unit of that score's column."""
        return f"{deviation:.4f}"

    # ---- one block as an ordinary model ------------------------------------------------------------------------

    def images_to_compare(self, experiment: Experiment, model: nn.Module) -> Mapping[str, Tensor]:
        """A batch of test images, on which an exported block that is not exact is compared with the block.

        Raises:
            ValueError: for this kind of model there is nothing between exact and refused.
        """
        raise ValueError(
            f"--approximate is for classifiers; {experiment.recipe.model.type} {self.does}, and its blocks are "
            "exported exactly or not at all: leave it out"
        )

    def files_of_export(self, experiment: Experiment, model: nn.Module, folder: Path) -> dict[str, bytes]:
        """Files that lie beside an exported block, by name: what its library makes inputs with.

        Args:
            experiment: of the run.
            model: the trained model.
            folder: where it is saved, with a tokenizer or an image processor.
        """
        return read_files(folder)

    # ---- checks ------------------------------------------------------------------------------------------------

    def check_recipe(self, recipe: Recipe) -> None:
        """Raise ValueError if sections of the recipe do not go together."""

    def check_examples(self, experiment: Experiment, model: nn.Module, data: Dataset) -> None:
        """Refuse examples that the model does not take, before any GPU work."""
        config, family, pretrained = experiment.config_of(model), experiment.family, experiment.recipe.model.pretrained
        family.check_conditions(
            config, experiment.conditions_without_prompt(data), f"model.type = {experiment.recipe.model.type}"
        )
        shape = family.example_shape(config)
        if not family.takes_shape(config, data.example_shape):
            ours, theirs = ("x".join(map(str, s)) for s in (shape, data.example_shape))
            where = self.mend_shape(shape, pretrained is not None)
            raise ValueError(f"the model takes {self.examples} of {ours}, the data has {theirs}; {where}")
        count, name = family.num_classes(config), family.class_count_field
        if not family.takes_classes(config, data.num_classes):
            if pretrained is not None and not self.new_head:
                fix = f"its weights have {count}: give the tokenizer or data that {pretrained} was trained with"
            else:
                fix = f"--set model.config.{name}={family.classes_for(data.num_classes)}"
            raise ValueError(f"the model has {name} = {count}, the data has {data.num_classes} {self.classes}; {fix}")

    def mend_shape(self, model: tuple[int, ...], pretrained: bool) -> str:
        """What to do about examples of another shape."""
        return "give data of the size that it was trained on" if pretrained else "set their size in model.config"

    def check(self, experiment: Experiment, model: nn.Module) -> None:
        """Refuse before work what could only fail after it: the one check of all that `measure` does.

        Args:
            experiment: of the splits that it has read already; a test split among them is one that will be measured.
            model: on any device, the meta device too.

        Raises:
            ValueError: test data that the model does not take, or too few; settings that multiply to more than anybody
                waits for; or what a task refuses besides, see `check_settings`.
            ImportError: a package that the measures need is not installed.
        """
        if experiment.of_blocks(model):
            grids = getattr(experiment.recipe.evaluate, "grid", None) or ()
            for grid in (grids,) if isinstance(grids, str) else grids:
                experiment.blocks_of(model).noise.check_grid(grid, "evaluate.grid")
        test = experiment.splits.get("test")
        if test is not None:
            self.check_examples(experiment, model, test)
            self._check_enough(test)
            self._check_calls(experiment, model, test)
        self.check_settings(experiment, model)

    def check_settings(self, experiment: Experiment, model: nn.Module) -> None:
        """Raise ValueError or ImportError if the measures cannot be taken with the recipe's settings."""

    def _check_enough(self, test: Dataset) -> None:
        """Refuse a test split with fewer examples than the measure needs: two sequences have a standard error."""
        if len(test) >= self.least_examples:
            return
        what = f"sequences of data.length = {test.example_shape[0]}" if self.of_text else "examples"
        raise ValueError(
            f"the test split has {len(test)} {what}, and evaluate.kind: {self.kind} needs {self.least_examples}: give "
            "more test data" + (", or set data.length lower" if self.of_text else "")
        )

    @abc.abstractmethod
    def calls(self, experiment: Experiment, model: nn.Module, test: Dataset) -> int:
        """About how often `measure` calls a block, each example counted by itself: what its settings multiply to."""

    def _check_calls(self, experiment: Experiment, model: nn.Module, test: Dataset) -> None:
        """Refuse settings that multiply to more than anybody waits for; say so where they are many."""
        calls, options = self.calls(experiment, model, test), experiment.recipe.evaluate
        names = ("samples", "steps", "seeds", "new_tokens", "limit")
        lower = " or ".join(f"evaluate.{name}" for name in names if hasattr(options, name))
        cost = f"evaluation takes about {calls:,} calls of a block, each example counted by itself"
        if calls > MOST_CALLS:
            raise ValueError(f"{cost}, more than {MOST_CALLS:,}: set {lower} lower")
        if calls > MANY_CALLS:
            warn_once(f"{cost}; for a quick look set {lower} lower")

    # ---- pictures of a model that trains -----------------------------------------------------------------------

    def cost_of_pictures(self, experiment: Experiment) -> str:
        """What `train.sample_every` costs, in one line."""
        raise NotImplementedError

    def draw_in_training(
        self, experiment: Experiment, model: DiffusionBlocks, path: Path, *, last_block: int | None
    ) -> None:
        """Draw samples of a model that trains, as a PNG; always of the same noise, labels and prompts.

        Args:
            experiment: of a task that `draws_in_training`.
            model: where it computes.
            path: the PNG.
            last_block: the last block that has learned anything, and so the last that is asked; None: all have.
        """
        raise NotImplementedError

    # ---- measures ----------------------------------------------------------------------------------------------

    def splits(self, options: Any) -> tuple[str, ...]:
        """The splits that `measure` reads."""
        return ("test",)

    def test_examples(self, experiment: Experiment) -> int | None:
        """How many examples of the split `test` are used, the first; None: all. What is after them need not be read."""
        return None

    @abc.abstractmethod
    def measure(self, experiment: Experiment, model: nn.Module) -> Sequence[Row]:
        """Measure a model as the recipe's `evaluate` section says: one row a combination of its settings."""

    def headline(self, rows: Sequence[Any]) -> Any:
        """The row that stands for the run in a table, fixed beforehand: nothing is selected by its result."""
        return rows[0]

    def measure_by_level(
        self, experiment: Experiment, model: DiffusionBlocks, *, every_block: bool = False
    ) -> Sequence[Row]:
        """Measure every block at levels of its own, or with `every_block` at those of all.

        Raises:
            ValueError: the task has no such measure.
        """
        does = f"generates {self.makes}" if self.makes else self.does
        raise ValueError(f"--by-level is for classifiers; {experiment.recipe.model.type} {does}")

    def draw_by_level(self, model: DiffusionBlocks, rows: Sequence[Any], path: Path) -> None:
        """Draw what `measure_by_level` gave as a PNG.

        Raises:
            ValueError: the task has no such figure.
        """
        raise ValueError(f"--figure: evaluate.kind: {self.kind} has no figure of its levels; leave it out")

    def compare_neighbours(
        self,
        experiment: Experiment,
        model: nn.Module,
        folder: Path,
        *,
        count: int,
        examples: int,
        shares: Sequence[float] | None,
    ) -> tuple[Sequence[Row], Sequence[Row]]:
        """Compare neighbouring blocks at the boundary between them, for `diffusionblocks boundaries`.

        Args:
            experiment: of the run.
            model: what it trained.
            folder: where the figure goes.
            count: samples for each place of a boundary.
            examples: of the training data, at which neighbours are compared.
            shares: by which each boundary is moved; None: the usual ones.

        Returns:
            A row a boundary, and a row a boundary and share.

        Raises:
            ValueError: the task has no such measure.
        """
        raise ValueError(f"boundaries is for diffusion models of images; {experiment.recipe.model.type} {self.does}")

    # ---- tables and figures --------------------------------------------------------------------------------------

    def summary(self, rows: Sequence[Any]) -> dict[str, Any]:
        """A run's measures as JSON values, in a row of a comparison's table."""
        result: dict[str, Any] = self.headline(rows).to_dict()
        return result

    def text(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """A run's measures, as JSON values, as they are printed; what is `by_level` is a table of its own."""
        from ...reports.tables import format_table

        return format_table([{name: value for name, value in row.items() if name != "by_level"} for row in rows])

    def details(self, table: Sequence[Mapping[str, Any]]) -> list[str]:
        """What is printed below a comparison's table, from the rows that `summary` gave it.

        Args:
            table: its rows; `key` names them.
        """
        return []

    @abc.abstractmethod
    def columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The printed columns of a row of a comparison's table, from what `summary` put there."""

    def draw(
        self,
        experiment: Experiment,
        table: Sequence[Mapping[str, Any]],
        results: Mapping[str, RunResult],
        folder: Path,
    ) -> None:
        """Draw a comparison's figures.

        Args:
            experiment: what was compared.
            table: its rows; `key` names them.
            results: by key.
            folder: of the comparison; each row has a folder of its own below it.
        """

    # ---- new examples ----------------------------------------------------------------------------------------------

    def predict(self, experiment: Experiment, model: nn.Module, files: Sequence[Path]) -> Iterator[dict[str, float]]:
        """Predict the class of each picture.

        Args:
            experiment: of the run.
            model: its trained model.
            files: of the pictures, in any sizes.

        Yields:
            For each file the probability of each class, by name, the likeliest first.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a picture that cannot be decoded, or a model that does not classify.
        """
        kind = experiment.recipe.model.type
        raise ValueError(f"predict is for classifiers; {kind} generates {self.makes}: use sample")

    # ---- samples -------------------------------------------------------------------------------------------------

    def sample(
        self, experiment: Experiment, model: nn.Module, folder: Path, values: Mapping[str, Any], *, progress: bool
    ) -> list[Path]:
        """Make samples for `diffusionblocks sample`.

        Args:
            experiment: says what is not given.
            model: what to sample from.
            folder: where the files go.
            values: the options of the command by name; None where one is not given.
            progress: show a progress bar.

        Returns:
            The files.
        """
        raise ValueError(f"sample is for diffusion models; {experiment.recipe.model.type} {self.does}: use evaluate")

    # ---- models --------------------------------------------------------------------------------------------------

    def settle(self, experiment: Experiment, model: nn.Module) -> None:
        """Adjust a new model's configs to the recipe's data, before it is trained."""


#: Tasks by `evaluate.kind`.
TASKS: Registry[Task[Any]] = Registry("task")

_SECTIONS: Registry[type[EvaluateSection]] = Registry("task")

#: The type of a recipe's `evaluate` section.
BY_KIND = ByKind(_SECTIONS)


def baselines_in(table: Sequence[Mapping[str, Any]], measure: str) -> list[tuple[str, float]]:
    """The baselines' rows of a comparison's table: their labels in a figure, and a measure of each."""
    rows = [row for row in table if row["name"] != "diffusionblocks"]
    return [(f"{row['key']} ({row['iterations']} steps)", row[measure]) for row in rows]


TaskClass = TypeVar("TaskClass", bound=type[Task[Any]])


def register_task(task: TaskClass) -> TaskClass:
    """Add a task, as a decorator of its class; recipes of models with its target can then say its `evaluate.kind`.

    Of several tasks of one target the first that was registered is taken where a recipe names none.

    Args:
        task: a subclass of `Task`, without arguments of `__init__`.

    Raises:
        TypeError: no such subclass, or methods that it must write are missing.
        ValueError: attributes are missing, its section has no field `kind: Literal["its name"]`, or the name is taken.
    """
    if not isinstance(task, type) or not issubclass(task, Task):
        raise TypeError(f"register_task takes a subclass of diffusionblocks.Task, got {task!r}")
    # Every recipe without evaluate.kind asks every task for its target.
    if missing := [name for name in ("target", "section", "takes", "does") if not hasattr(task, name)]:
        raise ValueError(f"{task.__name__} lacks {', '.join(missing)}: a task says these as class attributes")
    if not isinstance(task.takes, tuple):  # of a text, `in` would find parts
        raise ValueError(f"{task.__name__}: takes is names in a tuple, as in ('images',); got {task.takes!r}")
    instance = task()
    _SECTIONS.register(instance.kind, instance.section)
    TASKS.register(instance.kind, instance)
    return task


def tasks_of(target: str) -> list[Task[Any]]:
    """The tasks of models with a target, the one that is taken by default first.

    Args:
        target: kind of the target.

    Raises:
        ValueError: there is none.
    """
    tasks = [task for task in TASKS.values() if task.target == target]
    if not tasks:
        raise ValueError(f"no task measures models that denoise {target}: add one with diffusionblocks.register_task")
    return tasks
