"""Tasks: what is measured, drawn, sampled and printed of each kind of model, one object each."""

from .classification import AccuracyConfig, Classification
from .image_generation import ImageGeneration, SamplesConfig
from .masked_text import BitsConfig, MaskedText
from .next_token_text import LanguageConfig, NextTokenText
from .task import (
    TASKS,
    EvaluateSection,
    RunResult,
    SampleOption,
    Task,
    level_grid,
    level_grids,
    register_task,
    tasks_of,
)

__all__ = [
    "TASKS",
    "AccuracyConfig",
    "BitsConfig",
    "Classification",
    "EvaluateSection",
    "ImageGeneration",
    "LanguageConfig",
    "MaskedText",
    "NextTokenText",
    "RunResult",
    "SampleOption",
    "SamplesConfig",
    "Task",
    "level_grid",
    "level_grids",
    "register_task",
    "tasks_of",
]
