"""The task of classifiers: their accuracy, NLL and calibration over ways to predict."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ...common.fields import FEEDBACK_NAMES, Combination, LabelFeedback, Levels, Many, Samples, Seed
from ...common.messages import warn_once
from ...common.processing_files import IMAGE_PROCESSOR
from .task import EvaluateSection, LevelGrid, RunResult, Task, baselines_in, register_task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...core.model import DiffusionBlocks
    from ...data.dataset import Dataset
    from ...evaluation.accuracy import AccuracyRow
    from ...evaluation.diagnostics import LevelRow
    from ..experiment import Experiment


class AccuracyConfig(EvaluateSection):
    """Accuracy, negative log-likelihood and calibration error are measured for every combination of `combine`, `steps`
    and `seeds`, from one run of the chains.

    Attributes:
        combine: What becomes of what the blocks say of an image: `mean` (of their context logits), `product` (of
            independent witnesses), `probabilities` (their mean) or `chain` (the last step's prediction, the paper's).
            null: `mean`; under `blocks.target.likelihood: learned` `chain`, the only one that there is.
        steps: Denoising steps; null: as many as blocks, each of which is asked once; under `learned` 1.
        seeds: Noise seeds that are combined; null: 1, under `learned` 8.
        feedback: What a prediction feeds to the next step: `soft` or `hard`; null takes the model's.
        grid: Level grid, one that suits the noise process: of EDM `equal-quantile` or `karras`. null: the first, but
            with as many steps as blocks each block's own highest level (not under `learned`).
        flip: Average the log-probabilities of each image and of its mirror image, in every row, of baselines too.
        batch_size: Images at a time.
        limit: Number of test images for a quick look, evenly spread over the split; null takes all.
        seed: Seed of the starting noise.
    """

    kind: Literal["accuracy"] = "accuracy"
    combine: Many[Combination] | None = None
    steps: Many[Levels] | None = None
    seeds: Many[Levels] | None = None
    feedback: LabelFeedback | None = Field(default=None, validation_alias=FEEDBACK_NAMES)
    grid: LevelGrid | None = None
    flip: bool = False
    batch_size: Samples = 500
    limit: Samples | None = None
    seed: Seed = 0


def _own_names(names: Mapping[int, str] | None) -> list[str] | None:
    """Names of labels in their order; None for those that say no more than the labels' numbers."""
    if not names or all(name in (str(label), f"LABEL_{label}") for label, name in names.items()):
        return None
    return [str(names[label]) for label in sorted(names)]


def _plain(name: str) -> str:
    return name.replace("_", " ").casefold()


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


@register_task
class Classification(Task[AccuracyConfig]):
    """Measures the accuracy of classifiers."""

    target = "label"
    section = AccuracyConfig
    takes = ("images",)
    does = "classifies images"
    score = "test_accuracy"
    fits_levels = ("rise", "loss")
    plain_training = True
    by_level = True
    new_head = True
    shares_work = True

    def check_examples(self, experiment: Experiment, model: nn.Module, data: Dataset) -> None:
        """Warn also of labels that are as many, and called otherwise."""
        super().check_examples(experiment, model, data)
        config: Any = experiment.config_of(model)
        labels, classes = _own_names(getattr(config, "id2label", None)), _own_names(dict(enumerate(data.classes)))  # type: ignore[arg-type]
        if labels is None or classes is None or [_plain(name) for name in labels] == [_plain(name) for name in classes]:
            return
        fix = "" if experiment.recipe.model.pretrained is None else ": --set model.new_head=true draws a new classifier"
        warn_once(f"the model's labels are {_some(labels)}, those of the data {_some(classes)}, in this order{fix}")

    def settle(self, experiment: Experiment, model: nn.Module) -> None:
        """Let the model's config name the labels that it learns."""
        names = experiment.data("train").classes
        holders = [model, *model.modules()]
        configs: list[Any] = [getattr(holder, "config", None) for holder in holders]
        for config in configs:
            if getattr(config, "id2label", None) is not None and len(config.id2label) == len(names):
                config.id2label = dict(enumerate(names))
                config.label2id = {name: label for label, name in enumerate(names)}

    def calls(self, experiment: Experiment, model: nn.Module, test: Dataset) -> int:
        """As many chains as the longest average has seeds, for each number of steps."""
        options = self.options(experiment)
        chains = 1
        if experiment.of_blocks(model):
            _, steps, seeds = experiment.blocks_of(model).inference.defaults
            chains = sum(options.steps or [steps]) * max(options.seeds or [seeds])
        return min(len(test), options.limit or len(test)) * chains * (1 + options.flip)

    def check_settings(self, experiment: Experiment, model: nn.Module) -> None:
        """Refuse a way to combine that blocks without context logits do not have."""
        from ...sampling import check_combination

        if experiment.of_blocks(model):
            contexts = experiment.blocks_of(model).block(0).adds_likelihood
            for combine in self.options(experiment).combine or ():
                check_combination(combine, contexts=contexts, name="evaluate.combine", chain="[chain]")

    def measure(self, experiment: Experiment, model: nn.Module) -> list[AccuracyRow]:
        """Accuracy, NLL and calibration error for every combination of the settings."""
        from ...evaluation.accuracy import accuracy_grid

        options = self.options(experiment)
        with experiment.precision(model):
            return accuracy_grid(
                model,
                self._batches(experiment, model),
                combine=options.combine or (None,),
                steps=options.steps or (None,),
                seeds=options.seeds or (None,),
                feedback=options.feedback,
                grid=options.grid,
                seed=options.seed,
                flip=options.flip,
                work=experiment.work,
            )

    def predict(self, experiment: Experiment, model: nn.Module, files: Sequence[Path]) -> Iterator[dict[str, float]]:
        """Probabilities by the default way to predict, a batch of pictures at a time.

        Noise follows from each picture, so its probabilities depend on neither the others nor their order.
        """
        from ...common.modules import computes_on
        from ...training import Baseline

        config: Any = experiment.config_of(model)
        shape, device = experiment.family.example_shape(config), computes_on(model)
        size = self.options(experiment).batch_size
        for start in range(0, len(files), size):
            pixels = experiment.recipe.data.pictures(files[start : start + size], shape).to(device)
            with experiment.precision(model):
                if isinstance(model, Baseline):
                    prediction = next(iter(model.predictions(pixels).values()))
                else:
                    blocks = experiment.blocks_of(model)
                    generators = blocks.example_generators({"pixel_values": pixels})
                    prediction = blocks.predict(pixels, generator=generators)
            ranked, order = prediction.probabilities.float().sort(dim=-1, descending=True)
            names = getattr(config, "id2label", None) or {}
            for values, classes in zip(ranked.tolist(), order.tolist(), strict=True):
                yield {str(names.get(c, c)): value for c, value in zip(classes, values, strict=True)}

    def measure_by_level(
        self, experiment: Experiment, model: DiffusionBlocks, *, every_block: bool = False
    ) -> list[LevelRow]:
        """Accuracy and cross-entropies of every block on test images at levels of its own, or at those of all."""
        from ...evaluation.diagnostics import accuracy_by_level

        batches, seed = self._batches(experiment, model), self.options(experiment).seed
        with experiment.precision(model):
            return accuracy_by_level(model, batches, every_block=every_block, seed=seed, work=experiment.work)

    def draw_by_level(self, model: DiffusionBlocks, rows: Sequence[LevelRow], path: Path) -> None:
        """The blocks' cross-entropies over the noise level."""
        from ...reports.figures import draw_label_levels

        draw_label_levels(rows, model.partition, model.noise, path)

    def images_to_compare(self, experiment: Experiment, model: nn.Module) -> Mapping[str, Tensor]:
        """The first test images, as many as are evaluated at a time."""
        return next(self._batches(experiment, model)())

    def files_of_export(self, experiment: Experiment, model: nn.Module, folder: Path) -> dict[str, bytes]:
        """How images of any size become the model's inputs, for pipelines."""
        shape = experiment.family.example_shape(experiment.config_of(model))
        values = experiment.recipe.data.image_processor(shape)
        own = {} if values is None else {IMAGE_PROCESSOR: json.dumps(values, indent=2).encode()}
        return own | super().files_of_export(experiment, model, folder)

    def _batches(self, experiment: Experiment, model: nn.Module) -> Callable[[], Iterator[dict[str, Tensor]]]:
        from ...common.modules import computes_on

        options = self.options(experiment)
        test = experiment.data("test")
        images = test if options.limit is None else test.part(options.limit)
        section, device = experiment.recipe.data, computes_on(model)
        return functools.partial(section.evaluation_batches, images, batch_size=options.batch_size, device=device)

    def headline(self, rows: Sequence[AccuracyRow]) -> AccuracyRow:
        """The default way to combine: of a mean the fewest seeds and the most steps, of chains the other way round."""
        rules = [row.combine for row in rows]
        rule = "mean" if "mean" in rules else rules[0]
        sign = 1 if rule == "chain" else -1
        of_rule = [row for row in rows if row.combine == rule]
        return max(of_rule, key=lambda row: (sign * (row.seeds or 1), -sign * (row.steps or 1)))

    def summary(self, rows: Sequence[AccuracyRow]) -> dict[str, Any]:
        """The headline, and all rows beside it."""
        best = self.headline(rows)
        return {
            "combine": best.combine,
            "steps": best.steps,
            "seeds": best.seeds,
            "test_accuracy": best.accuracy,
            "standard_error": best.standard_error,
            "nll": best.nll,
            "ece": best.ece,
            "accuracies": [row.to_dict() for row in rows],
        }

    def columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """How the answer was combined, accuracy with its standard error, NLL and calibration error."""
        accuracy = f"{100 * row['test_accuracy']:.2f} +- {100 * row['standard_error']:.2f} %"
        chain = {"combine": row["combine"], "denoising steps": row["steps"], "seeds": row["seeds"]}
        return chain | {"test accuracy": accuracy, "NLL": f"{row['nll']:.3f}", "ECE": f"{row['ece']:.3f}"}

    def spread_text(self, deviation: float) -> str:
        """In per cent, as `columns` writes accuracies."""
        return f"{100 * deviation:.2f} %"

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
