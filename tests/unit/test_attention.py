"""Two streams: what each position sees, by perturbation and with positive controls; memory; keys and values kept.

Blocks are compared by their context logits: what z says is added to them beside the network, and would hide it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers import CAUSAL_FAMILIES, HIDDEN, LENGTH, VOCAB, randomise_adaptive, seeded, tiny, token_batch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import diffusionblocks as db
from diffusionblocks.core.block import Block
from diffusionblocks.families import BlockCall
from diffusionblocks.layers import two_streams as attention
from diffusionblocks.layers.two_streams import KERNELS, Past, Streams, two_streams

PLACES = (0, 1, 5, LENGTH - 1)
CPU = torch.device("cpu")


def block_of(family: str = "llama", previous: bool = True, **overrides: Any) -> Block:
    """The last of two blocks, in evaluation mode, with adaptive norms that act."""
    target = {"kind": "next-token", "previous": previous}
    model = db.convert(tiny(family, layers=4, **overrides), db.BlocksConfig(num_blocks=2, target=target))  # type: ignore[arg-type]
    randomise_adaptive(model)
    return model.eval().block(1)


def noise(rows: int = 3, length: int = LENGTH, seed: int = 7) -> Tensor:
    return torch.randn(rows, length, HIDDEN, generator=seeded(seed))


def other(ids: Tensor, places: slice) -> Tensor:
    changed = ids.clone()
    changed[:, places] = (changed[:, places] + 11) % VOCAB
    return changed


# ---- what is seen -----------------------------------------------------------------------------------------------


@torch.no_grad()
def leaks(block: Block) -> list[str]:
    """What a position sees and should not, or does not see and should: by changing one thing at a time."""
    ids, z, level = token_batch(3)["input_ids"], noise(), torch.tensor([0.05, 0.2, 0.3])
    clean: list[Tensor] = []
    norm = block.network.get_submodule("model.norm")

    def both(ids: Tensor, z: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Context logits of the noisy positions, and the clean stream."""
        hidden = block.family.hidden

        def spy(call: BlockCall) -> tuple[Tensor, Tensor]:
            # The last layer runs at the noisy positions alone, unless the clean stream is read.
            nothing, lean = hidden(call)
            assert nothing.shape == (3, 0, HIDDEN)
            states, raw = hidden(dataclasses.replace(call, clean_output=True))
            torch.testing.assert_close(lean, raw, rtol=1e-5, atol=1e-5)
            clean.append(norm(states))
            return nothing, lean

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(block.family, "hidden", spy)
            return block({"input_ids": ids}, z, level, context=True), clean[-1]

    noisy, stream = both(ids, z, level)
    found: list[str] = []

    def expect(what: str, after: Tensor, before: Tensor, *, same: bool) -> None:
        if same != bool(((after - before).abs().amax(dim=-1) < 1e-5).all()):
            found.append(what)

    for i in PLACES:
        after, after_clean = both(other(ids, slice(i, None)), z, level)
        expect(f"noisy <= {i}, clean tokens >= {i}", after[:, : i + 1], noisy[:, : i + 1], same=True)
        expect(f"clean < {i}, clean tokens >= {i}", after_clean[:, :i], stream[:, :i], same=True)
        expect(f"clean {i}, clean token {i}", after_clean[:, i], stream[:, i], same=False)
        if i:
            after, after_clean = both(other(ids, slice(i - 1, i)), z, level)
            expect(f"noisy {i}, clean token {i - 1}", after[:, i], noisy[:, i], same=False)
            after, _ = both(other(ids, slice(0, 1)), z, level)
            expect(f"noisy {i}, clean token 0", after[:, i], noisy[:, i], same=False)
        rest = torch.arange(LENGTH) != i
        moved = z.clone()
        moved[:, i] += noise(seed=8)[:, i]
        after, after_clean = both(ids, moved, level)
        expect(f"noisy {i}, its own z", after[:, i], noisy[:, i], same=False)
        expect(f"the other noisy positions, z of {i}", after[:, rest], noisy[:, rest], same=True)
        expect(f"the clean stream, z of {i}", after_clean, stream, same=True)
    after, after_clean = both(ids, z, level * 0.7)
    expect("noisy, the level", after, noisy, same=False)
    expect("the clean stream, the level", after_clean, stream, same=True)
    return found


@pytest.mark.each_value
@pytest.mark.parametrize("previous", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_a_position_sees_its_past_and_itself_alone(family: str, kernel: str, previous: bool) -> None:
    assert leaks(block_of(family, previous, attn_implementation=kernel)) == []


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Leaves `sdpa` the masks with which it does what no kernel without one does."""
    monkeypatch.setattr(attention, "has_kernel", lambda query, *, on_gpu: False)
    return monkeypatch


@pytest.fixture
def unmasked(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Lets `sdpa` do without masks in float32 as well, in which a CPU keeps them."""
    monkeypatch.setattr(attention, "has_kernel", lambda query, *, on_gpu: query.shape[2] > 1)
    return monkeypatch


@pytest.mark.usefixtures("unmasked")
def test_without_a_mask_too() -> None:
    assert leaks(block_of()) == []


def test_in_chunks_of_rows_too(masked: pytest.MonkeyPatch) -> None:
    masked.setattr(attention, "_ROWS_ON_CPU", 5)
    assert leaks(block_of()) == []


def test_a_kernel_that_lets_the_answer_through_is_found(unmasked: pytest.MonkeyPatch) -> None:
    """The positive control of what needs no mask: keys up to the position's own."""

    def inclusive(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    unmasked.setattr(attention, "past_and_own", inclusive)
    assert {f"noisy <= {i}, clean tokens >= {i}" for i in PLACES} <= set(leaks(block_of()))


def test_a_mask_that_lets_the_answer_through_is_found(masked: pytest.MonkeyPatch) -> None:
    """The positive control: `<=` where there should be `<`."""

    def rows(self: Streams, start: int, stop: int) -> Tensor:
        query, key = self.positions[0, start:stop, None], self.positions[0, :stop]
        return torch.cat([key <= query, torch.eye(stop - start, dtype=torch.bool)], dim=1)

    masked.setattr(Streams, "rows", rows)
    assert set(leaks(block_of())) == {f"noisy <= {i}, clean tokens >= {i}" for i in PLACES}


def test_a_mask_that_hides_the_past_or_shows_other_noise_is_found(masked: pytest.MonkeyPatch) -> None:
    right = Streams.rows
    masked.setattr(Streams, "rows", lambda s, a, b: right(s, a, b) & (torch.arange(b + b - a) >= b))
    assert "noisy 5, clean token 4" not in leaks(block_of())  # it comes in by the position's own input
    assert "noisy 5, clean token 4" in leaks(block_of(previous=False))
    masked.setattr(Streams, "rows", lambda s, a, b: right(s, a, b) | (torch.arange(b + b - a) == b))
    assert "the other noisy positions, z of 0" in leaks(block_of())


def test_the_masks_are_those_that_are_written_out_by_hand() -> None:
    n = 6
    streams = Streams(n, n, CPU)
    expected = torch.zeros(2 * n, 2 * n, dtype=torch.bool)
    for i in range(n):
        expected[i, i] = True
        expected[i, n : n + i] = True
        expected[n + i, n : n + i + 1] = True
    assert torch.equal(streams.whole(), expected)
    assert torch.equal(streams.positions, torch.arange(n).repeat(2)[None])
    for start, stop in ((0, 6), (0, 2), (2, 5)):
        wanted = torch.cat([expected[start:stop, n : n + stop], expected[start:stop, start:stop]], dim=1)
        assert torch.equal(streams.rows(start, stop), wanted)


@pytest.mark.parametrize("window", [1, 2, 4, 6])
def test_a_window_hides_what_is_behind_it(window: int) -> None:
    """Position i of either stream sees i - window + 1 to i: a noisy one itself in place of the last."""
    n = 6
    streams = Streams(n, n, CPU).within(window)
    expected = torch.zeros(2 * n, 2 * n, dtype=torch.bool)
    for i in range(n):
        first = max(0, i - window + 1)
        expected[i, i] = True
        expected[i, n + first : n + i] = True
        expected[n + i, n + first : n + i + 1] = True
    assert torch.equal(streams.whole(), expected)
    assert (streams.window is None) == (window >= n)  # as long as the text, it hides nothing
    for start, stop in ((0, 6), (0, 2), (2, 5)):
        first = streams.first_key(start)
        noisy = torch.cat([expected[start:stop, n + first : n + stop], expected[start:stop, start:stop]], dim=1)
        assert torch.equal(streams.rows(start, stop), noisy)
        assert torch.equal(streams.clean_rows(start, stop), expected[n + start : n + stop, n + first : n + stop])
        assert not expected[start:stop, n : n + first].any()  # what is left out is hidden


@pytest.mark.parametrize("window", [1, 3, 70, 129, 199])
def test_kernels_agree_beyond_a_window(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 200 positions FlexAttention skips whole tiles; the chunks of `sdpa` leave out keys."""
    length = 200
    streams = Streams(length, length, CPU).within(window)
    q, k, v = (torch.randn(2, heads, 2 * length, 8, generator=seeded(i)) for i, heads in enumerate((4, 2, 2)))
    for queries in (2 * length, length):  # both streams, and the noisy one alone
        eager = two_streams(q[:, :, :queries], k, v, streams, kernel="eager")
        for kernel in ("sdpa", "flex_attention"):
            torch.testing.assert_close(
                two_streams(q[:, :, :queries], k, v, streams, kernel=kernel), eager, rtol=1e-5, atol=1e-5
            )
        full = two_streams(q[:, :, :queries], k, v, Streams(length, length, CPU), kernel="eager")
        assert torch.equal(full[:, :, :window], eager[:, :, :window])
        assert not torch.allclose(full[:, :, length - 1], eager[:, :, length - 1], atol=1e-3)


@pytest.mark.parametrize("length", [6, 200])
def test_flex_attentions_mask_is_the_same(length: int) -> None:
    """Above 128 positions it skips whole tiles."""
    streams = Streams(length, length, CPU)
    q, k, v = (torch.randn(2, 4, 2 * length, 8, generator=seeded(i)) for i in range(3))
    flex, eager = (two_streams(q, k, v, streams, kernel=kernel) for kernel in ("flex_attention", "eager"))
    torch.testing.assert_close(flex, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_one_stream_is_compiled_too(window: int | None) -> None:
    """As `noise_input: false` trains: torch 2.11 cannot compile the split of a stream without positions."""
    streams = Streams(0, LENGTH, CPU).within(window)
    q, k, v = (torch.randn(2, 4, LENGTH, 8, generator=seeded(i)).requires_grad_() for i in range(3))
    eager = two_streams(q, k, v, streams, kernel="eager")
    compiled = torch.compile(two_streams, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, streams, kernel="sdpa"), eager, rtol=1e-5, atol=1e-5)


def test_a_scale_and_dropout_are_passed_on() -> None:
    streams = Streams(LENGTH, LENGTH, CPU)
    q, k, v = (torch.randn(2, 4, 2 * LENGTH, 8, generator=seeded(i)) for i in range(3))
    for kernel in KERNELS:
        found = two_streams(q, k, v, streams, scale=0.1, kernel=kernel)
        torch.testing.assert_close(found, two_streams(q, k, v, streams, scale=0.1, kernel="eager"))
        assert not torch.allclose(found, two_streams(q, k, v, streams, kernel=kernel), atol=1e-2)
    for kernel in ("sdpa", "eager"):
        dropped = [two_streams(q, k, torch.ones_like(v), streams, dropout=0.5, kernel=kernel) for _ in range(2)]
        assert not torch.equal(*dropped)
        many = torch.stack(
            [two_streams(q, k, torch.ones_like(v), streams, dropout=0.5, kernel=kernel) for _ in range(300)]
        )
        torch.testing.assert_close(many.mean(dim=(0, 1, 2, 4)), torch.ones(2 * LENGTH), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("length", [2, 5, 130])
def test_without_a_mask_outputs_and_gradients_are_the_references(length: int) -> None:
    """To the rounding of float64, where two queries share a key and where the noisy positions are alone."""
    streams = Streams(length, length, CPU)
    inputs = [
        torch.randn(2, heads, 2 * length, 8, generator=seeded(i), dtype=torch.float64, requires_grad=True)
        for i, heads in enumerate((4, 2, 2))
    ]
    weight = torch.randn(2, 4, 2 * length, 8, generator=seeded(3), dtype=torch.float64)
    for queries in (2 * length, length):
        outputs = [
            two_streams(inputs[0][:, :, :queries], *inputs[1:], streams, scale=0.7, kernel=kernel)
            for kernel in ("sdpa", "eager")
        ]
        sdpa, eager = ([out, *torch.autograd.grad((out * weight[:, :, :queries]).sum(), inputs)] for out in outputs)
        torch.testing.assert_close(sdpa, eager, rtol=1e-12, atol=1e-12)


def test_without_a_mask_numbers_of_a_head_may_lie_anywhere() -> None:
    """torch's kernel, called directly, reads its memory as if they lay side by side."""
    inputs = [torch.randn(2, 4, 8, 2 * LENGTH, generator=seeded(i), dtype=torch.float64) for i in range(3)]
    inputs = [tensor.transpose(-1, -2).requires_grad_() for tensor in inputs]
    outputs = [two_streams(*inputs, Streams(LENGTH, LENGTH, CPU), kernel=kernel) for kernel in ("sdpa", "eager")]
    sdpa, eager = ([out, *torch.autograd.grad(out.square().sum(), inputs)] for out in outputs)
    torch.testing.assert_close(sdpa, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_without_a_mask_a_gpu_is_the_reference_to_rounding(compiled: bool) -> None:
    """In bfloat16 it is as near to float32 as the reference in bfloat16 is, in a CUDA graph's steps too."""
    length, device = 200, torch.device("cuda")
    streams = Streams(length, length, device)
    wide = [torch.randn(2, heads, 2 * length, 64, generator=seeded(i)).to(device) for i, heads in enumerate((4, 2, 2))]
    weight = torch.randn(2, 4, 2 * length, 64, generator=seeded(3)).to(device)

    def step(kernel: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [tensor.to(dtype).requires_grad_() for tensor in wide]
        out = (attend if kernel == "sdpa" else two_streams)(*inputs, streams, kernel=kernel)
        return [out, *torch.autograd.grad((out.float() * weight).sum(), inputs)]

    attend = torch.compile(two_streams) if compiled else two_streams
    exact, near = step("eager", torch.float32), step("eager", torch.bfloat16)
    for one, two, true in zip(step("sdpa", torch.bfloat16), near, exact, strict=True):
        assert (one - true).norm() <= 2 * (two - true).norm() + 1e-3 * true.norm()


def test_compiled_it_is_the_same_without_a_mask() -> None:
    """One graph, forward and backward, under autocast as in training."""
    streams = Streams(LENGTH, LENGTH, CPU)
    inputs = [torch.randn(2, 4, 2 * LENGTH, 8, generator=seeded(i), requires_grad=True) for i in range(3)]

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return two_streams(*inputs, streams).float().square().sum()

    eager = torch.autograd.grad(loss(), inputs)
    torch._dynamo.reset()
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(), inputs)
    torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-2)


# ---- memory -----------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_mask_of_all_positions_by_all_is_made(masked: pytest.MonkeyPatch) -> None:
    n, rows = 3072, attention._ROWS_ON_CPU
    q, k, v = (torch.randn(1, 1, 2 * n, 8, generator=seeded(i), requires_grad=True) for i in range(3))
    with masked.context() as without, Largest() as kernel:
        without.setattr(attention, "has_kernel", lambda query, *, on_gpu: True)
        two_streams(q, k, v, Streams(n, n, CPU)).sum().backward()
    assert kernel.elements == q.numel()  # none at all
    with Largest() as sdpa:
        two_streams(q, k, v, Streams(n, n, CPU)).sum().backward()
    assert rows * n <= sdpa.elements <= rows * (n + rows)
    # The positive control: the reference makes it. On the meta device it takes no memory.
    meta = torch.device("meta")
    with Largest() as eager:
        two_streams(q.to(meta), k.to(meta), v.to(meta), Streams(n, n, meta), kernel="eager")
    assert eager.elements == (2 * n) ** 2 > 20 * sdpa.elements


# ---- keys and values that are kept --------------------------------------------------------------------------------

LEVEL = torch.tensor([0.05, 0.2, 0.3])
each_family = pytest.mark.parametrize("family", CAUSAL_FAMILIES)


@each_family
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("previous", [False, True])
@torch.no_grad()
def test_token_by_token_is_the_whole_at_once(family: str, kernel: str, previous: bool) -> None:
    block = block_of(family, previous, attn_implementation=kernel)
    ids, z = token_batch(3)["input_ids"], noise()
    whole = block({"input_ids": ids}, z, LEVEL, context=True)
    past = block.family.past(3, LENGTH, CPU)
    for i in range(LENGTH):
        new = ids[:, i - 1 : i] if i else ids[:, :0]
        step = block({"input_ids": new, "past": past}, z[:, i : i + 1], LEVEL, context=True)
        torch.testing.assert_close(step[:, 0], whole[:, i], rtol=1e-5, atol=1e-5)
        assert past.lengths.tolist() == [i] * 3


@each_family
@pytest.mark.parametrize("previous", [False, True])
@torch.no_grad()
def test_rows_of_different_lengths_and_several_calls_a_token(family: str, previous: bool) -> None:
    """As text is generated: prompts padded on the right, then tokens; at every token several levels and states z."""
    block = block_of(family, previous)
    ids, z = token_batch(3)["input_ids"], noise()
    levels = [torch.full((3,), sigma) for sigma in (0.3, 0.1, 0.02)]
    wholes = [block({"input_ids": ids}, z, level, context=True) for level in levels]
    past = block.family.past(3, 7 + 1 + 1 + 2 + 2, CPU)  # the longest row of each call
    lengths = torch.tensor([3, 0, 7])
    padded = ids[:, :7].clone()
    for row, count in enumerate(lengths.tolist()):
        padded[row, count:] = 26  # what stands in the padding has no meaning
    new, counts = padded, lengths
    assert past.capacity > LENGTH
    rows = torch.arange(3)
    for grow in ([1, 1, 1], [1, 0, 1], [0, 2, 1], [2, 1, 0], None):
        for call, (level, whole) in enumerate(zip(levels, wholes, strict=True)):
            inputs = {"input_ids": new, "counts": counts} if call == 0 else {"input_ids": new[:, :0]}
            step = block({**inputs, "past": past}, z[rows, lengths][:, None], level, context=True)
            assert past.lengths.tolist() == lengths.tolist()
            torch.testing.assert_close(step[:, 0], whole[rows, lengths], rtol=1e-5, atol=1e-5)
        if grow is not None:
            counts = torch.tensor(grow)
            new = torch.full((3, max(grow)), 26)
            for row, count in enumerate(grow):
                new[row, :count] = ids[row, lengths[row] : lengths[row] + count]
            lengths = lengths + counts


@torch.no_grad()
def test_what_is_kept_does_not_depend_on_the_level() -> None:
    """So it holds for every later call; the positive control is the test of the level in `leaks`."""
    block, ids = block_of(), token_batch(3)["input_ids"]
    pasts = []
    for sigma, seed in ((0.05, 1), (0.3, 2)):
        past = block.family.past(3, LENGTH, CPU)
        block({"input_ids": ids[:, :5], "past": past}, noise(seed=seed)[:, :1], torch.full((3,), sigma))
        pasts.append(past)
    for layer in pasts[0]._tensors:
        for ours, theirs in zip(pasts[0]._tensors[layer], pasts[1]._tensors[layer], strict=True):
            torch.testing.assert_close(ours, theirs)
            assert (ours[:, :, :5] != 0).any()
            assert (ours[:, :, 5:] == 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_token_by_token_is_the_whole_at_once_beyond_a_window(kernel: str) -> None:
    """Rows of different lengths; one layer slides, the other does not."""
    kinds = ["full_attention", "sliding_attention"] * 2
    values = {"use_sliding_window": True, "sliding_window": 4, "layer_types": kinds}
    block = block_of("qwen3", attn_implementation=kernel, **values)
    ids, z = token_batch(3)["input_ids"], noise()
    whole = block({"input_ids": ids}, z, LEVEL, context=True)
    past, rows = block.family.past(3, LENGTH + 7, CPU), torch.arange(3)
    lengths = torch.tensor([3, 0, 7])
    new, counts = ids[:, :7], lengths
    for _ in range(5):
        step = block({"input_ids": new, "counts": counts, "past": past}, z[rows, lengths][:, None], LEVEL, context=True)
        torch.testing.assert_close(step[:, 0], whole[rows, lengths], rtol=1e-5, atol=1e-5)
        new, counts = ids[rows, lengths][:, None], torch.ones_like(lengths)
        lengths = lengths + 1


def test_positions_of_new_tokens_go_on_where_the_rows_end() -> None:
    past = Past(2, 9)
    past.advance(torch.tensor([4, 1]), 4)
    streams = Streams(1, 2, CPU, past=past, counts=torch.tensor([2, 1]))
    assert streams.positions.tolist() == [[6, 4, 5], [2, 1, 2]]
    assert Streams(1, 0, CPU, past=past).positions.tolist() == [[4], [1]]


def test_more_tokens_than_there_is_room_for_are_refused() -> None:
    block, ids = block_of(), token_batch(3)["input_ids"]
    past = block.family.past(3, 4, CPU)
    z = noise()[:, :1]
    block({"input_ids": ids[:, :3], "past": past}, z, LEVEL)
    with pytest.raises(ValueError, match=r"3 \+ 2 tokens do not fit: the past was made for 4"):
        block({"input_ids": ids[:, 3:5], "past": past}, z, LEVEL)
    block({"input_ids": ids[:, 3:4], "past": past}, z, LEVEL)
    long = token_batch(2, length=65)["input_ids"]
    with pytest.raises(ValueError, match=r"65 tokens, but the model takes 64 \(max_position_embeddings\)"):
        block({"input_ids": long}, noise(2, 65), LEVEL[:2])
    past = block.family.past(2, 100, CPU)
    with pytest.raises(ValueError, match="65 tokens, but the model takes 64"):
        block({"input_ids": long[:, :64], "past": past}, noise(2, 1), LEVEL[:2])


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("llama", {"attn_implementation": "flash_attention_2"}, "flash_attention_2.*allowed: sdpa, flex_attention"),
        ("llama", {"attn_implementation": "flex_attention", "attention_dropout": 0.1}, "has no dropout"),
        ("qwen3", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type dynamic"),
    ],
)
def test_models_that_cannot_be_converted(family: str, values: dict[str, Any], message: str) -> None:
    implementation = values.pop("attn_implementation", "sdpa")
    model: Any = tiny(family, **values)
    model.config._attn_implementation = implementation  # the library asks for the kernel's package first
    with pytest.raises(ValueError, match=message):
        db.convert(model)
