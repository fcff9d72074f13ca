"""Merging: blocks that were trained apart, on machines that never talked, become one model.

Each folder holds some blocks of one model (`save_pretrained(path, blocks=...)`, or a run with `train.blocks`). Files
are checked and copied: names, shapes and dtypes by their headers, values for being finite, and the shared parameters
that must be equal by their bits. One tensor is read at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.digests import FileDigest, digest, seal
from ..common.files import whole_folder
from ..common.finite import DIVERGED, require_finite
from ..common.formats import read_json, write_json
from ..common.processing_files import IMAGE_PROCESSOR, TOKENIZER_SETTINGS
from ..common.tokenizer_file import same_tokenizer, tokenizer_in
from ..families import config_values
from .loading import check_digest, check_header, check_precisions, files_of, opened
from .model import DiffusionBlocks
from .model_card import card_text, notes_in, write_card
from .saved_model import (
    INDEX,
    SHARED,
    WITH_PROCESSING,
    SavedModel,
    block_file,
    outline_saved,
    read_saved,
    write_configs,
)
from .saving import check_out, replaced_names

#: entries of a model's config that say where it came from, and change nothing
_WRITERS = ("transformers_version", "_name_or_path", "_diffusers_version", "architectures")


@dataclass(frozen=True)
class Origin:
    """Where a block of a merged model was taken from.

    Attributes:
        block: its index.
        layers: the layers of the original network that it owns.
        folder: the saved model whose copy was taken.
        passed_over: others that hold a copy which was not.
        size: bytes of its file.
    """

    block: int
    layers: range
    folder: Path
    passed_over: tuple[Path, ...]
    size: int


def merge(
    folders: str | Path | Sequence[str | Path],
    out: str | Path,
    prefer: str | Path | Sequence[str | Path] = (),
    *,
    partial: bool = False,
) -> tuple[Origin, ...]:
    """Make one saved model of folders that hold its blocks. Nothing is written before all is checked.

    The files that say how its input is made (`processing_files`) go with it.

    Args:
        folders: saved models, or folders of runs (whose `model/` is taken); together they hold every block. One that
            holds all blocks may stand alone, and is copied.
        out: folder of the merged model; an older model there is replaced.
        prefer: where several folders hold a block, this one's copy is taken; of several, the first that holds it.
        partial: whether blocks may be missing; the index of the merged model then lists those that are there.

    Returns:
        Where each block was taken from.

    Raises:
        FileNotFoundError: a folder holds no model, or lacks a file that its index lists.
        ValueError: configurations that differ, a block that no folder or more than one holds, a file that does not
            match the model or holds values that are not finite, shared parameters, tokenizers or image processors that
            are not the same where they must be, or an `out` that is an input.
    """
    inputs, preferred = as_paths(folders), as_paths(prefer)
    models = [read_saved(_model_folder(folder)) for folder in inputs]
    _check_inputs(models, inputs, Path(out))
    _check_configs(models)
    first = models[0]
    if first.blocks_config.shared == "joint" and len(models) > 1:
        raise ValueError(
            "shared = joint: the blocks of each folder were trained with a copy of the shared parameters of their own, "
            f"so they cannot be merged: {_list(models)}; convert with shared: replicated or frozen to train blocks "
            "apart"
        )
    origins = _origins(models, [_model_folder(folder) for folder in preferred], partial=partial)
    model = outline_saved(first)
    files, dtype = _check_files(model, models, origins)
    index = {**first.index, "blocks": [origin.block for origin in origins]}
    index["files"] = {path.name: entry.model_dump() for path, entry in files.items()}
    with whole_folder(Path(out), replaced_names(Path(out), WITH_PROCESSING)) as temporary:
        for file in [*files, *common_processing([model.folder for model in models])]:
            shutil.copyfile(file, temporary / file.name)
        write_json(temporary / INDEX, seal(index))
        write_configs(temporary, model, dtype)
        write_card(temporary, card_text(model, index["blocks"], notes_in(first.folder)), before=Path(out))
    return origins


# ---- inputs ------------------------------------------------------------------------------------------------


def as_paths(inputs: str | Path | Sequence[str | Path]) -> list[Path]:
    """One folder or several, as a list."""
    return [Path(path) for path in ([inputs] if isinstance(inputs, str | Path) else inputs)]


def _model_folder(path: Path) -> Path:
    """The saved model at `path`, which may be the folder of a run."""
    for folder in (path, path / "model"):
        if (folder / INDEX).is_file():
            return folder
    raise FileNotFoundError(
        f"{path} holds no model: there is no {INDEX} in it or in {path / 'model'}; give a saved model or a run's folder"
    )


def _list(models: Sequence[SavedModel]) -> str:
    return ", ".join(str(model.folder) for model in models)


def _check_inputs(models: list[SavedModel], folders: list[Path], out: Path) -> None:
    if not models:
        raise ValueError("there is nothing to merge: give at least one folder")
    places = set()
    for model in models:
        if model.folder.resolve() in places:
            raise ValueError(f"{model.folder} is given twice; name each folder once")
        places.add(model.folder.resolve())
    check_out(out, [*folders, *(model.folder for model in models)], "merged")


def _check_configs(models: list[SavedModel]) -> None:
    first = models[0]
    for other in models[1:]:
        ours, theirs = _description(first), _description(other)
        if first.trained is not None and other.trained is not None:  # older folders do not say
            ours["trained"], theirs["trained"] = first.trained, other.trained
        generation = [model.index.get("generation_config") for model in (first, other)]
        if None not in generation:
            ours["generation_config"], theirs["generation_config"] = map(without_writers, generation)
        unequal = difference(ours, theirs)
        if unequal is not None:
            name, one, another = unequal
            raise ValueError(
                f"{first.folder} and {other.folder} hold parts of different models: {name} is {one} in the first and "
                f"{another} in the second; merge only blocks that were trained from one recipe"
            )


def common_processing(folders: Sequence[Path]) -> list[Path]:
    """The files that say how the input of a model is made, which its folders have in common, where any has some.

    Raises:
        ValueError: they have different tokenizers, or image processors.
    """
    tokenizers = [path for folder in folders if (path := tokenizer_in(folder)) is not None]
    for other in tokenizers[1:]:
        if not same_tokenizer(tokenizers[0], other):
            raise ValueError(
                f"{tokenizers[0]} and {other} are different tokenizers, so the blocks beside them learned different "
                "tokens; merge only blocks that were trained from one recipe on one corpus"
            )
    processors = [path for folder in folders if (path := folder / IMAGE_PROCESSOR).is_file()]
    for other in processors[1:]:
        if read_json(processors[0]) != read_json(other):
            raise ValueError(
                f"{processors[0]} and {other} are different image processors, so the blocks beside them saw different "
                "pixels; merge only blocks that were trained from one recipe"
            )
    settings = [tokenizers[0].parent / name for name in TOKENIZER_SETTINGS] if tokenizers else []
    return [*tokenizers[:1], *(path for path in settings if path.is_file()), *processors[:1]]


def _description(model: SavedModel) -> dict[str, Any]:
    """What must agree, in the terms of the libraries installed here, whatever versions wrote the folders."""
    values = config_values(model.model_class, model.model_config)
    return {
        "model_class": model.model_class,
        "model_config": without_writers(values),
        "blocks_config": model.blocks_config.model_dump(mode="json"),
        "partition": model.partition.to_dict(),
    }


def without_writers(values: Any) -> dict[str, Any]:
    """A config's values but for those that say where it came from."""
    return {name: value for name, value in values.items() if name not in _WRITERS}


def difference(a: Any, b: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The dotted name of the first field that differs, and both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            unequal = difference(a.get(key), b.get(key), f"{name}.{key}" if name else str(key))
            if unequal is not None:
                return unequal
        return None
    return None if a == b else (name, a, b)


def _origins(models: list[SavedModel], preferred: list[Path], *, partial: bool) -> tuple[Origin, ...]:
    """Which folder's copy of each block is taken."""
    ranked = rank([model.folder for model in models], preferred)
    partition = models[0].partition
    holders = [[model.folder for model in models if b in model.blocks] for b in range(partition.num_blocks)]
    absent = [b for b, folders in enumerate(holders) if not folders]
    if absent and not partial:
        raise ValueError(
            f"blocks {absent} are in none of {_list(models)}; train them (train.blocks: {absent}) and name their "
            "folder as well"
        )
    origins = []
    for b, folders in enumerate(holders):
        if b in absent:
            continue
        for folder in folders:
            if not (folder / block_file(b)).is_file():
                raise FileNotFoundError(f"{folder / block_file(b)} is missing, though {folder / INDEX} lists block {b}")
        source = choose_copy(f"block {b}", folders, ranked)
        passed_over = tuple(folder for folder in folders if folder != source)
        size = (source / block_file(b)).stat().st_size
        origins.append(Origin(b, partition.layer_range(b), source, passed_over, size))
    return tuple(origins)


def rank(folders: Sequence[Path], preferred: Sequence[Path]) -> list[Path]:
    """Those of the folders to merge that are preferred, in the order of preference.

    Raises:
        ValueError: one that is preferred is not among them.
    """
    by_path = {folder.resolve(): folder for folder in folders}
    for folder in preferred:
        if folder.resolve() not in by_path:
            raise ValueError(f"prefer = {folder} is none of the folders to merge: {', '.join(map(str, folders))}")
    return [by_path[folder.resolve()] for folder in preferred]


def choose_copy(name: str, holders: Sequence[Path], ranked: Sequence[Path]) -> Path:
    """The folder whose copy is taken of what several hold.

    Args:
        name: of what they hold, for the message.
        holders: the folders.
        ranked: folders in the order of preference.

    Raises:
        ValueError: several hold it, and none of them is preferred.
    """
    if len(holders) == 1:
        return holders[0]
    for folder in ranked:
        if folder in holders:
            return folder
    both = " and in ".join(map(str, holders))
    raise ValueError(f"{name} is in {both}; say whose copy to take: --prefer {holders[0]}")


# ---- files -------------------------------------------------------------------------------------------------


def _check_files(
    model: DiffusionBlocks, models: Sequence[SavedModel], origins: Sequence[Origin]
) -> tuple[dict[Path, FileDigest], torch.dtype]:
    """The tensor files of the merged model, checked against the model and each against its index, values for being
    finite, and the shared parameters that must be the same by their bits; and the dtype of its weights."""
    by_folder = {source.folder: source for source in models}
    files: dict[Path, dict[str, torch.Tensor]] = {}
    for origin in origins:
        files |= files_of(model, by_folder[origin.folder], [origin.block])
    _check_fixed(files, by_folder)
    dtypes = {path: check_header(path, tensors) for path, tensors in files.items()}
    check_precisions(model, dtypes)
    _check_shared(model, origins)
    for path, tensors in files.items():
        check_digest(by_folder[path.parent], path.name)
        with opened(path) as file:
            require_finite(((name, file.get_tensor(name)) for name in tensors), str(path), DIVERGED)
    digests = {path: (by_folder[path.parent].files or {}).get(path.name) or digest(path) for path in files}
    return digests, next(dtype for floating in dtypes.values() for dtype in floating)


def _check_fixed(files: dict[Path, dict[str, torch.Tensor]], by_folder: Mapping[Path, SavedModel]) -> None:
    """Leave one file of the fixed weights that blocks hold in common; refuse others than it, by their digests."""
    first, *others = [path for path in files if path.name == SHARED] or [Path()]

    def listed(path: Path) -> FileDigest:
        return (by_folder[path.parent].files or {}).get(SHARED) or digest(path)

    for path in others:
        if listed(first) != listed(path):
            raise ValueError(
                f"{first} and {path} differ: the blocks beside them were trained on other fixed weights; merge only "
                "blocks that were trained on one model"
            )
        del files[path]


def _check_shared(model: DiffusionBlocks, origins: Sequence[Origin]) -> None:
    """Refuse shared parameters that differ where the policy says that they do not."""
    policy = model.blocks_config.shared
    if policy == "joint" or len(origins) == 1 or model.blocks_config.lora is not None:  # then see `_check_fixed`
        return
    # Layers keep their places in the whole model, so only shared parameters have one name in all blocks; adaptive norms
    # are counted within a block.
    common = {id(parameter) for parameter in model.shared_parameters()}  # see `_check_fixed`
    states = [model.block(origin.block).state_dict(keep_vars=True) for origin in origins]
    everywhere = set.intersection(*({name for name, t in state.items() if id(t) not in common} for state in states))
    prefixes = ("network.", "shared.") if policy == "frozen" else ("shared.target.",)
    names = sorted(name for name in everywhere if name.startswith(prefixes))
    reference = origins[0].folder / block_file(origins[0].block)
    for origin in origins[1:]:
        path = origin.folder / block_file(origin.block)
        with opened(reference) as ours, opened(path) as theirs:
            different = next((n for n in names if not _same_bits(ours.get_tensor(n), theirs.get_tensor(n))), None)
        if different is not None:
            what = "shared parameters are fixed" if policy == "frozen" else "z must live in one space for all blocks"
            raise ValueError(
                f"{different} differs between {reference} and {path}, but under shared = {policy} {what}: the two were "
                "not trained from one start; train one of them again with the other's seeds and pretrained weights"
            )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
