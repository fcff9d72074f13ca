"""The processes that measure: each measurement in its own, so that none sees another's memory.

    server_command()                                    reads specifications, a line of JSON each; answers each
    python -m diffusionblocks.bench.worker OUT          measures the one specification it reads, here

The first, the server, imports the libraries once and never touches the GPU; it forks for each measurement, which saves
the seconds that imports take. Where a library has touched the GPU at its import, a fork cannot use it: then each
measurement is a fresh process, which takes about a quarter of a minute longer.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .methods import Spec

#: Packages that start CUDA at their import, and that transformers and diffusers import where they are. The server is
#: started without them (`server_command`), and its measurements import what they need.
STARTS_CUDA = ("bitsandbytes", "torchao")

#: A fork that cannot use the GPU says one of these.
_UNUSABLE = ("Cannot re-initialize CUDA in forked subprocess", "initialization error", "CUDA driver initialization")


def answer(spec: Spec) -> dict[str, Any]:
    """Measure; what goes wrong becomes the answer's `error`."""
    from .measurements import TASKS, failure

    start = time.perf_counter()
    try:
        result = TASKS[spec.task](spec)
    except Exception as error:
        return failure(error)
    return result | {"seconds": time.perf_counter() - start}


def server_command() -> list[str]:
    """What starts the server: a module that is None cannot be imported."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({STARTS_CUDA}))"
    return [sys.executable, "-c", f"{hide}; from {__name__} import serve; serve()"]


def serve() -> None:
    """Answer specifications from the standard input until it ends."""
    _preload()
    forks = hasattr(os, "fork") and not sys.modules["torch"].cuda.is_initialized()
    if not forks:
        print("a library has started CUDA at its import: every row imports them all anew", file=sys.stderr)
    for line in sys.stdin:
        request = json.loads(line)
        reply = isolated(request, forks)
        if forks and any(part in str(reply.get("error")) for part in _UNUSABLE):
            forks = False
            reply = isolated(request, forks)
        print(json.dumps(reply), flush=True)


def _preload() -> None:
    """Import what measurements need, without starting CUDA or threads, which forks could not use."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # to ask for GPUs would start it
    os.environ.setdefault("TORCH_WARM_POOL", "0")  # torch's compile workers
    import diffusers  # noqa: F401
    from transformers import ViTForImageClassification  # noqa: F401

    from ..models import DiT  # noqa: F401
    from . import measurements as tasks  # noqa: F401

    for name in STARTS_CUDA:
        if name in sys.modules and sys.modules[name] is None:
            del sys.modules[name]  # a measurement may import it


def isolated(request: dict[str, Any], fork: bool) -> dict[str, Any]:
    """The answer of a process of its own, which is ended with all its helpers when its time is up."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="diffusionblocks-bench-") as folder:
        out = Path(folder) / "answer.json"
        number, has_ended = _forked(request, out) if fork else _fresh(request, out)
        late = not _waits(has_ended, request["limit"])
        _end_group(number)
        if late:
            while not has_ended():
                time.sleep(0.01)
            return {"error": f"timed out after {request['limit']:g} s"}
        if not out.is_file():
            return {"error": "the process died without an answer (killed by the system, or for memory of the host)"}
        reply: dict[str, Any] = json.loads(out.read_text())
    return reply | {"process_seconds": time.perf_counter() - start}


def _forked(request: dict[str, Any], out: Path) -> tuple[int, Callable[[], bool]]:
    sys.stdout.flush()
    number = os.fork()
    if number == 0:
        try:
            os.setsid()
            os.dup2(2, 1)  # the standard output belongs to the answers
            _measure(request, out)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)

    def has_ended() -> bool:
        return os.waitpid(number, os.WNOHANG)[0] == number

    return number, has_ended


def _fresh(request: dict[str, Any], out: Path) -> tuple[int, Callable[[], bool]]:
    command = [sys.executable, "-m", __name__, str(out)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2, text=True, start_new_session=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps(request))
    process.stdin.close()
    return process.pid, lambda: process.poll() is not None


def _waits(has_ended: Callable[[], bool], seconds: float) -> bool:
    limit = time.perf_counter() + seconds
    while time.perf_counter() < limit:
        if has_ended():
            return True
        time.sleep(0.01)
    return False


def _end_group(number: int) -> None:
    """End what is left of a measurement's process group: torch's compile workers, or all of it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(number, signal.SIGKILL)


def _measure(request: dict[str, Any], out: Path) -> None:
    reply = answer(Spec.from_dict(request["spec"]))
    out.write_text(json.dumps(reply))


if __name__ == "__main__":
    _measure(json.load(sys.stdin), Path(sys.argv[1]))
