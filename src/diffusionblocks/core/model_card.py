"""The model card of a saved model: the README.md in its folder, which is its page on the hub.

A generated card ends in a line with the SHA-256 of what stands above it. A card without that line, or with other text
above it, was written by a person, and is never replaced by a generated one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.files import whole_file
from ..common.messages import one_line
from .model import DiffusionBlocks

CARD = "README.md"
"""Its name in a model's folder."""

PAPER = "2506.14202"

#: What stands for the name of the repository in a card that is not on the hub yet.
REPOSITORY = "user/name"

#: What a name on the hub looks like: an account and a repository.
NAME_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")

_SEAL = re.compile(r"<!-- diffusionblocks wrote this card \(([0-9a-f]{64})\)[^\n]*-->\n\Z")


@dataclass(frozen=True)
class CardNotes:
    """What a model does not know of itself, for its card.

    Attributes:
        name: of the run; None takes the class.
        data: what it was trained on, as Markdown.
        data_name: its short name.
        datasets: their names on the hub.
        recipe: of the training, as YAML.
        results: printed rows of a table, of equal keys: first the model's own, then its baselines.
        metric: name and value of the model's main result.
    """

    name: str | None = None
    data: str = ""
    data_name: str = "own data"
    datasets: Sequence[str] = ()
    recipe: str = ""
    results: Sequence[Mapping[str, Any]] = ()
    metric: tuple[str, float] | None = None


def card_text(model: DiffusionBlocks, blocks: Sequence[int] | None = None, notes: CardNotes | None = None) -> str:
    """The text of a model's card, with the line by which it is known as a generated one.

    Args:
        model: on any device, the meta device too.
        blocks: those that are in the folder; None: all.
        notes: what is known of its training.
    """
    notes = notes or CardNotes()
    partition = model.partition
    count = partition.num_blocks
    parts = [
        f"# {notes.name or model.model_class}",
        f"A `{model.model_class}` of {partition.num_layers} layers as {count} {'block' if count == 1 else 'blocks'}"
        f"{', each of all layers' if partition.split == 'experts' else ''}. "
        "Each block is a denoiser of its own for one interval of noise levels, which trains alone "
        f"([DiffusionBlocks](https://arxiv.org/abs/{PAPER})).",
        _use(model, blocks),
        f"## Blocks\n\n{markdown_table(_block_rows(model))}",
        f"## Data\n\n{notes.data or 'Not noted. Say here what the model was trained on.'}",
    ]
    if notes.recipe:
        parts.append(
            "## Recipe\n\n`diffusionblocks train` takes it as a file.\n\n<details><summary>the recipe</summary>\n\n"
            f"```yaml\n{notes.recipe.strip()}\n```\n\n</details>"
        )
    results = markdown_table(notes.results) if notes.results else "Not measured yet."
    which = "The first row is this model, the others are what it was compared with.\n\n" * (len(notes.results) > 1)
    parts.append(f"## Results\n\n{which}{results}")
    parts.append("## License\n\n`license` at the top of this file is for whoever publishes the model to set.")
    return sealed(f"---\n{_header(model, notes)}\n---\n\n" + "\n\n".join(parts) + "\n\n")


def _use(model: DiffusionBlocks, blocks: Sequence[int] | None) -> str:
    count = model.partition.num_blocks
    if blocks is not None and len(blocks) < count:
        held = f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {', '.join(map(str, blocks))}"
        return f"## Use\n\nHere is {held} of {count}. `diffusionblocks merge` makes one model of all of them."
    return (
        "## Use\n\n```python\nimport diffusionblocks as db\n\n"
        f'model = db.from_pretrained("{REPOSITORY}")  # or the name of a folder\n{model.inference.example}\n```\n\n'
        f"Only safetensors and JSON are read, and no code from here is run. `config.json` describes the "
        f"`{model.model_class}`; the weights are those of its blocks, which the class's own library does not load."
    )


def _block_rows(model: DiffusionBlocks) -> list[dict[str, Any]]:
    rows = []
    for index in range(model.partition.num_blocks):
        low, high = model.partition.interval(index)
        layers = model.partition.layer_range(index)
        rows.append(
            {
                "block": index,
                "layers": f"{layers[0]}-{layers[-1]}",
                f"levels ({model.noise.symbol})": f"{low:.4g} to {high:.4g}",
                "parameters": f"{sum(parameter.numel() for parameter in model.block(index).parameters()):,}",
            }
        )
    return rows


def _header(model: DiffusionBlocks, notes: CardNotes) -> str:
    """The YAML at the top of a card, as `huggingface_hub` writes it."""
    from huggingface_hub import EvalResult, ModelCardData

    task, result = model.inference.pipeline_tag, None
    if notes.metric is not None and notes.name is not None and task is not None:
        name, value = notes.metric
        data = next(iter(notes.datasets), notes.data_name)
        result = [EvalResult(task, data, notes.data_name, metric_type=name, metric_value=value)]
    kind = getattr(model.config, "model_type", None)
    return str(
        ModelCardData(
            library_name="diffusionblocks",
            license="unknown",
            pipeline_tag=task,
            tags=["diffusionblocks", *([kind] if kind else []), f"arxiv:{PAPER}", *model.model_tags],
            base_model=base_model(model.config),
            datasets=list(notes.datasets) or None,
            model_name=notes.name if result else None,
            eval_results=result,
        ).to_yaml()
    )


def base_model(config: Any) -> str | None:
    """The name on the hub of the model whose weights a config came with; None of a folder, or of fresh weights."""
    name = str(getattr(config, "_name_or_path", None) or "")
    return name if NAME_ON_HUB.fullmatch(name) and not Path(name).exists() else None


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as a table of Markdown; None shows as "-"."""
    names = list(rows[0])
    cells = [
        ["-" if row.get(name) is None else one_line(row[name]).replace("|", "\\|") for name in names] for row in rows
    ]
    lines = [names, ["---"] * len(names), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- generated, or written by a person ---------------------------------------------------------------------------


def sealed(text: str) -> str:
    """A generated card with the line by which it is known, in place of an older one."""
    text = _SEAL.sub("", text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}<!-- diffusionblocks wrote this card ({digest}), and replaces it until it is edited -->\n"


def is_generated(text: str) -> bool:
    """Whether a card is as it was generated: one that a person edited, or wrote, is not."""
    match = _SEAL.search(text)
    return match is not None and sealed(text) == text


def may_replace(path: Path) -> bool:
    """Whether a generated card may stand at a path: nothing is there, or another generated one."""
    try:
        return is_generated(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True
    except UnicodeDecodeError:
        return False


def write_card(folder: Path, text: str, before: Path | None = None) -> None:
    """Write a generated card into a model's folder, unless a person edited the one that is there.

    Args:
        folder: of the model.
        text: of `card_text`.
        before: the folder that `folder` is about to replace, whose card counts instead of its own.
    """
    if may_replace((folder if before is None else before) / CARD):
        with whole_file(folder / CARD) as temporary:
            temporary.write_text(text, encoding="utf-8")


def notes_in(folder: Path) -> CardNotes:
    """Name and data of a model's training, from the generated card in its folder; nothing where there is none."""
    from huggingface_hub import ModelCard

    path = folder / CARD
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if not is_generated(text):
        return CardNotes()
    name = re.search(r"^# (.+)$", text, re.M)
    data = re.search(r"^## Data\n\n(.*?)\n\n## ", text, re.M | re.S)
    return CardNotes(
        name=None if name is None else name[1],
        data="" if data is None else data[1],
        datasets=ModelCard(text).data.to_dict().get("datasets") or (),
    )


def remove_generated_card(folder: Path) -> None:
    """Delete a generated card, of a model that is no longer there."""
    if may_replace(folder / CARD):
        (folder / CARD).unlink(missing_ok=True)


def for_repository(text: str, repository: str) -> str:
    """A generated card that names its repository where it says how to load the model."""
    return sealed(text.replace(f'from_pretrained("{REPOSITORY}")', f'from_pretrained("{repository}")'))
