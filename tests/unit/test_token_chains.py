"""Chains of tokens that stay on the model: the same tokens, of the weights as they are now, until they are released."""

from __future__ import annotations

import copy
import functools
import gc
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import randomise_adaptive
from test_continuation import PROMPTS, EagerSteps, converted, lists, original
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import diffusionblocks as db
from diffusionblocks.core.token_network import version_of
from diffusionblocks.noise import one_level
from diffusionblocks.sampling import token_chain

FAMILIES = ("llama", "recurrent", "one-stream")
NEW = 7


class _Record(TorchDispatchMode):
    """Notes every operation, the memory that it reads, and the memory of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        places = tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}, result))
        if function is not torch.ops.aten._local_scalar_dense.default:
            self.operations.append((function, *places))
        return result


class RecordedSteps:
    """What a CUDA graph does, on a CPU: the first step is recorded, and replayed on the same memory, without Python."""

    calls_to_prepare = 1
    made = 0

    def __init__(self, step: Callable[..., Tensor]) -> None:
        self._step, self._inputs, self._output = step, [], torch.empty(0)
        self._operations: list[tuple[Any, Any, Any, Any]] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not self._operations:
            RecordedSteps.made += 1
            self._inputs = [value.clone() for value in inputs]
            with _Record() as record:
                self._output = self._step(*self._inputs)
            self._operations = record.operations
            return self._output.clone()
        for memory, value in zip(self._inputs, inputs, strict=True):
            memory.copy_(value)
        for function, args, kwargs, places in self._operations:
            results = function(*args, **kwargs)
            for place, result in zip(tensors_in(places), tensors_in(results), strict=True):
                if place.data_ptr() != result.data_ptr():
                    place.copy_(result)
        return self._output.clone()


def tensors_in(values: Any) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, Tensor)]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_chain, "StaticSteps", RecordedSteps)
    monkeypatch.setattr(RecordedSteps, "made", 0)


def plain(model: db.DiffusionBlocks, prompts: Any = PROMPTS, new: int = NEW, **options: Any) -> list[list[int]]:
    return lists(model.generate(prompts, new, **options))


def captured(model: db.DiffusionBlocks, prompts: Any = PROMPTS, new: int = NEW, **options: Any) -> list[list[int]]:
    return lists(model.generate(prompts, new, cuda_graph=True, **options))


def other_weights(model: db.DiffusionBlocks) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: value + 0.3 * torch.randn(value.shape, generator=generator).to(value.device)
        if value.is_floating_point()
        else value
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }


# ---- the tokens of weights as they are now -------------------------------------------------------------------------


def step_of_an_optimizer(model: db.DiffusionBlocks) -> None:
    values = other_weights(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.copy_(values[name])


def load(model: db.DiffusionBlocks) -> None:
    model.load_state_dict(other_weights(model), strict=False)


def assign(model: db.DiffusionBlocks) -> None:
    model.load_state_dict(other_weights(model), strict=False, assign=True)


def move(model: db.DiffusionBlocks) -> None:
    """As `.to(device)` does: the parameters stay, their memory does not."""
    values = other_weights(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.data = values[name]


def cast(model: db.DiffusionBlocks) -> None:
    model.double()


def steer(model: db.DiffusionBlocks) -> None:
    model.block(0).layers()[0].register_forward_hook(lambda module, args, output: output + 1.0)


@pytest.mark.each_value
@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("change", [step_of_an_optimizer, load, assign, move, cast, steer])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"combine": "chain"}], ids=str)
def test_a_captured_step_answers_with_the_weights_of_now(change: Any, options: dict[str, Any]) -> None:
    model = converted("llama")
    before = plain(model, **options)
    assert captured(model, **options) == captured(model, **options) == before
    assert RecordedSteps.made == 1
    change(model)
    after = plain(model, **options)
    assert change is cast or after != before  # the positive control: a stale answer would be another
    assert captured(model, **options) == captured(model, **options) == after
    in_place = change in (step_of_an_optimizer, load)
    assert RecordedSteps.made == (1 if in_place else 2)


@pytest.mark.usefixtures("recorded")
def test_a_recorded_step_is_stale_where_nobody_looks_at_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The positive control of the test above: without a version the old weights answer."""
    model = converted("llama")
    monkeypatch.setattr("diffusionblocks.core.inference.version_of", lambda model: 0)
    assert captured(model) == plain(model)
    move(model)
    assert captured(model) != plain(model)


@pytest.mark.usefixtures("recorded")
def test_a_learned_table_and_the_noise_levels_are_read_anew() -> None:
    """What is made of the weights once a text, and stays in the memory that a step was captured with."""
    target = {"kind": "next-token", "logit_scale": 8.0}
    model = db.convert(original("llama"), db.BlocksConfig(num_blocks=2, shared="joint", target=target)).eval()
    randomise_adaptive(model)
    assert captured(model) == plain(model)
    with torch.no_grad():
        model.target.embedding.copy_(model.target.embedding.flip(0))
        model.block(0).shared.noise_embedding.mlp[2].weight.mul_(3)
    assert captured(model) == plain(model)
    assert RecordedSteps.made == 1


def test_what_is_compiled_and_plain_numbers_of_modules_are_part_of_a_version() -> None:
    """A step that was captured with them reads memory which nobody writes any more, or the number of then."""
    model = converted("llama")
    layer: Any = model.block(0).layers()[0]
    before = version_of(model)
    assert version_of(model) == before
    layer.input_layernorm.variance_epsilon *= 2
    other = version_of(model)
    assert other != before
    model.compile_layers(backend="eager")
    assert version_of(model) not in (before, other)


@pytest.mark.parametrize("options", [{}, {"cuda_graph": True}], ids=str)
def test_threads_take_turns(options: dict[str, Any]) -> None:
    """What norms are told of a level stands on the modules, and what was seen of a text in a chain that is kept."""
    model, texts = converted("llama"), [{"seeds": [s, s + 1, s + 2]} for s in range(4)]
    expected = [plain(model, **text) for text in texts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(lambda text: plain(model, **text, **options), texts)) == expected
    finally:
        sys.setswitchinterval(interval)
    assert len(copy.deepcopy(model).token_chains) == 0  # with a lock of its own


# ---- which calls share a chain ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("recorded")
def test_calls_of_one_shape_share_a_step_and_others_have_their_own() -> None:
    model = converted("llama")
    longer = [[*PROMPTS[0], 7, 7], PROMPTS[1], PROMPTS[2][:5]]
    for prompts, new, options in (
        (PROMPTS, NEW, {}),
        (longer, NEW + 3, {"seeds": [5, 6, 7]}),  # the same room
        (PROMPTS[:2], NEW, {}),
        (PROMPTS, NEW, {}),
    ):
        assert captured(model, prompts, new, **options) == plain(model, prompts, new, **options)
    assert RecordedSteps.made == len(model.token_chains) == 2
    for options in ({"temperature": 0.5}, {"top_p": 0.5}, {"num_tokens": 9}, {"combine": "chain"}, {"steps": 3}):
        count = RecordedSteps.made
        assert captured(model, **options) == plain(model, **options)
        assert RecordedSteps.made == count + 1, options
        assert len(model.token_chains) == 2
    model.release_graphs()
    assert len(model.token_chains) == 0
    assert captured(model) == plain(model)


def test_a_view_with_other_boundaries_and_a_copy_have_chains_of_their_own() -> None:
    model = converted("llama")
    captured(model)
    view = model.with_boundaries([2 * model.partition.boundaries[1]])
    assert len(model.token_chains) == 1
    assert len(view.token_chains) == len(copy.deepcopy(model).token_chains) == 0
    assert captured(view) == plain(view)


def test_a_model_with_chains_is_freed_when_it_is_let_go() -> None:
    gc.disable()
    try:
        model = converted("llama")
        captured(model)
        reference = weakref.ref(model)
        del model
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("recorded")
def test_what_a_failed_call_left_behind_is_forgotten() -> None:
    model = converted("llama")
    expected = captured(model)
    head = model.block(1).network.get_submodule("lm_head").weight
    layer = model.block(0).layers()[0].self_attn.v_proj.weight
    for weight in (head, layer):
        values = weight.detach().clone()
        weight.data.fill_(torch.nan)
        with pytest.raises(ValueError, match=r"block [01]: logits at level"):
            captured(model)
        weight.data.copy_(values)
        assert captured(model) == expected


def test_a_text_that_does_not_fit_is_refused_before_it_begins() -> None:
    model = converted("llama")
    for option in ("cuda_graph", "compile"):
        with pytest.raises(ValueError, match="68 tokens, but the model takes 64"):
            model.generate(PROMPTS, 60, **{option: True})
    assert len(captured(model, [[1, 2]], 62)[0]) == 64


# ---- what is made once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_conditioning_is_what_a_call_makes_of_its_level(family: str) -> None:
    model = converted(family)
    block = model.block(model.partition.num_blocks - 1)
    level = one_level(sum(block.interval) / 2, torch.empty(3))
    tokens = torch.tensor(PROMPTS[0][:4]).repeat(3, 1)
    z = torch.randn(3, 4 - model.target.shift, model.target.table.shape[1])
    conditioning = block.conditioning(level[:1])
    assert conditioning is not None
    expected = block({"input_ids": tokens}, z, level)
    torch.testing.assert_close(block({"input_ids": tokens}, z, level, conditioning=conditioning), expected)
    other = block.conditioning(level[:1] / 2)
    if family != "one-stream":  # which is not told it
        assert not torch.equal(block({"input_ids": tokens}, z, level, conditioning=other), expected)
        handle = next(iter(block.adaptive)).register_forward_hook(lambda *_: None)
        assert block.conditioning(level[:1]) is None
        handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "backend"), [("llama", "aot_eager"), ("one-stream", "eager")])
def test_compiled_tokens_are_the_same_and_blocks_share_a_graph(
    family: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    model, graphs = converted(family), 3 if family == "llama" else 2  # a block, what it feeds the next, the token
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    first = model.generate(PROMPTS, NEW, compile=True)
    assert lists(first) == plain(model)
    step_of_an_optimizer(model)
    again = model.generate(PROMPTS, NEW, compile=True)
    assert lists(again) == plain(model) != lists(first)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert first.preparation_seconds > again.preparation_seconds == 0
    torch.compiler.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_steps_answer_with_the_weights_of_now(family: str, compile: bool) -> None:
    """Blocks without noise input run side by side, each on a stream of its own."""
    model = converted(family).cuda()
    for change in (lambda model: model, step_of_an_optimizer, lambda model: model.cpu().cuda(), assign):
        change(model)
        model.cuda()
        graphs = [lists(model.generate(PROMPTS, 24, cuda_graph=True, compile=compile)) for _ in range(3)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(token_chain, "StaticSteps", EagerSteps)
            eager = lists(copy.deepcopy(model).generate(PROMPTS, 24, cuda_graph=True, compile=compile))
        assert graphs == [eager] * 3
