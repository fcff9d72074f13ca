"""The measuring process as the command line sees it: a specification in, a row of its measurements out."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from .methods import Spec
from .timing import LOCK
from .worker import server_command


class Measurer(Protocol):
    """Answers specifications with measurements."""

    def ask(self, spec: Spec, limit: float) -> dict[str, Any]:
        """Measure; an `error` where there is no answer.

        Args:
            spec: what to measure.
            limit: seconds that it may take.
        """


class Server:
    """A process that measures each specification in a process of its own (`worker.py`).

    Args:
        lock: a file that benches of one GPU share: each measures while it holds it (`timing.alone`).
        environment: variables for it, beside this process's own.
    """

    def __init__(self, lock: Path | None = None, environment: dict[str, str] | None = None) -> None:
        shared = {} if lock is None else {LOCK: str(lock.absolute())}
        self._environment = {**os.environ, **(environment or {}), **shared}
        self._process: subprocess.Popen[str] | None = None

    def ask(self, spec: Spec, limit: float) -> dict[str, Any]:
        """Let the process measure; start it first where there is none."""
        if self._process is None:
            self._process = subprocess.Popen(
                server_command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"spec": spec.to_dict(), "limit": limit}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._process = None
            return {"error": f"the measuring process ended with exit status {code}; see its messages above"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def server(lock: Path | None = None, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """A `Server` for the length of a `with` block."""
    with contextlib.closing(Server(lock, environment)) as process:
        yield process
