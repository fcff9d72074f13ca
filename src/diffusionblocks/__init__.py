"""DiffusionBlocks: train a deep network one block at a time (ICLR 2026, arXiv 2506.14202)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import (
        BlocksConfig,
        ImageTargetConfig,
        LabelTargetConfig,
        LoraConfig,
        NextTokenTargetConfig,
        TokenTargetConfig,
    )
    from .core.block import Block
    from .core.branching import branch
    from .core.conversion import convert
    from .core.exporting import ExportDifference, export, export_block, export_difference, export_initialisation
    from .core.hub import from_pretrained, push_to_hub
    from .core.loading import load
    from .core.merging import merge
    from .core.model import DiffusionBlocks
    from .core.output import BlocksOutput
    from .core.partition import Partition
    from .data.data_config import register_data
    from .experiments.tasks import EvaluateSection, Task, register_task
    from .families import Family, register_family
    from .integrations.blocks_trainer import BlocksCallback, BlocksTrainer
    from .noise import DDPM, EDM, FlowMatching, GaussianProcess, Masking, NoiseProcess, register_noise_process
    from .sampling import register_solver

__version__ = "0.1.0"

# Imported when they are first asked for: torch and transformers take seconds, which the command line's --help, and
# Ctrl-C before it has begun, need not wait for.
_ROOMS = {
    "DDPM": "noise",
    "EDM": "noise",
    "Block": "core.block",
    "BlocksCallback": "integrations.blocks_trainer",
    "BlocksConfig": "config",
    "BlocksOutput": "core.output",
    "BlocksTrainer": "integrations.blocks_trainer",
    "DiffusionBlocks": "core.model",
    "EvaluateSection": "experiments.tasks",
    "ExportDifference": "core.exporting",
    "Family": "families",
    "FlowMatching": "noise",
    "GaussianProcess": "noise",
    "ImageTargetConfig": "config",
    "LabelTargetConfig": "config",
    "LoraConfig": "config",
    "Masking": "noise",
    "NextTokenTargetConfig": "config",
    "NoiseProcess": "noise",
    "Partition": "core.partition",
    "Task": "experiments.tasks",
    "TokenTargetConfig": "config",
    "branch": "core.branching",
    "convert": "core.conversion",
    "export": "core.exporting",
    "export_block": "core.exporting",
    "export_difference": "core.exporting",
    "export_initialisation": "core.exporting",
    "from_pretrained": "core.hub",
    "load": "core.loading",
    "merge": "core.merging",
    "push_to_hub": "core.hub",
    "register_data": "data.data_config",
    "register_family": "families",
    "register_noise_process": "noise",
    "register_solver": "sampling",
    "register_task": "experiments.tasks",
}

__all__ = [
    "DDPM",
    "EDM",
    "Block",
    "BlocksCallback",
    "BlocksConfig",
    "BlocksOutput",
    "BlocksTrainer",
    "DiffusionBlocks",
    "EvaluateSection",
    "ExportDifference",
    "Family",
    "FlowMatching",
    "GaussianProcess",
    "ImageTargetConfig",
    "LabelTargetConfig",
    "LoraConfig",
    "Masking",
    "NextTokenTargetConfig",
    "NoiseProcess",
    "Partition",
    "Task",
    "TokenTargetConfig",
    "__version__",
    "branch",
    "convert",
    "export",
    "export_block",
    "export_difference",
    "export_initialisation",
    "from_pretrained",
    "load",
    "merge",
    "push_to_hub",
    "register_data",
    "register_family",
    "register_noise_process",
    "register_solver",
    "register_task",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_ROOMS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__doc__", "__file__", "__name__", "__path__"]
