"""Files and folders that are there whole or not at all: written in a hidden folder, then renamed.

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
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

#: Where commands leave what they make, below the current folder, unless they are told another place.
RUNS = Path("runs")

_WORKSPACE = re.compile(r"\.(?P<name>.+)\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]{8}\.tmp")

_LOCK = ".lock"

_OLD = "the-old-one"  # within a workspace: the folder that is being replaced

#: Seconds after which the workspace of another machine counts as that of a dead process: it cannot be asked.
_FOREIGN_AGE = 24 * 3600.0
#: The same for one that has moved an older folder away without putting the new one in its place, which takes no time.
_FOREIGN_GAP = 60.0

#: How often a lock is tried: whoever looks at one has it for a moment.
_LOOKS = 5


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


def check_space(path: Path, size: int, free: int, advice: str) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        path: a folder; it need not exist.
        size: bytes that will be written there.
        free: bytes that its disk has (`free_space`).
        advice: what to do about it.

    Raises:
        ValueError: fewer bytes are free.
    """
    if size > free:
        raise ValueError(
            f"{path} will take about {size / 2**30:,.1f} GiB, and its disk has {free / 2**30:,.1f} free: {advice}"
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
def whole_folder(path: Path, ours: re.Pattern[str]) -> Iterator[Path]:
    """Write a folder whole or not at all: in a temporary one, which takes the name `path` when the body ends.

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
        mode = mode_of_new_files(workspace)
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
        ours: see `whole_folder`.
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
            for spare in sorted(path.parent.glob(f".{_literal(path.name)}-old-????????/{_literal(path.name)}")):
                spare.replace(path)
                spare.parent.rmdir()
                break


def recover_in(folder: Path, ours: re.Pattern[str]) -> None:
    """`recover` every folder in a folder of such."""
    for name in {_replaced_name(workspace) for workspace in _workspaces(folder)}:
        recover(folder / name, ours)


def _replaced_name(workspace: Path) -> str:
    match = _WORKSPACE.fullmatch(workspace.name)
    return "" if match is None else match["name"]


def _literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def sweep(folder: Path) -> None:
    """Delete what dead processes were writing in a folder; an older folder that one moved away is left to `recover`."""
    with contextlib.suppress(OSError):
        for workspace in _workspaces(folder):
            if not (workspace / _OLD).exists() and _is_dead(workspace, _FOREIGN_AGE):
                shutil.rmtree(workspace, ignore_errors=True)


_sweep_once = functools.cache(sweep)  # where many files are written, once is enough


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all: under a temporary name, which becomes `path` when the body ends.

    Whoever writes it at once uses another one; the last one names it.

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


def lock_text(folder: Path) -> str:
    """Who has locked a folder, on whatever machine; "" where nobody has."""
    try:
        return (folder / _LOCK).read_text()
    except OSError:
        return ""


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lock a folder, made if need be, for this process; the system unlocks it when the process ends, however it does.

    Where the disk has no locks (some network disks) it warns, and does not keep others out.

    Raises:
        ValueError: another process has it; the message names process and machine.
    """
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(path.open("a+"))
            try:
                _lock(file)
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


def _lock(file: TextIO) -> None:
    """Lock a file for this process. BlockingIOError: another one has it, and not only to look (`lock_holder`)."""
    for _ in range(_LOOKS):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.02)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def lock_holder(folder: Path) -> str | None:
    """Who works in a folder, `process 12 on gpu-3`, by its `folder_lock`; None: nobody, or its disk has no locks."""
    try:
        with (folder / ".lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # until the file is closed
            except BlockingIOError:
                return file.read().strip() or "another process"
    except OSError:
        return None
    return None


# ---- workspaces ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _workspace(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` that no other process or thread has; it goes at the end."""
    _sweep_once(path.parent)
    owner = f"{_machine()}-{os.getpid()}-{_start_of(os.getpid()) or 0}-{secrets.token_hex(4)}"
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
    match = _WORKSPACE.fullmatch(workspace.name)
    assert match is not None
    if match["machine"] != _machine():
        parts = [workspace, *workspace.rglob("*")]
        return time.time() - max(part.stat().st_mtime for part in parts) > age
    return not process_runs(int(match["pid"]), int(match["start"]))


def process_runs(pid: int, start: int) -> bool:
    """Whether a process of this machine is the one that started then (ids are given again)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _start_of(pid)
    return now is None or not start or now == start


def _start_of(pid: int) -> int | None:
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


def mode_of_new_files(workspace: Path) -> int:
    """The mode that the umask leaves a new file: safetensors makes files for their owner alone."""
    probe = workspace / "mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return mode
