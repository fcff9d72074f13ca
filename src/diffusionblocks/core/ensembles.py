"""An ensemble of networks as a folder, and ensembles made of members that were trained apart.

ensemble.json     format, class, number of members, those in the folder, what they were trained on, SHA-256 of it all
member-0/ ...     each member, as `end_to_end` writes a model
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from ..common.digests import check_seal, seal
from ..common.fields import Blocks
from ..common.files import recover, whole_folder
from ..common.formats import read_json, validate, write_json
from ..common.processing_files import write_files
from ..families import class_name_of, config_values, family_named
from .end_to_end import load_end_to_end, save_end_to_end
from .merging import Origin, as_paths, choose_copy, common_processing, difference, rank, without_writers
from .saved_model import ENSEMBLE, MODEL_FILES
from .saving import check_out


class _Index(BaseModel):
    """Schema of `ensemble.json`."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    format: Literal[1]
    model_class: str
    num_members: Blocks
    members: list[int] = Field(min_length=1)
    trained: dict[str, Any] | None = None


@dataclass(frozen=True)
class SavedEnsemble:
    """What the index of an ensemble says.

    Attributes:
        folder: where it lies.
        values: the index, as JSON values.
        model_class: name of the members' class.
        num_members: of the whole ensemble.
        members: the indices of those in the folder.
    """

    folder: Path
    values: dict[str, Any]
    model_class: str
    num_members: int
    members: tuple[int, ...]

    def path_of(self, member: int) -> Path:
        """The folder of a member."""
        return self.folder / _folder(member)


def _folder(member: int) -> str:
    return f"member-{member}"


def save_ensemble(
    members: Mapping[int, nn.Module],
    num_members: int,
    path: Path,
    trained: dict[str, Any] | None = None,
    processing: Mapping[str, bytes] | None = None,
) -> None:
    """Write members of an ensemble to a folder; what a run left there before is replaced once the new one is whole.

    Args:
        members: the networks, of one class, by their index.
        num_members: of the whole ensemble.
        path: the folder.
        trained: what they were trained on, as JSON values: members of different trainings are not merged.
        processing: files that say how their input is made (`processing_files`), content by name.

    Raises:
        ValueError: what `save_end_to_end` refuses.
    """
    model_class = class_name_of(next(iter(members.values())))
    index = {"format": 1, "model_class": model_class, "num_members": num_members, "members": sorted(members)}
    with whole_folder(path, MODEL_FILES) as folder:
        write_files(folder, processing or {})
        for number, member in members.items():
            save_end_to_end(member, folder / _folder(number))
        write_json(folder / ENSEMBLE, seal(index | ({} if trained is None else {"trained": trained})))


def read_ensemble(path: Path) -> SavedEnsemble:
    """Read the index of an ensemble.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it was changed or damaged, or names members that it cannot have.
    """
    recover(path, MODEL_FILES)
    file = path / ENSEMBLE
    values = read_json(file)
    index = validate(values, _Index, file)
    check_seal(values, file)
    if (
        sorted(set(index.members)) != index.members
        or not 0 <= index.members[0] <= index.members[-1] < index.num_members
    ):
        raise ValueError(f"{file}: members = {index.members} must ascend, from 0 to {index.num_members - 1} at most")
    return SavedEnsemble(path, values, index.model_class, index.num_members, tuple(index.members))


def load_ensemble(path: Path) -> list[nn.Module]:
    """Read all members of an ensemble, on the CPU.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: members are missing, or what `load_end_to_end` refuses.
    """
    saved = read_ensemble(path)
    absent = sorted(set(range(saved.num_members)) - set(saved.members))
    if absent:
        raise ValueError(
            f"{path} lacks members {absent} of the ensemble: train them (train.blocks: {absent}), and merge the folders"
        )
    return [load_end_to_end(saved.model_class, saved.path_of(member)) for member in saved.members]


def ensemble_folder(path: Path) -> Path | None:
    """The saved ensemble at a path, which may be the folder of a run; None where there is none."""
    return next((folder for folder in (path, path / "model") if (folder / ENSEMBLE).is_file()), None)


def merge_ensembles(
    folders: str | Path | Sequence[str | Path],
    out: str | Path,
    prefer: str | Path | Sequence[str | Path] = (),
    *,
    partial: bool = False,
) -> tuple[Origin, ...]:
    """Make one ensemble of folders that hold its members. Nothing is written before all is checked.

    Args:
        folders: saved ensembles, or folders of runs (whose `model/` is taken); together they hold every member.
        out: folder of the whole ensemble; an older model there is replaced.
        prefer: where several folders hold a member, this one's copy is taken; of several, the first that holds it.
        partial: whether members may be missing; the index then lists those that are there.

    Returns:
        Where each member was taken from.

    Raises:
        FileNotFoundError: a folder holds no ensemble, or a file is missing.
        ValueError: members of different ensembles, a member that no folder or more than one holds, a damaged one, or an
            `out` that is an input.
    """
    inputs, out = as_paths(folders), Path(out)
    saved = [read_ensemble(_ensemble_at(path)) for path in inputs]
    check_out(out, [*inputs, *(each.folder for each in saved)], "merged", MODEL_FILES)
    _check_indices(saved)
    ranked = rank([each.folder for each in saved], [_ensemble_at(path) for path in as_paths(prefer)])
    first, origins, configs = saved[0], [], []
    holders = [[each for each in saved if member in each.members] for member in range(first.num_members)]
    absent = [member for member, having in enumerate(holders) if not having]
    if absent and not partial:
        raise ValueError(
            f"members {absent} are in none of {', '.join(str(each.folder) for each in saved)}; train them "
            f"(train.blocks: {absent}) and name their folder as well"
        )
    for member, having in enumerate(holders):
        if member in absent:
            continue
        source = choose_copy(f"member {member}", [each.folder for each in having], ranked)
        path = source / _folder(member)
        model: Any = load_end_to_end(first.model_class, path)  # whole, finite and as it was saved
        others = tuple(each.folder for each in having if each.folder != source)
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        depth = family_named(first.model_class).depth(model.config)
        origins.append(Origin(member, range(depth), source, others, size))
        configs.append(without_writers(config_values(first.model_class, model.config)))
        _check_equal(configs[0], configs[-1], origins[0].folder, source)
    processing = common_processing([each.folder for each in saved])
    with whole_folder(out, MODEL_FILES) as temporary:
        for file in processing:
            shutil.copyfile(file, temporary / file.name)
        for origin in origins:
            shutil.copytree(origin.folder / _folder(origin.block), temporary / _folder(origin.block))
        index = {name: value for name, value in first.values.items() if name != "sha256"}
        write_json(temporary / ENSEMBLE, seal(index | {"members": [origin.block for origin in origins]}))
    return tuple(origins)


def _ensemble_at(path: Path) -> Path:
    folder = ensemble_folder(path)
    if folder is None:
        raise FileNotFoundError(
            f"{path} holds no ensemble: there is no {ENSEMBLE} in it or in {path / 'model'}; give a saved ensemble or "
            "a run's folder"
        )
    return folder


def _check_indices(saved: Sequence[SavedEnsemble]) -> None:
    """Refuse folders that are given twice, and members that were trained differently."""
    if len({each.folder.resolve() for each in saved}) < len(saved):
        raise ValueError(f"{', '.join(str(each.folder) for each in saved)}: name each folder once")
    for other in saved[1:]:
        ours, theirs = ({**each.values, "members": None, "sha256": None} for each in (saved[0], other))
        _check_equal(ours, theirs, saved[0].folder, other.folder)


def _check_equal(ours: Any, theirs: Any, here: Path, there: Path) -> None:
    unequal = difference(ours, theirs)
    if unequal is not None:
        name, one, another = unequal
        raise ValueError(
            f"{here} and {there} hold members of different ensembles: {name} is {one} in the first and {another} in "
            "the second; merge only members that were trained from one recipe"
        )
