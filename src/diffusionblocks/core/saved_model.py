"""A saved model as a folder: names of its files, its index and what that describes, the checks of its tensors.

A saved model is a folder:

    diffusionblocks.json        format, original class and config, BlocksConfig, partition, the blocks in the folder,
                                how a language model generates (generation_config),
                                length and SHA-256 of every tensor file, of a run what its blocks were trained on,
                                and the SHA-256 of all that is said here
    block-00.safetensors ...    everything block b owns, original names under `network.`
    shared.safetensors          the shared parameters, under the `joint` policy only
    tokenizer.json ...          how its input is made, where a recipe knows it (see `processing_files`)
    config.json                 the original class's config as its own library writes it, and generation_config.json:
                                for programs that read these; what loads the model goes by the index alone
    README.md                   the model card (see `model_card`)

A folder may hold some of the blocks only, for machines that share the training; `merging.py` makes one model of them.
No code from the folder is run; the original class is looked up by name in the family registry.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..common.digests import FileDigest, check_seal, json_digest
from ..common.files import recover
from ..common.formats import read_json, same_shape, validate, write_json
from ..common.processing_files import PROCESSING_FILES
from ..config import BlocksConfig, blocks_as_written
from ..families import config_file_values, config_values, family_named, outline, rebuild_config
from ..families.generation_config import generation_values, rebuilt_generation_config
from .conversion import assemble, resolve
from .model import DiffusionBlocks
from .partition import Partition

FORMAT = 1
INDEX = "diffusionblocks.json"
SHARED = "shared.safetensors"
STAMP = "diffusionblocks"  # in the metadata of a safetensors file
#: names of the files of a saved model
OURS = re.compile(r"diffusionblocks\.json|shared\.safetensors|block-\d+\.safetensors")
#: and with the files of `processing_files` beside them, where those are replaced as well
WITH_PROCESSING = re.compile("|".join([OURS.pattern, *map(re.escape, PROCESSING_FILES)]))
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
END_TO_END_FILES = "files.json"
ENSEMBLE = "ensemble.json"
LOCAL = "local.json"
#: names of the files of a model in the format of its own library
LIBRARY_FILES = (
    r"config\.json|generation_config\.json|(model|diffusion_pytorch_model)[\w.-]*\.safetensors(\.index\.json)?"
)
#: what a run may have left as its model, of any method: all of it is replaced
MODEL_FILES = re.compile(
    rf"{WITH_PROCESSING.pattern}|{LIBRARY_FILES}|files\.json|ensemble\.json|member-\d+|local\.json|module-\d+\.safetensors"
)

_Finite = Annotated[float, Field(allow_inf_nan=False)]


def block_file(index: int) -> str:
    """Name of the file that holds block `index`."""
    return f"block-{index:02d}.safetensors"


# ---- the index ----------------------------------------------------------------------------------------------


def describe(model: DiffusionBlocks, blocks: Sequence[int] | None = None) -> dict[str, Any]:
    """Everything needed to rebuild the model and route levels to blocks, and which blocks are there (None: all), as
    JSON values."""
    generation = generation_values(model.generation_config)
    return {
        "format": FORMAT,
        "model_class": model.model_class,
        "model_config": config_values(model.model_class, model.config),
        "blocks_config": model.blocks_config.model_dump(mode="json"),
        "partition": model.partition.to_dict(),
        "blocks": list(range(model.partition.num_blocks) if blocks is None else blocks),
    } | ({} if generation is None else {"generation_config": generation})


def stamp(index: dict[str, Any], block: int | None) -> str:
    """What a block's file says of itself: digests of its model and its training, and which block it is."""
    model = {name: index[name] for name in ("model_class", "model_config", "blocks_config", "partition")}
    values = {"model": _short_digest(model), "trained": _short_digest(index.get("trained")), "block": block}
    return json.dumps(values)


def _short_digest(values: Any) -> str | None:
    if values is None:
        return None
    return json_digest(values)[:16]


class _Partition(BaseModel):
    model_config = ConfigDict(strict=True)

    boundaries: list[_Finite]
    layers: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    training_intervals: list[Annotated[list[_Finite], Field(min_length=2, max_length=2)]]


class _Index(BaseModel):
    """Schema of the index of a saved model; older ones lack `blocks` and what follows `partition` here, newer ones may
    have more.

    A block's file is named by its number alone, so no name in an index leads out of the folder.
    """

    model_config = ConfigDict(strict=True, protected_namespaces=())

    format: int
    model_class: str
    config: dict[str, Any] = Field(alias="model_config")
    blocks_config: dict[str, Any]
    partition: _Partition
    files: dict[Annotated[str, Field(pattern=rf"^({OURS.pattern})$")], FileDigest] | None = None
    trained: dict[str, Any] | None = None
    generation_config: dict[str, Any] | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class SavedModel:
    """What the index of a saved model says.

    Attributes:
        folder: where it lies.
        index: the JSON values as they were read.
        model_class, model_config: the original class and its config object.
        blocks_config, partition: how it was converted.
        blocks: the blocks whose files are in the folder, ascending.
        files: length and SHA-256 of each; None where an older version wrote the folder.
        trained: what the blocks were trained on, of a run.
    """

    folder: Path
    index: dict[str, Any]
    model_class: str
    model_config: Any
    blocks_config: BlocksConfig
    partition: Partition
    blocks: tuple[int, ...]
    files: dict[str, FileDigest] | None = None
    trained: dict[str, Any] | None = None

    @property
    def missing(self) -> list[int]:
        """The blocks whose files are not in the folder."""
        return [b for b in range(self.partition.num_blocks) if b not in self.blocks]


def read_saved(path: str | Path) -> SavedModel:
    """Read and check the index of a saved model, and nothing else of it.

    Raises:
        FileNotFoundError: no such folder, or no index in it.
        ValueError: the index is damaged, of another format, or describes no model.
    """
    folder = Path(path)
    recover(folder, WITH_PROCESSING)
    if not (folder / INDEX).exists():
        raise FileNotFoundError(
            f"{folder / INDEX} is missing: give a folder that a converted model was saved to; of a run, give RUN/model"
            ", of a checkpoint of BlocksTrainer its folder model"
        )
    index = read_json(folder / INDEX)
    if index.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{folder}: format {index['format']!r}; this version reads format {FORMAT}")
    entries = validate(index, _Index, folder / INDEX)
    values = blocks_as_written(entries.blocks_config)
    config = validate(values, BlocksConfig, f"{folder / INDEX} does not describe a model")
    try:
        model_config = rebuild_config(entries.model_class, entries.config)
        # Older folders lack what is resolved since, such as the coverage of the levels.
        config = resolve(config, family_named(entries.model_class), model_config)
        partition = Partition.from_dict(index["partition"])
        _check_depth(entries.model_class, model_config, partition)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_model(folder, error) from error
    blocks = index.get("blocks", list(range(partition.num_blocks)))  # older folders hold all, and do not say so
    _check_blocks(folder, blocks, partition.num_blocks)
    check_seal(index, folder / INDEX)
    more = entries.files, entries.trained
    return SavedModel(folder, index, entries.model_class, model_config, config, partition, tuple(blocks), *more)


def _check_depth(model_class: str, model_config: Any, partition: Partition) -> None:
    """Refuse another number of layers than the partition's before a model of so many is outlined."""
    family = family_named(model_class)
    depth = family.depth(model_config)
    if depth != partition.num_layers:
        raise ValueError(
            f"model_config.{' + '.join(family.depth_fields)} = {depth}, but the partition has {partition.num_layers} "
            "layers"
        )


def _check_blocks(folder: Path, blocks: Any, count: int) -> None:
    indices = isinstance(blocks, list) and all(type(b) is int and 0 <= b < count for b in blocks)
    if not indices or not blocks or blocks != sorted(set(blocks)):
        raise ValueError(
            f"{folder / INDEX}: blocks = {blocks!r} must list indices from 0 to {count - 1}, ascending, without repeats"
        )


def _no_model(folder: Path, error: Exception) -> ValueError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return ValueError(f"{folder / INDEX} does not describe a model: {reason}")


def outline_saved(source: SavedModel) -> DiffusionBlocks:
    """The described model on the meta device: its structure, names and shapes, without memory for its weights.

    Raises:
        ValueError: the index describes no model, or its partition is not that of its config.
    """
    try:
        model = outline_of_index(source.index)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise _no_model(source.folder, error) from error
    if model.partition != source.partition:
        raise ValueError(f"{source.folder / INDEX}: the partition does not follow from the blocks_config beside it")
    return model


def outline_of_index(index: dict[str, Any]) -> DiffusionBlocks:
    """The model that the values of an index describe, on the meta device."""
    config = rebuild_config(index["model_class"], index["model_config"])
    original = outline(index["model_class"], config)
    model = assemble(original, BlocksConfig.model_validate(blocks_as_written(index["blocks_config"])), take=True)
    if index.get("generation_config") is not None:  # else, as in older folders, what the class makes of the config
        model.generation_config = rebuilt_generation_config(index["generation_config"], "generation_config")
    return model


def write_configs(folder: Path, model: DiffusionBlocks, dtype: torch.dtype) -> None:
    """Write the original class's config, and how a language model generates, as its own library does.

    Args:
        folder: of the saved model.
        model: what was saved, or its outline.
        dtype: of its weights.
    """
    write_json(folder / CONFIG, config_file_values(model.model_class, model.config, dtype))
    if (generation := generation_values(model.generation_config)) is not None:
        write_json(folder / GENERATION_CONFIG, generation)


# ---- tensors ------------------------------------------------------------------------------------------------


def check_tensors(
    present: Mapping[str, tuple[tuple[int, ...], torch.dtype | str]],
    model_tensors: Mapping[str, Tensor],
    what: str,
    fix: str,
) -> None:
    """Refuse tensors of other names, shapes or kinds of dtype than a model's.

    Args:
        present: shape and dtype of each tensor, by name.
        model_tensors: the model's.
        what: how the message begins.
        fix: and how it ends.

    Raises:
        ValueError: it names the first tensor that is missing, unknown or different.
    """
    for names, text in (
        (model_tensors.keys() - present.keys(), "lacks"),
        (present.keys() - model_tensors.keys(), "has unknown"),
    ):
        if names:
            raise ValueError(f"{what} {text} tensors {sorted(names)[:3]}, {len(names)} in all; {fix}")
    for name, tensor in model_tensors.items():
        shape, dtype = present[name]
        floating = tensor.is_floating_point()
        agrees = isinstance(dtype, torch.dtype) and (dtype.is_floating_point if floating else dtype == tensor.dtype)
        if not same_shape(shape, tensor.shape) or not agrees:
            expects = f"{'floating' if floating else tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{what} has {name} as {dtype} {shape}, the config says {expects}; {fix}")


def listed(dtypes: Iterable[torch.dtype]) -> str:
    """Dtypes, for a message."""
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
