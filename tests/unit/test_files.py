"""Files and folders, whole or not at all: what may be replaced, what a dead process left, modes, names."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffusionblocks.common import files
from diffusionblocks.common.files import (
    check_replaceable,
    delete_folder,
    recover,
    recover_in,
    sweep,
    whole_file,
    whole_folder,
)
from diffusionblocks.common.formats import read_json, write_json, write_tensors

OURS = re.compile(r"[ab]\.json")


def write(path: Path, value: int) -> None:
    with whole_folder(path, OURS) as folder:
        for name in ("a", "b"):
            write_json(folder / f"{name}.json", {"value": value})


def values(path: Path) -> list[int]:
    return [read_json(path / f"{name}.json")["value"] for name in ("a", "b")]


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# ---- what may be replaced ---------------------------------------------------------------------------------------


def a_file(folder: Path) -> Path:
    (folder / "m").write_text("mine")
    return folder / "m"


def a_link(folder: Path) -> Path:
    write(folder / "elsewhere", 1)
    (folder / "m").symlink_to(folder / "elsewhere")
    return folder / "m"


def a_dangling_link(folder: Path) -> Path:
    (folder / "m").symlink_to(folder / "nowhere")
    return folder / "m"


def other_things(folder: Path) -> Path:
    (folder / "m").mkdir()
    (folder / "m" / "thesis.tex").write_text("mine")
    return folder / "m"


def the_current_one(folder: Path) -> Path:
    write(folder / "m", 1)
    os.chdir(folder / "m")
    return folder / "m"


def above_the_current_one(folder: Path) -> Path:
    (folder / "m" / "below").mkdir(parents=True)
    os.chdir(folder / "m" / "below")
    return folder / "m"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (a_file, "is a file"),
        (a_link, "symbolic link"),
        (a_dangling_link, "symbolic link"),
        (other_things, r"holds other things \(thesis.tex\)"),
        (the_current_one, "current folder"),
        (above_the_current_one, "current folder"),
        (lambda _: Path(), "a name of its own"),
        (lambda _: Path(".."), "a name of its own"),
        (lambda folder: folder / "x" / "..", "a name of its own"),
        (lambda _: Path("/"), "a name of its own"),
    ],
)
def test_what_is_not_ours_is_refused_before_anything_moves(
    make: Callable[[Path], Path], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # and back at the end
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    entered = False
    with pytest.raises(ValueError, match=message), whole_folder(path, OURS):
        entered = True
    assert not entered
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_and_an_older_one_are_replaced_and_others_files_stay(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    write(tmp_path / "m", 1)
    (tmp_path / "m" / "notes").write_text("mine")
    write(tmp_path / "m", 2)
    assert values(tmp_path / "m") == [2, 2]
    assert (tmp_path / "m" / "notes").read_text() == "mine"
    assert hidden(tmp_path) == []
    check_replaceable(tmp_path / "new", OURS)


# ---- what a dead process left -----------------------------------------------------------------------------------


def dying_write(path: Path, last: int) -> int:
    """Replace the folder in a process that is killed at its `last` call of the system; its exit status."""
    if not (child := os.fork()):
        calls = 0

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal calls
                calls += 1
                if calls == last:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for name in ("replace", "mkdir", "rmdir", "unlink", "fsync", "chmod"):
            setattr(os, name, counted(getattr(os, name)))
        write(path, 2)
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.slow
def test_killed_at_any_call_the_folder_is_the_older_or_the_newer_one(tmp_path: Path) -> None:
    """One process after another dies one call of the system later, until one does not die."""
    path, seen, status = tmp_path / "m", set(), -1
    last = 0
    while status:
        last += 1
        write(path, 1)
        (path / "notes").write_text("mine")
        status = dying_write(path, last)
        assert status in (0, signal.SIGKILL)
        recover(path, OURS)
        (value, other) = values(path)
        assert value == other
        assert (path / "notes").read_text() == "mine"
        assert hidden(tmp_path) == []
        seen.add(value)
    assert last > 15
    assert seen == {1, 2}


def workspace_of(path: Path, pid: int, *, machine: str | None = None, started: int = 0) -> Path:
    made = path.with_name(f".{path.name}.{machine or files._machine()}-{pid}-{started}-00000000.tmp")
    (made / "new").mkdir(parents=True)
    write(made / "new" / "x", 3)
    return made


def a_dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_an_older_folder_that_was_moved_away_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write(path, 1)
    workspace = path.with_name(f".m.{files._machine()}-{a_dead_pid()}-0-00000000.tmp")
    workspace.mkdir()
    path.rename(workspace / files._OLD)
    sweep(tmp_path)  # takes no older folder
    recover_in(tmp_path, OURS)
    assert values(path) == [1, 1]
    assert hidden(tmp_path) == []


def test_an_older_folder_that_an_earlier_version_moved_away_comes_back(tmp_path: Path) -> None:
    write(tmp_path / ".m-old-abcd_123" / "m", 1)
    recover(tmp_path / "m", OURS)
    assert values(tmp_path / "m") == [1, 1]
    assert hidden(tmp_path) == []


def test_only_what_dead_processes_left_is_swept(tmp_path: Path) -> None:
    path = tmp_path / "m"
    dead = workspace_of(path, a_dead_pid())
    given_again = workspace_of(path, os.getpid(), started=1)
    alive = workspace_of(tmp_path / "n", os.getpid(), started=files._start_of(os.getpid()) or 0)
    elsewhere = workspace_of(tmp_path / "o", 1, machine="0" * 8)
    (tmp_path / ".m.mine.tmp").mkdir()
    (tmp_path / ".cache").mkdir()
    sweep(tmp_path)
    assert not dead.exists()
    if files._start_of(os.getpid()) is not None:
        assert not given_again.exists()
    assert alive.exists()
    assert elsewhere.exists()
    old = time.time() - 2 * 24 * 3600
    for part in [*elsewhere.rglob("*"), elsewhere]:
        os.utime(part, (old, old))
    sweep(tmp_path)
    assert not elsewhere.exists()
    assert (tmp_path / ".m.mine.tmp").exists()
    assert (tmp_path / ".cache").exists()


def test_a_deleted_folder_is_gone(tmp_path: Path) -> None:
    write(tmp_path / "m", 1)
    delete_folder(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


# ---- names and modes --------------------------------------------------------------------------------------------


def test_threads_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    def work(number: int) -> None:
        for _ in range(20):
            write_json(tmp_path / "x.json", {"value": [number] * 500})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(read_json(tmp_path / "x.json")["value"])) == 1
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_modes_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "m", OURS) as folder:
            write_json(folder / "a.json", {})
            write_tensors(folder / "b.json", {"a": torch.zeros(3)})
        write_tensors(tmp_path / "c", {"a": torch.zeros(3)})
        with whole_file(tmp_path / "d") as temporary:
            temporary.write_text("")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"m": 0o777 & ~umask} | dict.fromkeys(("a.json", "b.json", "c", "d"), 0o666 & ~umask)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\x00", "nonsense", '{"a": 1'])
def test_what_is_no_json_names_its_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is not JSON"):
        read_json(tmp_path / "x.json")
