"""MAUVE (arXiv 2102.01454): how near generated texts are to real ones, by histograms of a language model's features."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..common.finite import FiniteCheck, require_finite
from ..common.modules import evaluating
from ..data.text_files import open_text
from .teachers import Ids, as_ids, check_foreign_attention, check_ids, load_teacher_tokenizer

_READ_AT_ONCE = 2**20  # characters of a file of references

#: Texts, as strings or ids, to float features (n, d). See `HiddenFeatures`.
TextFeatures = Callable[[Sequence[Any]], Tensor]


@dataclass(frozen=True)
class Mauve:
    """MAUVE of generated texts and references, at one scaling.

    Attributes:
        scaling: the constant c of exp(-c KL). The reference's is 5; a smaller one gives larger scores.
        mean: over k-means seeds; from 0 to 1, higher is closer.
        deviation: standard deviation over the seeds; None for a single one.
        scores: of each seed.
        buckets: clusters of k-means.
    """

    scaling: float
    mean: float
    deviation: float | None
    scores: tuple[float, ...]
    buckets: int


class HiddenFeatures:
    """The features that MAUVE compares: a transformer's last hidden states of a text, at its last token or their mean.

    The reference takes gpt2-large and the last token. Texts are cut after `max_tokens`.

    Args:
        model: a model of transformers with or without a head, or a folder or hub name (only safetensors are read, and
            no code that comes with it is run).
        tokenizer: its tokenizer, where texts are given as strings. Where the model is a name: that beside it.
        pooling: "last" or "mean".
        max_tokens: >= 1; the reference's is 1024.
        batch_size: texts at a time, >= 1.
        device: where a model that is loaded goes; one that is given stays where it is.

    Raises:
        ValueError: another pooling, or a number below 1.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        tokenizer: Any = None,
        *,
        pooling: Literal["last", "mean"] = "last",
        max_tokens: int = 1024,
        batch_size: int = 16,
        device: torch.device | str = "cpu",
    ) -> None:
        if pooling not in ("last", "mean"):
            raise ValueError(f"pooling = {pooling!r}: must be 'last' or 'mean'")
        for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if isinstance(model, (str, Path)):
            from transformers import AutoModel

            check_foreign_attention(model)
            tokenizer = tokenizer or load_teacher_tokenizer(model)
            network = AutoModel.from_pretrained(model, dtype="auto", use_safetensors=True, trust_remote_code=False)
            require_finite(
                network.state_dict().items(), f"MAUVE's model {model}", "choose another one, or load it again"
            )
            model = network.to(device).eval()
        self.model: Any = getattr(model, "base_model", model)  # without a language model's head
        self.tokenizer, self.pooling, self.max_tokens, self.batch_size = tokenizer, pooling, max_tokens, batch_size

    def __call__(self, texts: Sequence[str | Ids]) -> Tensor:
        """Texts, as strings or ids -> features float32 (n, d) on the CPU.

        Raises:
            ValueError: a text without tokens, a string without tokenizer, ids that the model does not have, or features
                that are not finite.
        """
        ids = [self._ids(text)[: self.max_tokens] for text in texts]
        for index, text in enumerate(ids):
            if not len(text):
                raise ValueError(f"text {index} has no tokens, and so no features: leave it out")
        check_ids(self.model, ids)
        with torch.no_grad(), evaluating(self.model):
            parts = [self._features(ids[i : i + self.batch_size]) for i in range(0, len(ids), self.batch_size)]
        return FiniteCheck(type(self.model).__name__).values(torch.cat(parts), "features of texts")

    def _ids(self, text: str | Ids) -> Tensor:
        if not isinstance(text, str):
            return as_ids(text)
        if self.tokenizer is None:
            raise ValueError("features of strings need the model's tokenizer; give it, or texts as ids")
        return as_ids(self.tokenizer(text)["input_ids"])

    def _features(self, texts: Sequence[Tensor]) -> Tensor:
        device = next(self.model.parameters()).device
        ids = nn.utils.rnn.pad_sequence(list(texts), batch_first=True).to(device)
        lengths = torch.tensor([len(text) for text in texts], device=device)
        there = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        states = self.model(input_ids=ids, attention_mask=there.long(), use_cache=False).last_hidden_state.float()
        if self.pooling == "last":
            return states[torch.arange(len(texts), device=device), lengths - 1].cpu()  # type: ignore[no-any-return]
        return (torch.where(there[..., None], states, 0.0).sum(dim=1) / lengths[:, None]).cpu()


def reference_texts(path: Path, count: int, separator: str) -> list[str]:
    """The first documents of a text file, for MAUVE's references; those without letters are passed over.

    Args:
        path: UTF-8 text, plain or packed (.xz, .gz, .bz2). It is read as far as it is needed.
        count: how many, >= 1.
        separator: what stands between documents.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has fewer documents, is no UTF-8, or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: name a file of reference texts")
    texts: list[str] = []
    rest = ""
    with open_text(path) as file:
        while len(texts) < count and (piece := file.read(_READ_AT_ONCE)):
            *whole, rest = (rest + piece).split(separator)
            texts += [text.strip() for text in whole if text.strip()]
    if rest.strip():
        texts.append(rest.strip())
    if len(texts) < count:
        raise ValueError(
            f"{path} has {len(texts)} documents between {separator!r}, and {count} references are needed: give a "
            "larger file or its own separator"
        )
    return texts[:count]


def mauve_score(
    references: Tensor,
    generated: Tensor,
    *,
    scalings: Sequence[float] = (5.0, 0.2),
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    buckets: int | None = None,
) -> tuple[Mauve, ...]:
    """MAUVE (arXiv 2102.01454) by the reference package, over seeds of its k-means, once for each scaling.

    The paper's 0.2 inflates scores: a difference of 0.1 at 5 may vanish at 0.2. So both are given.

    Args:
        references: features (n, d) of real texts, such as `HiddenFeatures` gives.
        generated: features (m, d) of generated ones.
        scalings: each > 0.
        seeds: of k-means, at least one.
        buckets: clusters, >= 2; None: a tenth of the smaller set, as in the reference, and at least 2.

    Returns:
        One for each scaling, in their order.

    Raises:
        ImportError: the package is not installed.
        ValueError: features of other shapes or not finite, or another argument out of range.
    """
    if references.dim() != 2 or generated.dim() != 2 or references.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features must be (n, d) and (m, d), got {tuple(references.shape)} and {tuple(generated.shape)}"
        )
    for name, features in (("references", references), ("generated", generated)):
        if not features.isfinite().all():
            raise ValueError(f"{name}: features must be finite, some are NaN or infinite")
    if not seeds or not scalings or min(scalings) <= 0:
        raise ValueError(f"need scalings > 0 and at least one seed, got {list(scalings)} and {list(seeds)}")
    most = min(len(references), len(generated))
    clusters = max(2, round(most / 10)) if buckets is None else buckets
    if not 2 <= clusters <= most:
        raise ValueError(f"buckets = {clusters}: must be from 2 to {most}, the texts of the smaller set")
    compute = require_mauve()
    p, q = (np.asarray(features.float().cpu()) for features in (references, generated))
    results = []
    for scaling in scalings:
        scores = tuple(
            float(compute(p, q, num_buckets=clusters, mauve_scaling_factor=scaling, seed=seed).mauve) for seed in seeds
        )
        deviation = statistics.stdev(scores) if len(scores) > 1 else None
        results.append(Mauve(float(scaling), statistics.fmean(scores), deviation, scores, clusters))
    return tuple(results)


def require_mauve() -> Callable[..., Any]:
    """`compute_mauve` of the reference package.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module("mauve").compute_mauve  # type: ignore[no-any-return]
    except ImportError as error:
        raise ImportError(
            f"MAUVE needs the package mauve-text ({error}): run pip install 'diffusionblocks[mauve]', or --set "
            "evaluate.mauve=null"
        ) from error
