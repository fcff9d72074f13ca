"""The task of classifiers: their accuracy over denoising steps and averaged noise seeds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ...common.fields import FEEDBACK_NAMES, LabelFeedback, Levels, Many, Samples, Seed
from .task import EvaluateSection, LevelGrid, RunResult, Task, baselines_in, register_task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...core.model import DiffusionBlocks
    from ...data.dataset import Dataset
    from ...evaluation.accuracy import AccuracyRow
    from ...evaluation.diagnostics import LevelRow
    from ..experiment import Experiment


class AccuracyConfig(EvaluateSection):
    """Accuracy is measured for every pair of `steps` and `seeds`.

    Attributes:
        steps: Denoising steps.
        seeds: Noise seeds whose probabilities are averaged.
        feedback: What a prediction feeds to the next step: `soft` or `hard`; null takes the model's.
        grid: Level grid, one that suits the noise process: of EDM `equal-quantile` or `karras`.
        batch_size: Images at a time.
        limit: Number of test images, the first, for a quick look; null takes all.
        seed: Seed of the starting noise.
    """

    kind: Literal["accuracy"] = "accuracy"
    steps: Many[Levels] = (1, 3)
    seeds: Many[Levels] = (1, 8)
    feedback: LabelFeedback | None = Field(default=None, validation_alias=FEEDBACK_NAMES)
    grid: LevelGrid = "equal-quantile"
    batch_size: Samples = 500
    limit: Samples | None = None
    seed: Seed = 0


@register_task
class Classification(Task[AccuracyConfig]):
    """Measures the accuracy of classifiers."""

    target = "label"
    section = AccuracyConfig
    takes = ("images",)
    does = "classifies images"
    score = "test_accuracy"
    fits_levels = True
    plain_training = True
    by_level = True
    new_head = True

    def calls(self, experiment: Experiment, model: nn.Module, test: Dataset) -> int:
        """As many chains as the longest average has seeds, for each number of steps."""
        options = self.options(experiment)
        chains = sum(options.steps) * max(options.seeds) if experiment.of_blocks(model) else 1
        return min(len(test), options.limit or len(test)) * chains

    def measure(self, experiment: Experiment, model: nn.Module) -> list[AccuracyRow]:
        """Accuracy for every pair of steps and seeds."""
        from ...evaluation.accuracy import accuracy_grid

        options = self.options(experiment)
        with experiment.precision(model):
            return accuracy_grid(
                model,
                self._batches(experiment, model),
                steps=options.steps,
                seeds=options.seeds,
                feedback=options.feedback,
                grid=options.grid,
                seed=options.seed,
            )

    def measure_by_level(self, experiment: Experiment, model: DiffusionBlocks) -> list[LevelRow]:
        """Accuracy of every block on test images at levels of its own, beside what z gives away."""
        from ...evaluation.diagnostics import accuracy_by_level

        with experiment.precision(model):
            return accuracy_by_level(model, self._batches(experiment, model), seed=self.options(experiment).seed)

    def _batches(self, experiment: Experiment, model: nn.Module) -> Callable[[], Iterator[dict[str, Tensor]]]:
        from ...common.modules import computes_on

        options = self.options(experiment)
        images = experiment.data("test").first(options.limit)
        section, device = experiment.recipe.data, computes_on(model)
        return functools.partial(section.evaluation_batches, images, batch_size=options.batch_size, device=device)

    def headline(self, rows: Sequence[AccuracyRow]) -> AccuracyRow:
        """The one with the most seeds and the fewest steps."""
        return max(rows, key=lambda row: (row.seeds or 1, -(row.steps or 1)))

    def summary(self, rows: Sequence[AccuracyRow]) -> dict[str, Any]:
        """The headline, and all rows beside it."""
        best = self.headline(rows)
        return {
            "steps": best.steps,
            "seeds": best.seeds,
            "test_accuracy": best.accuracy,
            "standard_error": best.standard_error,
            "accuracies": [row.to_dict() for row in rows],
        }

    def columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Steps, seeds and accuracy with its standard error."""
        accuracy = f"{100 * row['test_accuracy']:.2f} +- {100 * row['standard_error']:.2f} %"
        return {"denoising steps": row["steps"], "seeds": row["seeds"], "test accuracy": accuracy}

    def draw(
        self,
        experiment: Experiment,
        table: Sequence[Mapping[str, Any]],
        results: Mapping[str, RunResult],
        folder: Path,
    ) -> None:
        """The accuracies of the blocks beside the baselines', and the partition."""
        from ...reports.figures import draw_run

        if "diffusionblocks" not in results:
            return
        model: Any = results["diffusionblocks"].model
        baselines = baselines_in(table, "test_accuracy")
        rows: list[Any] = list(results["diffusionblocks"].rows)
        draw_run(rows, baselines, model.partition, model.noise, folder / "figure.png")
