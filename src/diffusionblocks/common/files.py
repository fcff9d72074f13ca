"""Files, whole or not at all: written in a hidden folder and renamed. safetensors and JSON, never pickle.

What is being written lies in `.NAME.OWNER.tmp` beside its place, where OWNER names the process. A process that dies
leaves it there; the next one that writes to the same place sweeps it, and puts back what a replacement had moved away.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .finite import not_finite_entry
from .messages import shortened

_WORKSPACE = re.compile(r"\.(?P<name>.+)\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<started>\d+)-[0-9a-f]{8}\.tmp")

_OLD = "the-old-one"  # within a workspace: the folder that is being replaced

#: Seconds after which the workspace of another machine counts as that of a dead process: it cannot be asked.
_FOREIGN_AGE = 24 * 3600.0
#: The same for one that has moved an older folder away without putting the new one in its place, which takes no time.
_FOREIGN_GAP = 60.0


# ---- replacing -------------------------------------------------------------------------------------------------


def check_writable(path: Path, name: str) -> None:
    """Refuse a folder that cannot be made or written into, before work whose results would go there.

    Args:
        path: the folder; it need not exist.
        name: what the message calls it.

    Raises:
        ValueError: a file stands in its way, or it, or the folder where it would be made, is read-only.
    """
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{name} {path}: {there} is a file, not a folder; name another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"{name} {path}: {there} cannot be written into; change its permissions, or name another place"
        )


def free_space(path: Path) -> int:
    """Bytes that are free on the disk of a folder, which need not exist."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def check_space(path: Path, needed: int, free: int, advice: str) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        path: a folder; it need not exist.
        needed: bytes that will be written there.
        free: bytes that its disk has (`free_space`).
        advice: what to do about it.

    Raises:
        ValueError: fewer bytes are free.
    """
    if needed > free:
        raise ValueError(
            f"{path} will take about {needed / 2**30:,.1f} GiB, and its disk has {free / 2**30:,.1f} free: {advice}"
        )


def check_replaceable(path: Path, ours: re.Pattern[str]) -> None:
    """Refuse a folder that must not be replaced, before anything is written or moved.

    Args:
        path: where a folder is to be written.
        ours: names of files that such a folder holds; one that is there and holds any of them, or nothing, may be
            replaced.

    Raises:
        ValueError: a file, a link, the current folder or one above it, a mounted disk, or a folder of other things.
    """
    if path.name in ("", ".."):
        raise ValueError(f"{path} cannot be replaced by what is saved: give a folder with a name of its own")
    if path.is_symlink():
        raise ValueError(
            f"{path} is a symbolic link to {path.readlink()}: saving there would replace the link; give the folder "
            "itself, or another one"
        )
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file; choose a folder")
    if Path.cwd().is_relative_to(path.resolve()):
        raise ValueError(f"{path} is the current folder or above it, and would be replaced; choose a folder below it")
    if path.is_mount():
        raise ValueError(f"{path} is where a disk is mounted, and cannot be replaced; choose a folder below it")
    names = sorted(entry.name for entry in path.iterdir())
    if names and not any(ours.fullmatch(name) for name in names):
        raise ValueError(
            f"{path} holds other things ({', '.join(names[:3])}) and nothing that was saved there before, so it is not "
            "replaced; choose a new or empty folder"
        )


@contextlib.contextmanager
def replaced_folder(path: Path, ours: re.Pattern[str]) -> Iterator[Path]:
    """A temporary folder that takes the name `path` when the body ends without error.

    Files of an older folder whose names match `ours` are replaced; others are not ours and move to the new folder.

    Raises:
        ValueError: see `check_replaceable`; nothing was moved.
        OSError: it cannot be written; what was at `path` is there as before.
    """
    check_replaceable(path, ours)
    recover(path, ours)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _workspace(path) as workspace:
        new, old = workspace / "new", workspace / _OLD
        new.mkdir()
        with naming(path):
            yield new
        mode = _mode_of_new_files(workspace)
        for file in new.iterdir():
            if file.is_file():
                file.chmod(mode)
                _sync(file)
        try:
            if path.exists():
                path.replace(old)
            new.replace(path)
        except BaseException:
            _put_back(old, path)  # the older folder takes its place again
            raise
        _move_others(old, path, ours)


def _put_back(old: Path, path: Path) -> None:
    if old.exists() and not os.path.lexists(path):
        old.replace(path)


def _move_others(old: Path, path: Path, ours: re.Pattern[str]) -> None:
    if old.is_dir():
        for file in old.iterdir():
            if not ours.fullmatch(file.name) and not os.path.lexists(path / file.name):
                file.replace(path / file.name)


def delete_folder(path: Path) -> None:
    """Delete a folder: it is there whole or not at all, also where the process is killed meanwhile."""
    with _workspace(path) as workspace:
        path.replace(workspace / "deleted")


def recover(path: Path, ours: re.Pattern[str]) -> None:
    """Finish what a process was doing that died while it replaced a folder, and sweep what it left.

    Does nothing where nothing was left, or where it cannot (a read-only disk).

    Args:
        path: the folder.
        ours: see `replaced_folder`.
    """
    with contextlib.suppress(OSError):
        for workspace in _workspaces(path.parent):
            if _replaced_name(workspace) != path.name:
                continue
            old, new = workspace / _OLD, workspace / "new"
            gap = old.exists() and not os.path.lexists(path)
            if not _is_dead(workspace, _FOREIGN_GAP if gap else _FOREIGN_AGE):
                continue
            if gap:
                (new if new.exists() else old).replace(path)  # the new one was whole before the older one moved
            if path.is_dir():
                _move_others(old, path, ours)
            shutil.rmtree(workspace, ignore_errors=True)
        if not os.path.lexists(path):  # as version 0.1.0 moved it away
            for kept in sorted(path.parent.glob(f".{_literal(path.name)}-old-????????/{_literal(path.name)}")):
                kept.replace(path)
                kept.parent.rmdir()
                break


def recover_in(folder: Path, ours: re.Pattern[str]) -> None:
    """`recover` every folder in a folder of such."""
    for name in {_replaced_name(workspace) for workspace in _workspaces(folder)}:
        recover(folder / name, ours)


def _replaced_name(workspace: Path) -> str:
    found = _WORKSPACE.fullmatch(workspace.name)
    return "" if found is None else found["name"]


def _literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def sweep(folder: Path) -> None:
    """Delete what dead processes were writing in a folder; an older folder that one moved away is left to `recover`."""
    with contextlib.suppress(OSError):
        for workspace in _workspaces(folder):
            if not (workspace / _OLD).exists() and _is_dead(workspace, _FOREIGN_AGE):
                shutil.rmtree(workspace, ignore_errors=True)


_swept = functools.cache(sweep)  # where many files are written, once is enough


@contextlib.contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path`. Whoever writes it at once uses another one; the last one names it.

    Raises:
        OSError: it cannot be written; it names `path`, and what was there stays.
    """
    with _workspace(path) as workspace, naming(path):
        yield workspace / path.name
        (workspace / path.name).replace(path)


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Let errors of the system that name no file, or a temporary one, name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or ".tmp/" in str(error.filename)):
            error.filename, error.filename2 = str(path), None
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder, made if need be, to this process: the system lets go of it when the process ends, however it does.

    Where the disk has no locks (some network disks) it warns, and does not keep others out.

    Raises:
        ValueError: another process has it; the message names process and machine.
    """
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(path.open("a+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                who = file.read().strip() or "another process"
                raise ValueError(
                    f"{folder} is in use by {who}: wait for it, stop it, or choose another folder"
                ) from None
            except OSError as error:
                warnings.warn(
                    f"{folder} is on a disk without locks ({error.strerror}): let no second run write there",
                    stacklevel=3,
                )
            if path.is_file() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break  # else the process before deleted it between our opening and locking it
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if not existed:
                with contextlib.suppress(OSError):  # something is in it
                    folder.rmdir()


# ---- workspaces ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _workspace(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` that no other process or thread has; it goes at the end."""
    _swept(path.parent)
    owner = f"{_machine()}-{os.getpid()}-{_started(os.getpid()) or 0}-{secrets.token_hex(4)}"
    workspace = path.with_name(f".{path.name}.{owner}.tmp")
    with naming(path):
        workspace.mkdir()
    try:
        yield workspace
    finally:
        if os.path.lexists(path) or not (workspace / _OLD).exists():  # else it holds the only copy
            shutil.rmtree(workspace, ignore_errors=True)


@contextlib.contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """A hidden folder in `parent`, for files that will be renamed into it; it goes at the end."""
    with _workspace(parent / name) as workspace:
        yield workspace


def _workspaces(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _WORKSPACE.fullmatch(path.name) and path.is_dir())


def _is_dead(workspace: Path, age: float) -> bool:
    """Whether the process that made it has ended; of another machine, whether it is older than `age` seconds."""
    found = _WORKSPACE.fullmatch(workspace.name)
    assert found is not None
    if found["machine"] != _machine():
        parts = [workspace, *workspace.rglob("*")]
        return time.time() - max(part.stat().st_mtime for part in parts) > age
    return not process_runs(int(found["pid"]), int(found["started"]))


def process_runs(pid: int, started: int) -> bool:
    """Whether a process of this machine is the one that started then (ids are given again)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _started(pid)
    return now is None or not started or now == started


def _started(pid: int) -> int | None:
    """When a process started, in ticks since the machine did; None where the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


@functools.cache
def _machine() -> str:
    """Names the machine, or container, within which ids of processes mean something."""
    space = Path("/proc/self/ns/pid")
    names = [socket.gethostname(), str(space.readlink()) if space.is_symlink() else ""]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:8]


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mode_of_new_files(workspace: Path) -> int:
    """The mode that the umask leaves a new file: safetensors makes files for their owner alone."""
    probe = workspace / "mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return mode


# ---- tensors ---------------------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors, and text beside them, to a safetensors file, through a temporary name.

    Raises:
        OSError: it cannot be written, as on a full disk; it names the file.
    """
    with renamed(path) as temporary:
        mode = _mode_of_new_files(temporary.parent)
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise ValueError(f"{path} cannot be written: {error}") from None
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        except RuntimeError as error:  # tensors that lie in the same memory
            raise ValueError(f"{path} cannot be written: {' '.join(str(error).split())}") from None
        temporary.chmod(mode)


def same_shape(stored: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether a stored tensor is of the shape that a model expects. Older files have no dimension for single values."""
    return tuple(stored) == tuple(expected) or (not stored and tuple(expected) == (1,))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        FileNotFoundError, ValueError: it is missing or damaged; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return dict(load_file(path))
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:  # the last three: an unknown dtype, no bytes
        raise ValueError(f"{path} is damaged or not safetensors: {error}") from None


class FileDigest(BaseModel):
    """What an index says about a file beside it."""

    model_config = ConfigDict(frozen=True, strict=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def digest(path: Path) -> FileDigest:
    """Length and SHA-256 of a file.

    Raises:
        FileNotFoundError: it is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    with path.open("rb") as file:
        return FileDigest(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


# ---- JSON ------------------------------------------------------------------------------------------------------


def write_json(path: Path, values: Any) -> None:
    """Write JSON through a temporary name. ValueError: a number is not finite (see `json_text`)."""
    text = json_text(values, str(path), indent=2)
    with renamed(path) as temporary:
        temporary.write_text(text + "\n")


def json_text(values: Any, what: str, indent: int | None = None) -> str:
    """JSON values as text.

    Args:
        values: to write.
        what: they are for: the message starts with it.
        indent: of nested values; None writes one line.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not know; the message names its entry.
    """
    if (found := not_finite_entry(values)) is not None:
        name, value = found
        raise ValueError(f"{what} is not written: {name} is {value}, and JSON has finite numbers only")
    return json.dumps(values, indent=indent, allow_nan=False)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError, ValueError: it is missing or no JSON object; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        values = json.loads(path.read_bytes(), parse_constant=_refused_constant)
    except (ValueError, RecursionError) as error:  # not JSON, not text, a number too long, nested too deep
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


def _refused_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON's")


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """JSON values with the SHA-256 of what they say, as their entry `sha256`."""
    return values | {"sha256": _digest_of_values(values)}


def check_seal(values: dict[str, Any], where: Path) -> None:
    """Refuse values of which `sealed` wrote other ones; older files have no such entry.

    Raises:
        ValueError: it names the file.
    """
    if "sha256" in values and values["sha256"] != _digest_of_values(values):
        raise ValueError(
            f"{where} was changed or damaged after it was saved, by its sha256; copy it again, or delete its entry "
            "sha256 if the change is meant"
        )


def _digest_of_values(values: dict[str, Any]) -> str:
    as_read = json.loads(json.dumps({name: value for name, value in values.items() if name != "sha256"}))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


_Checked = TypeVar("_Checked", bound=BaseModel)


def checked(values: Any, schema: type[_Checked], where: Path | str) -> _Checked:
    """Validate values that were read from a file.

    Raises:
        ValueError: one line that names the file, the field, what is wrong with it, and its value.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        first, *more = error.errors()
        field = ".".join(str(part) for part in first["loc"])
        given = "" if first["type"] == "missing" else f" (got {shortened(repr(first['input']), 80)})"
        others = f"; {len(more)} more fields are wrong" if more else ""
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}: {field}{': ' if field else ''}{message}{given}{others}") from None
