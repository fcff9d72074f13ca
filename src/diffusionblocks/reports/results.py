"""JSON files of results: measured rows, with the command, device and commit that made them."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..common.formats import write_json


def write_results(
    path: Path, rows: list[dict[str, Any]], header: Mapping[str, Any] | None = None, /, **more: Any
) -> None:
    """Write measured rows with the command, device and commit that made them.

    Args:
        path: the file; its folder is made.
        rows: JSON values.
        header: what says how they were made; default this process's (`results_header`).
        more: further entries, between header and rows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**(results_header() if header is None else header), **more, "rows": rows})


def results_header(device: str | None = None) -> dict[str, Any]:
    """Command, device, version of torch and commit of this process.

    Args:
        device: its name; default that of the GPU, which is looked at, or the CPU's.
    """
    if device is None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {"command": _command(), "device": device, "torch": torch.__version__, "commit": commit()}


def joint_header(files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The header of results that several processes made, from the contents of their files."""

    def parts(name: str, separator: str) -> dict[str, None]:
        return dict.fromkeys(part for file in files for part in str(file[name]).split(separator))  # of joint ones, too

    command = " && ".join(parts("command", " && "))
    names = ("device", "torch", "commit")
    return {"command": command, **{name: ", ".join(sorted(parts(name, ", "))) for name in names}}


def _command() -> str:
    program = Path(sys.argv[0])
    ours = program.stem in ("diffusionblocks", "cli") or program.parts[-2:] == ("diffusionblocks", "__main__.py")
    return shlex.join([*(["diffusionblocks"] if ours else ["python", str(program)]), *sys.argv[1:]])


def commit() -> str | None:
    """The checked-out commit, with "+" where tracked files differ from it; None outside a repository.

    A copy without its repository (a job on another machine) names it by the variable DIFFUSIONBLOCKS_COMMIT.
    """
    if variable := os.environ.get("DIFFUSIONBLOCKS_COMMIT"):
        return variable
    try:
        name = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return name + "+" * bool(changed)
