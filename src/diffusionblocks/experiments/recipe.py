"""Recipes: YAML files that reproduce a run, validated before any work.

No imports, interpolation or code in YAML. `--set a.b=v` overrides a field; its value is parsed as YAML.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from ..common.fields import (
    MOST_LENGTH,
    MOST_LEVELS,
    MOST_SAMPLES,
    Epochs,
    Float,
    Int,
    Length,
    Levels,
    Many,
    NonNegative,
    Positive,
    Samples,
    Seed,
    Steps,
)
from ..common.messages import near
from ..common.yaml_values import MOST_BYTES, read_yaml
from ..config import BlocksConfig
from ..data.data_config import DataConfig, LatentsConfig
from ..families import supported_classes
from ..noise import NOISE_PROCESSES, GridName
from ..sampling import SolverName
from ..targets import FEEDBACK_NAMES, LabelFeedback, TokenFeedback, check_loss_chunk
from ..training import TrainConfig


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    """The ordinary model that is trained end to end, or converted.

    Attributes:
        type: A supported class, for example `ViTForImageClassification`.
        config: Values of that class's config (hidden_size, num_hidden_layers, ...).
        pretrained: Folder or hub name of weights to start from. Their shape is kept; of sizes only `num_labels` may
            differ in `config`, for a new classifier that is drawn from train.seed.
        dtype: Precision of the weights that are trained, whatever pretrained files have. In `bfloat16` most steps at
            usual learning rates are rounded away. (train.precision says how a step computes.)
    """

    type: str
    config: dict[str, Any] = Field(default_factory=dict)
    pretrained: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


class AccuracyConfig(_Section):
    """Accuracy is measured for every pair of `steps` and `seeds`.

    Attributes:
        steps: denoising steps.
        seeds: noise seeds whose probabilities are averaged.
        feedback: `soft` or `hard`; null takes the model's.
        grid: level grid, one that suits the noise process: of EDM `equal-quantile` or `karras`.
        batch_size: images at a time.
        limit: only the first so many test images, for a quick look; null takes all.
        seed: of the starting noise.
    """

    kind: Literal["accuracy"] = "accuracy"
    steps: Many[Levels] = (1, 3)
    seeds: Many[Levels] = (1, 8)
    feedback: LabelFeedback | None = Field(default=None, validation_alias=FEEDBACK_NAMES)
    grid: GridName = "equal-quantile"
    batch_size: Samples = 500
    limit: Samples | None = None
    seed: Seed = 0


class SamplesConfig(_Section):
    """Generated images are measured for every combination of solver, steps, grid and guidance.

    Attributes:
        samples: how many images; labels take turns, image i starts from the noise of seed `seed` + i.
        solver: `euler` (the paper), `heun` (EDM), `dpmpp-2m` (DPM-Solver++(2M)) or one that is registered.
        steps: solver steps.
        grid: levels: of EDM `karras` (EDM eq. 5) or `equal-quantile`, of flow matching `uniform` or `equal-quantile`.
        guidance: classifier-free guidance on D; 1 is none.
        features: `classifier`: a small CNN that is trained on the data set first, and kept; `inception`: FID (extra:
            fid); null: only draw pictures.
        features_folder: where the classifier is kept; null is runs/<name>-features.
        reference_images: compare with so many real images of each split, the first; null takes all (of latents each
            has to be decoded).
        batch_size: images at a time.
        grid_images: how many images the picture shows.
        seed: see `samples`.
    """

    kind: Literal["samples"]
    samples: Int = Field(default=10_000, ge=2, le=MOST_SAMPLES)
    solver: Many[SolverName] = ("euler",)
    steps: Many[Levels] = (50,)
    grid: Many[GridName] = ("karras",)
    guidance: Many[NonNegative] = (1.0,)
    features: Literal["classifier", "inception"] | None = "classifier"
    features_folder: Path | None = None
    reference_images: Int | None = Field(default=None, ge=2, le=MOST_SAMPLES)
    batch_size: Samples = 500
    grid_images: Int = Field(default=100, ge=1, le=10_000)
    seed: Seed = 0


class BitsConfig(_Section):
    """Bits a character of a masked text model: the evidence bound, each level by the block that owns it.

    Attributes:
        batch_size: sequences at a time.
        limit: only the first so many sequences of the test text; null takes all.
        times: levels drawn for each sequence and block.
        seed: of levels and masks, and of the first generated text.
        samples: how many texts are generated to be looked at.
        steps, grid, temperature: of the generated texts, see `DiffusionBlocks.generate`.
    """

    kind: Literal["bits"]
    batch_size: Samples = 256
    limit: Int | None = Field(default=None, ge=2, le=MOST_SAMPLES)
    times: Levels = 1
    seed: Seed = 0
    samples: Samples = 16
    steps: Levels = 64
    grid: GridName = "equal-quantile"
    temperature: NonNegative = 1.0


class LanguageConfig(_Section):
    """An autoregressive text model: cross-entropy of the test text by level, and measures of what it writes.

    Attributes:
        batch_size: sequences at a time.
        limit: only the first so many sequences of the test text; null takes all.
        seed: of the noise, and of the first continuation; continuation i has seed `seed` + i.
        levels: at how many levels the cross-entropy is measured.
        samples: how many continuations are written, of as many prompts, the first of the test text.
        generation_batch_size: continuations that are written together; null takes batch_size. It changes no text. On a
            GPU a token of hundreds of them takes about as long as a token of one.
        prompt_length: tokens of a prompt; 0 writes from nothing.
        new_tokens: tokens of a continuation.
        steps: denoising steps a token; null: one a block.
        grid: level grid, one that suits the noise process: of EDM `equal-quantile` or `karras`.
        feedback: `soft`, `hard`, `sampled` or `top-k`; null takes the model's.
        temperature: of the tokens' distribution; 0 takes the likeliest.
        top_p: draw from the likeliest tokens of this total probability only; 1 draws from all.
        teacher: folder or hub name of a causal language model, for generative perplexity; null: none.
        teacher_tokens: whether the teacher has the tokenizer of the data; else it is given the text.
        mauve: folder or hub name of the model whose features MAUVE compares (the reference takes gpt2-large); null:
            none.
    """

    kind: Literal["language"]
    batch_size: Samples = 32
    limit: Int | None = Field(default=None, ge=2, le=MOST_SAMPLES)
    seed: Seed = 0
    levels: Int = Field(default=16, ge=2, le=MOST_LEVELS)
    samples: Samples = 16
    generation_batch_size: Samples | None = None
    prompt_length: Int = Field(default=50, ge=0, le=MOST_LENGTH)
    new_tokens: Length = 50
    steps: Levels | None = None
    grid: GridName = "equal-quantile"
    feedback: TokenFeedback | None = Field(default=None, validation_alias=FEEDBACK_NAMES)
    temperature: NonNegative = 1.0
    top_p: Float = Field(default=1.0, gt=0, le=1)
    teacher: str | None = None
    teacher_tokens: bool = True
    mauve: str | None = None


class TrunkConfig(_Section):
    """Train one block's worth of layers on all levels first, then branch it into the blocks.

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


class FitConfig(_Section):
    """Fit the noise levels first: equal mass is equal rise of the cross-entropy, as one block's worth of layers has it.

    Attributes:
        steps: Steps of the fit's training, where `train` is in steps. Learning rate and schedule are `train`'s.
        epochs: Epochs of the fit's training, where `train` is in epochs.
        rounds: Equal parts of it, after each of which the levels are fitted again.
        grid: Levels, even over log sigma, at which the cross-entropy is measured.
        examples: Training examples on which it is measured.
        batch_size: Examples at a time in the measurement; null takes train.batch_size.
        floor: Share of the training draws that stays spread evenly over log sigma.
    """

    steps: Steps | None = None
    epochs: Epochs | None = None
    rounds: Int = Field(default=3, ge=1, le=1000)
    grid: Int = Field(default=33, ge=3, le=MOST_LEVELS)
    examples: Samples = 512
    batch_size: Samples | None = None
    floor: Float = Field(default=0.05, gt=0, le=1)


#: The tags of unions in a recipe: part of pydantic's location of an error, but not of the YAML.
_TAGS = {
    "data": ("digits", "images", "latents", "topics", "text", "tokens"),
    "evaluate": ("accuracy", "samples", "bits", "language"),
    "target": ("label", "image", "tokens", "next-token"),
    "noise": tuple(NOISE_PROCESSES),
}

#: Wrong fields that a message lists, and how long a line of them may be.
_MOST_LINES, _MOST_CHARACTERS = 5, 600

_SHOULD = "Input should be "
_SECTION = f"{_SHOULD}a section, with fields of its own"
_PATTERNS = {
    "name": "Input should be letters, digits, '.', '_' or '-', the first a letter or digit",
    "device": "Input should be auto, cpu, cuda or cuda:N",
}

#: Classes whose own training draws its depth on the host, anew each step: a captured step would repeat the first one.
DEPTH_ON_HOST = ("RecurrentDepth",)

#: What families denoise whose levels can be fitted.
_FITTED = ("label", "next-token")

#: What each family is measured by, and the data that it takes, by what it denoises.
_MEASURES = {"label": "accuracy", "image": "samples", "tokens": "bits", "next-token": "language"}
_DATA = {
    "label": ("digits", "images"),
    "image": ("digits", "images", "latents"),
    "tokens": ("topics", "text"),
    "next-token": ("topics", "text", "tokens"),
}
_DOES = {
    "label": "classifies images",
    "image": "generates images",
    "tokens": "generates text",
    "next-token": "generates text",
}


def _evaluation_kind(values: Any) -> str:
    found = values.get("kind", "accuracy") if isinstance(values, dict) else getattr(values, "kind", values)
    return str(found)


EvaluateConfig = Annotated[
    Annotated[AccuracyConfig, Tag("accuracy")]
    | Annotated[SamplesConfig, Tag("samples")]
    | Annotated[BitsConfig, Tag("bits")]
    | Annotated[LanguageConfig, Tag("language")],
    Discriminator(_evaluation_kind),
]


class Recipe(_Section):
    """A whole run.

    Attributes:
        name: Name of the run, and of its default output folder, runs/<name>.
        method: `diffusionblocks`, or `end-to-end`: the baseline, the same class unconverted. Of a model that denoises
            anyway, of images or masked text, that is one block on all levels.
        model: The ordinary model.
        blocks: How it is split into blocks.
        data: What it is trained and measured on.
        fit: Fit the noise levels to the task first (classifiers and autoregressive text); null takes blocks.noise as it
            is.
        trunk: Train a trunk first and branch it into the blocks; null trains the blocks from scratch.
        train: How each block is trained.
        evaluate: `accuracy` of a classifier, measures of a diffusion model's `samples`, `bits` a character of a masked
            text model, or `language`: cross-entropies and continuations of an autoregressive one.
        device: Where to compute: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    method: Literal["diffusionblocks", "end-to-end"] = "diffusionblocks"
    model: ModelConfig
    blocks: BlocksConfig = BlocksConfig()
    data: DataConfig
    fit: FitConfig | None = None
    trunk: TrunkConfig | None = None
    train: TrainConfig
    evaluate: EvaluateConfig = AccuracyConfig()
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if (self.train.steps is None) == (self.train.epochs is None):
            raise ValueError(
                f"give either train.steps or train.epochs, and not both: got steps = {self.train.steps}, epochs = "
                f"{self.train.epochs}"
            )
        trunk = self.trunk
        if trunk is not None and (
            (trunk.steps is None) != (self.train.steps is None) or (trunk.epochs is None) != (self.train.epochs is None)
        ):
            raise ValueError("trunk and train must both be given in steps, or both in epochs")
        if trunk is not None and self.blocks.layers is not None and len(set(self.blocks.layers)) > 1:
            raise ValueError(f"a trunk branches into blocks of equal layers, not blocks.layers = {self.blocks.layers}")
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
        family = supported_classes().get(self.model.type)
        if family is not None and family.target not in _FITTED:
            raise ValueError(
                f"fit is for models with a cross-entropy over log sigma, classifiers and autoregressive text; "
                f"{self.model.type} is neither: leave fit out"
            )
        if getattr(self.blocks.noise, "quantiles", None) is not None:
            raise ValueError("blocks.noise.quantiles are fitted levels already: leave them out, or fit")
        if self.blocks.layers is not None and len(set(self.blocks.layers)) > 1:
            raise ValueError(f"a fit trains one of equal blocks, not blocks.layers = {self.blocks.layers}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _one_family(cls, values: Any) -> Any:
        # Before the sections are read: fields of the other kind would only hide what is wrong.
        model = values.get("model") if isinstance(values, dict) else None
        name = model.get("type") if isinstance(model, dict) else getattr(model, "type", None)
        known = supported_classes()
        if isinstance(name, str) and name in known:  # an unknown one is refused where it is looked up, with the list
            wanted = _MEASURES[known[name].target]
            section = values.get("evaluate", {})
            kind = _evaluation_kind(section)
            if isinstance(section, (dict, BaseModel)) and kind != wanted:
                raise ValueError(f"evaluate.kind must be {wanted} for {name}, got {_cut(kind, 80)}")
        return values

    @model_validator(mode="after")
    def _data_of_the_family(self) -> Self:
        family = supported_classes().get(self.model.type)
        if family is None or self.data.kind in _DATA[family.target]:
            return self
        does = _DOES[family.target]
        others = {
            "latents": "diffusion models",
            "topics": "text models",
            "text": "text models",
            "tokens": "autoregressive models",
        }
        wanted = others.get(self.data.kind, "image models")
        raise ValueError(
            f"{self.model.type} {does}; data.kind: {self.data.kind} is for {wanted}; "
            f"allowed: {', '.join(_DATA[family.target])}"
        )

    @model_validator(mode="after")
    def _chunks_of_text(self) -> Self:
        family = supported_classes().get(self.model.type)
        if family is not None:
            of_text = family.target in ("tokens", "next-token")
            model = f"{self.model.type} {_DOES[family.target]} and"
            check_loss_chunk(self.train.loss_chunk, model, of_text=of_text, name="train.loss_chunk")
        return self

    @model_validator(mode="after")
    def _no_graph_of_a_drawn_depth(self) -> Self:
        if self.method == "end-to-end" and self.train.cuda_graph and self.model.type in DEPTH_ON_HOST:
            raise ValueError(
                f"train.cuda_graph = true captures one step, but {self.model.type} end to end draws its number of "
                "iterations anew each step: set train.cuda_graph to false"
            )
        return self

    @model_validator(mode="after")
    def _features_of_latents(self) -> Self:
        if isinstance(self.data, LatentsConfig) and isinstance(self.evaluate, SamplesConfig):
            if self.evaluate.features == "classifier":
                raise ValueError(
                    "evaluate.features: classifier needs images; for latents use inception and data.vae, or null"
                )
            if self.evaluate.features is not None and self.data.vae is None:
                raise ValueError(
                    f"evaluate.features: {self.evaluate.features} sees decoded samples: name the latents' autoencoder "
                    "in data.vae, or set evaluate.features to null"
                )
        return self


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: the YAML file.
        overrides: `a.b=value` strings; the value is YAML (`null`, `[1, 2]`, `0.1`, `text`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown field, or a value that is not allowed; the message names field and value.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no recipe at {file}")
    with file.open("rb") as opened:
        values = read_yaml(opened.read(MOST_BYTES + 1), str(file))
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds {_shown(values)}"
        raise ValueError(f"{file} {found}: a recipe is sections with names, as model, data and train")
    for override in overrides or []:
        _override(values, override)
    return parse_recipe(values, str(file))


def parse_recipe(values: dict[str, Any], where: str) -> Recipe:
    """Validate a recipe given as plain values; ValueError names every wrong field, its value and what is allowed."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where} is not a valid recipe:\n{explain(error, Recipe)}") from None


def explain(error: ValidationError, config: type[BaseModel] | None = None) -> str:
    """A line for every wrong field, of the first few: its name as in the YAML, what is wrong, and the value.

    Args:
        error: what pydantic raised.
        config: whose validation it was, for names that are near an unknown one.
    """
    said: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        location, message = _explained(item, config)
        messages = said.setdefault(location, [])
        if message not in messages:
            messages.append(message)
    lines = [f"  {_cut(_joined(location, messages), _MOST_CHARACTERS)}" for location, messages in said.items()]
    return "\n".join(lines[:_MOST_LINES] + [f"  and {len(lines) - _MOST_LINES} more"] * (len(lines) > _MOST_LINES))


def _joined(location: str, messages: list[str]) -> str:
    """One line for a field: of a list the first wrong value stands for all, of a union all that is allowed is said."""
    first, *others = messages
    given = first.partition(" (got ")
    extra = [m.partition(" (got ")[0].removeprefix(_SHOULD) for m in others if m.startswith(_SHOULD)]
    alike = [m for m in dict.fromkeys(extra) if given[0].startswith(_SHOULD) and m not in given[0]]
    text = f"{given[0]}{''.join(f', or {m}' for m in alike[:2])}{given[1]}{given[2]}"
    return f"{location}: {text}" if location else text


def _explained(item: Any, config: type[BaseModel] | None) -> tuple[str, str]:
    """(the field as it is written in the YAML, what is wrong with it) of one of pydantic's errors."""
    parts = [str(part) for part in item["loc"]]
    names, inside = _named(parts, config)
    location = ".".join(names)
    kind, value, message = item["type"], item["input"], item["msg"].removeprefix("Value error, ")
    given = f" (got {_shown(value)})"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return location, f"no such field{near(parts[-1], inside)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        if not isinstance(value, dict):
            return location, f"{_SECTION}{given}"
        allowed = ", ".join(map(repr, _TAGS[names[-1]]))
        return f"{location}.kind", f"Input should be one of {allowed} (got {_shown(value.get('kind'))})"
    if kind in ("model_type", "dataclass_type", "model_attributes_type", "dict_type"):
        message = _SECTION
    elif kind == "tuple_type":
        message = "Input should be a list, in brackets"
    elif kind == "path_type":
        message = "Input should be a path"
    elif kind == "string_pattern_mismatch":
        message = _PATTERNS[names[-1]]
    elif kind in ("too_long", "too_short"):
        message = message.replace("Tuple", "List").replace(" after validation", "")
    elif kind == "missing":
        message, given = "is missing; give it", ""
    elif kind in ("bool_type", "bool_parsing"):
        message = "Input should be true or false"
    elif kind == "value_error" and isinstance(value, (dict, BaseModel)):
        # Where fields do not go together, the message names them: the section would be printed whole.
        given = ""
        field = message.split(maxsplit=1)[0]
        if location and field in inside:
            location = f"{location}.{field}"
    return location, f"{message}{given}"


def _shown(value: Any) -> str:
    """A value in a message: not longer than a line."""
    return _cut(repr(value), 80)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 30]}... ({len(text):,} characters)"


def _named(parts: list[str], config: type[BaseModel] | None) -> tuple[list[str], list[str]]:
    """What of a location of pydantic's stands in the YAML, and the names that the section there has.

    Of a location are also the kinds of sections, places in lists and the members of unions; readers see none of them.
    """
    if config is None:
        return [part for i, part in enumerate(parts) if not i or part not in _TAGS.get(parts[i - 1], ())], []
    here, names = [config], list[str]()
    for place, part in enumerate(parts):
        types = {name: found for section in here for name, found in _types_of(section).items()}
        of_kind = [section for section in here if part in get_args(_types_of(section).get("kind"))]
        if len(here) > 1 and of_kind:
            here = of_kind
        elif part in types:
            names.append(part)
            here = _sections(types[part])
        elif place == len(parts) - 1 and types:
            names.append(part)  # an unknown field
        elif not here and not part.isdecimal() and names[-1] in ("config", "split_files"):
            names.append(part)  # a name of the user's own
    return names, list(dict.fromkeys(name for section in here for name in _types_of(section)))


def _sections(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _types_of(section: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(section):
        types = get_type_hints(section)
        return {field.name: types[field.name] for field in dataclasses.fields(section)}
    return {name: field.annotation for name, field in section.model_fields.items()}


def _override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        raise ValueError(f"--set wants field.name=value, got {_shown(override)}")
    value = read_yaml(text, f"--set {name}")
    *parents, last = name.split(".")
    place = values
    for parent in parents:
        inner = place.get(parent)
        if inner is None:  # absent, or null: a section that was left out
            inner = place[parent] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"--set {name}: {parent} is {_shown(inner)}, not a section")
        place = inner
    place[last] = value
    if name == "data.source":  # what the user names wins over the environment variable
        place["folder"] = None
