"""What the blocks denoise: the base of all targets, and what targets of text have in common."""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..common.config_model import ConfigModel
from ..common.messages import span
from ..common.precision import without_autocast

Batch = Mapping[str, Tensor]

#: Entry of a block's inputs: the row expected of the target so far, float32 (batch, dim) or (batch, length, dim); zeros
#: where nothing was said of it.
HINT = "hint"

#: What to do instead of giving an entry that nothing reads.
_HINTS = {
    "position_ids": "positions follow from attention_mask, and diffusionblocks.BlocksTrainer takes packed texts apart",
    "use_cache": "trl's trainer goes with blocks as class Mine(diffusionblocks.BlocksTrainer, SFTTrainer)",
}


class BaseTargetConfig(ConfigModel):
    """What the sections `target` of all kinds have in common.

    Attributes:
        kind: tells them apart.
        weight: `none`, or the name of the weight of the loss at each level.
        unread: share of the drawn levels, at either end, beyond which none is read by default (see `EDM.coverage`).
    """

    unread: ClassVar[float] = 0.0

    @property
    def adds_likelihood(self) -> bool:
        """Whether what z says of the target is added to the network's logits in closed form."""
        return False

    @property
    def sees_noise(self) -> bool:
        """Whether blocks are shown z and told the noise level."""
        return True

    @property
    def reads_trunk(self) -> bool:
        """Whether blocks attend to a frozen trunk in place of a stream of their own."""
        return False

    def resolve(self, shared: str) -> Self:
        """The section with the defaults that depend on the policy for shared parameters."""
        return self


class EmbeddingTargetConfig(BaseTargetConfig):
    """A section of a target whose rows are drawn, given or learned; `embedding` says which.

    Attributes:
        likelihood: What the network learns of p(y | x, z), which is p(y | x) times p(z | y) up to a factor. `added`:
            p(y | x) alone, as context logits; the other is known, and z . e / sigma^2 is added to them in closed form.
            `learned`: both together (the paper).
        noise_input: Whether the blocks are shown the noised target and told the noise level. false: neither. Then each
            is an ordinary model of its own layers, trained with the likelihood added (see `export_block`).
        self_conditioning: Whether blocks are also shown what was said of the target so far, through a linear map that
            starts at zero: the row expected under the mean of the earlier blocks' context logits. In training it is
            that of the block's own, from a first pass without gradients, and for half of the samples nothing. So
            blocks still train apart; a step costs a forward pass more. Needs `likelihood: added`.
        unread: chains read off what the network knows of the input; a level where nothing was trained tells nothing.
        fixed: the embedding by default where it is not learned.
        of_noise_input: fields that say how blocks are shown noise -> why they say nothing without.
    """

    unread: ClassVar[float] = 0.001
    fixed: ClassVar[str]
    of_noise_input: ClassVar[dict[str, str]] = {}

    likelihood: Literal["added", "learned"] = "added"
    noise_input: bool = True
    self_conditioning: bool = False

    @property
    def adds_likelihood(self) -> bool:
        """Whether `likelihood` is `added`."""
        return self.likelihood == "added"

    @property
    def sees_noise(self) -> bool:
        """`noise_input`."""
        return self.noise_input

    @model_validator(mode="after")
    def _conditions_on_context_logits(self) -> Self:
        if self.self_conditioning and self.likelihood == "learned":
            raise ValueError(
                "target.self_conditioning = true needs target.likelihood = added, got learned: blocks are shown "
                "context logits, and without it there are none; leave likelihood out"
            )
        return self

    def resolve(self, shared: str) -> Self:
        """With the embedding that goes with the policy: learned under `joint`, if networks see it, else fixed."""
        if getattr(self, "embedding", None) is not None:
            return self
        learned = shared == "joint" and self.noise_input and not self.reads_trunk
        return self.model_copy(update={"embedding": "learned" if learned else self.fixed})

    @model_validator(mode="after")
    def _without_noise_input(self) -> Self:
        if self.noise_input:
            return self
        if self.likelihood == "learned":
            raise ValueError(
                "target.noise_input = false needs target.likelihood = added, got learned: a network that sees no z "
                "cannot learn what z says; leave likelihood out"
            )
        if getattr(self, "embedding", None) == "learned":
            raise ValueError(
                "target.embedding = learned: with target.noise_input = false no network sees the rows, so nothing "
                "would teach them; leave embedding out"
            )
        for name, why in self.of_noise_input.items():
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                text = str(value).lower() if isinstance(value, bool) else value
                raise ValueError(f"target.{name} = {text}: with target.noise_input = false {why}; leave {name} out")
        return self


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

    def counted_lengths(self, batch: Batch) -> list[int] | None:
        """Of each text of a resolved batch, how many entries there are up to the last that counts; None: all count."""
        return None

    def hint(self, logits: Tensor, z: Tensor) -> Tensor:
        """What self-conditioning shows of logits: the expected row, float32 (..., dim).

        Args:
            logits: (batch, num_classes), or (batch, some, vocab_size) of any positions; context logits, if there are.
            z: the noised target at these positions.
        """
        raise NotImplementedError(f"{type(self).__name__} has no rows")

    def tokens_of(self, shape: tuple[int, ...]) -> int:
        """Tokens of an image of a batch's shape; of other targets no process asks for it."""
        return 1

    def training_inputs(self, inputs: Batch, generator: torch.Generator | None) -> Batch:
        """The inputs x as they are shown in training."""
        return inputs


class TextTarget(Target):
    """A target whose loss is made of the cross-entropies of positions, of one stream of them or of several."""

    #: logits of a position
    vocab_size: int

    @abc.abstractmethod
    def target_tokens(self, batch: Batch) -> tuple[Tensor, ...]:
        """The tokens (batch, length) that the logits of each stream are of, of its first `length` positions."""

    @abc.abstractmethod
    def reduce(self, token_losses: Sequence[Tensor], batch: Batch, z: Tensor | None) -> Tensor:
        """The loss (batch,) of a resolved batch from the cross-entropies (batch, length) of each stream that there is,
        in order."""

    def loss(self, output: Tensor, batch: Batch, z: Tensor | None = None) -> Tensor:
        """`reduce` of logits (batch, positions, vocab_size), those of a second stream behind those of the first."""
        tokens = self.target_tokens(batch)
        lengths = [row.shape[1] for row in tokens]
        parts: Sequence[Tensor] = [output]
        if output.shape[1] > lengths[0]:
            # Split, not sliced: the gradient of a slice is filled up with zeros, once more as large as the logits.
            parts = output.split([*lengths, output.shape[1] - sum(lengths)], dim=1)
        return self.reduce([cross_entropies(*pair) for pair in zip(parts, tokens, strict=False)], batch, z)


def random_rows(count: int, dim: int, seed: int) -> Tensor:
    """Unit rows of random directions, float32 (count, dim), the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator), dim=-1)


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
        self.embedding = nn.Parameter(random_rows(count, dim, seed), requires_grad=learned)

    @property
    def table(self) -> Tensor:
        """All targets: unit rows, float32, shape (count, dim)."""
        return F.normalize(self.embedding.float(), dim=-1)

    def rows(self, ids: Tensor) -> Tensor:
        """Unit rows, float32: int64 ids (...) -> (..., dim)."""
        return F.normalize(F.embedding(ids, self.embedding).float(), dim=-1)

    def hint(self, logits: Tensor, z: Tensor) -> Tensor:
        """The row expected under the probabilities of logits."""
        return logits.float().softmax(dim=-1) @ self.table

    def posterior(self, context: Tensor, evidence: Tensor, table: Tensor | None = None) -> Tensor:
        """Posterior logits log p(y | x, z), up to a constant, of context logits log p(y | x): by Bayes' rule.

        No gradient goes through what is added, which is computed in float32 or better even under autocast.

        Args:
            context: (..., count), of any dtype.
            evidence: what z says of the target, `GaussianProcess.evidence`: (..., dim), float32 or float64.
            table: `table`, for a caller who has it; None makes it, which costs more than the rest for a few rows.

        Returns:
            (..., count), of the dtype of `evidence`.
        """
        with torch.no_grad():
            table = (self.table if table is None else table).to(evidence.dtype)
        logits, evidence = context.to(evidence.dtype).flatten(0, -2), evidence.detach().flatten(0, -2)
        with without_autocast(context):  # in bfloat16 neighbouring rows are one
            return torch.addmm(logits, evidence, table.T).view(context.shape)


def mean_loss(losses: Tensor, batch: Batch) -> Tensor:
    """The mean of losses (batch,) over the samples of a resolved batch of which something counts."""
    loss_mask = batch.get("loss_mask")
    if loss_mask is None:
        return losses.mean()
    return losses.sum() / loss_mask.any(dim=1).sum()


def cross_entropies(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of every position, in nats.

    Args:
        logits: (batch, length, vocab_size), of any dtype.
        tokens: (batch, length), int64.

    Returns:
        Losses, float32, shape (batch, length).
    """
    return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)


#: `loss_chunk` that keeps the logits of a batch within `LOGITS_AT_ONCE`.
AUTO: Final = "auto"

#: Logits that `auto` lets exist at once: 64 MiB in float32, and as much again for each step of the cross-entropy.
LOGITS_AT_ONCE = 2**24

#: Positions of each sequence whose logits exist at a time; `auto`; None: all.
LossChunk = int | Literal["auto"] | None


def positions_at_once(chunk: LossChunk, shape: Sequence[int], vocab_size: int) -> int | None:
    """Positions of each sequence whose logits are made together.

    Args:
        chunk: as it was asked for.
        shape: of the tokens, (batch, length).
        vocab_size: logits of a position.

    Returns:
        `chunk`, where it is a number. Under `auto` the length in the fewest equal chunks of at most `LOGITS_AT_ONCE`
        logits (of one position at least), and None where one chunk is enough.
    """
    if not isinstance(chunk, str):
        return chunk
    batch, length = shape
    most = max(1, LOGITS_AT_ONCE // max(1, batch * vocab_size))
    return None if length <= most else math.ceil(length / math.ceil(length / most))


def _recomputed(number: int, count: int, token_losses: Callable[..., Tensor], *row: Tensor) -> Tensor:
    """Losses of one chunk, whose logits the backward pass makes again."""
    losses: Tensor = checkpoint(token_losses, *row, use_reentrant=False, preserve_rng_state=False)
    return losses


_chunk_losses: Callable[..., Tensor] = _recomputed  # no ContextVar, whose value torch.compile does not read


@contextlib.contextmanager
def followed_in_shape() -> Iterator[None]:
    """Compute only the first two chunks of `in_chunks` and the last; the others have shape alone, and lifetime.

    For a step on tensors without values: chunks hold the same memory one after another, and most while gradients of
    all the others are there, as at the first.
    """
    global _chunk_losses
    before, _chunk_losses = _chunk_losses, _first_and_last
    try:
        yield
    finally:
        _chunk_losses = before


def _first_and_last(number: int, count: int, token_losses: Callable[..., Tensor], *row: Tensor) -> Tensor:
    if number < 2 or number == count - 1:
        return _recomputed(number, count, token_losses, *row)
    losses: Tensor = _Shape.apply(row[0])  # type: ignore[no-untyped-call]
    return losses


class _Shape(torch.autograd.Function):
    """Losses of some positions, and the gradient of their states, without values."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        """(batch, some, dim) -> (batch, some)."""
        ctx.like = states.shape, states.dtype
        return states.new_empty(states.shape[:2], dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Of the shape of the states."""
        shape, dtype = ctx.like
        return gradients[0].new_empty(shape, dtype=dtype)


def in_chunks(
    token_losses: Callable[..., Tensor],
    states: Tensor,
    tokens: Tensor,
    chunk: int | None,
    more: Sequence[Tensor] = (),
) -> Tensor:
    """Cross-entropies (batch, length), with the logits of at most `chunk` positions of a sequence in memory at a time.

    The backward pass makes them again, chunk after chunk, so read-out and cross-entropy must draw nothing at random.

    Args:
        token_losses: read-out and cross-entropy of any of the positions: states (batch, some, dim), tokens (batch,
            some), then `more` of them -> (batch, some).
        states: (batch, length or more, dim); the first `length` positions count.
        tokens: (batch, length).
        chunk: positions, >= 1; None: all.
        more: further tensors (batch, length, any) that the losses of a position need.
    """
    length = tokens.shape[1]
    if states.shape[1] > length:
        states = states[:, :length]
    if chunk is None or length <= chunk:
        return token_losses(states, tokens, *more)
    # Split, not sliced: the gradients of all chunks are put together once.
    columns = [list(column.split(chunk, dim=1)) for column in (states, tokens, *more)]
    # The last is filled up: a compiled read-out that met a second shape could keep other tensors when it runs again.
    if missing := -length % chunk:
        for parts in columns:
            parts[-1] = F.pad(parts[-1], (*[0, 0] * (parts[-1].dim() - 2), 0, missing))
    rows = list(zip(*columns, strict=True))
    losses = [_chunk_losses(number, len(rows), token_losses, *row) for number, row in enumerate(rows)]
    return torch.cat(losses, dim=1)[:, :length]


def check_entries(
    batch: Mapping[str, object], names: Collection[str], reader: str, error: type[Exception] = ValueError
) -> None:
    """Refuse entries of a batch that nothing reads: their sender means something by them.

    Args:
        batch: by name.
        names: the entries that are read.
        reader: what reads them, for the message.
        error: what is raised where the batch has others.
    """
    if unknown := [name for name in batch if name not in names]:
        reads = f"it reads {', '.join(sorted(set(names)))}" if names else "it reads none"
        hint = "".join(f"; {_HINTS[name]}" for name in unknown if name in _HINTS)
        raise error(f"{reader} takes no {', '.join(unknown)}: {reads}{hint}. Leave them out of the batch")


def check_loss_chunk(chunk: LossChunk, model: str, *, of_text: bool, name: str = "loss_chunk") -> None:
    """Raise ValueError unless `chunk` is None, `auto`, or >= 1 and for a model of text; the message has both names."""
    if chunk is None or chunk == AUTO:
        return
    if isinstance(chunk, str) or chunk < 1:
        raise ValueError(f"{name} must be auto, >= 1 (positions), or null for all at once; got {chunk}")
    if not of_text:
        raise ValueError(f"{name} = {chunk} is for text models: {model} has no logits at each position; leave it out")


def check_tokens(tokens: Tensor, vocab_size: int, shape: tuple[int, ...], *, mask: bool = False) -> None:
    """Raise ValueError unless tokens are int64, of that shape, in [0, vocab_size) (or the mask)."""
    if not isinstance(tokens, Tensor) or tokens.shape != shape or tokens.dtype != torch.int64:
        got = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"input_ids must be an int64 tensor of shape {shape}, got {got}")
    if tokens.device.type == "cpu" and tokens.numel():  # on a GPU the check would stall the queue
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size + mask:
            name = f" ({vocab_size}: the mask)" if mask else ""
            raise ValueError(f"input_ids must be in [0, {vocab_size - 1 + mask}]{name}, got {span(low, high)}")


def attention(mask: Tensor, tokens: Tensor) -> Tensor:
    """bool, of the shape of tokens (batch, length): an attention mask, checked."""
    check_like_tokens("attention_mask", mask, tokens)
    refuse_where((mask != 0) & (mask != 1), "attention_mask must be 1 at the tokens of a text and 0 at its padding")
    return mask != 0


def check_like_tokens(name: str, values: Tensor, tokens: Tensor) -> None:
    """Raise ValueError unless an entry has one whole number for each token."""
    whole = isinstance(values, Tensor) and not (values.is_floating_point() or values.is_complex())
    if not whole or values.shape != tokens.shape:
        got = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"{name} must be whole numbers of the shape of input_ids, {tuple(tokens.shape)}, one for each token; got "
            f"{got}. Leave out what says something else, such as a text's class"
        )


def refuse_where(wrong: Tensor, message: str) -> None:
    """Raise ValueError where anything is wrong; on a GPU, without waiting for it, a device-side assertion."""
    if wrong.device.type == "cpu" and not torch.compiler.is_compiling():
        if bool(wrong.any()):
            raise ValueError(message)
    else:
        torch._assert_async(~wrong.any(), message)
