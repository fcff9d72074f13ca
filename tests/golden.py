"""Values that an earlier commit gave, and how they are compared with those of today."""

from __future__ import annotations

import hashlib
import inspect
import math
import platform
import runpy
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def machine() -> dict[str, str]:
    """What bits of float32 arithmetic depend on: the version of torch, and the processor."""
    # Names alone do not tell: a virtual machine calls processors of several generations the same.
    facts = dict.fromkeys(line for line in _cpuinfo() if line.startswith(("cpu family", "model", "stepping", "flags")))
    processor = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16] if facts else platform.processor()
    return {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(), "processor": processor}


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.is_file() else []


def command(*arguments: object) -> int:
    """The exit status of `python -m diffusionblocks ARGUMENTS`, run in this process."""
    before = sys.argv
    sys.argv = ["diffusionblocks", *map(str, arguments)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the module may have been imported before it is run
            runpy.run_module("diffusionblocks", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = before
    return 0


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def outputs(kind: str, model: Any) -> dict[str, Tensor]:
    """What a model gives for fixed inputs and seeds: losses of each block, and its predictions or samples.

    Args:
        kind: `vit`, `dit`, `masked` or `llama`, of the recipes in old_artefacts/recipes.
        model: a DiffusionBlocks.
    """
    g = seeded(0)
    images, labels = torch.randn(6, 1, 8, 8, generator=g), torch.arange(6)
    tokens = torch.randint(27, (6, 16), generator=g)
    batch = {"input_ids": tokens} if kind in ("masked", "llama") else {"pixel_values": images, "labels": labels}
    values: dict[str, Tensor] = {}
    with torch.no_grad():
        for b in range(model.partition.num_blocks):
            values[f"loss.{b}"] = model.loss(batch, block=b, generator=seeded(b))
        if kind == "vit":
            values["logits"] = model.predict(images, steps=3, seeds=2, generator=seeded(7)).logits
        elif kind == "dit":
            for solver in ("euler", "heun", "dpmpp-2m"):
                values[solver] = model.sample([0, 3, 9], seeds=[5, 6, 7], steps=5, solver=solver, guidance=1.5)
        elif kind == "masked":
            values["text"] = model.generate((3, 4), steps=8)
        else:
            # Texts were continued by a method of another name once.
            generate = getattr(model, "continue_texts", model.generate)
            options = {"combine": "chain"} if "combine" in inspect.signature(model.generate).parameters else {}
            made = generate([tokens[0, :5], tokens[1, :3]], 8, seeds=[3, 4], stop_tokens=[], **options)
            values["text"] = torch.cat([torch.as_tensor(row) for row in made.tokens])
    return values


def digests(module: nn.Module | Mapping[str, Tensor]) -> list[str]:
    """A digest of each tensor of a module or state dict, whatever they are called."""
    state = module.state_dict() if isinstance(module, nn.Module) else module
    return sorted(_digest(tensor) for tensor in state.values())


def _digest(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous().reshape(-1)  # a number may have become a list of one
    return hashlib.sha256(str(plain.dtype).encode() + plain.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def assert_as_before(now: Mapping[str, Tensor], before: Mapping[str, Tensor], same_machine: bool) -> None:
    """Bit for bit on the machine that made `before`; elsewhere to a relative 1e-4, and whole numbers exactly."""
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert now[name].dtype == value.dtype, name
        if same_machine or not value.is_floating_point():
            assert torch.equal(now[name], value), name
        else:
            torch.testing.assert_close(now[name], value, rtol=1e-4, atol=1e-5, msg=name)


def numbers(value: Any) -> list[float]:
    """All numbers in JSON values, ascending, whatever they are called."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return []
    if isinstance(value, (int, float)):
        return [float(value)]
    parts = value.values() if isinstance(value, Mapping) else value
    return sorted(number for part in parts for number in numbers(part))


def lacks(now: list[float], before: list[float], tolerance: float) -> list[float]:
    """Which numbers of `before` have no equal in `now`, each of which serves once."""
    left, missing = list(now), []
    for number in before:
        near = [n for n in left if math.isclose(n, number, rel_tol=tolerance, abs_tol=tolerance)]
        if near:
            left.remove(min(near, key=lambda n: abs(n - number)))
        else:
            missing.append(number)
    return missing
