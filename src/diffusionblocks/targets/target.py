"""What y is: the clean target of each task, its inner loss, and the feedback from a prediction back to z."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Batch = Mapping[str, Tensor]

#: The label of a token that is context only: it has no loss. (transformers' number, and torch's `ignore_index`.)
CONTEXT = -100

#: An `ignore_index` that no label has, so that torch passes over none.
NONE_IGNORED = torch.iinfo(torch.int64).min


class Target(nn.Module, abc.ABC):
    """What the blocks of a family denoise. Losses are per sample."""

    #: the batch entries that make y and the loss
    names: tuple[str, ...]
    #: further entries that a batch may have, of which `resolve` takes account
    optional: tuple[str, ...] = ()

    @abc.abstractmethod
    def encode(self, batch: Batch) -> Tensor:
        """The clean target y, shape (batch, ...): float32, or int64 tokens."""

    @abc.abstractmethod
    def loss(self, output: Tensor, batch: Batch, z: Tensor | None = None) -> Tensor:
        """Loss of a block's output for z, float32, shape (batch,). Targets that are wholly hidden need no z."""

    @abc.abstractmethod
    def check(self, batch: Batch, size: int) -> None:
        """Raise ValueError where an entry of `names` has a wrong shape, dtype or value."""

    def resolve(self, batch: Batch) -> Batch:
        """The batch that a loss is made of, with what the `optional` entries say.

        Raises:
            ValueError: one of them says what cannot be followed.
        """
        return batch

    def training_inputs(self, inputs: Batch, generator: torch.Generator | None) -> Batch:
        """The inputs x as they are shown in training."""
        return inputs


class TextTarget(Target):
    """A target whose loss is made of the cross-entropies of positions, of one stream of them or of several."""

    @abc.abstractmethod
    def target_tokens(self, batch: Batch) -> tuple[Tensor, ...]:
        """The tokens (batch, length) that the logits of each stream are of, of its first `length` positions."""

    @abc.abstractmethod
    def reduce(self, nats: Sequence[Tensor], batch: Batch, z: Tensor | None) -> Tensor:
        """The loss (batch,) of a resolved batch from the cross-entropies (batch, length) of each stream that there is,
        in order."""

    def loss(self, output: Tensor, batch: Batch, z: Tensor | None = None) -> Tensor:
        """`reduce` of logits (batch, positions, vocab_size), those of a second stream behind those of the first."""
        wanted = self.target_tokens(batch)
        lengths = [tokens.shape[1] for tokens in wanted]
        parts: Sequence[Tensor] = [output]
        if output.shape[1] > lengths[0]:
            # Split, not sliced: the gradient of a slice is filled up with zeros, once more as large as the logits.
            parts = output.split([*lengths, output.shape[1] - sum(lengths)], dim=1)
        return self.reduce([cross_entropies(*pair) for pair in zip(parts, wanted, strict=False)], batch, z)


class EmbeddingTarget(Target):
    """A row of a table of unit vectors as the target: that of a label, or of a token (paper, section 4.1).

    Normalisation keeps learned embeddings from collapsing. Initial rows are random directions drawn from `seed`,
    so every block, on whatever machine, has the same space for z.

    Args:
        count: number of rows.
        dim: size of a row (the model's hidden size).
        learned: whether the rows are trained.
        seed: seed of the rows.
    """

    def __init__(self, count: int, dim: int, *, learned: bool, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        rows = F.normalize(torch.randn(count, dim, generator=generator), dim=-1)
        self.embedding = nn.Parameter(rows, requires_grad=learned)

    @property
    def table(self) -> Tensor:
        """All targets: unit rows, float32, shape (count, dim)."""
        return F.normalize(self.embedding.float(), dim=-1)

    def rows(self, ids: Tensor) -> Tensor:
        """Unit rows, float32: int64 ids (...) -> (..., dim)."""
        return F.normalize(F.embedding(ids, self.embedding).float(), dim=-1)


class LabelTarget(EmbeddingTarget):
    """The label's L2-normalised embedding as the target of a classifier (paper, section 4.1).

    Args:
        num_classes: number of labels, >= 2.
        dim, learned, seed: see `EmbeddingTarget`.
    """

    names = ("labels",)

    def __init__(self, num_classes: int, dim: int, *, learned: bool, seed: int) -> None:
        if num_classes < 2:
            raise ValueError(f"a classifier needs at least 2 labels, got {num_classes}")
        super().__init__(num_classes, dim, learned=learned, seed=seed)

    def encode(self, batch: Batch) -> Tensor:
        """`labels` (batch,) -> y (batch, dim)."""
        return self.rows(batch["labels"])

    def loss(self, output: Tensor, batch: Batch, z: Tensor | None = None) -> Tensor:
        """Cross-entropy of logits (batch, num_classes)."""
        return label_losses(output, batch["labels"])

    def check(self, batch: Batch, size: int) -> None:
        """See `Target`."""
        check_labels(batch["labels"], size, len(self.embedding))

    def denoised(self, logits: Tensor, feedback: str) -> Tensor:
        """The feedback from logits (batch, num_classes) to D (batch, dim), which the solver feeds on.

        `soft`: the expected target under the predicted probabilities. `hard`: the most probable label's row.
        """
        if feedback == "soft":
            return logits.float().softmax(dim=-1) @ self.table
        if feedback == "hard":
            return self.table[logits.argmax(dim=-1)]
        raise ValueError(f"unknown feedback {feedback!r}; allowed: soft, hard")


class ImageTarget(Target):
    """The image (or latent) itself as the target of a diffusion model; the label, if any, is the input.

    Args:
        shape: (channels, height, width).
        num_classes: number of labels; 0 for an unconditional model. Label `num_classes` is the null class.
        label_dropout: share of the training samples whose label is replaced by the null class, in [0, 1].
    """

    names = ("pixel_values",)
    optional = ("labels",)  # images often have some; an unconditional model passes over them

    def __init__(self, shape: tuple[int, int, int], *, num_classes: int, label_dropout: float) -> None:
        super().__init__()
        self.shape = shape
        self.num_classes = num_classes
        self.label_dropout = label_dropout

    @property
    def null_class(self) -> int | None:
        """The label that stands for no label; None where the model has never seen one."""
        return self.num_classes if self.num_classes and self.label_dropout > 0 else None

    def check_guidance(self, guidance: float, name: str = "guidance") -> None:
        """Raise ValueError for guidance other than 1 where there is no null class, saying why there is none."""
        if guidance == 1 or self.null_class is not None:
            return
        why = "was trained with label_dropout = 0" if self.num_classes else "is unconditional"
        raise ValueError(f"{name} = {guidance} needs a null class, but the model {why}; set {name} to 1")

    def encode(self, batch: Batch) -> Tensor:
        """`pixel_values` (batch, channels, height, width), with a standard deviation of about sigma_data."""
        return batch["pixel_values"].float()

    def training_inputs(self, inputs: Batch, generator: torch.Generator | None) -> Batch:
        """Drop labels at random."""
        if self.null_class is None:
            return inputs
        labels = inputs["labels"]
        drop = torch.rand(labels.shape, generator=generator, device=labels.device) < self.label_dropout
        return {**inputs, "labels": torch.where(drop, self.null_class, labels)}

    def loss(self, output: Tensor, batch: Batch, z: Tensor | None = None) -> Tensor:
        """Mean squared error over the image's elements (EDM eq. 3)."""
        return (output.float() - batch["pixel_values"].float()).square().flatten(1).mean(dim=1)

    def check(self, batch: Batch, size: int) -> None:
        """See `Target`."""
        images = batch["pixel_values"]
        if not isinstance(images, Tensor) or images.shape != (size, *self.shape) or not images.is_floating_point():
            found = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"pixel_values must be a float tensor of shape {(size, *self.shape)}, got {found}")


class TokenTarget(TextTarget):
    """The tokens themselves as the target of masked diffusion (paper, masked text; MD4, arXiv 2406.04329).

    Args:
        vocab_size: number of tokens; the mask is the id after them.
        length: of a sequence.
    """

    names = ("input_ids",)
    optional = ("attention_mask",)

    def __init__(self, vocab_size: int, length: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.length = length

    @property
    def mask_id(self) -> int:
        """The id that stands for a masked token."""
        return self.vocab_size

    def encode(self, batch: Batch) -> Tensor:
        """`input_ids` (batch, length), int64."""
        return batch["input_ids"]

    def target_tokens(self, batch: Batch) -> tuple[Tensor, ...]:
        """See `TextTarget`."""
        return (batch["input_ids"],)

    def resolve(self, batch: Batch) -> Batch:
        """Without `attention_mask`, which must be 1 everywhere: a text has the model's length, and no padding."""
        if (mask := batch.get("attention_mask")) is None:
            return batch
        _refuse(
            ~_tokens_there(mask, batch["input_ids"]),
            "attention_mask has zeros: a masked text model reads texts of its own length, without padding; cut the "
            "texts to it, or join them",
        )
        return {"input_ids": batch["input_ids"]}

    def reduce(self, nats: Sequence[Tensor], batch: Batch, z: Tensor | None) -> Tensor:
        """The sum over the tokens that z hides, over the length.

        In nats per token of the whole sequence, so that under the ELBO's weight its mean over all levels is the bound.
        Without z every token counts.
        """
        (each,) = nats
        if z is not None:
            each = each * (z == self.mask_id)
        return each.sum(dim=1) / each.shape[1]

    def check(self, batch: Batch, size: int) -> None:
        """See `Target`."""
        check_tokens(batch["input_ids"], self.vocab_size, (size, self.length))


class NextTokenTarget(EmbeddingTarget, TextTarget):
    """The next token's L2-normalised embedding as the target of an autoregressive model (paper, section 4.3).

    Args:
        vocab_size: number of tokens.
        dim, learned, seed: see `EmbeddingTarget`.
        shift: 0 where a position of its own denoises each token, given the tokens before it (two streams); 1 where
            the position of a token denoises the one after it (one stream).
        clean_weight: weight of the clean stream's plain next-token loss; 0 leaves it out.
    """

    names = ("input_ids",)
    optional = ("labels", "attention_mask")

    def __init__(
        self, vocab_size: int, dim: int, *, learned: bool, seed: int, shift: int = 0, clean_weight: float = 0.0
    ) -> None:
        super().__init__(vocab_size, dim, learned=learned, seed=seed)
        self.shift = shift
        self.clean_weight = clean_weight

    @torch.no_grad()
    def take_rows(self, embedding: Tensor) -> None:
        """Let the rows be the directions of an embedding (vocab_size, dim)."""
        self.embedding.copy_(F.normalize(embedding.float(), dim=-1))

    def encode(self, batch: Batch) -> Tensor:
        """`input_ids` (batch, length) -> y (batch, length - shift, dim)."""
        return self.rows(batch["input_ids"][:, self.shift :])

    def target_tokens(self, batch: Batch) -> tuple[Tensor, ...]:
        """See `TextTarget`: of the noisy positions, and of the clean ones, of which the last has nothing to predict."""
        tokens = batch["input_ids"]
        return tokens[:, self.shift :], tokens[:, 1:]

    def resolve(self, batch: Batch) -> Batch:
        """With `counted`, bool (batch, length), where `labels` or `attention_mask` leave tokens out of the loss.

        Tokens whose label is `CONTEXT` are read and not counted. Those that `attention_mask` hides are moved behind the
        others of their text, where no position that counts sees them: a text is as if they were not there, wherever
        they stood. A text without a counted token has loss 0.

        Raises:
            ValueError: labels that are neither the token nor `CONTEXT`, or entries of another shape or dtype than
                `input_ids`; or no token counts in the whole batch. (On a GPU, which is not waited for, a value ends in
                a device-side assertion with the same message.)
        """
        tokens, labels, mask = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
        if labels is None and mask is None:
            return batch
        there = counted = torch.ones_like(tokens, dtype=torch.bool)
        if mask is not None:
            there = counted = _tokens_there(mask, tokens)
        if labels is not None:
            _check_like_tokens("labels", labels, tokens)
            counted = there & (labels != CONTEXT)
            _refuse(
                counted & (labels != tokens),
                f"labels must be the tokens of input_ids themselves, or {CONTEXT} where a token is not counted: they "
                "are not to be shifted, and no others can be learned",
            )
        if mask is not None:
            order = there.logical_not().byte().argsort(dim=1, stable=True)
            tokens, counted = tokens.where(there, 0).gather(1, order), counted.gather(1, order)
        counted = F.pad(counted[:, self.shift :], (self.shift, 0))  # what no position predicts
        _refuse(
            ~counted.any(),
            "no token of the batch counts: labels and attention_mask leave nothing to learn; leave such texts out",
        )
        return {"input_ids": tokens, "counted": counted}

    def reduce(self, nats: Sequence[Tensor], batch: Batch, z: Tensor | None) -> Tensor:
        """The mean over the counted tokens of each sequence, in nats; and `clean_weight` times that of the clean
        stream."""
        if "counted" in batch:
            starts = (self.shift, 1)  # of the noisy and the clean stream, see `target_tokens`
            pairs = zip(nats, starts, strict=False)
            noisy, *clean = (_mean_of(each, batch["counted"][:, start:]) for each, start in pairs)
        else:
            noisy, *clean = (each.mean(dim=1) for each in nats)
        return noisy + self.clean_weight * clean[0] if clean else noisy

    def check(self, batch: Batch, size: int) -> None:
        """See `Target`."""
        tokens = batch["input_ids"]
        least = max(self.shift, int(self.clean_weight > 0))  # the clean stream's last position has nothing to predict
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.shape[1] <= least:
            found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"input_ids must have shape (batch, length), length > {least}, got {found}")
        check_tokens(tokens, len(self.embedding), (size, tokens.shape[1]))


def _mean_of(values: Tensor, counted: Tensor) -> Tensor:
    """Of each row (batch, length) the mean of the values that count; 0 where none does."""
    return torch.where(counted, values, 0.0).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def mean_loss(losses: Tensor, batch: Batch) -> Tensor:
    """The mean of losses (batch,) over the samples of a resolved batch of which something counts."""
    counted = batch.get("counted")
    if counted is None:
        return losses.mean()
    return losses.sum() / counted.any(dim=1).sum()


def label_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropies, float32 (batch,), of logits (batch, num_classes); no label is passed over, as -100 would be."""
    return F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=NONE_IGNORED)


def cross_entropies(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of every position, in nats: logits (batch, length, vocab_size), tokens (batch, length) -> (batch, length).

    In float32, whatever the logits' dtype.
    """
    nats = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none")
    return nats.view(tokens.shape)


def in_chunks(nats: Callable[[Tensor, Tensor], Tensor], states: Tensor, tokens: Tensor, chunk: int | None) -> Tensor:
    """Cross-entropies (batch, length), with the logits of at most `chunk` positions of a sequence in memory at a time.

    The backward pass makes them again, chunk after chunk, so read-out and cross-entropy must draw nothing at random.

    Args:
        nats: read-out and cross-entropy of any of the positions: states (batch, some, dim), tokens (batch, some) ->
            (batch, some).
        states: (batch, length or more, dim); the first `length` positions count.
        tokens: (batch, length).
        chunk: positions, >= 1; None: all.
    """
    length = tokens.shape[1]
    if states.shape[1] > length:
        states = states[:, :length]
    if chunk is None or length <= chunk:
        return nats(states, tokens)
    # Split, not sliced: the gradients of all chunks are put together once.
    parts, wanted = list(states.split(chunk, dim=1)), list(tokens.split(chunk, dim=1))
    # The last is filled up: a compiled read-out that met a second shape could keep other tensors when it runs again.
    if missing := -length % chunk:
        parts[-1], wanted[-1] = F.pad(parts[-1], (0, 0, 0, missing)), F.pad(wanted[-1], (0, missing))
    pairs = zip(parts, wanted, strict=True)
    made = [checkpoint(nats, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
    return torch.cat(made, dim=1)[:, :length]


def check_entries(
    batch: Mapping[str, object], known: Collection[str], reader: str, error: type[Exception] = ValueError
) -> None:
    """Refuse entries of a batch that nothing reads: their sender means something by them.

    Args:
        batch: by name.
        known: the names that are read.
        reader: what reads them, for the message.
        error: what is raised where the batch has others.
    """
    if unknown := [name for name in batch if name not in known]:
        reads = f"it reads {', '.join(sorted(set(known)))}" if known else "it reads none"
        hint = "; positions follow from attention_mask" if "position_ids" in unknown else ""
        raise error(f"{reader} takes no {', '.join(unknown)}: {reads}{hint}. Leave them out of the batch")


def _tokens_there(mask: Tensor, tokens: Tensor) -> Tensor:
    """bool, of the shape of tokens (batch, length): an attention mask, checked."""
    _check_like_tokens("attention_mask", mask, tokens)
    _refuse((mask != 0) & (mask != 1), "attention_mask must be 1 at the tokens of a text and 0 at its padding")
    return mask != 0


def _check_like_tokens(name: str, values: Tensor, tokens: Tensor) -> None:
    """Raise ValueError unless an entry has one whole number for each token."""
    whole = isinstance(values, Tensor) and not (values.is_floating_point() or values.is_complex())
    if not whole or values.shape != tokens.shape:
        found = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"{name} must be whole numbers of the shape of input_ids, {tuple(tokens.shape)}, one for each token; got "
            f"{found}. Leave out what says something else, such as a text's class"
        )


def _refuse(wrong: Tensor, message: str) -> None:
    """Raise ValueError where anything is wrong; on a GPU, without waiting for it, a device-side assertion."""
    if wrong.device.type == "cpu" and not torch.compiler.is_compiling():
        if bool(wrong.any()):
            raise ValueError(message)
    else:
        torch._assert_async(~wrong.any(), message)


def check_loss_chunk(chunk: int | None, model: str, *, of_text: bool, name: str = "loss_chunk") -> None:
    """Raise ValueError unless `chunk` is None, or >= 1 and for a model of text; the message has both names."""
    if chunk is not None and chunk < 1:
        raise ValueError(f"{name} must be >= 1 (positions), or null for all at once; got {chunk}")
    if chunk is not None and not of_text:
        raise ValueError(f"{name} = {chunk} is for text models: {model} has no logits at each position; leave it out")


def check_tokens(tokens: Tensor, vocab_size: int, shape: tuple[int, ...], *, mask: bool = False) -> None:
    """Raise ValueError unless tokens are int64, of that shape, in [0, vocab_size) (or the mask)."""
    if not isinstance(tokens, Tensor) or tokens.shape != shape or tokens.dtype != torch.int64:
        found = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"input_ids must be an int64 tensor of shape {shape}, got {found}")
    if tokens.device.type == "cpu" and tokens.numel():  # on a GPU the check would stall the queue
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size + mask:
            name = f" ({vocab_size}: the mask)" if mask else ""
            raise ValueError(f"input_ids must be in [0, {vocab_size - 1 + mask}]{name}, got {low} to {high}")


def check_labels(labels: Tensor, size: int, num_classes: int, *, null_class: bool = False) -> None:
    """Raise ValueError unless labels are int64, of shape (size,), in [0, num_classes) (or the null class)."""
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.shape != (size,) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 of shape ({size},), got {labels.dtype} {tuple(labels.shape)}")
    if labels.device.type == "cpu" and size:  # on a GPU the check would stall the queue
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes + null_class:
            null = f" ({num_classes}: the null class)" if null_class else ""
            raise ValueError(f"labels must be in [0, {num_classes - 1 + null_class}]{null}, got {low} to {high}")
