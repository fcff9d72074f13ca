"""Logs: JSON lines always, TensorBoard as an extra, behind one small protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from ..common.files import naming
from ..common.formats import json_text


class Logger(Protocol):
    """Receives the records of a run."""

    def log(self, record: dict[str, Any]) -> None:
        """Receive one record; `iteration` orders them."""

    def close(self) -> None:
        """Flush and release."""


#: name of a run's log
LOG = "log.jsonl"


class JsonLines:
    """Appends records to a .jsonl file. On resume, records past the checkpoint are dropped.

    Args:
        path: the file.
        resume_at: keep records with iteration <= this; None starts the file anew.
    """

    def __init__(self, path: Path, resume_at: int | None = None) -> None:
        lines: list[str] = []
        if resume_at is not None and path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line).get("iteration", 0) <= resume_at:
                        lines.append(line)
                except json.JSONDecodeError:
                    break  # the line that a killed run was writing
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")
        self._file.writelines(f"{line}\n" for line in lines)
        self._file.flush()

    def log(self, record: dict[str, Any]) -> None:
        """Write one line, and flush it."""
        with naming(self._file.name):
            self._file.write(json_text(record, self._file.name) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with naming(self._file.name):
            self._file.close()


class TensorBoard:
    """Scalars to TensorBoard; needs the extra `tensorboard`."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError(
                "TensorBoard logging needs the extra: pip install 'diffusionblocks[tensorboard]'"
            ) from None
        self._writer = SummaryWriter(str(folder))

    def log(self, record: dict[str, Any]) -> None:
        """Write the record's numbers under its unit's name."""
        unit = record.get("unit", "run")
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "iteration":
                self._writer.add_scalar(f"{unit}/{name}", value, record.get("iteration", 0))

    def close(self) -> None:
        """Flush and release the writer."""
        self._writer.close()
