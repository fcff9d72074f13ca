"""Features of real images, computed once: kept in a file that is named after what they were made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..common.formats import read_tensors, write_tensors
from .features import Features
from .frechet import FeatureStatistics
from .image_quality import MOST_NEIGHBOURS, Reference
from .sample_quality import pieces_of
from .work import ALONE, Work

#: Gives the uint8 images (n, C, H, W) of some numbers.
Images = Callable[[range], Tensor]

_FORMAT = 2  # raise it when the content of a file changes: older files are then not read
_SEED = 0

#: The names of the files.
KEPT_REFERENCES = "real-*.safetensors"


def order_of_rows(count: int) -> Tensor:
    """Numbers of the images, of `count`, whose features a `Reference` has as rows: int64 (m,), by a fixed seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(_SEED))[:MOST_NEIGHBOURS]


def reference(features: Features, images: Images, count: int, *, batch_size: int, work: Work = ALONE) -> Reference:
    """Features of real images.

    Args:
        features: what maps images to them.
        images: gives some of the images by their numbers.
        count: how many there are.
        batch_size: images at a time.
        work: who computes which batch.

    Returns:
        On ranks but the first it is of nothing.
    """
    statistics, rows, order = FeatureStatistics(features.dim), None, order_of_rows(count)
    place = torch.full((count,), -1, dtype=torch.int64)
    place[order] = torch.arange(len(order))
    pieces = pieces_of(count, batch_size)
    shared = work.in_order(pieces, lambda numbers: {"features": features(images(numbers))})
    for number, results in enumerate(shared):
        batch, piece = results["features"], pieces[number]
        statistics.update(batch)
        if rows is None:
            rows = batch.new_empty(len(order), features.dim)
        places = place[piece.start : piece.stop]
        here = (places >= 0).nonzero()[:, 0]
        rows[places[here].to(batch.device)] = batch[here.to(batch.device)]
    return Reference(statistics, rows)


def kept_reference(
    features: Features,
    images: Images,
    count: int,
    *,
    folder: Path,
    identity: str,
    batch_size: int,
    device: torch.device,
    work: Work = ALONE,
) -> Reference:
    """Features of real images from the file that has them, or computed and written to it.

    Args:
        features, images, count, batch_size, work: see `reference`; nothing is computed where there is such a file.
        folder: where the files lie; it is made.
        identity: a digest of the images.
        device: where the rows go.

    Returns:
        On ranks but the first it may be of nothing.
    """
    made_of = f"{_FORMAT} {MOST_NEIGHBOURS} {_SEED} {features.name} {features.digest} {count} {identity}"
    file = folder / f"real-{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.safetensors"
    from_file: list[Reference] = []

    def read() -> bool:
        from_file.extend(_read(file, count, features.dim, device))
        return bool(from_file)

    if work.decides(read):
        return from_file[0] if from_file else Reference(FeatureStatistics(features.dim))
    result = reference(features, images, count, batch_size=batch_size, work=work)
    if work.leads and result.rows is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(file, result.statistics.to_tensors() | {"rows": result.rows})
    return result


def _read(file: Path, count: int, dim: int, device: torch.device) -> list[Reference]:
    """What a file has; nothing where there is none, or a damaged one, which is made again."""
    try:
        tensors = read_tensors(file)
        rows = tensors.pop("rows").to(device)
        statistics = FeatureStatistics.from_tensors(tensors)
    except (FileNotFoundError, KeyError, ValueError):
        return []
    fits = statistics.count == count and rows.shape == (len(order_of_rows(count)), dim)
    return [Reference(statistics, rows)] if fits else []
