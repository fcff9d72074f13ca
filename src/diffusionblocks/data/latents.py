"""Images as the posterior of an autoencoder: shards on disk, read by memory mapping, and batches drawn from them.

A folder holds, for each split, `<split>-00000.safetensors`, ... and the index `<split>.json`. A shard has the tensors
`mean` and `std`, float16 (n, C, H, W), both multiplied by the autoencoder's scaling factor, and `labels`, int64 (n,).
`encode.py` makes such folders."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import checked, read_json, temporary_folder, write_json, write_tensors
from .placement import on_device

__all__ = ["LatentBatches", "LatentData", "latent_folder", "write_shards"]

_MAKE = "make it with `python -m diffusionblocks.data.encode`"

_Positive = Annotated[int, Field(ge=1)]


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


@dataclass(frozen=True)
class LatentData:
    """Labelled latents of one shape, in ordinary memory or mapped from files: N rows in one or more shards.

    Attributes:
        mean: per shard, float16 (n, C, H, W), n >= 1: the mean of the autoencoder's posterior, multiplied by
            `scaling_factor`.
        std: the posterior's standard deviation, multiplied by it too; shapes as in `mean`.
        labels: int64 (N,), each from 0 to num_classes - 1.
        class_names: one name per class, in the order of the labels.
        vae: folder or hub name of the autoencoder.
        scaling_factor: the autoencoder's factor, which makes the latents' deviation about 1.

    Raises:
        ValueError: a dtype, a shape or a label is not as above.
    """

    mean: tuple[Tensor, ...]
    std: tuple[Tensor, ...]
    labels: Tensor
    class_names: tuple[str, ...]
    vae: str
    scaling_factor: float

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
            result.index_copy_(0, places, shards[number].index_select(0, local))
        return result

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


def latent_folder(path: str | Path, split: str = "train") -> LatentData:
    """Opens a split of a folder of latents. Labels are read; means and deviations are mapped, and read when used.

    Args:
        path: the folder.
        split: which split.

    Returns:
        The rows in the order in which they were written.

    Raises:
        FileNotFoundError: there is no such folder, index or shard.
        ValueError: the index or a shard is damaged, or they disagree; the message names the file.
    """
    _check_split(split)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of latents; {_MAKE}")
    index = _read_index(folder, split)
    means, stds, labels = [], [], []
    for number, rows in enumerate(index.rows):
        file = _shard(folder, split, number)
        mean, std, label = _open_shard(file, rows, index.shape)
        _check_labels(label, index.num_classes, 0, str(file))
        means.append(mean)
        stds.append(std)
        labels.append(label)
    return LatentData(tuple(means), tuple(stds), torch.cat(labels), index.class_names, index.vae, index.scaling_factor)


def examples_of_split(path: str | Path, split: str) -> int:
    """Examples of a split as its index says.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: it is damaged.
    """
    return sum(_read_index(Path(path).expanduser(), split).rows)


def _read_index(folder: Path, split: str) -> _Index:
    file = folder / f"{split}.json"
    if not file.is_file():
        present = sorted(path.stem for path in folder.glob("*.json"))
        raise FileNotFoundError(f"{file} is missing; the folder holds the splits {present}; {_MAKE}")
    values = read_json(file)
    try:
        index = checked(values, _Index, file)
    except ValueError as error:
        raise ValueError(f"{error}; encode the split again") from None
    if len(index.class_names) != index.num_classes:
        raise ValueError(
            f"{file}: num_classes = {index.num_classes}, but {len(index.class_names)} class names; "
            "encode the split again"
        )
    return index


def _open_shard(file: Path, rows: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """mean and std mapped, labels read."""
    want = {"mean": ("F16", [rows, *shape]), "std": ("F16", [rows, *shape]), "labels": ("I64", [rows])}
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
            return opened.get_tensor("mean"), opened.get_tensor("std"), opened.get_tensor("labels").clone()
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut off: {error}; copy it or encode the split again") from None


# --- writing ------------------------------------------------------------------------------------------------


def write_shards(
    folder: str | Path,
    split: str,
    rows: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    shard_rows: int,
    class_names: Sequence[str],
    vae: str,
    scaling_factor: float,
    overwrite: bool = False,
) -> int:
    """Writes a split of a folder of latents. What is written appears under its names only when all of it is there;
    what a run that is killed before leaves in a hidden folder is swept by the next one.

    Args:
        folder: where; made if need be. Other splits in it stay.
        split: name of the split.
        rows: batches of any size of (mean, std, labels): floating (n, C, H, W) twice, std >= 0, both multiplied by
            `scaling_factor` already, and int64 (n,); on any device. Held in memory: one shard.
        shard_rows: rows of a shard; the last one may have fewer.
        class_names: one name per class, in the order of the labels.
        vae: folder or hub name of the autoencoder, to be noted.
        scaling_factor: its scaling factor, to be noted.
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
    if not (math.isfinite(scaling_factor) and scaling_factor > 0):
        raise ValueError(f"scaling_factor = {scaling_factor!r}: must be finite and > 0")
    if not class_names:
        raise ValueError("class_names is empty: must be one name per class")
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if not overwrite and (present := _files(folder, split)):
        raise FileExistsError(
            f"{folder} holds {present[0].name}: split {split!r} exists; set overwrite, or write to another folder"
        )

    # Inside the folder, not beside it: the same disk, even where the folder is a mount.
    with temporary_folder(folder, split) as temporary:
        counts = []
        shape: tuple[int, ...] = ()
        with contextlib.closing(_shards(rows, shard_rows, len(class_names))) as shards:
            for number, tensors in enumerate(shards):
                write_tensors(_shard(temporary, split, number), tensors)
                counts.append(len(tensors["labels"]))
                shape = tuple(tensors["mean"].shape[1:])
        if not counts:
            raise ValueError(f"split {split!r}: there are no rows to write")
        values = {
            "rows": counts,
            "shape": shape,
            "num_classes": len(class_names),
            "class_names": tuple(class_names),
            "vae": vae,
            "scaling_factor": scaling_factor,
        }
        index = _Index.model_validate(values)
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
            self._mean = self._copied(data.mean)
            self._std = self._copied(data.std) if sample_posterior else None
        self._draw = self._eager_draw

    def _copied(self, shards: Sequence[Tensor]) -> Tensor:
        """All shards as one tensor on the device; no second copy is ever in memory."""
        result = torch.empty((self.num_examples, *self._data.image_shape), dtype=torch.float16, device=self.device)
        for part, shard in zip(result.split([len(shard) for shard in shards]), shards, strict=True):
            part.copy_(shard)
        return result

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
