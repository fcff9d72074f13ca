"""Runs each input in a child process of its own, under limits of time and memory.

A server imports the libraries once and forks a child for each job, so an input costs milliseconds, and one that
hangs, crashes or takes memory ends alone. `python sandbox.py` is the server; `Sandbox` starts it and talks to it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: address space that a job may take beside what the libraries have taken before it
MEMORY = 1 << 30
#: CPU seconds of a job; one that waits for nothing ends after WAIT times as long
SECONDS = 10
WAIT = 6
#: CPU seconds after which a job whose length the user chooses gets a SIGINT, as Ctrl-C sends it
PATIENCE = 3


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        code: its exit status; minus the signal that ended it, as subprocess says it.
        interrupted: whether it got the SIGINT after PATIENCE.
        out, err: what it wrote.
        product: what it computed, as JSON values; None unless it succeeded.
        seconds: CPU time.
        peak: bytes of memory, the libraries' included.
    """

    code: int
    interrupted: bool
    out: str
    err: str
    product: Any
    seconds: float
    peak: int


class Sandbox:
    """A server of forked children. `folder` is for its files; a job runs in a workspace of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        home = folder / "home"
        home.mkdir(exist_ok=True)
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(home / "huggingface"),
            "MPLCONFIGDIR": str(home / "matplotlib"),
            "MPLBACKEND": "agg",
            "COLUMNS": "100",
        }
        environment.pop("DIFFUSIONBLOCKS_DATA", None)
        with (folder / "server.err").open("w") as errors:
            self.server = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True, env=environment,
            )  # fmt: skip
        self.number = 0

    def run(
        self, actions: list[dict[str, Any]], workspace: Path, *, interrupt: bool = False, seconds: float = SECONDS
    ) -> Outcome:
        """Run actions, one after another until one fails, with `workspace` as the current folder."""
        self.number += 1
        files = {name: str(self.folder / f"{self.number}.{name}") for name in ("out", "err", "product", "interrupted")}
        job = {"actions": actions, "workspace": str(workspace), "interrupt": interrupt, "seconds": seconds, **files}
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        if not answer:
            raise RuntimeError(f"the sandbox ended: {(self.folder / 'server.err').read_text()[-2000:]}")
        written = {name: Path(path) for name, path in files.items()}
        try:
            return Outcome(
                **json.loads(answer),
                interrupted=written["interrupted"].exists(),
                out=written["out"].read_text(errors="replace"),
                err=written["err"].read_text(errors="replace"),
                product=json.loads(written["product"].read_text()) if written["product"].exists() else None,
            )
        finally:
            for path in written.values():
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """End the server."""
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()


@contextmanager
def sandbox(folder: Path) -> Iterator[Sandbox]:
    """A `Sandbox` that is closed at the end."""
    server = Sandbox(folder)
    try:
        yield server
    finally:
        server.close()


# ---- the server ----------------------------------------------------------------------------------------------


def serve() -> None:
    """Answer jobs, a line of JSON each, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints at import is no answer
    import actions

    actions.preload()
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(job, actions.ACTIONS)
        answers.write(json.dumps(_watched(child, job["seconds"])) + "\n")
        answers.flush()


def _watched(child: int, seconds: float) -> dict[str, Any]:
    """Wait for a child, and end it where it neither ends nor uses its CPU time."""
    deadline = time.monotonic() + WAIT * seconds
    pause = 0.001
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # what it has started, if anything
    used = usage.ru_utime + usage.ru_stime
    return {"code": os.waitstatus_to_exitcode(status), "seconds": used, "peak": usage.ru_maxrss * 1024}


def _run(job: dict[str, Any], known: dict[str, Any]) -> None:
    """The child: run the actions under limits and exit."""
    code = 1
    try:
        os.setsid()
        os.chdir(job["workspace"])
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        _limit(job)
        for action in job["actions"]:
            arguments = dict(action)
            code, product = known[arguments.pop("do")](**arguments)
            if product is not None:
                Path(job["product"]).write_text(json.dumps(product, sort_keys=True))
            if code:
                break
    except SystemExit as error:  # as the interpreter does
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)


def _limit(job: dict[str, Any]) -> None:
    def interrupt(*_: object) -> None:
        Path(job["interrupted"]).touch()
        os.kill(os.getpid(), signal.SIGINT)

    seconds = int(job["seconds"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if job["interrupt"]:
        signal.signal(signal.SIGXCPU, interrupt)
    used = sum(os.times()[:2])
    soft = int(used + (PATIENCE if job["interrupt"] else seconds)) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, soft + seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statistics = Path("/proc/self/statm")
    if statistics.exists():  # Linux; elsewhere the address space is no measure
        taken = int(statistics.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))


if __name__ == "__main__":
    serve()
