"""Latents in files: shards that are read by memory mapping, and an index for each split.

A folder holds, for each split, `<split>-00000.safetensors`, ... and the index `<split>.json`. A shard has the tensors
`mean` and `std`, float16 (n, C, H, W), of videos (n, C, T, H, W), both on the scale that the index notes
(`LatentScale`), and `labels`, int64 (n,). `encode.py` makes such folders. All latents of a
shard have one size, which the index notes where there are several.

Latents with prompts have the states of these, too, as text encoders gave them: floating ones bfloat16, masks bool, by
the names of `prompt_states.py`. Those of the empty prompt lie in `<split>-empty.safetensors`.

Of an autoencoder whose config says no scale, the mean and deviation of each channel are measured over the split that is
written first; the folder's other splits are brought to the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.files import temporary_folder
from ..common.formats import read_json, validate, write_json, write_tensors
from ..targets.image import MASK
from .dataset import check_labels
from .image_table import ClassNames
from .latent_data import LatentData, LatentScale

if TYPE_CHECKING:
    from .autoencoder import ImageAutoencoder

__all__ = [
    "DecodedBy",
    "Prompts",
    "check_split",
    "decoded_by",
    "examples_of_split",
    "largest_example",
    "latent_folder",
    "measured_scale",
    "noted_prompts",
    "write_shards",
]

_SOURCE = "source"  # key of a shard's metadata

#: How a folder of latents is made, for messages.
MAKE_LATENTS = "make it with `diffusionblocks encode`"

_AT_ONCE = 64  # rows in higher precision, while a shard is measured or rescaled

_MOST_OF_A_SHARD = 2**30  # bytes, where rows have states: these are often larger than the latents

_Positive = Annotated[int, Field(ge=1)]

#: (C, H, W), or of videos (C, T, H, W).
_Shape = Annotated[tuple[_Positive, ...], Field(min_length=3, max_length=4)]

_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Index(BaseModel):
    """What `<split>.json` holds: without it, a split's shards are not a split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1  # Raise it when the content of the files changes.
    rows: list[_Positive] = Field(min_length=1)
    shape: _Shape
    num_classes: _Positive
    class_names: tuple[str, ...]
    vae: str
    vae_weights: str | None = None  # their SHA-256; None in folders of older versions
    scaling_factor: float = Field(gt=0, allow_inf_nan=False)
    shift_factor: _Finite | None = None  # None in folders of older versions, which subtracted it without noting it
    latents_mean: tuple[_Finite, ...] | None = None
    latents_std: tuple[_Finite, ...] | None = None
    scale_of_latents: Literal[True] | None = None  # mean and std are of latents, not of the autoencoder's config
    shapes: list[_Shape] | None = None  # of each shard, where they differ
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # of the videos that were encoded
    text_encoder: str | None = None
    prompt_length: _Positive | None = None  # as it was set; None: as the encoder takes
    states: dict[str, tuple[_Positive, ...]] | None = None  # shape of each for one row

    def source(self) -> str:
        """What the latents are of, noted in every shard, too."""
        return self.model_dump_json(exclude={"format", "rows", "shape", "shapes", "num_classes"})

    def shape_of(self, shard: int) -> tuple[int, ...]:
        """That of a shard's latents."""
        return self.shape if self.shapes is None else self.shapes[shard]

    def scale(self) -> LatentScale:
        """How the latents were made of the autoencoder's."""
        return LatentScale(self.scaling_factor, self.shift_factor, self.latents_mean, self.latents_std)


def check_split(split: str) -> None:
    """ValueError unless a split's name can be that of files."""
    if not re.fullmatch(r"\w+(\.\w+)*", split):
        raise ValueError(f"split = {split!r}: must be letters, digits, '_' and inner '.', it names files")


def _shard(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05d}.safetensors"


def _empty_file(folder: Path, split: str) -> Path:
    return folder / f"{split}-empty.safetensors"


def _files(folder: Path, split: str) -> list[Path]:
    """The split's index and shards, as far as there are any; the index first."""
    shards = re.compile(re.escape(split) + r"-\d{5,}\.safetensors")
    beside = [folder / f"{split}.json", _empty_file(folder, split)]
    return [path for path in beside if path.exists()] + sorted(
        path for path in folder.iterdir() if shards.fullmatch(path.name)
    )


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
        raise FileNotFoundError(f"{folder}: no such folder of latents; {MAKE_LATENTS}")
    index = _read_index(folder, split)
    names, order = index.class_names, None
    if reference_split not in (None, split) and _index_file(folder, str(reference_split)).is_file():
        reference = _read_index(folder, str(reference_split))
        order = _label_order(index, reference, _index_file(folder, split), _index_file(folder, str(reference_split)))
        names = reference.class_names
    means, stds, labels = [], [], []
    states: dict[str, list[Tensor]] = {name: [] for name in index.states or {}}
    files = [_shard(folder, split, number) for number in range(len(index.rows))]
    for number, file in enumerate(files):
        tensors = _open_shard(file, number, index)
        means.append(tensors["mean"])
        stds.append(tensors["std"])
        labels.append(tensors["labels"] if order is None else torch.from_numpy(order)[tensors["labels"]])
        for name, of_shards in states.items():
            of_shards.append(tensors[name])
    return LatentData(
        tuple(means),
        tuple(stds),
        torch.cat(labels),
        names,
        index.vae,
        index.scaling_factor,
        tuple(map(str, files)),
        states={name: tuple(of_shards) for name, of_shards in states.items()},
        empty=_open_empty(_empty_file(folder, split), index),
    )


@dataclass(frozen=True)
class Prompts:
    """What a split notes of the prompts whose states it has.

    Attributes:
        text_encoder: folder or hub name of what made the states.
        length: tokens of a prompt, as it was set; None: as the encoder takes.
        empty: the states of the empty prompt, by name, without the first axis.
    """

    text_encoder: str
    length: int | None
    empty: Mapping[str, Tensor]


def noted_prompts(path: str | Path, split: str) -> Prompts | None:
    """What a split notes of its prompts; None where it has none.

    Raises:
        FileNotFoundError: no index, or no file of the empty prompt.
        ValueError: one of them is damaged.
    """
    folder = Path(path).expanduser()
    index = _read_index(folder, split)
    if index.text_encoder is None:
        return None
    return Prompts(index.text_encoder, index.prompt_length, _open_empty(_empty_file(folder, split), index))


@dataclass(frozen=True)
class DecodedBy:
    """What decodes a split's latents.

    Attributes:
        vae: folder or hub name of the autoencoder.
        scale: how its latents were scaled.
        scale_of_latents: whether the scale was measured on latents, for the autoencoder's config says none.
        channels: of its latents.
        weights: SHA-256 of its weights; None in folders of older versions.
        fps: frames a second of the videos that were encoded; None of images.
    """

    vae: str
    scale: LatentScale
    scale_of_latents: bool
    channels: int
    weights: str | None = None
    fps: float | None = None

    def check_decoder(self, vae: ImageAutoencoder, where: str) -> None:
        """Refuse an autoencoder that did not make the latents.

        Args:
            vae: what is to decode them.
            where: folder and split, for messages.

        Raises:
            ValueError: its latents have other channels, or it has the noted name and other weights.

        Warns:
            UserWarning: it has another name and other weights: only who named it can know whether that may be.
        """
        if self.weights == vae.weights:
            return
        if vae.latent_shape[0] != self.channels:
            raise ValueError(
                f"vae = {vae.name!r}: its latents have {vae.latent_shape[0]} channels, those of {where} "
                f"{self.channels}: name the autoencoder that encoded them, {self.vae!r}"
            )
        if self.weights is None:
            return
        if vae.name == self.vae:
            raise ValueError(
                f"vae = {vae.name!r}: its weights are not those that encoded {where}: bring its files back, or encode "
                "every split again"
            )
        warnings.warn(
            f"vae = {vae.name!r} has other weights than {self.vae!r}, which encoded {where}: images are wrong unless "
            "both have the same latents",
            stacklevel=2,
        )


def decoded_by(path: str | Path, split: str) -> DecodedBy | None:
    """What a split's index notes of its autoencoder; None where there is no such split.

    Raises:
        ValueError: its index is damaged.
    """
    folder = Path(path).expanduser()
    if not _index_file(folder, split).is_file():
        return None
    index = _read_index(folder, split)
    return DecodedBy(
        vae=index.vae,
        scale=index.scale(),
        scale_of_latents=bool(index.scale_of_latents),
        channels=index.shape[0],
        weights=index.vae_weights,
        fps=index.fps,
    )


def measured_scale(path: str | Path, split: str, vae: str, weights: str) -> LatentScale | None:
    """The scale that was measured for a folder's splits of an autoencoder, other than this one; None for none.

    Args:
        path: the folder, which need not be there.
        split: the one that is left out.
        vae: name of the autoencoder.
        weights: their SHA-256.

    Raises:
        ValueError: an index is damaged, or another split is of other weights under the same name.
    """
    result = None
    folder = Path(path).expanduser()
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        if '"vae"' not in file.read_text(encoding="utf-8", errors="replace"):  # a file of the user's own
            continue
        noted = None if file.stem == split else decoded_by(folder, file.stem)
        if noted is None or noted.vae != vae:
            continue
        if noted.weights not in (None, weights):
            raise ValueError(
                f"vae = {vae!r}: its weights are not those that encoded split {file.stem!r} of {folder}: bring its "
                "files back, or encode every split again, into another folder"
            )
        if noted.scale_of_latents and result is None:
            result = noted.scale
    return result


def _label_order(index: _Index, reference: _Index, here: Path, there: Path) -> np.ndarray | None:
    """What each of a split's labels is in the reference, see `ClassNames.labels_from`."""
    if index.shape[0] != reference.shape[0] or (
        index.shape != reference.shape and index.shapes is None and reference.shapes is None
    ):
        raise ValueError(f"{here} has latents {index.shape}, {there} has {reference.shape}: encode both at one size")
    if index.vae != reference.vae:
        raise ValueError(
            f"{here} is of the autoencoder {index.vae!r}, {there} of {reference.vae!r}: encode both with one; if it is "
            "the same, write the same name into both"
        )
    if None not in (index.vae_weights, reference.vae_weights) and index.vae_weights != reference.vae_weights:
        raise ValueError(
            f"{here} and {there} are of other weights of the autoencoder {index.vae!r}: encode both with one"
        )
    index.scale().check_same(reference.scale(), str(here), str(there))
    if index.fps != reference.fps:
        raise ValueError(f"{here} has fps = {index.fps}, {there} has {reference.fps}: encode both at one fps")
    if (index.text_encoder, index.states) != (reference.text_encoder, reference.states):
        raise ValueError(
            f"{here} has prompts by {index.text_encoder}, {there} by {reference.text_encoder}, or of another length: "
            "encode both with one text encoder"
        )
    return ClassNames(reference.class_names, str(there)).labels_from(ClassNames(index.class_names, str(here)))


def examples_of_split(path: str | Path, split: str) -> int:
    """Examples of a split as its index says.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: it is damaged.
    """
    return sum(_read_index(Path(path).expanduser(), split).rows)


def largest_example(path: str | Path, split: str) -> dict[str, tuple[int, ...]]:
    """Shapes of one example of a split, its states among them: of the largest, where there are several sizes.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: it is damaged.
    """
    index = _read_index(Path(path).expanduser(), split)
    return {"pixel_values": max(index.shapes or [index.shape], key=math.prod), **(index.states or {})}


def _index_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.json"


def _read_index(folder: Path, split: str) -> _Index:
    file = _index_file(folder, split)
    if not file.is_file():
        present = sorted(path.stem for path in folder.glob("*.json"))
        raise FileNotFoundError(f"{file} is missing; the folder holds the splits {present}; {MAKE_LATENTS}")
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
    if index.shapes is not None and len(index.shapes) != len(index.rows):
        raise ValueError(f"{file}: {len(index.shapes)} shapes of {len(index.rows)} shards; encode the split again")
    if (index.states is None) != (index.text_encoder is None):
        raise ValueError(f"{file}: states and text_encoder belong together; encode the split again")
    try:
        index.scale().check_channels(index.shape[0])
    except ValueError as error:
        raise ValueError(f"{file}: {error}; encode the split again") from None
    return index


def _dtype(name: str) -> torch.dtype:
    return torch.bool if name == MASK else torch.bfloat16


def _layout(index: _Index, rows: int | None) -> dict[str, tuple[str, list[int]]]:
    """dtype and shape of the states of so many rows; None: of the empty prompt."""
    lead = [] if rows is None else [rows]
    names = {torch.bool: "BOOL", torch.bfloat16: "BF16"}
    return {name: (names[_dtype(name)], [*lead, *shape]) for name, shape in (index.states or {}).items()}


def _open_empty(file: Path, index: _Index) -> dict[str, Tensor]:
    """The states of the empty prompt, read; none where there are no prompts."""
    if index.states is None:
        return {}
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing, the states of the empty prompt; encode the split again")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut off: {error}; copy it or encode the split again") from None
    layout = {name: (_dtype(name), tuple(shape)) for name, shape in index.states.items()}
    if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} != layout:
        raise ValueError(f"{file} does not hold {layout}, as the index says; encode the split again")
    return tensors


def _open_shard(file: Path, number: int, index: _Index) -> dict[str, Tensor]:
    """mean, std and states mapped, labels read."""
    rows = index.rows[number]
    shape = [rows, *index.shape_of(number)]
    layout = {"mean": ("F16", shape), "std": ("F16", shape), "labels": ("I64", [rows]), **_layout(index, rows)}
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
            return {name: labels if name == "labels" else opened.get_tensor(name) for name in layout}
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
    rows: Iterable[tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Mapping[str, Tensor]]],
    *,
    shard_rows: int,
    class_names: Sequence[str],
    vae: str,
    vae_weights: str | None = None,
    scale: LatentScale | None,
    scale_of_latents: bool = False,
    prompts: Prompts | None = None,
    fps: float | None = None,
    overwrite: bool = False,
) -> int:
    """Write a split of a folder of latents. What is written appears under its names only when all of it is there;
    what a run that is killed before leaves in a hidden folder is swept by the next one.

    Args:
        folder: where; made if need be. Other splits in it stay.
        split: name of the split.
        rows: batches of any size of (mean, std, labels): floating (n, C, H, W), or of videos (n, C, T, H, W),
            twice, std >= 0, both brought to `scale` already (without one the autoencoder's own), and int64 (n,); on any
            device. With `prompts` a fourth entry has the states of each row's prompt, by name. Batches may differ in
            size. Held in memory: one shard a size.
        shard_rows: rows of a shard; the last one of a size may have fewer, and those with states have at most 1 GiB.
        class_names: one name per class, in the order of the labels.
        vae: folder or hub name of the autoencoder, to be noted.
        vae_weights: SHA-256 of its weights, to be noted.
        scale: how the autoencoder's latents were scaled, to be noted. None: measure each channel's mean and deviation,
            and bring the rows to mean 0 and deviation 1 by them.
        scale_of_latents: whether a given scale was measured, on another split.
        prompts: what made the states, and those of the empty prompt, to be noted; None: rows have no prompts.
        fps: frames a second of the videos, to be noted; None of images.
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
    if not overwrite:
        _check_free(folder, split)

    values = {
        "rows": [1],
        "shape": (1, 1, 1),
        "num_classes": len(class_names),
        "class_names": tuple(class_names),
        "vae": vae,
        "vae_weights": vae_weights,
        "fps": fps,
        "scale_of_latents": True if scale_of_latents or scale is None else None,
        "text_encoder": None if prompts is None else prompts.text_encoder,
        "prompt_length": None if prompts is None else prompts.length,
        "states": None if prompts is None else {name: tuple(value.shape) for name, value in prompts.empty.items()},
        **dataclasses.asdict(scale or LatentScale(1.0)),
    }
    index = _Index.model_validate(values)
    # Inside the folder, not beside it: the same disk, even where the folder is a mount.
    with temporary_folder(folder, split) as temporary:
        counts = []
        shapes: list[tuple[int, ...]] = []
        statistics = _ChannelStatistics()
        # What is still to be rescaled is rounded to half precision then, once.
        dtype = torch.float32 if scale is None else torch.float16
        states = None if prompts is None else {name: value.to(_dtype(name)) for name, value in prompts.empty.items()}
        if states is not None:
            write_tensors(_empty_file(temporary, split), states)
        with contextlib.closing(_shards(rows, shard_rows, len(class_names), dtype, states or {})) as shards:
            for number, tensors in enumerate(shards):
                write_tensors(_shard(temporary, split, number), tensors, {_SOURCE: index.source()})
                counts.append(len(tensors["labels"]))
                shapes.append(tuple(tensors["mean"].shape[1:]))
                if scale is None:
                    statistics.add(tensors["mean"], tensors["std"])
        if not counts:
            raise ValueError(f"split {split!r}: there are no rows to write")
        if scale is None:
            scale = statistics.scale()
            index = index.model_copy(update=dataclasses.asdict(scale))
            for number in range(len(counts)):
                _rescale(_shard(temporary, split, number), scale, {_SOURCE: index.source()})
        scale.check_channels(shapes[0][0])
        several = {"shapes": shapes} if len(set(shapes)) > 1 else {}
        index = index.model_copy(update={"rows": counts, "shape": shapes[0], **several})
        if not overwrite:
            _check_free(folder, split)  # another process may have written it meanwhile
        for old in _files(folder, split):
            old.unlink()
        for number in range(len(counts)):
            _shard(temporary, split, number).replace(_shard(folder, split, number))
        if states is not None:
            _empty_file(temporary, split).replace(_empty_file(folder, split))
        write_json(folder / f"{split}.json", index.model_dump())
    return sum(counts)


def _check_free(folder: Path, split: str) -> None:
    if present := _files(folder, split):
        raise FileExistsError(
            f"{folder} holds {present[0].name}: split {split!r} exists; set overwrite, or write to another folder"
        )


class _ChannelStatistics:
    """Mean and variance of each channel of latents as they are drawn from their posteriors, summed shard by shard."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Tensor = torch.zeros(())
        self._squares: Tensor = torch.zeros(())

    def add(self, mean: Tensor, std: Tensor) -> None:
        """float32 (n, C, ...) each."""
        for rows, deviations in zip(mean.split(_AT_ONCE), std.split(_AT_ONCE), strict=True):
            values, variances = rows.double(), deviations.double().square()
            others = [axis for axis in range(values.dim()) if axis != 1]
            self._sum = self._sum + values.sum(others)
            self._squares = self._squares + (values.square() + variances).sum(others)
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
        rest = {name: opened.get_tensor(name) for name in opened.keys() if name not in ("mean", "std")}  # noqa: SIM118
        mean, std = (opened.get_tensor(name) for name in ("mean", "std"))
        shift, factor = scale.shift_and_factor(mean)
        means = torch.cat([((rows - shift) * factor).half() for rows in mean.split(_AT_ONCE)])
        stds = torch.cat([(rows * factor).half() for rows in std.split(_AT_ONCE)])
    write_tensors(file, {"mean": means, "std": stds, **{name: t.clone() for name, t in rest.items()}}, metadata)


def _shards(
    batches: Iterable[Any], shard_rows: int, classes: int, dtype: torch.dtype, states: Mapping[str, Tensor]
) -> Generator[dict[str, Tensor]]:
    """Check the batches and cut them anew, each size by itself; a yielded shard is valid until the next."""
    buffers: dict[tuple[int, ...], dict[str, Tensor]] = {}
    counts: dict[tuple[int, ...], int] = {}
    rows, channels = 0, None
    for mean, std, labels, *more in batches:
        where = f"batch from row {rows} on"
        floating = mean.is_floating_point() and std.is_floating_point()
        if not (floating and mean.dim() in (4, 5) and std.shape == mean.shape):
            raise ValueError(
                f"{where}: mean {mean.dtype} {tuple(mean.shape)}, std {std.dtype} {tuple(std.shape)}: must be "
                "floating and of one shape (n, C, H, W) or (n, C, T, H, W)"
            )
        if labels.dtype != torch.int64 or labels.shape != mean.shape[:1]:
            raise ValueError(f"{where}: labels {labels.dtype} {tuple(labels.shape)}: must be int64 ({len(mean)},)")
        parts = {"mean": mean.cpu().to(dtype), "std": std.cpu().to(dtype), "labels": labels.cpu()}
        if not (parts["mean"].isfinite().all() and parts["std"].isfinite().all() and (parts["std"] >= 0).all()):
            name = str(dtype).removeprefix("torch.")
            raise ValueError(f"{where}: mean and std must be finite in {name}, and std >= 0; check the autoencoder")
        check_labels(parts["labels"], classes, "labels", rows)
        channels = channels or mean.shape[1]
        if mean.shape[1] != channels:
            raise ValueError(f"{where}: latents of {mean.shape[1]} channels: must be {channels} as before")
        parts |= _checked_states(more[0] if more else {}, states, len(mean), where)
        rows += len(mean)
        size = tuple(mean.shape[1:])
        if size not in buffers:
            most = shard_rows
            if states:
                most = min(most, max(1, _MOST_OF_A_SHARD // sum(part[:1].nbytes for part in parts.values())))
            buffers[size] = {name: part.new_empty((most, *part.shape[1:])) for name, part in parts.items()}
        buffer, count, start = buffers[size], counts.get(size, 0), 0
        most = len(buffer["labels"])
        while start < len(labels):
            amount = min(most - count, len(labels) - start)
            for name, part in parts.items():
                buffer[name][count : count + amount] = part[start : start + amount]
            count, start = count + amount, start + amount
            if count == most:
                yield buffer
                count = 0
        counts[size] = count
    for size, count in counts.items():
        if count:
            yield {name: buffer[:count] for name, buffer in buffers[size].items()}


def _checked_states(
    values: Mapping[str, Tensor], states: Mapping[str, Tensor], count: int, where: str
) -> dict[str, Tensor]:
    """The states of a batch's prompts, in the dtype that is written; ValueError for others than the empty prompt's."""
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    expected_shapes = {name: (count, *value.shape) for name, value in states.items()}
    if shapes != expected_shapes:
        raise ValueError(f"{where}: states {shapes}: must be {expected_shapes}, as the empty prompt's")
    parts = {name: value.cpu().to(_dtype(name)) for name, value in values.items()}
    if not all(bool(value.isfinite().all()) for value in parts.values()):
        raise ValueError(f"{where}: states must be finite in bfloat16; check the text encoder")
    return parts
