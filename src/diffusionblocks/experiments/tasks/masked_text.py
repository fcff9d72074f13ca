"""The task of masked text models: bits per character, generated texts, and infilling."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field

from ...common.fields import MOST_SAMPLES, Int, Levels, NonNegative, Samples, Seed, check_count
from .task import TEMPERATURE, EvaluateSection, LevelGrid, RunResult, SampleOption, Task, register_task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...core.model import DiffusionBlocks
    from ...data.dataset import Dataset
    from ...evaluation.bits import Bits
    from ...targets import TokenTarget
    from ..experiment import Experiment

GAP = "_"
"""Stands for a character to be filled in."""


class BitsConfig(EvaluateSection):
    """Bits per character of a masked text model: the evidence bound, each level by the block that owns it.

    Attributes:
        batch_size: Sequences at a time.
        limit: Number of sequences of the test text, the first; null takes all.
        times: Levels drawn for each sequence and block.
        seed: Seed of levels and masks, and of the first generated text.
        samples: Number of texts that are generated to be looked at.
        steps: Steps of a generated text.
        grid: Level grid of the generated texts.
        temperature: Temperature of the generated texts.
    """

    kind: Literal["bits"] = "bits"
    batch_size: Samples = 256
    limit: Int | None = Field(default=None, ge=2, le=MOST_SAMPLES)
    times: Levels = 1
    seed: Seed = 0
    samples: Samples = 16
    steps: Levels = 64
    grid: LevelGrid = "equal-quantile"
    temperature: NonNegative = 1.0


@register_task
class MaskedText(Task[BitsConfig]):
    """Measures the bits per character of masked text models, and writes their texts."""

    target = "tokens"
    section = BitsConfig
    takes = ("characters",)
    does = "generates text"
    score = "bits_per_character"
    makes = "masked text"
    examples = "texts"
    classes = "different tokens"
    of_text = True
    fits_levels = ("loss",)
    shares_work = True
    least_examples = 2
    sample_options = (
        TEMPERATURE,
        SampleOption("infill", "text: fill in the gaps of this, as in 'the _____ of'", {"metavar": "TEXT"}),
    )

    def check_examples(self, experiment: Experiment, model: nn.Module, data: Dataset) -> None:
        """Refuse also a mask that is one of the characters."""
        super().check_examples(experiment, model, data)
        mask = _target(experiment.blocks_of(model)).mask_id
        if mask < (count := data.num_classes):
            raise ValueError(
                f"blocks.noise.mask_token_id = {mask} is one of the data's {count} characters: set "
                f"blocks.noise.mask_token_id to {count}, of a model with model.config.vocab_size > {count}"
            )

    def test_examples(self, experiment: Experiment) -> int | None:
        """The sequences of `limit`."""
        return self.options(experiment).limit

    def calls(self, experiment: Experiment, model: nn.Module, test: Dataset) -> int:
        """Those of the bound, and of the texts that are generated."""
        options, partition = self.options(experiment), experiment.blocks_of(model).partition
        sequences = min(len(test), options.limit or len(test))
        return sequences * partition.num_blocks * options.times + options.samples * options.steps

    def measure(self, experiment: Experiment, model: nn.Module) -> list[Bits]:
        """Bits per character of the test text."""
        from ...common.modules import evaluating
        from ...evaluation.bits import bits_rows

        options, blocks = self.options(experiment), experiment.blocks_of(model)
        text = experiment.data("test").first(options.limit)
        batches = experiment.recipe.data.evaluation_batches(text, batch_size=options.batch_size, device=blocks.device)
        networks = {b: functools.partial(blocks.block(b).estimate, {}) for b in range(blocks.partition.num_blocks)}
        noise: Any = blocks.noise
        with experiment.precision(model), evaluating(model):
            return bits_rows(
                networks,
                noise,
                batches,
                blocks.partition,
                times=options.times,
                seed=options.seed,
                work=experiment.work,
            )

    def summary(self, rows: Sequence[Bits]) -> dict[str, Any]:
        """The bits under a name of their own, and all that was measured with them."""
        return {"bits_per_character": rows[0].bits, **rows[0].to_dict()}

    def columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Bits with their standard error, and each block's part of them."""
        return {
            "bits per character": f"{row['bits_per_character']:.4f} +- {row['standard_error']:.4f}",
            "of each block": " + ".join(f"{bits:.3f}" for bits in row["block_bits"]),
        }

    def draw(
        self,
        experiment: Experiment,
        table: Sequence[Mapping[str, Any]],
        results: Mapping[str, RunResult],
        folder: Path,
    ) -> None:
        """Texts of every row."""
        for key, result in results.items():
            write_texts(experiment, experiment.blocks_of(result.model), folder / key / "samples")

    def sample(
        self, experiment: Experiment, model: nn.Module, folder: Path, values: Mapping[str, Any], *, progress: bool
    ) -> list[Path]:
        """Generate texts, or fill in the gaps of one."""
        names = ("count", "seed", "steps", "grid", "temperature", "infill")
        options = {name: values[name] for name in names}
        return [write_texts(experiment, experiment.blocks_of(model), folder, **options, progress=progress)]


def write_texts(
    experiment: Experiment,
    model: DiffusionBlocks,
    folder: Path,
    *,
    count: int | None = None,
    seed: int | None = None,
    steps: int | None = None,
    grid: str | None = None,
    temperature: float | None = None,
    infill: str | None = None,
    progress: bool = False,
) -> Path:
    """Generate texts and write them to `folder`/samples.txt, one a line.

    Args:
        experiment: of a masked text model; says the precision, and the defaults of what follows.
        model: its blocks.
        folder: where the file goes.
        count: how many texts.
        seed: text i has seed `seed` + i.
        steps, grid, temperature: see `DiffusionBlocks.generate`.
        infill: a text whose gaps (`_`) are filled in. It is the start of a text of the model's length, of which the
            line has the part that it covers.
        progress: show a progress bar.

    Returns:
        The file; of several ranks the first writes it.

    Raises:
        ValueError: count < 1, or an infill with other characters, without a gap or longer than the model's texts.
    """
    from ...common.files import check_writable, whole_file
    from ...data.character_text import SYMBOLS, decode

    options, target = cast(BitsConfig, experiment.recipe.evaluate), _target(model)
    count = options.samples if count is None else count
    check_count("count", count, MOST_SAMPLES)
    check_writable(folder, "the samples' folder")
    length = getattr(experiment.recipe.data, "length", target.length) if target.shorter else target.length
    pattern = _pattern(infill, target, length)
    first = options.seed if seed is None else seed
    lines: list[str] = []

    def generate(seeds: range) -> dict[str, Tensor]:
        tokens = model.generate(
            seeds,
            steps=options.steps if steps is None else steps,
            grid=grid or options.grid,
            temperature=options.temperature if temperature is None else temperature,
            template=pattern,
            num_tokens=len(SYMBOLS),
            progress=progress and experiment.work.leads,
        )
        return {"tokens": tokens}

    with experiment.precision(model):
        for results in experiment.work.in_order(_groups(range(first, first + count), options.batch_size), generate):
            lines += [decode(row[: len(infill) if infill else length]) for row in results["tokens"]]
    path = folder / "samples.txt"
    if not experiment.work.leads:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
    return path


def _target(model: DiffusionBlocks) -> TokenTarget:
    from ...targets import TokenTarget

    assert isinstance(model.target, TokenTarget)
    return model.target


def _pattern(infill: str | None, target: TokenTarget, length: int) -> Tensor:
    """The known tokens of a text of that length; what is not known is the mask."""
    import torch

    from ...data.character_text import SYMBOLS, encode

    tokens = torch.full((length,), target.mask_id)
    if infill is None:
        return tokens
    if wrong := sorted(set(infill) - set(SYMBOLS + GAP)):
        raise ValueError(f"infill = {infill!r}: must be of letters a to z, spaces and gaps ({GAP}), has {wrong}")
    if GAP not in infill or len(infill) > length:
        raise ValueError(
            f"infill = {infill!r}: must have a gap ({GAP}) and at most {length} characters, has {len(infill)}"
        )
    gaps = torch.tensor([character == GAP for character in infill])
    tokens[: len(infill)] = encode(infill.replace(GAP, " ")).long().masked_fill(gaps, target.mask_id)
    return tokens


def _groups(seeds: range, size: int) -> Iterator[range]:
    for start in range(0, len(seeds), size):
        yield seeds[start : start + size]
