"""Loading a saved model, block by block. No code from the folder is run: its class is looked up by name in the family
registry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.digests import FileDigest, check_seal, digest
from ..common.files import recover
from ..common.finite import DIVERGED, require_finite
from ..common.formats import read_json, read_tensors, same_shape, validate
from ..config import BlocksConfig
from ..families import family_named, outline, rebuild_config
from ..families.generation_config import rebuilt_generation_config
from .conversion import assemble, resolve
from .materialise import materialise_buffers
from .model import DiffusionBlocks
from .partition import Partition
from .saving import FORMAT, INDEX, OURS, SHARED, STAMP, WITH_TOKENIZER, block_file, listed, stamp

_Finite = Annotated[float, Field(allow_inf_nan=False)]

#: what safetensors calls the dtypes that models have
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


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
    recover(folder, WITH_TOKENIZER)
    index = read_json(folder / INDEX)
    if index.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{folder}: format {index['format']!r}; this version reads format {FORMAT}")
    described = validate(index, _Index, folder / INDEX)
    try:
        model_config = rebuild_config(described.model_class, described.config)
        # Older folders lack what is resolved since, such as the coverage of the levels.
        config = BlocksConfig.model_validate(described.blocks_config)
        config = resolve(config, family_named(described.model_class), model_config)
        partition = Partition.from_dict(index["partition"])
        _check_depth(described.model_class, model_config, partition)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_model(folder, error) from error
    blocks = index.get("blocks", list(range(partition.num_blocks)))  # older folders hold all, and do not say so
    _check_blocks(folder, blocks, partition.num_blocks)
    check_seal(index, folder / INDEX)
    more = described.files, described.trained
    return SavedModel(folder, index, described.model_class, model_config, config, partition, tuple(blocks), *more)


def _check_depth(model_class: str, model_config: Any, partition: Partition) -> None:
    """Refuse another number of layers than the partition's before a model of so many is outlined."""
    field = family_named(model_class).depth_field
    depth = getattr(model_config, field, None)
    if isinstance(depth, int) and depth != partition.num_layers:
        raise ValueError(f"model_config.{field} = {depth}, but the partition has {partition.num_layers} layers")


def _check_blocks(folder: Path, blocks: Any, count: int) -> None:
    indices = isinstance(blocks, list) and all(type(b) is int and 0 <= b < count for b in blocks)
    if not indices or not blocks or blocks != sorted(set(blocks)):
        raise ValueError(
            f"{folder / INDEX}: blocks = {blocks!r} must list indices from 0 to {count - 1}, ascending, without repeats"
        )


def _no_model(folder: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())  # of pydantic it has several lines
    return ValueError(f"{folder / INDEX} does not describe a model: {type(error).__name__}: {reason}")


def outline_saved(saved: SavedModel) -> DiffusionBlocks:
    """The described model on the meta device: its structure, names and shapes, without memory for its weights.

    Raises:
        ValueError: the index describes no model, or its partition is not that of its config.
    """
    try:
        model = outline_of_index(saved.index)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise _no_model(saved.folder, error) from error
    if model.partition != saved.partition:
        raise ValueError(f"{saved.folder / INDEX}: the partition does not follow from the blocks_config beside it")
    return model


def outline_of_index(index: dict[str, Any]) -> DiffusionBlocks:
    """The model that the values of an index describe, on the meta device."""
    config = rebuild_config(index["model_class"], index["model_config"])
    original = outline(index["model_class"], config)
    model = assemble(original, BlocksConfig.model_validate(index["blocks_config"]), take=True)
    if index.get("generation_config") is not None:  # else, as in older folders, what the class makes of the config
        model.generation_config = rebuilt_generation_config(index["generation_config"], "generation_config")
    return model


def load(path: str | Path, *, device: torch.device | str = "cpu", verify: bool = True) -> DiffusionBlocks:
    """Read a model saved by `save_pretrained`, one block after another.

    Files are mapped into memory and copied tensor by tensor, so the host needs no room for weights that go to a GPU.

    Args:
        path: the folder.
        device: where to put it.
        verify: compare each file's SHA-256 with the index, about a second a gigabyte; False takes what is there.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: not a saved DiffusionBlocks model, another format, some blocks only, tensors that do not match or
            are not finite, or a file that is not the one that was saved with the index.
    """
    saved = read_saved(path)
    if saved.missing:
        raise ValueError(
            f"{saved.folder} holds blocks {list(saved.blocks)} of {saved.partition.num_blocks}; blocks {saved.missing} "
            f"are missing: merge it with the folders that hold them, diffusionblocks merge {saved.folder} OTHER ... "
            "--out MODEL, and load that"
        )
    model = outline_saved(saved)
    check_precisions({file: check_header(file, tensors) for file, tensors in files_of(model, saved).items()})
    if verify:
        for name in [block_file(b) for b in saved.blocks] + ([SHARED] if model.shared_parameters() else []):
            check_digest(saved, name)
    joint = bool(model.shared_parameters())
    common = _copied(saved.folder / SHARED, device) if joint else {}
    for b in saved.blocks:
        file, block = saved.folder / block_file(b), model.block(b)
        own = _copied(file, device)
        # Buffers that no file holds have the weights' precision.
        block.to(dtype=next((t.dtype for t in own.values() if t.is_floating_point()), None))
        try:
            block.load_state_dict(own | common, strict=True, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{file} does not match the model: {error}") from None
        if joint and b == 0:
            # Now they are the parameters that all blocks hold: assigning them again must not make others.
            common = {name: parameter for name, parameter in block.named_parameters() if name in common}
        materialise_buffers(model, b)
        block.to(device)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    return model.eval()


def _copied(file: Path, device: torch.device | str) -> dict[str, Tensor]:
    """The tensors of a file on the device, in memory of their own: what is mapped has the file's alignment."""
    copies = {name: tensor.to(device, copy=True) for name, tensor in read_tensors(file).items()}
    require_finite(copies.items(), str(file), DIVERGED)
    return copies


# ---- files against their index -----------------------------------------------------------------------------


def files_of(
    model: DiffusionBlocks, saved: SavedModel, blocks: Sequence[int] | None = None
) -> dict[Path, dict[str, Tensor]]:
    """The tensor files of a saved model, and what the outline of its model expects in each.

    Args:
        model: the outline.
        saved: where they lie.
        blocks: of these blocks only; None takes all.
    """
    common = {id(parameter) for parameter in model.shared_parameters()}
    files = {}
    for b in saved.blocks if blocks is None else blocks:
        tensors = model.block(b).state_dict(keep_vars=True)
        files[saved.folder / block_file(b)] = {name: t for name, t in tensors.items() if id(t) not in common}
        if common and b == 0:
            files[saved.folder / SHARED] = {name: t for name, t in tensors.items() if id(t) in common}
    return files


def check_header(path: Path, expected: Mapping[str, Tensor]) -> frozenset[torch.dtype]:
    """Check names, shapes and dtypes in a safetensors file by its header; return the floating dtypes in it.

    Raises:
        FileNotFoundError, ValueError: it is missing or damaged, or holds something else; the message names the tensor.
    """
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        present = {
            name: (tuple(s.get_shape()), _DTYPES.get(s.get_dtype(), s.get_dtype())) for name, s in slices.items()
        }
    check_tensors(present, expected, f"{path} does not match the model: it", "save the model again")
    return frozenset(
        dtype for _, dtype in present.values() if isinstance(dtype, torch.dtype) and dtype.is_floating_point
    )


def check_tensors(
    present: Mapping[str, tuple[tuple[int, ...], torch.dtype | str]],
    expected: Mapping[str, Tensor],
    what: str,
    fix: str,
) -> None:
    """Refuse tensors of other names, shapes or kinds of dtype than a model's.

    Args:
        present: shape and dtype of each tensor, by name.
        expected: the model's.
        what: how the message begins.
        fix: and how it ends.

    Raises:
        ValueError: it names the first tensor that is missing, unknown or different.
    """
    for names, text in ((expected.keys() - present.keys(), "lacks"), (present.keys() - expected.keys(), "has unknown")):
        if names:
            raise ValueError(f"{what} {text} tensors {sorted(names)[:3]}, {len(names)} in all; {fix}")
    for name, tensor in expected.items():
        shape, dtype = present[name]
        floating = tensor.is_floating_point()
        agrees = isinstance(dtype, torch.dtype) and (dtype.is_floating_point if floating else dtype == tensor.dtype)
        if not same_shape(shape, tensor.shape) or not agrees:
            expects = f"{'floating' if floating else tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{what} has {name} as {dtype} {shape}, the config says {expects}; {fix}")


def check_precisions(dtypes: Mapping[Path, frozenset[torch.dtype]]) -> None:
    """Refuse files of one model whose weights have different precisions.

    Raises:
        ValueError: it names two such files.
    """
    files: dict[frozenset[torch.dtype], Path] = {}
    for path, floating in dtypes.items():
        if floating:
            files.setdefault(floating, path)
    if len(files) > 1:
        (one, here), (other, there), *_ = files.items()
        raise ValueError(
            f"{here} holds {listed(one)} weights and {there} {listed(other)}: a model has one precision; save the "
            "blocks in the same"
        )


def check_digest(saved: SavedModel, name: str) -> None:
    """Check that a file is the one that was saved with the index, bit by bit, where the index tells.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is another; the message says whether it is of another model or training, or was changed.
    """
    if saved.files is None:
        return
    path = saved.folder / name
    if name not in saved.files:
        raise ValueError(f"{saved.folder / INDEX}: files does not list {name}; save the model again")
    if digest(path) == saved.files[name]:
        return
    block = next((b for b in saved.blocks if block_file(b) == name), None)
    with opened(path) as file:
        own = (file.metadata() or {}).get(STAMP)
    origin = "it was changed or damaged after it was saved"
    if own is not None and own != stamp(saved.index, block):
        origin = f"it is of another model, block or training: it says {own}, the index {stamp(saved.index, block)}"
    elif own is not None:
        origin += ", or is of another run of the same recipe"
    raise ValueError(
        f"{path} does not match {INDEX} beside it, by its SHA-256: {origin}; copy the file again from where it was "
        "saved, or save the model again"
    )


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, mapped into memory.

    Raises:
        FileNotFoundError, ValueError: it is missing or damaged; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not safetensors: {error}") from None
