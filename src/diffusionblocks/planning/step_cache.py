"""Logs of steps in files, so that a plan follows no step that an earlier one has followed.

An entry is JSON, with all that decides on its step and a SHA-256. One of another step, or damaged, is passed over.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.digests import check_seal, digest, json_digest, seal
from ..common.formats import read_json, write_json
from .timeline import StepLog

_OURS = __name__.partition(".")[0]

#: Packages whose versions are known, and whose classes decide with their config on what they do.
_LIBRARIES = {"torch", "transformers", "diffusers", "huggingface_hub", "numpy"}

#: Variables of the environment that libraries read when they choose kernels or compile.
_VARIABLES = ("TORCH", "PYTORCH", "TRITON", "TRANSFORMERS", "DIFFUSERS", "USE_")

#: So many entries stay, the newest; each is some ten thousand bytes.
_MOST = 500


class StepCache:
    """Logs of steps in a folder, by what decides on them.

    A folder that cannot be written is passed over as well: all logs are made anew then.

    Args:
        folder: of the entries; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of_user(cls) -> StepCache:
        """The one in the user's folder for caches: `XDG_CACHE_HOME`, by default `~/.cache`."""
        # A relative path is to be ignored, says the XDG Base Directory Specification.
        folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
        caches = folder if folder.is_absolute() else Path.home() / ".cache"
        return cls(caches / _OURS / "steps")

    def read(self, step: dict[str, Any]) -> StepLog | None:
        """Read the log of a step; None: there is none that is whole.

        Args:
            step: JSON values, all that decides on it.
        """
        path = self._path(step)
        try:
            values = read_json(path)
            check_seal(values, path)
            if "sha256" not in values or values.get("step") != step:
                return None
            return StepLog.from_values(values["log"])
        except (OSError, ValueError, KeyError):
            return None

    def write(self, step: dict[str, Any], log: StepLog) -> None:
        """Write the log of a step, whole or not at all."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self._path(step), seal({"step": step, "log": log.to_values()}))
            entries = sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
            for path in entries[:-_MOST]:
                path.unlink(missing_ok=True)

    def _path(self, step: dict[str, Any]) -> Path:
        return self.folder / f"{json_digest(step)}.json"


def code_of(module: nn.Module) -> dict[str, str] | None:
    """Digests of the files that define a module's parts, beside those of `surroundings`.

    Args:
        module: on any device.

    Returns:
        By their names as imported; None where a part, or what it holds, is of a package that is not known: what decides
        there is not known either.
    """
    files: dict[str, str] = {}
    for name in {_defined_in(thing) for part in module.modules() for thing in (part, *vars(part).values())}:
        package = name.partition(".")[0]
        if package in sys.stdlib_module_names or package == _OURS:
            continue
        if package not in _LIBRARIES:
            return None
        file = getattr(sys.modules.get(name), "__file__", None)
        if package != "torch" and file is not None:
            files[name] = digest(Path(file)).sha256
    return files


def _defined_in(thing: Any) -> str:
    return getattr(thing, "__module__", None) or type(thing).__module__


@functools.cache
def surroundings() -> dict[str, Any]:
    """What decides on every step, as JSON values: our source, Python, what is installed, processor and environment."""
    return {
        "source": _source_digest(),
        "python": platform.python_version(),
        "torch": [torch.__version__, torch.version.git_version],
        "installed": hashlib.sha256("\n".join(_installed()).encode()).hexdigest(),
        "processor": [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.cuda.is_available()],
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
    }


def _source_digest() -> str:
    package = Path(__file__).parents[1]
    result = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        result.update(f"{path.relative_to(package)}\n{path.stat().st_size}\n".encode())
        result.update(path.read_bytes())
    return result.hexdigest()


def _installed() -> Iterator[str]:
    """Names and versions of distributions, which their folders are called by."""
    for folder in dict.fromkeys(sys.path):
        with contextlib.suppress(OSError):
            yield from sorted(path.name for path in Path(folder).glob("*.*-info"))
