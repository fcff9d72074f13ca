"""What a run trains, as JSON values: a run resumes only as the one that it was, and blocks are merged only of one.

A description is the recipe, and what tells its data and pretrained weights apart wherever they lie: number, shape and
classes of the examples, and digests of contents. It lies in every checkpoint; what of it a block learned from lies in
the index of the saved model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from ..common.formats import read_json
from ..common.messages import shorten
from ..common.tokenizer_file import TOKENIZER
from ..core.merging import difference
from ..core.saved_model import ENSEMBLE, INDEX, LOCAL
from ..data.data_config import DataSection
from ..data.dataset import Dataset
from ..families import family_named, supported_classes
from ..noise import EDM
from ..training.distillation import model_folder
from ..training.train_config import RESUME_MAY_DIFFER
from .recipe import Recipe, with_target
from .shipped_recipes import RECIPE

#: Fields of a recipe that may differ between a run and its resumption, by section: they do not change what is trained,
#: or say where something lies whose content is compared.
MAY_DIFFER: Mapping[str, frozenset[str]] = {
    "train": RESUME_MAY_DIFFER,
    "data": frozenset({"source", "folder", "cache", "placement", "split_files", "test_split", "tokenizer", "vae"})
    | {"valid_split"},
}
_NOT_COMPARED = frozenset({"name", "device", "evaluate", "parallel", "rows"})

#: Fields of `train` in which runs may differ, beside those, whose blocks become one model.
_MERGE_MAY_DIFFER = frozenset({"blocks", "schedule", "steps_per_switch", "optimizer_in_backward"})

#: What a description has beside the recipe, by section.
_IDENTITY = {
    "data": ("examples", "shape", "classes", "content", "held_out"),
    "model": ("files",),
    "train": ("teachers",),
}

#: What is digested: the whole of so many bytes, else as many evenly spread pieces as make up a quarter of that.
_WHOLE, _PIECE = 2**28, 2**20


def describe_run(recipe: Recipe, data: dict[str, Any] | None) -> dict[str, Any]:
    """What a run of a recipe trains, as JSON values.

    Args:
        recipe: of the run.
        data: `data_identity` of its training data; None: they are not read yet.
    """
    description = recipe.model_dump(mode="json")
    description["blocks"] = describe_blocks(recipe)
    description["data"] |= data or {}
    if recipe.model.pretrained is not None and (folder := Path(recipe.model.pretrained)).is_dir():
        description["model"]["files"] = _files_in(folder, "*.safetensors")
    if (teaching := recipe.train.teaching) is not None:
        description["train"]["teachers"] = [
            _files_in(model_folder(name), "**/*.safetensors") for name in teaching.teacher
        ]
    return description


def describe_blocks(recipe: Recipe) -> dict[str, Any]:
    """The section `blocks` of a recipe, as JSON values, with the target written out: its defaults may become others."""
    blocks = recipe.blocks
    if blocks.target is None and recipe.model.type in supported_classes():
        blocks = blocks.model_copy(update={"target": family_named(recipe.model.type).default_target()})
    return blocks.model_dump(mode="json")


def _files_in(folder: Path, weights: str) -> dict[str, list[Any]]:
    """Size and digest of a model's config, and of its files of weights, which a pattern names."""
    files = [folder / "config.json", *sorted(folder.glob(weights))]
    return {str(file.relative_to(folder)): [file.stat().st_size, _of_file(file)] for file in files if file.is_file()}


def learned_from(description: dict[str, Any]) -> dict[str, Any]:
    """What of a description a block learned from, beside its model: it is the same in all blocks of one model."""
    compared = _compared(description)
    train = {name: value for name, value in (compared.get("train") or {}).items() if name not in _MERGE_MAY_DIFFER}
    return {"train": train, **{name: compared.get(name) for name in ("data", "fit", "trunk")}}


def check_same_scale(folder: Path, data: DataSection, what: str) -> None:
    """Refuse a saved model that learned from inputs which were scaled otherwise than a recipe scales them.

    Args:
        folder: of the model, which lies in its run's folder, or says itself what it learned from.
        data: the recipe's section.
        what: the model, as a message begins.

    Raises:
        ValueError: it names the field, and both values.
    """
    marks = [folder / name for name in (INDEX, ENSEMBLE, LOCAL) if (folder / name).is_file()]
    noted = read_json(marks[0]).get("trained") if marks else None
    run = folder.parent / RECIPE
    if noted is None and run.is_file():
        noted = read_json(run)
    theirs = noted.get("data") if isinstance(noted, dict) else None
    if not isinstance(theirs, dict):  # nothing is known of them
        return
    ours = data.model_dump(mode="json")
    for name in ("mean", "std", "scale"):
        before, now = theirs.get(name), ours.get(name)
        if None not in (before, now) and before != now:
            raise ValueError(
                f"{what} learned from inputs of data.{name} = {before}, and the recipe has {now}: use the recipe that "
                "it was trained with, or a model of these inputs"
            )


def check_same_run(before: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Refuse to go on with a run that trained something else.

    Args:
        before: its description; what an older version did not note is not compared.
        now: that of the run that shall go on.
        where: of the checkpoint, for the message.

    Raises:
        ValueError: it names the first field that differs, and both values.
    """
    if not all(isinstance(before.get(section), dict) for section in ("model", "blocks", "data", "train")):
        raise ValueError(f"{where}: its description of the run is damaged; start anew with --restart")
    ours, theirs = _compared(now), _compared(in_current_terms(before))
    _check_likelihood(ours, theirs, where)
    for section, names in _IDENTITY.items():
        for name in names:
            if name not in ours[section] or name not in theirs.get(section, {}):
                ours[section].pop(name, None)
                theirs.get(section, {}).pop(name, None)
    if "files" in ours["model"]:  # then it does not matter where they lie
        ours["model"].pop("pretrained")
        theirs["model"].pop("pretrained")
    result = difference(theirs, ours)
    if result is not None:
        name, old, new = result
        replaced = " (the data were replaced)" if name == "data.content" else ""
        raise ValueError(
            f"{where} was made with {name} = {shorten(str(old), 160)}, this run has "
            f"{shorten(str(new), 160)}{replaced}: set it back, "
            "start anew with --restart, or choose another folder"
        )


def _check_likelihood(ours: dict[str, Any], theirs: dict[str, Any], where: Path) -> None:
    """Refuse to go on with blocks that learned the likelihood by such as have it added; whole models have none."""
    targets = [(run.get("blocks") or {}).get("target") or {} for run in (ours, theirs)]
    if ours.get("method") == "end-to-end":
        for target in targets:
            target.pop("likelihood", None)
    now, before = (target.get("likelihood") for target in targets)
    if (now, before) == ("added", "learned"):
        kind = targets[0].get("kind")
        of_kind = "" if kind == "label" else f"--set blocks.target.kind={kind} "  # the recipe may have no such section
        raise ValueError(
            f"{where} was made with blocks.target.likelihood = learned, as all were before there was that field, this "
            f"run has added: go on as before with {of_kind}--set blocks.target.likelihood=learned, start anew with "
            "--restart, or choose another folder"
        )


def check_goes_on_from_first_version(before: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """As `check_same_run`, for a run that version 0.1.0 left: it told the network every level, and noted none of it.

    Raises:
        ValueError: a field differs, or the network would be told fewer levels than before.
    """
    if not _leaves_levels_out(now):
        return check_same_run(before, now, where)
    check_same_run(of_every_level(before), of_every_level(now), where)
    if (now["blocks"]["noise"] or {}).get("coverage") != [0.0, 1.0]:
        raise ValueError(
            f"{where} is of version 0.1.0, which told the network every level; now those where next to nothing is "
            "trained are left out: go on as before with --set blocks.noise.coverage=[0,1], start anew with --restart, "
            "or choose another folder"
        )


def _leaves_levels_out(description: dict[str, Any]) -> bool:
    """Whether blocks of the description are, by default, not told all levels (`LabelTargetConfig.unread`)."""
    if description["method"] != "diffusionblocks":
        return False
    return getattr(family_named(description["model"]["type"]).default_target(), "unread", 0.0) > 0


def of_every_level(description: dict[str, Any]) -> dict[str, Any]:
    """With the noise process written out, but for its coverage."""
    blocks = description.get("blocks")
    if not isinstance(blocks, dict):
        return description
    noise = EDM().to_dict() | (blocks.get("noise") or {}) | {"coverage": None}
    return description | {"blocks": blocks | {"noise": noise}}


def _compared(description: dict[str, Any]) -> dict[str, Any]:
    def of_section(name: str, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {field: value for field, value in values.items() if field not in MAY_DIFFER.get(name, frozenset())}

    sections = {name: of_section(name, values) for name, values in description.items() if name not in _NOT_COMPARED}
    train = sections.get("train")
    if isinstance(train, dict) and train.get("teachers") and isinstance(train.get("distill"), dict):
        # Their contents are compared, so it does not matter where they lie.
        sections["train"] = train | {"distill": {n: v for n, v in train["distill"].items() if n != "teacher"}}
    return sections


def in_current_terms(description: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of fields that were added since, and their names of today."""
    description = with_target(description)
    more = {
        section: {name: description[section][name] for name in names if name in description[section]}
        for section, names in _IDENTITY.items()
    }
    plain = {
        name: {f: v for f, v in values.items() if f not in more[name]} if name in more else values
        for name, values in description.items()
    }
    plain = renew(Recipe, plain)
    return {name: values | more[name] if name in more else values for name, values in plain.items()}


def renew(schema: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """The values of a config with the defaults of fields that were added since, and their names of today.

    Those that the schema refuses stay as they are.
    """
    try:
        return schema.model_validate(values).model_dump(mode="json")
    except ValidationError:
        return values


def data_identity(data: Dataset) -> dict[str, Any]:
    """What tells data apart wherever they lie, as JSON values: number, shape and classes, and a digest."""
    tokenizer = data.processing.get(TOKENIZER)
    digest = None if tokenizer is None else hashlib.sha256(tokenizer).hexdigest()
    return {
        "examples": len(data),
        "shape": list(data.example_shape),
        "classes": data.classes,
        "content": _content(data.tensors(), digest),
    }


def _content(tensors: Iterable[Tensor], extra: str | None) -> str:
    """A digest of tensors: of all their bytes, or of pieces of them where they are large."""
    tensors = list(tensors)
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    share = min(1.0, _WHOLE / 4 / max(1, sum(sizes))) if sum(sizes) > _WHOLE else 1.0
    result = hashlib.sha256(str(extra).encode())
    for tensor, size in zip(tensors, sizes, strict=True):
        result.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        pieces = -(-size // _PIECE)
        amount = max(1, round(share * pieces))
        for number in range(amount):
            start = number * pieces // amount * _PIECE
            result.update(flat[start : start + _PIECE].data)
    return result.hexdigest()


def _of_file(file: Path) -> str:
    """A digest of the first and the last MiB of a file."""
    with file.open("rb") as opened:
        result = hashlib.sha256(opened.read(_PIECE))
        opened.seek(max(0, file.stat().st_size - _PIECE))
        result.update(opened.read())
    return result.hexdigest()
