"""Attention of two streams in one sequence: noisy positions first, then the clean ones (Block Diffusion, arXiv
2503.09573, with blocks of one token).

Clean position i sees clean positions <= i: an ordinary causal model. Noisy position i sees clean positions < i, its
past, and itself; never the clean token that it is to predict. Clean positions never see noisy ones, so what they give
does not depend on the noise level, and their keys and values can be kept while text is generated (`Past`).

Where attention slides over a window of w tokens, position i of either stream sees only what is behind i - w: a noisy
position the w - 1 clean ones before it, and itself (`Streams.within`).

Three kernels give the same: `sdpa` (no mask where all of the past is seen, see `past_and_own.py`; for windows, dropout
and a GPU's float32 boolean masks of some hundred rows), `flex_attention` (one call under a block mask) and `eager`
(plain matrix products under the whole mask: the reference).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.precision import as_autocast
from .past_and_own import has_kernel, past_and_own

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask  # which takes long to import

KERNELS = ("sdpa", "flex_attention", "eager")
#: The value of a layer's own config that is its window: see `Streams.within`.
WINDOW = "diffusionblocks_window"

#: A past has places for a whole multiple of so many positions.
_ALIGNED = 16

#: Noisy rows of one call under `sdpa`: the mask has so many rows, and keys beyond the last of them are left out.
_ROWS = 512
#: The same on a CPU, where calls are cheap: fewer rows waste less on pairs of noisy positions, which are masked.
_ROWS_ON_CPU = 64
_as_on_gpu = False


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let `sdpa` go on a CPU the way that it goes on a GPU: where a GPU's memory is predicted there."""
    global _as_on_gpu
    _as_on_gpu = True
    try:
        yield
    finally:
        _as_on_gpu = False


class Past:
    """Keys and values of the clean tokens that a block's layers have seen, while text is generated.

    Rows may hold different numbers of tokens: each is filled from its start. All that changes does so in place.

    Args:
        batch: rows.
        capacity: most tokens of a row, where each call counts as many as its longest row.
        device: where they are kept.

    Attributes:
        lengths: tokens that each row holds, int64, shape (batch,).
        most: an upper bound of `lengths`, known to the host.
        last: whatever a model keeps of each row's last token.
        static: whether attention runs over all places, those still empty masked, so that every step has the same
            shapes: then a CUDA graph can repeat one, and no number on the host changes from step to step. Whoever sets
            it sees to it that the tokens fit.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device | str | None = None) -> None:
        self.capacity = capacity
        # With one for a noisy position, the last; fast kernels want masks of whole multiples.
        self._room = -(-(capacity + 1) // _ALIGNED) * _ALIGNED
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.most = 0
        self.last: Tensor | None = None
        self.static = False
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}

    def clear(self) -> None:
        """Forget all texts; the memory stays where it is."""
        self.lengths.zero_()
        self.most, self.static = 0, False
        for tensor in (*itertools.chain(*self._tensors.values()), *([] if self.last is None else [self.last])):
            tensor.zero_()  # masked places are multiplied by 0, which NaN would outlive

    def places(self, new: int, noisy: int = 0) -> int:
        """How many places attention runs over where so many tokens are new, beside those of noisy positions."""
        return self._room - noisy if self.static else self.most + new

    def update(self, layer: int, noisy: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put new tokens behind those that a layer holds; all of them, and room for shorter rows.

        Args:
            layer: the layer's number.
            noisy: 0 or 1, how many positions, the first, are noisy: they are seen, and not kept.
            key: (batch, heads, noisy + new, dim); `new` may be 0.
            value: likewise.

        Returns:
            Keys and values (batch, heads, places + noisy, dim), see `places`: row r holds tokens in its first
            lengths[r] + new places, what is behind them has no meaning; then the noisy ones.
        """
        new = key.shape[2] - noisy
        if not self.static and self.most + new > self.capacity:
            raise ValueError(f"{self.most} + {new} tokens do not fit: the past was made for {self.capacity}")
        if layer not in self._tensors:
            shape = (key.shape[0], key.shape[1], self._room, key.shape[3])
            self._tensors[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        end = self.places(new, noisy)
        in_place = noisy if self.static else 0
        if in_place or new:  # one write for all: noisy positions are the first, and have the last places
            at = [self.lengths[:, None] + torch.arange(new, device=key.device)]
            if in_place:
                at.insert(0, torch.arange(end, self._room, device=key.device).expand(key.shape[0], -1))
            places, rows = torch.cat(at, dim=1), torch.arange(key.shape[0], device=key.device)[:, None]
            for tensor, fresh in zip(self._tensors[layer], (key, value), strict=True):
                fresh = fresh[:, :, noisy - in_place :].transpose(1, 2)
                tensor.transpose(1, 2).index_put_((rows, places), fresh)
        if self.static:
            return self._tensors[layer]
        pairs = zip(self._tensors[layer], (key, value), strict=True)
        if not noisy:
            return self._tensors[layer][0][:, :, :end], self._tensors[layer][1][:, :, :end]
        keys, values = (torch.cat([tensor[:, :, :end], fresh[:, :, :noisy]], dim=2) for tensor, fresh in pairs)
        return keys, values

    def advance(self, counts: Tensor, new: int) -> None:
        """After all layers: `counts` (batch,) of the `new` places given to each row were tokens, the others padding."""
        self.lengths += counts
        if not self.static:
            self.most += new


class Streams:
    """What the positions of one forward pass are.

    Args:
        noisy: how many positions, the first, are noisy; none where there is one stream.
        clean: how many positions, the others, are clean.
        device: of the masks.
        past: clean tokens seen before; with it there is at most one noisy position, behind all clean ones.
        counts: how many of the clean positions of each row are tokens, (batch,), with `past`; None: all.

    Attributes:
        positions: of each position in its text, (1 or batch, noisy + clean).
        window: how many tokens attention sees, the position's own included; None: all of the past.
    """

    window: int | None = None
    #: the number in `past` of the layer that is attended to; None: the attending layer's own
    layer: int | None = None
    #: keys and values of the clean positions, where a layer runs at the noisy ones alone
    _clean: tuple[Tensor, Tensor] | None = None

    def __init__(
        self,
        noisy: int,
        clean: int,
        device: torch.device,
        *,
        past: Past | None = None,
        counts: Tensor | None = None,
    ) -> None:
        self.noisy, self.clean, self.past = noisy, clean, past
        places = torch.arange(max(noisy, clean), device=device)
        if past is None:
            assert noisy in (0, clean)
            self.positions = torch.cat([places[:noisy], places])[None]
            return
        assert noisy <= 1
        start = past.lengths[:, None]
        self.counts = torch.full_like(past.lengths, clean) if counts is None else counts
        behind = start + self.counts[:, None]
        self.positions = torch.cat([behind[:, :noisy], start + places[:clean]], dim=1)
        # Keys are the places of `past`, then the noisy position itself. It stands where the next token will be, a place
        # in `past` that is still empty.
        end = past.places(clean, noisy)
        self._keys = torch.arange(end + noisy, device=device)
        is_noisy = torch.arange(noisy + clean, device=device)[:, None] < noisy
        last = torch.where(is_noisy, self.positions[:, :, None] - 1, self.positions[:, :, None])
        self._over_past = ((self._keys <= last) | (is_noisy & (self._keys >= end)))[:, None]

    def within(self, window: int | None) -> Streams:
        """The same positions, of which each sees only so many tokens, its own included; None: all of its past."""
        last = self.clean - 1 if self.past is None else self.past.places(self.clean, self.noisy)
        if window is None or window > last:
            return self
        streams = copy.copy(self)
        streams.window = window
        if self.past is not None:
            streams._over_past = self._over_past & (self._keys > self.positions[:, :, None] - window)[:, None]
        return streams

    def beside(self, key: Tensor, value: Tensor) -> Streams:
        """The same, where a layer runs at the noisy positions alone, with these keys and values of the clean ones."""
        streams = copy.copy(self)
        streams._clean = key, value
        return streams

    def of_layer(self, number: int) -> Streams:
        """The same, where the clean positions are those of another layer, by its number in `past`."""
        streams = copy.copy(self)
        streams.layer = number
        return streams

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """`two_streams` in an attention module of transformers: (batch, heads, length, dim) of each."""
        if self._clean is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip((key, value), self._clean, strict=True))
        # Read only where it counts: compiled layers that ask for their numbers share no graph.
        layer = 0 if self.past is None else self.layer
        layer = int(module.layer_idx) if layer is None else layer  # type: ignore[arg-type]
        streams = self.within(getattr(module.config, WINDOW))
        return two_streams(query, key, value, streams, layer=layer, **options)

    def first_key(self, start: int) -> int:
        """The first clean key that rows from `start` on see."""
        return 0 if self.window is None else max(0, start - self.window + 1)

    def _near(self, query: Tensor, key: Tensor) -> Tensor | bool:
        return True if self.window is None else key > query - self.window

    def rows(self, start: int, stop: int) -> Tensor:
        """What noisy rows start..stop see of clean keys first_key..stop, and of their own: bool (rows, keys + rows)."""
        query = self.positions[0, start:stop, None]
        key = self.positions[0, self.first_key(start) : stop]
        own = torch.eye(stop - start, dtype=torch.bool, device=key.device)
        return torch.cat([(key < query) & self._near(query, key), own], dim=1)

    def clean_rows(self, start: int, stop: int) -> Tensor:
        """What clean rows start..stop see of clean keys first_key..stop: bool (rows, keys)."""
        query = self.positions[0, start:stop, None]
        key = self.positions[0, self.first_key(start) : stop]
        return (key <= query) & self._near(query, key)

    def over_past(self, queries: int) -> Tensor:
        """What the first `queries` positions see of `past` and of the noisy one: bool (batch, 1, queries, keys)."""
        return self._over_past[:, :, :queries]

    def whole(self) -> Tensor:
        """Everything at once: bool (noisy + clean, noisy + clean). For the reference."""
        at = self.positions[0]
        noisy = torch.arange(len(at), device=at.device) < self.noisy
        query, key = at[:, None], at[None, :]
        to_clean = ~noisy[None, :] & torch.where(noisy[:, None], key < query, key <= query)
        own = noisy[:, None] & noisy[None, :] & (key == query)
        return to_clean & self._near(query, key) | own

    def block_mask(self, queries: int, device: torch.device) -> BlockMask:
        """`whole` of the first `queries` positions for FlexAttention, which never makes it."""
        make = _block_mask if torch.compiler.is_compiling() else _cached_block_mask
        return make(self.noisy, self.noisy + self.clean, queries, device, self.window)


def _block_mask(noisy: int, length: int, queries: int, device: torch.device, window: int | None) -> BlockMask:
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        from_noisy, to_noisy = query < noisy, key < noisy
        i = torch.where(from_noisy, query, query - noisy)
        j = torch.where(to_noisy, key, key - noisy)
        clean_past = ~to_noisy & torch.where(from_noisy, j < i, j <= i)
        if window is not None:
            clean_past = clean_past & (j > i - window)
        return clean_past | (query == key)

    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(visible, None, None, queries, length, device=str(device))


_cached_block_mask = functools.lru_cache(maxsize=16)(_block_mask)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def two_streams(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    streams: Streams,
    *,
    layer: int = 0,
    scale: float | None = None,
    dropout: float = 0.0,
    kernel: str = "sdpa",
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of noisy and clean positions.

    Args:
        query: (batch, heads, noisy + clean, dim), or of the noisy positions alone.
        key: (batch, key heads, noisy + clean, dim); key heads divide heads.
        value: likewise.
        streams: what the positions are.
        layer: the layer's number, for `streams.past`.
        scale: of the scores; None is 1 / sqrt(dim).
        dropout: of the weights (not under `flex_attention`).
        kernel: one of `KERNELS`; `flex_attention` trains on a GPU only, and is `sdpa` where it cannot.
        softcap: scores are bent to stay below it: softcap * tanh(score / softcap). With it the kernel is `eager`.
        sinks: (heads,), the score of a key that is not there, to which attention may go. Likewise `eager`.

    Returns:
        Of the shape of `query`.
    """
    if bent := softcap is not None or sinks is not None:
        kernel = "eager"
    if kernel == "flex_attention" and query.device.type == "cpu" and query.requires_grad:
        kernel = "sdpa"  # FlexAttention has no backward pass there
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and (kernel != "flex_attention" or streams.past is not None):
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    n, queries = streams.noisy, query.shape[2]
    if streams.past is not None:
        keys, values = streams.past.update(layer, n, key, value)
        visible = streams.over_past(queries)
        if bent:
            return _reference(query, keys, values, visible, scale, dropout, softcap, sinks)
        return F.scaled_dot_product_attention(query, keys, values, visible, scale=scale)
    if kernel == "flex_attention":
        from torch.nn.attention.flex_attention import flex_attention

        attend = flex_attention if query.device.type == "cpu" or torch.compiler.is_compiling() else _compiled_flex()
        mask = streams.block_mask(queries, query.device)
        return attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=groups > 1)  # type: ignore[no-any-return]
    if kernel == "eager":
        return _reference(query, key, value, streams.whole()[:queries], scale, dropout, softcap, sinks)
    query, key, value = map(as_autocast, (query, key, value))  # as the library's attention does by itself
    attend = functools.partial(F.scaled_dot_product_attention, scale=scale, dropout_p=dropout)
    (noisy_k, clean_k), (noisy_v, clean_v) = (t.split([n, t.shape[2] - n], dim=2) for t in (key, value))
    noisy_q, *clean_q = query.split([n, queries - n] if queries > n else [n], dim=2)
    on_gpu = _as_on_gpu or query.device.type != "cpu"
    rows = _ROWS if on_gpu else _ROWS_ON_CPU
    parts = []
    unmasked = streams.window is None and not dropout and has_kernel(noisy_q, on_gpu=on_gpu)
    if unmasked:
        parts.append(past_and_own(noisy_q, clean_k, clean_v, noisy_k, noisy_v, scale))
    for start, q in [] if unmasked else _in_rows(noisy_q, rows):
        stop = start + q.shape[2]
        first, own = streams.first_key(start), slice(start, stop)
        keys = torch.cat([clean_k[:, :, first:stop], noisy_k[:, :, own]], dim=2)
        values = torch.cat([clean_v[:, :, first:stop], noisy_v[:, :, own]], dim=2)
        parts.append(attend(q, keys, values, streams.rows(start, stop)))
    for whole in clean_q:  # one, or none
        if streams.window is None:
            parts.append(attend(whole, clean_k, clean_v, is_causal=True))
            continue
        for start, q in _in_rows(whole, rows):
            part = slice(streams.first_key(start), start + q.shape[2])
            parts.append(attend(q, clean_k[:, :, part], clean_v[:, :, part], streams.clean_rows(start, part.stop)))
    return torch.cat(parts, dim=2)


def _in_rows(query: Tensor, rows: int) -> list[tuple[int, Tensor]]:
    """So many positions at a time, each with where they start; nothing of a stream without positions."""
    if not query.shape[2]:  # torch 2.11 cannot compile the split of an empty tensor
        return []
    return [(rows * i, part) for i, part in enumerate(query.split(rows, dim=2))]


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]].to(query.dtype)
    return F.dropout(weights, dropout) @ value


class KeysValues:
    """A mask that notes what attention would have seen, and lets it see nothing: for what a layer gives others.

    Attributes:
        key: (batch, key heads, length, dim), after whatever a class does to it.
        value: likewise.
    """

    key: Tensor
    value: Tensor

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        """Note keys and values; the queries as they are, which nobody reads."""
        self.key, self.value = key, value
        return query


class NotedStreams(KeysValues):
    """A mask that notes keys and values as well, and lets attention see what some streams do."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """`Streams.attend`."""
        self.key, self.value = key, value
        return self.streams.attend(module, query, key, value, **options)


def library_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Streams | KeysValues,
    *,
    kernel: str,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`two_streams` as an attention function of transformers (`AttentionInterface`): (batch, length, heads, dim).

    The mask says what is seen, the window of each layer included. `s_aux` is the library's name for sinks.
    """
    out = attention_mask.attend(
        module, query, key, value, scale=scaling, dropout=dropout, kernel=kernel, softcap=softcap, sinks=s_aux
    )
    return out.transpose(1, 2).contiguous(), None
