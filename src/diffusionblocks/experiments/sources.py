"""What a recipe names: its device, its data and its model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.files import recover
from ..common.formats import read_json
from ..common.messages import near
from ..config import BlocksConfig
from ..core.conversion import assemble
from ..core.end_to_end import load_end_to_end, save_end_to_end
from ..core.loading import load
from ..core.materialise import build, empty, materialise
from ..core.model import DiffusionBlocks
from ..core.saving import INDEX, MODEL_FILES, save
from ..core.weights import Fresh, WeightSource, cast_weights, pretrained_source
from ..data import TextChunks, TextCodec
from ..data.data_config import DataSection, ImagesSection, TextSection
from ..data.dataset import BatchMaker, Dataset
from ..families import (
    config_fields,
    family_named,
    instantiate,
    outline,
    pretrained,
    rebuild_config,
    supported_classes,
    with_depth,
)
from ..families.causal_lm import attention_window
from ..families.generation_config import as_ids, end_tokens, rebuilt_generation_config
from ..families.libraries import cached_file
from ..families.sizes import SIZES, check_shape, check_sizes
from ..training import EndToEnd
from .recipe import Recipe

_log = logging.getLogger(__name__)

Data = Dataset


#: What an example is, by what the family denoises.
_EXAMPLES = {"label": "images", "image": "images", "tokens": "texts", "next-token": "texts"}


def device_of(recipe: Recipe) -> torch.device:
    """The recipe's device.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if recipe.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(recipe.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {recipe.device}, but torch sees no GPU; use device: cpu or auto")
    return device


# ---- data ----------------------------------------------------------------------------------------------


def load_data(recipe: Recipe, split: str) -> Dataset:
    """The recipe's `train` or `test` data."""
    return recipe.data.load(split)


def text_codec(recipe: Recipe) -> TextCodec:
    """What turns text into the recipe's ids and back, see `TextSection.codec`.

    Raises:
        FileNotFoundError, ValueError: what reading or training the tokenizer refuses; or a recipe without text.
    """
    data = recipe.data
    if not isinstance(data, TextSection):
        raise ValueError(f"data.kind: {data.kind} has no text; text has data.kind: topics, text or tokens")
    return data.codec()


def with_saved_tokenizer(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the tokenizer that lies in a model's folder, see `TextSection.with_tokenizer_of`."""
    data = recipe.data
    if not isinstance(data, TextSection):
        return recipe
    return recipe.model_copy(update={"data": data.with_tokenizer_of(folder)})


def make_batches(recipe: Recipe, data: Dataset, device: torch.device) -> BatchMaker:
    """What makes training batches of the data on the device."""
    section: DataSection = recipe.data
    return section.batches(data, device)


def pixels_of(recipe: Recipe, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What turns model-space samples into uint8 images, see `ImagesSection.to_pixels`."""
    assert isinstance(recipe.data, ImagesSection), "text has no pixels"
    return recipe.data.to_pixels(device)


# ---- models --------------------------------------------------------------------------------------------


def build_original(recipe: Recipe) -> nn.Module:
    """The ordinary model that the recipe names, whole: fresh (seeded by `train.seed`) or pretrained.

    Raises:
        ValueError: a class that is not supported, or config values that the class does not take.
    """
    config = model_config(recipe)
    if recipe.model.pretrained is not None:
        return _pretrained_whole(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        # `instantiate` forks from here, so the weights depend on this seed alone.
        return cast_weights(instantiate(recipe.model.type, config), dtype_of(recipe))


def dtype_of(recipe: Recipe) -> torch.dtype:
    """The dtype of the recipe's weights."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[recipe.model.dtype]


def weight_source(recipe: Recipe) -> WeightSource:
    """Where the blocks of the recipe's model get their initial weights: fresh (seeded by `train.seed`) or pretrained.

    Raises:
        ValueError: a class that is not supported, or config values that the class does not take.
    """
    model, seed = recipe.model, recipe.train.seed
    config = model_config(recipe)
    if model.pretrained is None:
        return Fresh(model.type, config, seed=seed, dtype=dtype_of(recipe))
    source = pretrained_source(model.type, model.pretrained, _without_labels(recipe), seed=seed, dtype=dtype_of(recipe))
    if not _other_labels(recipe, source.model_config):
        return source
    config = copy.deepcopy(source.model_config)
    config.num_labels = model.config["num_labels"]
    return NewHead(source, config, seed=seed)


class NewHead(WeightSource):
    """Another source's weights but for what depends on the number of labels, which is drawn afresh.

    Args:
        source: of the weights.
        model_config: its config, with another number of labels.
        seed: of the new classifier.
    """

    def __init__(self, source: WeightSource, model_config: Any, *, seed: int) -> None:
        super().__init__(source.model_class, model_config, source.dtype)
        before, now = source.outline().state_dict(), self.outline().state_dict()
        self.new = frozenset(name for name in now if name not in before or before[name].shape != now[name].shape)
        self._source, self._fresh = source, Fresh(source.model_class, model_config, seed=seed, dtype=source.dtype)
        self._told = False  # a plan or a check makes a source too, and draws nothing from it

    def tensors(self, block: int, layers: range, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """See `WeightSource`."""
        yield from self._source.tensors(block, layers, [name for name in names if name not in self.new])
        fresh = [name for name in names if name in self.new]
        if fresh:
            if not self._told:
                names_of_new, seed = " and ".join(sorted(self.new)), self._fresh.seed
                _log.warning("%s drawn afresh for another number of labels, from seed %d", names_of_new, seed)
                self._told = True
            yield from self._fresh.tensors(block, layers, fresh)


def _pretrained_whole(recipe: Recipe) -> nn.Module:
    """The pretrained model, with a new classifier where the recipe has other labels: the one that the blocks get."""
    model = recipe.model
    assert model.pretrained is not None
    whole = pretrained(model.type, model.pretrained, _without_labels(recipe), dtype_of(recipe))
    if not _other_labels(recipe, whole.config):
        return whole
    source = weight_source(recipe)
    assert isinstance(source, NewHead)
    fresh = instantiate(model.type, source.model_config)
    state = {name: tensor for name, tensor in whole.state_dict().items() if name not in source.new}
    fresh.load_state_dict(state | dict(source.tensors(0, range(1), sorted(source.new))))
    return cast_weights(fresh, source.dtype)


def _without_labels(recipe: Recipe) -> dict[str, Any]:
    """The recipe's own config values that a pretrained model is loaded with: its classifier is the folder's then."""
    return {name: value for name, value in recipe.model.config.items() if name != "num_labels"}


def _other_labels(recipe: Recipe, config: Any) -> bool:
    return (
        family_named(recipe.model.type).target == "label"
        and recipe.model.config.get("num_labels", config.num_labels) != config.num_labels
    )


def model_config(recipe: Recipe) -> Any:
    """The config object of the recipe's model: of its own values, or a pretrained model's own.

    Raises:
        ValueError: a class that is not supported; a name that its config does not have; a size that is out of range,
            does not go with the others, or contradicts the pretrained model.
    """
    model_class, values = recipe.model.type, recipe.model.config
    known = config_fields(model_class)
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"model.config.{unknown[0]}: {model_class} knows no {unknown}{near(unknown[0], known)}")
    for field in sorted(values.keys() & {"dtype", "torch_dtype"}):
        raise ValueError(f"model.config.{field} = {values[field]!r}: the weights' dtype is model.dtype; leave it out")
    check_sizes(values)
    config = _rebuilt(model_class, values, "model.config")
    name = recipe.model.pretrained
    if name is None:
        check_shape(config)
        try:
            outline(model_class, with_depth(model_class, config, 1))
        except Exception as error:  # as an activation function that the library has not
            raise ValueError(f"model.config: {model_class} refuses it: {_one_line(error)}") from None
        return config
    described = described_config(model_class, name)
    for field in sorted(values.keys() & SIZES.keys() - {"num_labels"}):
        own = getattr(described, field)
        if own != values[field]:
            raise ValueError(
                f"model.config.{field} = {values[field]}, but {name} has {own}, and its weights are of that size: "
                f"leave model.config.{field} out, or train afresh, with all its sizes in model.config: --set "
                "model.pretrained=null"
            )
    return described


def described_config(model_class: str, name: str) -> Any:
    """The config object of a pretrained model.

    Args:
        model_class: the supported class that it is to be.
        name: a folder, or a name on the hub.

    Raises:
        ValueError: no model is there, or one of another class, or with sizes out of range.
    """
    file = cached_file(name, "config.json")
    if file is None:
        raise ValueError(
            f"model.pretrained = {name}: no model is there; give a folder with config.json and safetensors files, or a "
            "name on the hub"
        )
    values = read_json(file)
    found = (values.get("architectures") or [values.get("_class_name")])[0]
    if isinstance(found, str) and supported_classes().get(found, None) is not family_named(model_class):
        raise ValueError(f"model.pretrained = {name} holds a {found}, the recipe has model.type: {model_class}")
    check_sizes(values, f"{name}/config.json: ")
    known = config_fields(model_class)
    return _rebuilt(model_class, {n: v for n, v in values.items() if n in known and n != "attn_implementation"}, name)


def _rebuilt(model_class: str, values: dict[str, Any], where: str) -> Any:
    try:
        return rebuild_config(model_class, values)
    except Exception as error:  # whatever a library's class makes of values that are the user's
        raise ValueError(f"{where}: {model_class} refuses it: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def is_end_to_end(recipe: Recipe) -> bool:
    """Whether the recipe's model stays whole, as an unconverted classifier or language model."""
    return recipe.method == "end-to-end" and has_plain_training(recipe)


def has_plain_training(recipe: Recipe) -> bool:
    """Whether the recipe's class has an end-to-end training of its own; else it denoises anyway, all levels at once."""
    return family_named(recipe.model.type).target in ("label", "next-token")


def blocks_config(recipe: Recipe) -> BlocksConfig:
    """How the recipe's model is split.

    The end-to-end training of a model that denoises anyway, of images or text, is that of one block on all levels:
    nothing is added to it or taken away.
    """
    return recipe.blocks if recipe.method == "diffusionblocks" else recipe.blocks.as_one_block()


def build_model(recipe: Recipe, blocks: Sequence[int] | None = None) -> nn.Module:
    """The recipe's model on the CPU: its blocks, built one after another, or the end-to-end control.

    Args:
        recipe: names the model.
        blocks: build only these, and leave the others on the meta device; default `train.blocks` (None builds all).

    Raises:
        ValueError: a class or config that is not supported, or no such block.
    """
    if is_end_to_end(recipe):
        return EndToEnd(build_original(recipe))
    config = blocks_config(recipe)
    chosen = recipe.train.blocks if blocks is None else blocks
    if chosen and max(chosen) >= config.num_blocks:
        raise ValueError(f"train.blocks = {list(chosen)}: the model has blocks 0 to {config.num_blocks - 1}")
    return build(weight_source(recipe), config, blocks=chosen)


def unfilled_model(recipe: Recipe) -> tuple[nn.Module, Callable[[int], None] | None]:
    """As `build_model`, for a trainer: the blocks are on the meta device, and the function gives one its weights."""
    if is_end_to_end(recipe):
        return build_model(recipe), None
    source = weight_source(recipe)
    model = empty(source, blocks_config(recipe))
    return model, lambda index: materialise(model, index, source)


def outline_of(recipe: Recipe) -> nn.Module:
    """As `build_model`, on the meta device: structure, names, shapes and dtypes, without memory for the weights.

    Raises:
        ValueError: a class or config that is not supported.
    """
    original = weight_source(recipe).outline()
    return EndToEnd(original) if is_end_to_end(recipe) else assemble(original, blocks_config(recipe), take=True)


def config_of(model: nn.Module) -> Any:
    """The config object of the original, of a model that `build_model` or `outline_of` made."""
    return model.config if isinstance(model, DiffusionBlocks) else model.model.config  # type: ignore[union-attr]


def check_data(recipe: Recipe, model: nn.Module, data: Data) -> None:
    """Refuse examples that the model does not take, before any GPU work."""
    config = config_of(model)
    family = family_named(recipe.model.type)
    shape = family.example_shape(config)
    shorter = family.target == "next-token" and data.example_shape <= shape
    pretrained = recipe.model.pretrained is not None
    if shape != data.example_shape and not shorter:
        taken, found = ("x".join(map(str, s)) for s in (shape, data.example_shape))
        what = _EXAMPLES[family.target]
        where = "give data of the size that it was trained on" if pretrained else "set their size in model.config"
        if family.target == "next-token":
            where = f"--set data.length={shape[0]}"
        raise ValueError(f"the model takes {what} of {taken}, the data has {found}; {where}")
    if family.target == "next-token" and isinstance(model, DiffusionBlocks):
        window = attention_window(config)
        if window is not None and data.example_shape[0] > window:
            raise ValueError(
                f"data.length = {data.example_shape[0]}, but the model's attention slides over {window} tokens "
                f"(sliding_window), which two streams do not: --set data.length={window}"
            )
    count, field = family.num_classes(config), family.class_count_field
    # Ids that no text has are never targets, and are not generated: vocabularies are padded to round numbers.
    if count in (data.num_classes, 0) or (family.target == "next-token" and count > data.num_classes):
        return
    what = "different tokens" if isinstance(data, TextChunks) else "classes"
    if pretrained and family.target != "label":
        fix = f"its weights have {count}: give the tokenizer or data that {recipe.model.pretrained} was trained with"
    else:
        fix = f"--set model.config.{field}={data.num_classes}"
    raise ValueError(f"the model has {field} = {count}, the data has {data.num_classes} {what}; {fix}")


def note_ends(recipe: Recipe, model: nn.Module) -> None:
    """Let the configs of an autoregressive model say which tokens end the texts that it learns.

    That is the `END` of the recipe's tokenizer, and what a pretrained folder or the recipe's own `model.config` names;
    none of characters. A class's default is an id of another vocabulary.

    Args:
        recipe: its data are at hand.
        model: a `DiffusionBlocks`, or an `EndToEnd`.
    """
    if family_named(recipe.model.type).target != "next-token":
        return
    holder: Any = model if isinstance(model, DiffusionBlocks) else model.model
    own = end_tokens(holder) if recipe.model.pretrained else as_ids(recipe.model.config.get("eos_token_id"))
    end = text_codec(recipe).end
    ids = list(dict.fromkeys([*own, *([] if end is None else [end])]))
    ends = None if not ids else ids[0] if len(ids) == 1 else ids
    if hasattr(holder.config, "eos_token_id"):
        holder.config.eos_token_id = ends
    if getattr(holder, "generation_config", None) is not None:
        holder.generation_config.eos_token_id = ends
    elif ends is not None and isinstance(holder, DiffusionBlocks):
        holder.generation_config = rebuilt_generation_config({"eos_token_id": ends}, recipe.name)


def save_model(
    model: nn.Module,
    path: Path,
    blocks: Sequence[int] | None = None,
    *,
    data: Data | None = None,
    trained: dict[str, Any] | None = None,
) -> None:
    """Save a model to a folder: blocks in our format, an end-to-end control in its own library's.

    Args:
        model: a `DiffusionBlocks`, or an `EndToEnd`.
        path: the folder.
        blocks: only these; None saves all.
        data: what it was trained on: the tokenizer of text in tokens goes with it, as `tokenizer.json`.
        trained: what its blocks learned from, for their index (`identity.learned_from`).
    """
    tokenizer = None if data is None else data.tokenizer
    if isinstance(model, DiffusionBlocks):
        save(model, path, blocks, tokenizer, trained)
    elif isinstance(model, EndToEnd):
        save_end_to_end(model.model, path, tokenizer)


def load_model(recipe: Recipe, path: Path) -> nn.Module:
    """Load what `save_model` wrote, on the recipe's device; of blocks under `resident: active` the one that runs.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a model of the other method, or of another family.
    """
    recover(path, MODEL_FILES)
    if not path.is_dir():
        train = f"diffusionblocks train RECIPE --out {path.parent}"
        raise FileNotFoundError(
            f"no model at {path}; train first: {train}; or name a trained one with --model RUN/model"
        )
    in_our_format = (path / INDEX).is_file()
    if not in_our_format and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no model; of a run, give the folder RUN/model")
    if in_our_format:
        class_name = str(read_json(path / INDEX).get("model_class"))
    else:
        class_name = str((read_json(path / "config.json").get("architectures") or [recipe.model.type])[0])
    family = family_named(recipe.model.type)
    if family_named(class_name) is not family:
        raise ValueError(
            f"{path} holds a {class_name}, the recipe describes a {recipe.model.type}: give the recipe that the model "
            "was trained with"
        )
    if in_our_format == is_end_to_end(recipe):
        method = "diffusionblocks" if in_our_format else "end-to-end"
        raise ValueError(f"{path} holds a model of method {method}, the recipe says method: {recipe.method}")
    device = device_of(recipe)
    if in_our_format:
        one_at_a_time = recipe.train.resident == "active" and device.type == "cuda"
        model = load(path, device="cpu" if one_at_a_time else device)
        if recipe.method == "end-to-end" and model.partition.num_blocks > 1:
            raise ValueError(
                f"{path} holds {model.partition.num_blocks} blocks, the recipe says method: end-to-end, which is one "
                "block on all levels"
            )
        if recipe.model.pretrained is None:
            described = family.example_shape(rebuild_config(recipe.model.type, recipe.model.config))
            found = family.example_shape(model.config)
            if found != described:
                raise ValueError(
                    f"{path} holds a model of {_EXAMPLES[family.target]} {found}, the recipe describes one of "
                    f"{described}: give the recipe that the model was trained with"
                )
        if one_at_a_time:  # what was too large to train at once may be too large to stand there at once
            model.run_one_at_a_time(device)
        elif recipe.train.compile and device.type == "cuda" and family.target not in ("label", "next-token"):
            model.compile_layers()
        return model
    return EndToEnd(load_end_to_end(class_name, path).to(device))
