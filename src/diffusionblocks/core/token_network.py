"""What the blocks of an autoregressive model say of a next token, level by level: what text is generated with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.modules import tensors_of
from ..noise import one_level
from ..sampling import LogitVotes
from ..targets import HINT, NextTokenTarget
from .block import Block, Conditioning

if TYPE_CHECKING:
    from .model import DiffusionBlocks


def _ask(
    block: Block,
    inputs: Mapping[str, Any],
    z: Tensor,
    level: Tensor,
    layers: list[tuple[Any, Any]] | None,
    conditioning: Conditioning | None,
    context: bool,
) -> Tensor:
    return block(inputs, z, level, context=context, layers=layers, conditioning=conditioning)  # type: ignore[no-any-return]


class TokenNetwork:
    """Asks the block that owns a level, as `sampling.token_chain.Network` says.

    Self-conditioning shows each block the mean of what those before it said in the same chain.

    Args:
        model: of which it holds the blocks alone, so that the model is freed when it is.
        levels: of the chains, descending; a block is asked at each but the last.
        rows: texts of a batch, whose calls have one shape once their `past` is static: then what follows from a level
            and the weights is made once for all tokens. None: it never is.
        compile: torch.compile the calls of one shape. Blocks of one shape share one graph.
    """

    def __init__(
        self, model: DiffusionBlocks, levels: Sequence[float], rows: int | None = None, *, compile: bool = False
    ) -> None:
        self._first = levels[0]
        self._blocks = {level: model.block(model.partition.block_of(level)) for level in levels[:-1]}
        self._levels: dict[float, Tensor] = {}
        if rows is not None:
            self._levels = {level: torch.full((rows,), level, device=model.device) for level in levels[:-1]}
        self._conditionings: dict[float, Conditioning | None] = {}
        self._context, self._hints = model.block(0).adds_likelihood, model.block(0).self_conditioning
        self._said = LogitVotes(("mean",))
        self._ask = _ask
        if compile:
            dynamo: Any = torch._dynamo.config
            # Each batch size is a graph of its own; past the limit torch would quietly run the others eagerly.
            dynamo.recompile_limit = max(dynamo.recompile_limit, 8 * (1 + len(model.blocks)))
            self._ask = torch.compile(_ask, dynamic=False)

    @torch.no_grad()
    def begin(self) -> None:
        """Make what follows from the weights anew, in the memory that it has."""
        for level, rows in self._levels.items():
            now = self._blocks[level].conditioning(rows[:1])
            before = self._conditionings.setdefault(level, now)
            if now is None or before is None:
                self._conditionings[level] = None
                continue
            for memory, value in zip(before.tensors, now.tensors, strict=True):
                memory.copy_(value)

    def __call__(self, inputs: Mapping[str, Any], z: Tensor, level: float) -> Tensor:
        """Logits (n, positions, vocab_size); context logits where blocks have them."""
        block = self._blocks[level]
        if self._hints:
            if level == self._first:  # levels descend: here a chain begins
                self._said = LogitVotes(("mean",))
            if self._said.count:
                target = block.target
                assert isinstance(target, NextTokenTarget)
                inputs = {**inputs, HINT: target.hint(self._said.answer("mean"), z)}
        past = inputs.get("past")
        if past is not None and past.static:
            at = self._levels[level], block.callable_layers(), self._conditionings[level]
            logits = self._ask(block, inputs, z, *at, self._context)
        else:
            logits = _ask(block, inputs, z, one_level(level, z), None, None, self._context)
        if self._hints:
            self._said.add(logits)
        return logits


def version_of(model: DiffusionBlocks) -> Any:
    """What a captured step holds fast of a model: where tensors lie, what runs, and what is compiled.

    Values of tensors are not part of it: a captured step reads them where they are. Plain numbers of modules, such as
    the scale of an update, are.
    """
    tensors = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors_of(model)]
    modules = [(id(m), *m._forward_pre_hooks, None, *m._forward_hooks) for m in model.modules()]
    compiled = [id(m._compiled_call_impl) for m in model.modules()]
    numbers = [[(n, v) for n, v in vars(m).items() if isinstance(v, (int, float))] for m in model.modules()]
    return tensors, modules, compiled, numbers, [block.noise for block in model.blocks]
