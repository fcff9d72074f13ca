"""Images as the posterior of an autoencoder: shards on disk, read by memory mapping, and batches drawn from them.

A folder holds, for each split, `<split>-00000.safetensors`, ... and the index `<split>.json`. A shard has the tensors
`mean` and `std`, float16 (n, C, H, W), both on the scale that the index notes (`LatentScale`), and `labels`, int64
(n,). `encode.py` makes such folders."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
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
from .dataset import Dataset
from .example_device import on_device
from .tables import ClassNames

__all__ = ["LatentBatches", "LatentData", "LatentScale", "latent_folder", "scale_of_split", "write_shards"]

_SOURCE = "source"  # key of a shard's metadata
_CHECKED_AT_ONCE = 2**28  # bytes on the host that are looked at before training; of more, each row as it is gathered
_MAKE = "make it with `python -m diffusionblocks.data.encode`"

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

    def source(self) -> str:
        """What the latents are of, noted in every shard, too."""
        return self.model_dump_json(exclude={"format", "rows", "shape", "num_classes"})

    def scale(self) -> LatentScale:
        """How the latents were made of the autoencoder's."""
        return LatentScale(self.scaling_factor, self.shift_factor, self.latents_mean, self.latents_std)


@dataclass(frozen=True)
class LatentScale:
    """How an autoencoder's latents are brought to a mean of about 0 and a deviation of about 1, as diffusers does:
    `(latent - shift_factor) * scaling_factor`, or `(latent - latents_mean) / latents_std * scaling_factor` a channel.

    Attributes:
        scaling_factor: finite, > 0.
        shift_factor: None where it was not noted (folders of older versions).
        latents_mean, latents_std: a number a channel, std > 0; None for an autoencoder without them.

    Raises:
        ValueError: a value is not as above, only one of mean and std is there, or mean and shift_factor are.
    """

    scaling_factor: float
    shift_factor: float | None = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scaling_factor) and self.scaling_factor > 0):
            raise ValueError(f"scaling_factor = {self.scaling_factor!r}: must be finite and > 0")
        if self.shift_factor is not None and not math.isfinite(self.shift_factor):
            raise ValueError(f"shift_factor = {self.shift_factor!r}: must be finite")
        mean, std = self.latents_mean, self.latents_std
        if (mean is None) != (std is None):
            raise ValueError(f"latents_mean = {mean}, latents_std = {std}: must both be there, or neither")
        if mean is None or std is None:
            return
        if self.shift_factor:
            raise ValueError(f"latents_mean and shift_factor = {self.shift_factor}: only one of them can be meant")
        if len(mean) != len(std) or not all(map(math.isfinite, (*mean, *std))) or not all(value > 0 for value in std):
            raise ValueError(
                f"latents_mean = {list(mean)}, latents_std = {list(std)}: must be finite, as many as channels, std > 0"
            )

    def check_channels(self, channels: int) -> None:
        """ValueError unless mean and std, where they are there, have a value a channel."""
        if self.latents_mean is not None and len(self.latents_mean) != channels:
            raise ValueError(f"latents_mean has {len(self.latents_mean)} values: must be {channels}, one per channel")

    def shift_and_factor(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """What is subtracted first and multiplied with then: float32 (C or 1, 1, 1) on the device of `like`."""
        mean = torch.tensor(self.latents_mean or [self.shift_factor or 0.0], dtype=torch.float32, device=like.device)
        std = torch.tensor(self.latents_std or [1.0], dtype=torch.float32, device=like.device)
        return mean.view(-1, 1, 1), (self.scaling_factor / std).view(-1, 1, 1)

    def check_same(self, other: LatentScale, here: str, there: str) -> None:
        """Refuse latents of another scale.

        Raises:
            ValueError: it is another one; the message names the field and both places.
        """
        for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
            own, theirs = getattr(self, name), getattr(other, name)
            unknown = name == "shift_factor" and (own is None or theirs is None)
            if own != theirs and not unknown:
                raise ValueError(
                    f"{here} has {name} = {own}, {there} has {theirs}: latents of one are not those of the other; "
                    "encode with the autoencoder that is meant"
                )


@dataclass(frozen=True)
class LatentData(Dataset):
    """Labelled latents of one shape, in ordinary memory or mapped from files: N rows in one or more shards.

    Attributes:
        mean: per shard, float16 (n, C, H, W), n >= 1: the mean of the autoencoder's posterior, multiplied by
            `scaling_factor`.
        std: the posterior's standard deviation, multiplied by it too; shapes as in `mean`.
        labels: int64 (N,), each from 0 to num_classes - 1.
        class_names: one name per class, in the order of the labels.
        vae: folder or hub name of the autoencoder.
        scaling_factor: the autoencoder's factor, which makes the latents' deviation about 1.
        files: per shard, where it is from, for messages; empty for latents that were never in a file.

    Raises:
        ValueError: a dtype, a shape or a label is not as above.
    """

    mean: tuple[Tensor, ...]
    std: tuple[Tensor, ...]
    labels: Tensor
    class_names: tuple[str, ...]
    vae: str
    scaling_factor: float
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(f"mean: {len(self.mean)} shards, std: {len(self.std)}: must be as many, and at least one")
        for shard, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            shape = (len(mean), *self.mean[0].shape[1:])
            for name, tensor in (("mean", mean), ("std", std)):
                if tensor.dtype != torch.float16 or tensor.shape != shape or tensor.dim() != 4 or 0 in shape:
                    raise ValueError(
                        f"shard {shard}, {name}: {tensor.dtype} {tuple(tensor.shape)}: must be float16 (n, C, H, W), "
                        "n >= 1, C, H, W the same everywhere"
                    )
        rows = sum(len(mean) for mean in self.mean)
        if self.labels.dtype != torch.int64 or self.labels.shape != (rows,):
            raise ValueError(f"labels: {self.labels.dtype} {tuple(self.labels.shape)}: must be int64 ({rows},)")
        _check_labels(self.labels, len(self.class_names), 0, "labels")

    @property
    def num_classes(self) -> int:
        """Number of classes, also of those that have no row here."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every latent."""
        _, c, h, w = self.mean[0].shape
        return c, h, w

    @property
    def example_shape(self) -> tuple[int, int, int]:
        """`image_shape`: of every example."""
        return self.image_shape

    @property
    def classes(self) -> list[str]:
        """See `Dataset`."""
        return list(self.class_names)

    def tensors(self) -> list[Tensor]:
        """See `Dataset`."""
        return [self.labels, *self.mean, *self.std]

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, part: Literal["mean", "std"], indices: Tensor, pin_memory: bool = False) -> Tensor:
        """Gathers rows of all shards into fresh memory.

        Args:
            part: which tensor.
            indices: int64 (n,) on the CPU, 0 to N - 1, in any order, repeats allowed.
            pin_memory: whether the result is page-locked.

        Returns:
            float16 (n, C, H, W) on the CPU.

        Raises:
            IndexError: an index is out of range.
            ValueError: a row has a value that is not finite, or a negative deviation.
        """
        shards = self.mean if part == "mean" else self.std
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"indices from {int(indices.min())} to {int(indices.max())}: must be 0 to {len(self) - 1}")
        result = torch.empty((len(indices), *self.image_shape), dtype=torch.float16, pin_memory=pin_memory)
        shard = torch.searchsorted(self._ends, indices, right=True)
        order = shard.argsort()
        numbers, counts = shard[order].unique_consecutive(return_counts=True)
        for number, places in zip(numbers.tolist(), order.split(counts.tolist()), strict=True):
            local = indices[places] - (int(self._ends[number]) - len(shards[number]))
            rows = shards[number].index_select(0, local)
            self.check_values(part, number, rows, local)
            result.index_copy_(0, places, rows)
        return result

    def check_values(
        self, part: Literal["mean", "std"], shard: int, rows: Tensor, numbers: Tensor | None = None
    ) -> None:
        """Refuse what no autoencoder gives.

        Args:
            part: which tensor.
            shard: its number.
            rows: float16 (n, C, H, W), of the shard.
            numbers: int64 (n,), which rows of the shard they are; None: the first n.

        Raises:
            ValueError: a value is not finite, or a deviation is negative; the message names shard and row.
        """
        fine = rows.isfinite() if part == "mean" else rows.isfinite() & (rows >= 0)
        if not bool(fine.all()):
            first = int((~fine.flatten(1).all(dim=1)).nonzero()[0])
            row = first if numbers is None else int(numbers[first])
            where = self.files[shard] if self.files else f"shard {shard}"
            allowed = "finite" if part == "mean" else "finite and >= 0"
            raise ValueError(f"{where}, row {row}: {part} has values that are not {allowed}; encode the split again")

    @functools.cached_property
    def _ends(self) -> Tensor:
        """int64 (number of shards,): the row after each shard's last."""
        return torch.tensor([len(mean) for mean in self.mean]).cumsum(0)


def _check_labels(labels: Tensor, classes: int, first_row: int, where: str) -> None:
    bad = (labels < 0) | (labels >= classes)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{where}, row {first_row + row}: label {int(labels[row])}: must be from 0 to {classes - 1} "
            f"({classes} classes); rows without a label must be dropped first"
        )


def _check_split(split: str) -> None:
    if not re.fullmatch(r"\w+(\.\w+)*", split):
        raise ValueError(f"split = {split!r}: must be letters, digits, '_' and inner '.', it names files")


def _shard(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05d}.safetensors"


def _files(folder: Path, split: str) -> list[Path]:
    """The split's index and shards, as far as there are any; the index first."""
    shards = re.compile(re.escape(split) + r"-\d{5,}\.safetensors")
    index = folder / f"{split}.json"
    return [index] * index.exists() + sorted(path for path in folder.iterdir() if shards.fullmatch(path.name))


# --- reading ------------------------------------------------------------------------------------------------


def latent_folder(path: str | Path, split: str = "train", *, reference_split: str | None = "train") -> LatentData:
    """Opens a split of a folder of latents. Labels are read; means and deviations are mapped, and read when used.

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
    _check_split(split)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of latents; {_MAKE}")
    index = _read_index(folder, split)
    names, order = index.class_names, None
    if reference_split not in (None, split) and _index_file(folder, str(reference_split)).is_file():
        reference = _read_index(folder, str(reference_split))
        order = _agreed(index, reference, _index_file(folder, split), _index_file(folder, str(reference_split)))
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


def scale_of_split(path: str | Path, split: str) -> LatentScale | None:
    """How a split's latents were scaled; None where there is no such split.

    Raises:
        ValueError: its index is damaged.
    """
    folder = Path(path).expanduser()
    return _read_index(folder, split).scale() if _index_file(folder, split).is_file() else None


def _agreed(index: _Index, reference: _Index, here: Path, there: Path) -> np.ndarray | None:
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
    want = {"mean": ("F16", shape), "std": ("F16", shape), "labels": ("I64", [rows])}
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing, but the index names it; copy it here or encode the split again")
    try:
        with safe_open(file, framework="pt") as opened:  # It also checks that the file is as long as it should be.
            found = {}
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                part = opened.get_slice(name)
                found[name] = (part.get_dtype(), list(part.get_shape()))
            if found != want:
                raise ValueError(f"{file} holds {found}: must be {want}, as the index says; encode the split again")
            labels = opened.get_tensor("labels").clone()
            _check_labels(labels, index.num_classes, 0, str(file))
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
    expected = json.loads(index.source())
    for name in expected:
        if values.get(name) != expected[name]:
            here, there = (str(one.get(name))[:200] for one in (values, expected))
            raise ValueError(
                f"{file}: {name} is {here}, in the index of its split {there}: a shard of other latents; encode again"
            )


# --- writing ------------------------------------------------------------------------------------------------


def write_shards(
    folder: str | Path,
    split: str,
    rows: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    shard_rows: int,
    class_names: Sequence[str],
    vae: str,
    scale: LatentScale,
    overwrite: bool = False,
) -> int:
    """Writes a split of a folder of latents. What is written appears under its names only when all of it is there;
    what a run that is killed before leaves in a hidden folder is swept by the next one.

    Args:
        folder: where; made if need be. Other splits in it stay.
        split: name of the split.
        rows: batches of any size of (mean, std, labels): floating (n, C, H, W) twice, std >= 0, both brought to `scale`
            already, and int64 (n,); on any device. Held in memory: one shard.
        shard_rows: rows of a shard; the last one may have fewer.
        class_names: one name per class, in the order of the labels.
        vae: folder or hub name of the autoencoder, to be noted.
        scale: how the autoencoder's latents were scaled, to be noted.
        overwrite: whether to replace an existing split (at the end: should it fail, the old one stays).

    Returns:
        Number of rows.

    Raises:
        FileExistsError: the split is there already, whole or not, and `overwrite` is not set.
        ValueError: an argument or a batch is not as above, a value is not finite in float16, or there are no rows.
    """
    _check_split(split)
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
        **dataclasses.asdict(scale),
    }
    index = _Index.model_validate(values)
    # Inside the folder, not beside it: the same disk, even where the folder is a mount.
    with temporary_folder(folder, split) as temporary:
        counts = []
        shape: tuple[int, ...] = ()
        with contextlib.closing(_shards(rows, shard_rows, len(class_names))) as shards:
            for number, tensors in enumerate(shards):
                write_tensors(_shard(temporary, split, number), tensors, {_SOURCE: index.source()})
                counts.append(len(tensors["labels"]))
                shape = tuple(tensors["mean"].shape[1:])
        if not counts:
            raise ValueError(f"split {split!r}: there are no rows to write")
        scale.check_channels(shape[0])
        index = index.model_copy(update={"rows": counts, "shape": shape})
        for old in _files(folder, split):
            old.unlink()
        for number in range(len(counts)):
            _shard(temporary, split, number).replace(_shard(folder, split, number))
        write_json(folder / f"{split}.json", index.model_dump())
    return sum(counts)


def _shards(
    batches: Iterable[tuple[Tensor, Tensor, Tensor]], shard_rows: int, classes: int
) -> Generator[dict[str, Tensor]]:
    """Checks the batches and cuts them anew; a yielded shard is valid until the next."""
    buffers: dict[str, Tensor] = {}
    done = filled = 0
    for mean, std, labels in batches:
        where = f"batch from row {done + filled} on"
        if not (mean.is_floating_point() and std.is_floating_point() and mean.dim() == 4 and std.shape == mean.shape):
            raise ValueError(
                f"{where}: mean {mean.dtype} {tuple(mean.shape)}, std {std.dtype} {tuple(std.shape)}: must be "
                "floating and of one shape (n, C, H, W)"
            )
        if labels.dtype != torch.int64 or labels.shape != mean.shape[:1]:
            raise ValueError(f"{where}: labels {labels.dtype} {tuple(labels.shape)}: must be int64 ({len(mean)},)")
        parts = {"mean": mean.cpu().to(torch.float16), "std": std.cpu().to(torch.float16), "labels": labels.cpu()}
        if not (parts["mean"].isfinite().all() and parts["std"].isfinite().all() and (parts["std"] >= 0).all()):
            raise ValueError(f"{where}: mean and std must be finite in float16, and std >= 0; check the autoencoder")
        _check_labels(parts["labels"], classes, done + filled, "labels")
        if not buffers:
            buffers = {name: part.new_empty((shard_rows, *part.shape[1:])) for name, part in parts.items()}
        if buffers["mean"].shape[1:] != mean.shape[1:]:
            raise ValueError(
                f"{where}: latents {tuple(mean.shape[1:])}: must be {tuple(buffers['mean'].shape[1:])} as before"
            )
        start = 0
        while start < len(labels):
            count = min(shard_rows - filled, len(labels) - start)
            for name, part in parts.items():
                buffers[name][filled : filled + count] = part[start : start + count]
            filled, start = filled + count, start + count
            if filled == shard_rows:
                yield buffers
                done, filled = done + filled, 0
    if filled:
        yield {name: buffer[:filled] for name, buffer in buffers.items()}


# --- batches ------------------------------------------------------------------------------------------------


class LatentBatches:
    """Makes training batches on a device: gathers the posteriors and draws a latent from each. Nothing is flipped: the
    flip of a latent is not the latent of the flipped image.

    Args:
        data: the latents.
        device: where the batches are made.
        scale: multiplies the latents, > 0. Those of `data` have a deviation of about 1 (see its `scaling_factor`), so
            0.5 gives the usual sigma_data = 0.5.
        sample_posterior: whether to draw mean + std * noise, anew every time; otherwise it is the mean.
        placement: where the latents are kept. "device": on the device (on a CPU: read into memory); "host": where
            `data` has them, each batch being copied over through page-locked memory; "auto": on a GPU if they take at
            most a quarter of its free memory. The batches are the same. A CUDA graph can only be made of "device".

    Attributes:
        num_examples: number of latents.
        on_device: whether all latents were copied to the device.

    Raises:
        ValueError: scale or placement is not as above.
    """

    def __init__(
        self,
        data: LatentData,
        *,
        device: torch.device,
        scale: float = 0.5,
        sample_posterior: bool = True,
        placement: str = "auto",
    ) -> None:
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale = {scale!r}: must be finite and > 0")
        self.num_examples = len(data)
        self.device = torch.device(device)
        self.scale = float(scale)
        self.sample_posterior = sample_posterior
        self._data = data
        num_bytes = self.num_examples * math.prod(data.image_shape) * 2 * (1 + sample_posterior)
        self.on_device = on_device(placement, num_bytes, self.device)
        self._labels = data.labels
        if self.on_device:
            self._labels = data.labels.to(self.device)
            self._mean = self._copied("mean")
            self._std = self._copied("std") if sample_posterior else None
        elif num_bytes <= _CHECKED_AT_ONCE:
            for part in ("mean", "std") if sample_posterior else ("mean",):
                for number, shard in enumerate(self._shards(part)):
                    data.check_values(part, number, shard)
        self._draw = self._eager_draw

    def _copied(self, name: Literal["mean", "std"]) -> Tensor:
        """All shards as one tensor on the device; no second copy is ever in memory."""
        shards = self._shards(name)
        result = torch.empty((self.num_examples, *self._data.image_shape), dtype=torch.float16, device=self.device)
        for number, part in enumerate(result.split([len(shard) for shard in shards])):
            self._data.check_values(name, number, shards[number])
            part.copy_(shards[number])
        return result

    def _shards(self, part: Literal["mean", "std"]) -> Sequence[Tensor]:
        return self._data.mean if part == "mean" else self._data.std

    def compile(self) -> None:
        """Compiles the arithmetic into one kernel; the latents stay the same, up to rounding."""
        self._draw = torch.compile(self._eager_draw, fullgraph=True)

    def _eager_draw(self, mean: Tensor, std: Tensor | None, noise: Tensor | None) -> Tensor:
        latents = mean.to(torch.float32)
        if std is not None and noise is not None:
            latents = latents + std.to(torch.float32) * noise
        return latents * self.scale

    def __call__(self, indices: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Makes the batch of the given examples.

        Args:
            indices: int64 (n,), 0 to num_examples - 1; on the device when the latents are there (then nothing waits
                for the device), else on the CPU.
            generator: source of the posterior's noise, on `device`; None for the default one.

        Returns:
            On the device: "pixel_values" float32 (n, C, H, W), named like images because it is what a diffusion model
            denoises, and "labels" int64 (n,).

        Raises:
            ValueError: a CUDA graph is being captured, but the latents are not on the device.
        """
        std = None
        if self.on_device:
            labels, mean = self._labels.index_select(0, indices), self._mean.index_select(0, indices)
            if self._std is not None:
                std = self._std.index_select(0, indices)
        else:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise ValueError(
                    "a CUDA graph cannot gather latents from ordinary memory; set placement to 'device', or cuda_graph "
                    "to false"
                )
            indices = indices.cpu()
            labels, mean = self._moved(self._labels.index_select(0, indices)), self._rows("mean", indices)
            if self.sample_posterior:
                std = self._rows("std", indices)
        noise = None
        if std is not None:
            noise = torch.randn(std.shape, generator=generator, device=self.device)
        return {"pixel_values": self._draw(mean, std, noise), "labels": labels}

    def _rows(self, part: Literal["mean", "std"], indices: Tensor) -> Tensor:
        # Fresh page-locked memory each time: its allocator keeps a buffer until the copy out of it has ended.
        return self._moved(self._data.rows(part, indices, pin_memory=self.device.type == "cuda"))

    def _moved(self, rows: Tensor) -> Tensor:
        return rows.to(self.device, non_blocking=True)
