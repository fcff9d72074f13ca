"""What is compared: the methods, and the specification of one measurement."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from ..training.train_config import LEAN_BUDGET

_BUDGET = {"activation_memory_budget": LEAN_BUDGET}
_CHECKPOINTING = {"activation_checkpointing": True}
_OPTIMISATIONS = {"activation_checkpointing": True, "optimizer": "adamw-8bit", "optimizer_in_backward": True}


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        kind: `whole` model end to end; a `short` model of one block's layers end to end; an `alternative`, the whole
            model with an optimizer of another package; `blocks`.
        train: what it changes in the recipe's `train` section.
        about: what a reader must know about it.
        host_copies: how many times the bytes of the weights it keeps in host memory; of blocks the planner knows.
    """

    kind: Literal["whole", "short", "alternative", "blocks"]
    about: str
    train: dict[str, Any] = field(default_factory=dict)
    host_copies: float = 0.0


#: Former names of methods, which tables of older versions have and the command line accepts.
FORMER_NAMES = {
    "end-to-end-all-savers": "end-to-end-all-optimisations",
    "resident-active-all-savers": "resident-active-all-optimisations",
}

METHODS: dict[str, Method] = {
    "end-to-end": Method("whole", "AdamW, float32 weights, bfloat16 autocast"),
    "end-to-end-memory-budget": Method("whole", "torch.compile computes what is cheap again", _BUDGET),
    "end-to-end-checkpointing": Method("whole", "each layer is computed again", _CHECKPOINTING),
    "end-to-end-8bit-in-backward": Method(
        "whole",
        "8-bit AdamW, which steps inside the backward pass",
        {"optimizer": "adamw-8bit", "optimizer_in_backward": True},
    ),
    "end-to-end-all-optimisations": Method(
        "whole", "checkpointing and 8-bit AdamW in the backward pass", _OPTIMISATIONS
    ),
    "end-to-end-cpu-offload": Method("alternative", "torchao's CPUOffloadOptimizer: AdamW and gradients on the host"),
    "end-to-end-badam": Method(
        "alternative",
        "BAdam: a layer at a time; weights in bfloat16 without float32 copies, but for the layer that trains",
    ),
    "end-to-end-apollo-mini": Method("alternative", "APOLLO-Mini: rank 1 for the layers' matrices, AdamW for the rest"),
    "end-to-end-fsdp-offload": Method(
        "alternative",
        "torch's FSDP2 on one GPU: CPUOffloadPolicy keeps weights, gradients and AdamW on the host",
        _CHECKPOINTING,
        host_copies=4,
    ),
    "end-to-end-group-offloading": Method(
        "alternative", "diffusers' apply_group_offloading, a layer a group on a stream", _CHECKPOINTING, host_copies=4
    ),
    "end-to-end-ramtorch": Method(
        "alternative", "RamTorch's linear layers: weights and AdamW on the host", _CHECKPOINTING, host_copies=4
    ),
    "end-to-end-megatrain": Method(
        "alternative",
        "MegaTrain: weights, gradients and AdamW on the host; it computes layers again, four at a time",
        host_copies=5,
    ),
    "end-to-end-short": Method("short", "a model of one block's layers, end to end"),
    "resident-all": Method("blocks", "every block stays on the device"),
    "resident-active": Method("blocks", "only the block that trains is on the device", {"resident": "active"}),
    "resident-active-memory-budget": Method(
        "blocks", "and torch.compile computes what is cheap again", {"resident": "active", **_BUDGET}
    ),
    "resident-active-checkpointing": Method(
        "blocks", "and each layer is computed again", {"resident": "active", "activation_checkpointing": True}
    ),
    "resident-active-all-optimisations": Method(
        "blocks", "and 8-bit AdamW in the backward pass", {"resident": "active", **_OPTIMISATIONS}
    ),
}

Task = Literal["row", "switching", "overhead", "fits"]

#: What tells rows of one model, method and B apart, where it is not the default.
_IN_KEY = ("task", "depth", "batch_size", "tiny", "device", "compile", "cuda_graph", "captured", "offload", "budget")


@dataclass(frozen=True)
class Spec:
    """One measurement, done in a process of its own.

    Attributes:
        model: a name of `models.MODELS`.
        method: a name of `METHODS`.
        blocks: B; of `end-to-end-short` the B that its depth is the block of; else 1.
        task: a `row` of memory and speed; total time at several steps per switch (`switching`); the trainer's loop
            against a bare one (`overhead`); or only whether it `fits` a budget.
        depth: number of layers instead of the model's own.
        batch_size: instead of the model's own.
        device: `cuda` or `cpu`.
        tiny: shrink the model to toy size.
        compile: torch.compile, as the trainer does it.
        cuda_graph: capture the trainer's steps; a row then has its speed alone.
        captured: of a row, time captured steps too, of another trainer; not of alternatives.
        windows: timed windows, of which the median is reported.
        iterations: steps of each block in a window.
        steps_per_switch: steps over which a row spreads the cost of a switch of blocks.
        switching_steps: steps per switch that the task `switching` times.
        offload: where blocks wait, `host` or `disk`.
        budget: bytes that the allocator may take; None: all there are.
    """

    model: str
    method: str = "end-to-end"
    blocks: int = 1
    task: Task = "row"
    depth: int | None = None
    batch_size: int | None = None
    device: str = "cuda"
    tiny: bool = False
    compile: bool = True
    cuda_graph: bool = False
    captured: bool = False
    windows: int = 5
    iterations: int = 5
    steps_per_switch: int = 10
    switching_steps: tuple[int, ...] = (1, 10, 50)
    offload: str = "host"
    budget: int | None = None

    @property
    def key(self) -> str:
        """Names a row within a table, so that a later run finds it."""
        parts = [self.model, self.method, f"blocks={self.blocks}"]
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in _IN_KEY:
            if getattr(self, name) != defaults[name]:
                parts.append(f"{name}={getattr(self, name)}")
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self) | {"switching_steps": list(self.switching_steps)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Spec:
        """Read what `to_dict` gave, of this version or an older one."""
        values = {_FORMER_FIELDS.get(name, name): value for name, value in values.items()}
        task = "switching" if values["task"] == "dwell" else values["task"]
        steps = tuple(values["switching_steps"])
        return cls(**values | {"method": current_name(values["method"]), "task": task, "switching_steps": steps})


#: Former names of fields of a specification.
_FORMER_FIELDS = {"dwell": "steps_per_switch", "dwells": "switching_steps"}


def current_name(method: str) -> str:
    """The name of a method, given that or a former one."""
    return FORMER_NAMES.get(method, method)


def check_names(what: str, names: list[str], choices: list[str]) -> None:
    """Refuse a name that is no choice."""
    unknown = [name for name in names if name not in choices]
    if unknown:
        raise ValueError(f"unknown {what} {', '.join(unknown)}; allowed: {', '.join(choices)}")


def rows_of(models: list[str], blocks: list[int], methods: list[str], base: Spec) -> list[Spec]:
    """The rows of a table, in an order in which neighbours share compiled code.

    Args:
        models: names of models.
        blocks: values of B, for the methods that have several blocks and for the short model.
        methods: names of methods.
        base: all else; without torch.compile, methods that are options of it are left out.

    Raises:
        ValueError: an unknown method.
    """
    check_names("method", methods, list(METHODS))
    methods = [name for name in methods if base.compile or not _BUDGET.keys() & METHODS[name].train.keys()]
    rows = []
    for model in models:
        for count in [1, *blocks]:
            for name, method in METHODS.items():
                if name in methods and (method.kind in ("short", "blocks")) == (count > 1):
                    rows.append(dataclasses.replace(base, model=model, method=name, blocks=count))
    return rows
