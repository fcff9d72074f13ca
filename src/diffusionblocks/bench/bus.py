"""Bytes that a step moves between host and device, as the device's own records of copies say."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .runners import Runner

#: Steps that are recorded.
_STEPS = 2


def bus_bytes_of_step(runner: Runner, steps_per_switch: int) -> float | None:
    """Bytes over the bus of a mean step, both directions together; None on a CPU.

    Args:
        runner: has stepped before.
        steps_per_switch: steps over which a switch is spread, where the runner switches.
    """
    if runner.device.type != "cuda":
        return None
    staying = _recorded(runner, [turn for turn in range(runner.turns) for _ in range(_STEPS + 1)])
    if not runner.switches:
        return staying / (runner.turns * (_STEPS + 1))
    # Both went once round; the rest of the first are steps without a switch.
    switching = _recorded(runner, list(range(runner.turns)))
    step = (staying - switching) / (runner.turns * _STEPS)
    return step + (switching / runner.turns - step) / steps_per_switch


def _recorded(runner: Runner, turns: list[int]) -> int:
    runner.step(turns[-1])  # as before each round: the last part is there
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for turn in turns:
            runner.step(turn)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory(prefix="diffusionblocks-bench-") as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return bytes_over_bus(json.loads(path.read_text())["traceEvents"])


def bytes_over_bus(events: Iterable[dict[str, Any]]) -> int:
    """Bytes of the copies between host and device among the events of a trace."""
    return sum(
        int(event["args"]["bytes"])
        for event in events
        if event.get("cat") == "gpu_memcpy" and any(way in event["name"] for way in ("HtoD", "DtoH"))
    )
