"""Recipes: YAML files that reproduce a run, validated before any work.

No imports, interpolation or code in YAML. `--set a.b=v` overrides a field; its value is parsed as YAML.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializeAsAny, ValidationError, model_validator

from ..common.config_model import ConfigModel
from ..common.fields import MOST_LEVELS, Epochs, Float, Int, Positive, Samples, Steps
from ..common.formats import read_json
from ..common.schema_errors import cut, explain, text_of
from ..common.yaml_values import MOST_BYTES, read_yaml
from ..config import BlocksConfig, blocks_as_written
from ..data.data_config import DATA, DataConfig
from ..families import family_named, supported_classes
from ..targets import check_label_loss, check_loss_chunk
from ..training import TrainConfig
from ..training.local_learning import LocalConfig
from ..training.units import check_readers
from .shipped_recipes import recipe_file
from .tasks import TASKS, AccuracyConfig, EvaluateSection, Task, tasks_of
from .tasks.task import BY_KIND


class ModelConfig(ConfigModel):
    """The ordinary model that is trained end to end, or converted.

    Attributes:
        type: A supported class, for example `ViTForImageClassification`.
        config: Values of that class's config (hidden_size, num_hidden_layers, ...).
        pretrained: Folder or hub name of weights to start from. Their shape is kept; of sizes only `num_labels` may
            differ in `config`, for a new classifier that is drawn from train.seed. Their tokenizer and image processor
            are used where `data` leaves them out, and saved beside the trained model.
        new_head: Draw the classifier afresh also where the pretrained model has as many labels as the data, but others.
        dtype: Precision of the weights that are trained, whatever pretrained files have. In `bfloat16` most steps at
            usual learning rates are rounded away; `train.weights: bfloat16` trains them without that loss, whatever
            is said here. (train.precision says how a step computes.)
    """

    type: str
    config: dict[str, Any] = Field(default_factory=dict)
    pretrained: str | None = None
    new_head: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"


class TrunkConfig(ConfigModel):
    """Train one block's worth of layers on all levels first, then branch it into the blocks.

    Of blocks of several sizes (`blocks.layers`) the trunk has the layers of the largest, and a smaller one is copied
    from some of them, evenly spaced, the first and the last among them.

    Attributes:
        steps: Steps of the trunk, where `train` is in steps; `train` is then the length of each block after the branch.
        epochs: Epochs of the trunk, where `train` is in epochs.
        lr: Learning rate of the trunk; null takes train.lr.
        lr_schedule: Schedule of the trunk; `constant` because it is not at its end when it branches.
        weights: What blocks start from: the trunk's `raw` weights, or its `averaged` ones.
        optimizer: AdamW's state after the branch: `copied` from the trunk, or `fresh`.
        average: The blocks' moving average: `fresh` from the weights at the branch, or `copied` from the trunk's, whose
            steps then count in its ramp-up.
        warmup: Warm-up of the learning rate after the branch: `none`, for the trunk is warm, or `again`, as `train`
            says, for a fresh optimizer.
    """

    steps: Steps | None = None
    epochs: Epochs | None = None
    lr: Positive | None = None
    lr_schedule: Literal["constant", "cosine"] = "constant"
    weights: Literal["raw", "averaged"] = "raw"
    optimizer: Literal["copied", "fresh"] = "copied"
    average: Literal["copied", "fresh"] = "fresh"
    warmup: Literal["none", "again"] = "none"


class ParallelConfig(ConfigModel):
    """How several processes share a run, under torchrun; one process reads nothing of it.

    Attributes:
        within_block: What ranks of one block share, where there are more ranks than blocks; also in the fit, the trunk
            and the end-to-end model, which all ranks train together. Each computes some rows of every batch, and
            gradients are summed. `replicate` holds the whole block on each. `shard` gives each some rows of its
            weights, gradients, optimizer state and average (FSDP2, layer by layer), and gathers a layer when it
            computes.
        timeout: Seconds without a sign of life after which a rank counts as dead, and the others stop.
    """

    within_block: Literal["replicate", "shard"] = "replicate"
    timeout: Float = Field(default=600.0, ge=1, le=10**6)


class FitConfig(ConfigModel):
    """Fit the noise levels first, to the cross-entropy of one block given x and z.

    Masked text takes `equal: loss` alone: equal probability is an equal share of the evidence bound, over the share of
    masked tokens. The weights follow, so that the bound stays what it is.

    Attributes:
        steps: Steps of the fit's training, where `train` is in steps. Learning rate and schedule are `train`'s.
        epochs: Epochs of the fit's training, where `train` is in epochs.
        rounds: Equal parts of it, after each of which the levels are fitted again.
        equal: What equal probability is equal of: the `rise` of the cross-entropy, or the cross-entropy itself
            (`loss`), over log sigma. `rise` trains where z narrows the candidates. `loss` is for a target whose
            likelihood is added: there steps teach the more, the more z leaves open, up to the highest levels.
        grid: Levels, even over log sigma, at which the cross-entropy is measured.
        examples: Training examples on which it is measured.
        batch_size: Examples at a time in the measurement; null takes train.batch_size.
        floor: Share of the training draws that stays spread evenly over log sigma.
    """

    steps: Steps | None = None
    epochs: Epochs | None = None
    rounds: Int = Field(default=3, ge=1, le=1000)
    equal: Literal["rise", "loss"] = "rise"
    grid: Int = Field(default=33, ge=3, le=MOST_LEVELS)
    examples: Samples = 512
    batch_size: Samples | None = None
    floor: Float = Field(default=0.05, gt=0, le=1)


class MonitorConfig(ConfigModel):
    """How a measured partition (`blocks.partition`: loss, acceleration or energy) is measured on the trunk.

    Attributes:
        power: Boundaries share the integral of the monitor to this power equally: over time, or of `loss` over the
            quantile. Less than 1 makes intervals more even. null: 0.5 of acceleration and energy, 1 of `loss`.
        levels: Levels at which it is measured.
        examples: Training examples, or trajectories, over which it is averaged.
        batch_size: Examples at a time; null takes train.batch_size.
    """

    power: Positive | None = None
    levels: Int = Field(default=64, ge=4, le=MOST_LEVELS)
    examples: Samples = 256
    batch_size: Samples | None = None


#: Classes whose own training draws its depth on the host, anew each step: a captured step would repeat the first one.
DEPTH_ON_HOST = ("RecurrentDepth",)

#: Classes with a training of their own, by its method.
OWN_TRAINING = {"noprop": ("NoPropCNN",)}

#: It is the name of a folder, too.
RowName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=,+-]*$", max_length=100)]

EvaluateConfig = Annotated[SerializeAsAny[EvaluateSection], BY_KIND]


class Recipe(ConfigModel):
    """A whole run.

    Attributes:
        name: Name of the run, and of its default output folder, runs/<name>.
        method: `diffusionblocks`, or a baseline. `end-to-end`: the same class unconverted; of a model that denoises
            anyway, of images or masked text, that is one block on all levels. `ensemble`, of classifiers and
            autoregressive text: as many unconverted networks as blocks, of one block's layers and one block's steps
            each, whose answers are averaged; train.blocks then names members. `local`, of classifiers: modules of one
            network, each trained by a loss of its own. `noprop`, of NoPropCNN: each of its networks denoises one step
            of a fixed schedule (arXiv 2503.24322).
        model: The ordinary model.
        blocks: How it is split into blocks.
        local: How modules are trained under `method: local`.
        data: What it is trained and measured on.
        fit: Fit the noise levels to the task first (classifiers and autoregressive text); null takes blocks.noise as it
            is.
        trunk: Train a trunk first and branch it into the blocks; null trains the blocks from scratch.
        monitor: How the boundaries of a measured partition are taken from the trunk.
        train: How each block is trained.
        parallel: How several processes share the run.
        evaluate: What is measured afterwards. Its kind follows from the model: `accuracy` of a classifier, measures of
            a diffusion model's `samples`, `bits` per character of a masked text model, or `language`: cross-entropies
            and continuations of an autoregressive one.
        device: Where to compute: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.
        rows: Rows of `diffusionblocks ablate` by name: of each the sections and fields in which it differs from this
            recipe. Nothing else reads them.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    method: Literal["diffusionblocks", "end-to-end", "ensemble", "local", "noprop"] = "diffusionblocks"
    model: ModelConfig
    blocks: BlocksConfig = BlocksConfig()
    local: LocalConfig = LocalConfig()
    data: DataConfig
    fit: FitConfig | None = None
    trunk: TrunkConfig | None = None
    monitor: MonitorConfig = MonitorConfig()
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    evaluate: EvaluateConfig = AccuracyConfig()
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")
    rows: dict[RowName, dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if (self.train.steps is None) == (self.train.epochs is None):
            raise ValueError(
                f"give either train.steps or train.epochs, and not both: got steps = {self.train.steps}, epochs = "
                f"{self.train.epochs}; set one of them to null"
            )
        trunk = self.trunk
        if trunk is not None and (
            (trunk.steps is None) != (self.train.steps is None) or (trunk.epochs is None) != (self.train.epochs is None)
        ):
            raise ValueError("trunk and train must both be given in steps, or both in epochs")
        family = supported_classes().get(self.model.type)
        if trunk is not None and family is not None and self.blocks.split == "layers":
            family.check_movable(self.model.type)
        return self

    @model_validator(mode="after")
    def _fit_of_the_family(self) -> Self:
        fit = self.fit
        if fit is None:
            return self
        if (fit.steps is None) != (self.train.steps is None) or (fit.epochs is None) != (self.train.epochs is None):
            raise ValueError("fit and train must both be given in steps, or both in epochs")
        if fit.steps is not None and fit.steps < fit.rounds:
            raise ValueError(f"fit.rounds = {fit.rounds} needs as many fit.steps at least, got {fit.steps}")
        if not self.task.fits_levels:
            raise ValueError(
                f"fit is for models with a cross-entropy at every level, classifiers and text; {self.model.type} is "
                "neither: leave fit out"
            )
        if fit.equal not in self.task.fits_levels:
            raise ValueError(
                f"fit.equal = {fit.equal}: levels of a {self.model.type} are fitted to the bound's own integrand; set "
                f"fit.equal to {self.task.fits_levels[0]}"
            )
        if self.blocks.noise is not None and not hasattr(self.blocks.noise, "quantiles"):
            raise ValueError(
                f"fit writes the levels into blocks.noise.quantiles, which the noise process {self.blocks.noise.kind} "
                "has not: use kind: edm, or leave fit out"
            )
        if getattr(self.blocks.noise, "quantiles", None) is not None:
            raise ValueError("blocks.noise.quantiles are fitted levels already: leave them out, or fit")
        if self.blocks.layers is not None and len(set(self.blocks.layers)) > 1:
            raise ValueError(f"a fit trains one of equal blocks, not blocks.layers = {self.blocks.layers}")
        return self

    @model_validator(mode="after")
    def _pictures_that_can_be_drawn(self) -> Self:
        if self.train.sample_every is None or self.model.type not in supported_classes():
            return self
        if not self.task.draws_in_training:
            raise ValueError(
                f"train.sample_every = {self.train.sample_every} draws diffusion models of images, and "
                f"{self.model.type} {self.task.does}: set train.sample_every to null"
            )
        if self.train.blocks is not None:
            raise ValueError(
                f"train.sample_every = {self.train.sample_every} draws chains through all blocks, and train.blocks = "
                f"{list(self.train.blocks)} trains some without the others: set train.sample_every to null"
            )
        return self

    @model_validator(mode="after")
    def _partition_that_can_be_measured(self) -> Self:
        blocks = self.blocks
        if self.method != "diffusionblocks" or not blocks.measured_later:
            return self
        if self.trunk is None:
            raise ValueError(
                f"blocks.partition = {blocks.partition} is measured on a trunk, and there is none: give the recipe a "
                "section trunk, or leave blocks.partition out"
            )
        if self.model.type in supported_classes() and blocks.partition != "loss" and not self.task.has_trajectories:
            raise ValueError(
                f"blocks.partition = {blocks.partition} is measured on the trajectories of images, and "
                f"{self.model.type} {self.task.does}: set blocks.partition to loss"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _evaluation_of_the_model(cls, values: Any) -> Any:
        # Before the sections are read: fields of another kind would only hide what is wrong.
        if not isinstance(values, dict):
            return values
        model, section = values.get("model"), values.get("evaluate", {})
        name = model.get("type") if isinstance(model, dict) else getattr(model, "type", None)
        family = supported_classes().get(name) if isinstance(name, str) else None
        if family is None:  # refused where it is looked up, with the list; what would be measured is not known
            return values | {"evaluate": {"kind": next(iter(TASKS))}} if isinstance(section, dict) else values
        kinds = [task.kind for task in tasks_of(family.target)]
        if isinstance(section, dict) and "kind" not in section:
            return values | {"evaluate": {"kind": kinds[0], **section}}
        kind = section.get("kind") if isinstance(section, dict) else getattr(section, "kind", kinds[0])
        if kind not in kinds:
            choices = " or ".join(kinds)
            unknown = isinstance(kind, str) and kind not in TASKS
            own = "" if not unknown else ". Of your own, import the package that registers it first (register_task)"
            raise ValueError(f"evaluate.kind must be {choices} for {name}, got {cut(str(kind), 80)}; leave it out{own}")
        return values

    @property
    def task(self) -> Task[Any]:
        """What is measured, drawn and sampled: it follows from `evaluate.kind`, and that from the model."""
        return TASKS[self.evaluate.kind]

    @model_validator(mode="after")
    def _data_of_the_task(self) -> Self:
        if self.model.type not in supported_classes():
            return self
        task = self.task
        if self.data.examples not in task.takes:
            choices = [kind for kind, section in DATA.items() if section.examples in task.takes]
            raise ValueError(
                f"{self.model.type} {task.does}; data.kind: {self.data.kind} is for {self.data.users}; "
                f"allowed: {', '.join(choices)}"
            )
        model = f"{self.model.type} {task.does} and"
        check_loss_chunk(self.train.loss_chunk, model, of_text=task.of_text, name="train.loss_chunk")
        check_label_loss(
            self.train.label_loss, model, of_labels=task.target == "label", context=self._has_context_logits
        )
        task.check_recipe(self)
        if self.method == "local" and task.target != "label":
            raise ValueError(f"method: local is for classifiers; {self.model.type} {task.does}: use method: end-to-end")
        if self.method == "ensemble" and (not task.plain_training or self.model.type in DEPTH_ON_HOST):
            raise ValueError(
                "method: ensemble is for models of several blocks whose answers can be averaged, and "
                f"{self.model.type} {task.does}"
                + (" in one" if task.plain_training else "")
                + ": use method: end-to-end"
            )
        if self.method == "local":
            check_readers(self.train)
        if self.train.early_stopping is not None and self._moves_in_common:
            raise ValueError(
                "train.early_stopping stops each block by itself, and with "
                + ("method: local modules read" if self.method == "local" else "blocks.shared: joint blocks move")
                + " what others move: set train.early_stopping to null"
                + ("" if self.method == "local" else ", or blocks.shared to replicated")
            )
        if self.model.type not in OWN_TRAINING.get(self.method, (self.model.type,)):
            classes = " or ".join(OWN_TRAINING[self.method])
            raise ValueError(
                f"method: {self.method} is the training of {classes} alone, got model.type: {self.model.type}; use "
                "method: diffusionblocks or end-to-end"
            )
        return self

    @property
    def _moves_in_common(self) -> bool:
        """Whether what is trained apart moves, or reads, what other parts move."""
        joint = self.method == "diffusionblocks" and self.blocks.shared == "joint" and self.blocks.num_blocks > 1
        return joint or self.method == "local"

    @property
    def _has_context_logits(self) -> bool:
        """Whether a classifier's logits are known without what z says; end to end there is no z."""
        target = self.blocks.target
        return self.method != "diffusionblocks" or target is None or target.adds_likelihood

    @model_validator(mode="after")
    def _no_graph_of_a_drawn_depth(self) -> Self:
        if self.method != "diffusionblocks" and self.train.cuda_graph and self.model.type in DEPTH_ON_HOST:
            raise ValueError(
                f"train.cuda_graph = true captures one step, but {self.model.type} end to end draws its number of "
                "iterations anew each step: set train.cuda_graph to false"
            )
        return self


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: a YAML file, the folder of a run, or the name of a recipe that ships: see `recipe_file`.
        overrides: `a.b=value` strings; the value is YAML (`null`, `[1, 2]`, `0.1`, `text`).

    Raises:
        FileNotFoundError: no such file, and none of that name ships.
        ValueError: not YAML, an unknown field, or a value that is not allowed; the message names field and value.
    """
    file = recipe_file(path)
    if file.suffix == ".json":  # which a run wrote
        values: Any = with_target(read_json(file))
    else:
        with file.open("rb") as opened:
            values = read_yaml(opened.read(MOST_BYTES + 1), str(file))
    if not isinstance(values, dict):
        content = "is empty" if values is None else f"holds {text_of(values)}"
        raise ValueError(f"{file} {content}: a recipe is sections with names, as model, data and train")
    for override in overrides or []:
        _override(values, override)
    return parse_recipe(values, f"{file}, with what --set changes," if overrides else str(file))


def parse_recipe(values: dict[str, Any], where: str) -> Recipe:
    """Validate a recipe given as plain values; ValueError names every wrong field, its value and what is allowed."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where} is not a valid recipe:\n{explain(error, Recipe)}") from None


def _override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        raise ValueError(f"--set wants field.name=value, got {text_of(override)}")
    put(values, name, read_yaml(text, f"--set {name}"), f"--set {name}")


def with_target(description: dict[str, Any]) -> dict[str, Any]:
    """With the blocks' target as it was meant; versions that left the family's default out knew no `likelihood`."""
    blocks, model = description.get("blocks"), description.get("model")
    name = model.get("type") if isinstance(model, dict) else None
    if not isinstance(blocks, dict) or not isinstance(name, str) or name not in supported_classes():
        return description
    if blocks.get("target") is None:
        blocks = blocks | {"target": {"kind": family_named(name).target}}
    return description | {"blocks": blocks_as_written(blocks)}


def put(values: dict[str, Any], name: str, value: Any, where: str) -> None:
    """Give one field of a recipe's plain values another value; sections that were left out are made.

    Args:
        values: they are changed.
        name: dotted name of the field.
        value: a plain value.
        where: how messages begin.

    Raises:
        ValueError: a parent of the field is no section.
    """
    *parents, last = name.split(".")
    place = values
    for parent in parents:
        inner = place.get(parent)
        if inner is None:  # absent, or null: a section that was left out
            inner = place[parent] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"{where}: {parent} is {text_of(inner)}, not a section")
        place = inner
    place[last] = value
    if name == "data.source" and "folder" in place:  # what the user names wins over the environment variable
        place["folder"] = None
