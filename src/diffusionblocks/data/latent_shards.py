"""Latents in files: shards that are read by memory mapping, and an index for each split.

A folder holds, for each split, `<split>-00000.safetensors`, ... and the index `<split>.json`. A shard has the tensors
`mean` and `std`, float16 (n, C, H, W), both on the scale that the index notes (`LatentScale`), and `labels`, int64
(n,). `encode.py` makes such folders.

Of an autoencoder whose config says no scale, the mean and deviation of each channel are measured over the split that is
written first; the folder's other splits are brought to the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.files import temporary_folder
from ..common.formats import read_json, validate, write_json, write_tensors
from .dataset import check_labels
from .image_table import ClassNames
from .latent_data import LatentData, LatentScale

__all__ = [
    "DecodedBy",
    "check_split",
    "decoded_by",
    "examples_of_split",
    "latent_folder",
    "measured_scale",
    "write_shards",
]

_SOURCE = "source"  # key of a shard's metadata

_MAKE = "make it with `diffusionblocks encode`"

_AT_ONCE = 64  # rows in higher precision, while a shard is measured or rescaled

_Positive = Annotated[int, Field(ge=1)]

_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Index(BaseModel):
    """What `<split>.json` holds: without it, a split's shards are not a split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1  # Raise it when the content of the files changes.
    rows: list[_Positive] = Field(min_length=1)
    shape: tuple[_Positive, _Positive, _Positive]
    num_classes: _Positive
    class_names: tuple[str, ...]
    vae: str
    scaling_factor: float = Field(gt=0, allow_inf_nan=False)
    shift_factor: _Finite | None = None  # None in folders of older versions, which subtracted it without noting it
    latents_mean: tuple[_Finite, ...] | None = None
    latents_std: tuple[_Finite, ...] | None = None
    scale_of_latents: Literal[True] | None = None  # mean and std are of latents, not of the autoencoder's config

    def source(self) -> str:
        """What the latents are of, noted in every shard, too."""
        return self.model_dump_json(exclude={"format", "rows", "shape", "num_classes"})

    def scale(self) -> LatentScale:
        """How the latents were made of the autoencoder's."""
        return LatentScale(self.scaling_factor, self.shift_factor, self.latents_mean, self.latents_std)


def check_split(split: str) -> None:
    """ValueError unless a split's name can be that of files."""
    if not re.fullmatch(r"\w+(\.\w+)*", split):
        raise ValueError(f"split = {split!r}: must be letters, digits, '_' and inner '.', it names files")


def _shard(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05d}.safetensors"


def _files(folder: Path, split: str) -> list[Path]:
    """The split's index and shards, as far as there are any; the index first."""
    shards = re.compile(re.escape(split) + r"-\d{5,}\.safetensors")
    index = folder / f"{split}.json"
    return [index] * index.exists() + sorted(path for path in folder.iterdir() if shards.fullmatch(path.name))


def latent_folder(path: str | Path, split: str = "train", *, reference_split: str | None = "train") -> LatentData:
    """Open a split of a folder of latents. Labels are read; means and deviations are mapped, and read when used.

    Args:
        path: the folder.
        split: which split.
        reference_split: the split that says which label is which class, and by which autoencoder and to which scale
            latents are made, where it is there; None: this one.

    Returns:
        The rows in the order in which they were written. Labels are in the reference's order of class names.

    Raises:
        FileNotFoundError: there is no such folder, index or shard.
        ValueError: the index or a shard is damaged, or they or the splits disagree; the message names the file.
    """
    check_split(split)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of latents; {_MAKE}")
    index = _read_index(folder, split)
    names, order = index.class_names, None
    if reference_split not in (None, split) and _index_file(folder, str(reference_split)).is_file():
        reference = _read_index(folder, str(reference_split))
        order = _label_order(index, reference, _index_file(folder, split), _index_file(folder, str(reference_split)))
        names = reference.class_names
    means, stds, labels = [], [], []
    files = [_shard(folder, split, number) for number in range(len(index.rows))]
    for file, rows in zip(files, index.rows, strict=True):
        mean, std, label = _open_shard(file, rows, index)
        means.append(mean)
        stds.append(std)
        labels.append(label if order is None else torch.from_numpy(order)[label])
    where = tuple(map(str, files))
    return LatentData(tuple(means), tuple(stds), torch.cat(labels), names, index.vae, index.scaling_factor, where)


@dataclass(frozen=True)
class DecodedBy:
    """What decodes a split's latents.

    Attributes:
        vae: folder or hub name of the autoencoder.
        scale: how its latents were scaled.
        scale_of_latents: whether the scale was measured on latents, for the autoencoder's config says none.
    """

    vae: str
    scale: LatentScale
    scale_of_latents: bool


def decoded_by(path: str | Path, split: str) -> DecodedBy | None:
    """What a split's index notes of its autoencoder; None where there is no such split.

    Raises:
        ValueError: its index is damaged.
    """
    folder = Path(path).expanduser()
    if not _index_file(folder, split).is_file():
        return None
    index = _read_index(folder, split)
    return DecodedBy(index.vae, index.scale(), bool(index.scale_of_latents))


def measured_scale(path: str | Path, split: str, vae: str) -> LatentScale | None:
    """The scale that was measured for a folder's splits of an autoencoder, other than this one; None for none.

    Raises:
        ValueError: an index is damaged.
    """
    folder = Path(path).expanduser()
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        noted = None if file.stem == split else decoded_by(folder, file.stem)
        if noted is not None and noted.scale_of_latents and noted.vae == vae:
            return noted.scale
    return None


def _label_order(index: _Index, reference: _Index, here: Path, there: Path) -> np.ndarray | None:
    """What each of a split's labels is in the reference, see `ClassNames.labels_from`."""
    if index.shape != reference.shape:
        raise ValueError(f"{here} has latents {index.shape}, {there} has {reference.shape}: encode both at one size")
    if index.vae != reference.vae:
        raise ValueError(
            f"{here} is of the autoencoder {index.vae!r}, {there} of {reference.vae!r}: encode both with one; if it is "
            "the same, write the same name into both"
        )
    index.scale().check_same(reference.scale(), str(here), str(there))
    return ClassNames(reference.class_names, str(there)).labels_from(ClassNames(index.class_names, str(here)))


def examples_of_split(path: str | Path, split: str) -> int:
    """Examples of a split as its index says.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: it is damaged.
    """
    return sum(_read_index(Path(path).expanduser(), split).rows)


def _index_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.json"


def _read_index(folder: Path, split: str) -> _Index:
    file = _index_file(folder, split)
    if not file.is_file():
        present = sorted(path.stem for path in folder.glob("*.json"))
        raise FileNotFoundError(f"{file} is missing; the folder holds the splits {present}; {_MAKE}")
    values = read_json(file)
    try:
        index = validate(values, _Index, file)
    except ValueError as error:
        raise ValueError(f"{error}; encode the split again") from None
    if len(index.class_names) != index.num_classes:
        raise ValueError(
            f"{file}: num_classes = {index.num_classes}, but {len(index.class_names)} class names; "
            "encode the split again"
        )
    try:
        index.scale().check_channels(index.shape[0])
    except ValueError as error:
        raise ValueError(f"{file}: {error}; encode the split again") from None
    return index


def _open_shard(file: Path, rows: int, index: _Index) -> tuple[Tensor, Tensor, Tensor]:
    """mean and std mapped, labels read."""
    shape = [rows, *index.shape]
    layout = {"mean": ("F16", shape), "std": ("F16", shape), "labels": ("I64", [rows])}
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing, but the index names it; copy it here or encode the split again")
    try:
        with safe_open(file, framework="pt") as opened:  # It also checks that the file is as long as it should be.
            parts = {}
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                part = opened.get_slice(name)
                parts[name] = (part.get_dtype(), list(part.get_shape()))
            if parts != layout:
                raise ValueError(f"{file} holds {parts}: must be {layout}, as the index says; encode the split again")
            labels = opened.get_tensor("labels").clone()
            check_labels(labels, index.num_classes, str(file))
            _check_source((opened.metadata() or {}).get(_SOURCE), file, index)
            return opened.get_tensor("mean"), opened.get_tensor("std"), labels
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut off: {error}; copy it or encode the split again") from None


def _check_source(noted: str | None, file: Path, index: _Index) -> None:
    """Refuse a shard of another split or run; shards of older versions note nothing."""
    if noted is None:
        return
    try:
        values = dict(json.loads(noted))
    except (TypeError, ValueError):
        raise ValueError(f"{file}: its metadata are damaged; copy it or encode the split again") from None
    own = json.loads(index.source())
    for name in own:
        if values.get(name) != own[name]:
            here, there = (str(one.get(name))[:200] for one in (values, own))
            raise ValueError(
                f"{file}: {name} is {here}, in the index of its split {there}: a shard of other latents; encode again"
            )


def write_shards(
    folder: str | Path,
    split: str,
    rows: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    shard_rows: int,
    class_names: Sequence[str],
    vae: str,
    scale: LatentScale | None,
    scale_of_latents: bool = False,
    overwrite: bool = False,
) -> int:
    """Write a split of a folder of latents. What is written appears under its names only when all of it is there;
    what a run that is killed before leaves in a hidden folder is swept by the next one.

    Args:
        folder: where; made if need be. Other splits in it stay.
        split: name of the split.
        rows: batches of any size of (mean, std, labels): floating (n, C, H, W) twice, std >= 0, both brought to `scale`
            already (without one the autoencoder's own), and int64 (n,); on any device. Held in memory: one shard.
        shard_rows: rows of a shard; the last one may have fewer.
        class_names: one name per class, in the order of the labels.
        vae: folder or hub name of the autoencoder, to be noted.
        scale: how the autoencoder's latents were scaled, to be noted. None: measure each channel's mean and deviation,
            and bring the rows to mean 0 and deviation 1 by them.
        scale_of_latents: whether a given scale was measured, on another split.
        overwrite: whether to replace an existing split (at the end: should it fail, the old one stays).

    Returns:
        Number of rows.

    Raises:
        FileExistsError: the split is there already, whole or not, and `overwrite` is not set.
        ValueError: an argument or a batch is not as above, a value is not finite in float16, or there are no rows.
    """
    check_split(split)
    if shard_rows < 1:
        raise ValueError(f"shard_rows = {shard_rows!r}: must be at least 1")
    if not class_names:
        raise ValueError("class_names is empty: must be one name per class")
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if not overwrite and (present := _files(folder, split)):
        raise FileExistsError(
            f"{folder} holds {present[0].name}: split {split!r} exists; set overwrite, or write to another folder"
        )

    values = {
        "rows": [1],
        "shape": (1, 1, 1),
        "num_classes": len(class_names),
        "class_names": tuple(class_names),
        "vae": vae,
        "scale_of_latents": True if scale_of_latents or scale is None else None,
        **dataclasses.asdict(scale or LatentScale(1.0)),
    }
    index = _Index.model_validate(values)
    # Inside the folder, not beside it: the same disk, even where the folder is a mount.
    with temporary_folder(folder, split) as temporary:
        counts = []
        shape: tuple[int, ...] = ()
        statistics = _ChannelStatistics()
        # What is still to be rescaled is rounded to half precision then, once.
        dtype = torch.float32 if scale is None else torch.float16
        with contextlib.closing(_shards(rows, shard_rows, len(class_names), dtype)) as shards:
            for number, tensors in enumerate(shards):
                write_tensors(_shard(temporary, split, number), tensors, {_SOURCE: index.source()})
                counts.append(len(tensors["labels"]))
                shape = tuple(tensors["mean"].shape[1:])
                if scale is None:
                    statistics.add(tensors["mean"], tensors["std"])
        if not counts:
            raise ValueError(f"split {split!r}: there are no rows to write")
        if scale is None:
            scale = statistics.scale()
            index = index.model_copy(update=dataclasses.asdict(scale))
            for number in range(len(counts)):
                _rescale(_shard(temporary, split, number), scale, {_SOURCE: index.source()})
        scale.check_channels(shape[0])
        index = index.model_copy(update={"rows": counts, "shape": shape})
        for old in _files(folder, split):
            old.unlink()
        for number in range(len(counts)):
            _shard(temporary, split, number).replace(_shard(folder, split, number))
        write_json(folder / f"{split}.json", index.model_dump())
    return sum(counts)


class _ChannelStatistics:
    """Mean and variance of each channel of latents as they are drawn from their posteriors, summed shard by shard."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Tensor = torch.zeros(())
        self._squares: Tensor = torch.zeros(())

    def add(self, mean: Tensor, std: Tensor) -> None:
        """float32 (n, C, H, W) each."""
        for rows, deviations in zip(mean.split(_AT_ONCE), std.split(_AT_ONCE), strict=True):
            values, variances = rows.double(), deviations.double().square()
            self._sum = self._sum + values.sum((0, 2, 3))
            self._squares = self._squares + (values.square() + variances).sum((0, 2, 3))
            self._count += values[:, 0].numel()

    def scale(self) -> LatentScale:
        """What brings them to mean 0 and deviation 1.

        Raises:
            ValueError: a channel never changes.
        """
        mean = self._sum / self._count
        variance = self._squares / self._count - mean.square()
        if not bool((variance > 0).all()):
            channel = int((variance <= 0).nonzero()[0])
            raise ValueError(
                f"channel {channel} of the latents is {mean[channel]:.4g} everywhere; check the autoencoder"
            )
        return LatentScale(1.0, 0.0, tuple(mean.tolist()), tuple(variance.sqrt().tolist()))


def _rescale(file: Path, scale: LatentScale, metadata: dict[str, str]) -> None:
    """Bring a shard of an autoencoder's own latents, in float32, to a scale, in float16."""
    with safe_open(file, framework="pt") as opened:
        mean, std, labels = (opened.get_tensor(name) for name in ("mean", "std", "labels"))
        shift, factor = scale.shift_and_factor(mean)
        means = torch.cat([((rows - shift) * factor).half() for rows in mean.split(_AT_ONCE)])
        stds = torch.cat([(rows * factor).half() for rows in std.split(_AT_ONCE)])
    write_tensors(file, {"mean": means, "std": stds, "labels": labels.clone()}, metadata)


def _shards(
    batches: Iterable[tuple[Tensor, Tensor, Tensor]], shard_rows: int, classes: int, dtype: torch.dtype
) -> Generator[dict[str, Tensor]]:
    """Check the batches and cut them anew; a yielded shard is valid until the next."""
    buffers: dict[str, Tensor] = {}
    rows = count = 0  # of the shards before, and of this one
    for mean, std, labels in batches:
        where = f"batch from row {rows + count} on"
        if not (mean.is_floating_point() and std.is_floating_point() and mean.dim() == 4 and std.shape == mean.shape):
            raise ValueError(
                f"{where}: mean {mean.dtype} {tuple(mean.shape)}, std {std.dtype} {tuple(std.shape)}: must be "
                "floating and of one shape (n, C, H, W)"
            )
        if labels.dtype != torch.int64 or labels.shape != mean.shape[:1]:
            raise ValueError(f"{where}: labels {labels.dtype} {tuple(labels.shape)}: must be int64 ({len(mean)},)")
        parts = {"mean": mean.cpu().to(dtype), "std": std.cpu().to(dtype), "labels": labels.cpu()}
        if not (parts["mean"].isfinite().all() and parts["std"].isfinite().all() and (parts["std"] >= 0).all()):
            name = str(dtype).removeprefix("torch.")
            raise ValueError(f"{where}: mean and std must be finite in {name}, and std >= 0; check the autoencoder")
        check_labels(parts["labels"], classes, "labels", rows + count)
        if not buffers:
            buffers = {name: part.new_empty((shard_rows, *part.shape[1:])) for name, part in parts.items()}
        if buffers["mean"].shape[1:] != mean.shape[1:]:
            raise ValueError(
                f"{where}: latents {tuple(mean.shape[1:])}: must be {tuple(buffers['mean'].shape[1:])} as before"
            )
        start = 0
        while start < len(labels):
            more = min(shard_rows - count, len(labels) - start)
            for name, part in parts.items():
                buffers[name][count : count + more] = part[start : start + more]
            count, start = count + more, start + more
            if count == shard_rows:
                yield buffers
                rows, count = rows + count, 0
    if count:
        yield {name: buffer[:count] for name, buffer in buffers.items()}
