"""Nothing is read off NaN or an infinity: every place where a network's numbers become an answer."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LENGTH, VOCAB, convert, image_batch, seeded, tiny, token_batch
from torch import Tensor, nn

import diffusionblocks as db
from diffusionblocks.common.finite import FiniteCheck, all_finite, first_not_finite
from diffusionblocks.common.formats import read_json, write_json
from diffusionblocks.evaluation.accuracy import accuracy_grid
from diffusionblocks.evaluation.bits import bits_per_character
from diffusionblocks.evaluation.cross_entropy import decodable_share, language_row, plain_language_row
from diffusionblocks.evaluation.diagnostics import accuracy_by_level
from diffusionblocks.evaluation.frechet import FeatureStatistics, frechet_distance
from diffusionblocks.evaluation.mauve import HiddenFeatures
from diffusionblocks.evaluation.perplexity import generated_text, generative_perplexity
from diffusionblocks.evaluation.sample_quality import Setting, measure_samples
from diffusionblocks.noise.fitted_levels import isotonic
from diffusionblocks.sampling import continue_plainly
from diffusionblocks.training import EndToEnd
from diffusionblocks.training.run_log import JsonLines

#: The last layer of each family: a value in it reaches every output, so that a level or sample cannot miss it.
HEADS = {
    "vit": "classifier.bias",
    "dit": "final_layer.linear.bias",
    "masked": "head.linear.bias",
    "llama": "lm_head.weight",
}
BAD = (math.nan, math.inf, -math.inf)


def spoiled(family: str, value: float = math.nan, blocks: tuple[int, ...] = (0, 1)) -> db.DiffusionBlocks:
    """Two blocks, some of which have one value in their heads that is not finite."""
    model = convert(family, layers=2, num_blocks=2).eval()
    with torch.no_grad():
        for block in blocks:
            model.block(block).network.get_parameter(HEADS[family]).view(-1)[3] = value
    return model


def batches(family: str) -> Callable[[], list[dict[str, Tensor]]]:
    return lambda: [image_batch(6) if family in ("vit", "dit") else token_batch(6)]


def bits(model: db.DiffusionBlocks) -> Any:
    networks = {b: lambda z, t, b=b: model.block(b)({}, z, t) for b in range(2)}
    return bits_per_character(networks, model.noise, batches("masked")(), model.partition)  # type: ignore[arg-type]


def measured(model: db.DiffusionBlocks) -> Any:
    options: dict[str, Any] = {"pixels": lambda x: x, "measures": None}
    return measure_samples(model, [Setting(steps=4)], samples=4, batch_size=4, **options)


ANSWERS: list[tuple[str, str, Callable[[db.DiffusionBlocks], Any]]] = [
    ("predict", "vit", lambda m: m.predict(image_batch(6)["pixel_values"], steps=4)),
    ("predict, hard", "vit", lambda m: m.predict(image_batch(6)["pixel_values"], steps=4, feedback="hard")),
    ("forward", "vit", lambda m: m(**image_batch(6))),
    ("accuracy", "vit", lambda m: accuracy_grid(m, batches("vit"), steps=[2])),
    ("accuracy by level", "vit", lambda m: accuracy_by_level(m, batches("vit"))),
    ("sample", "dit", lambda m: m.sample([0, 1], steps=4)),
    ("sample, Heun", "dit", lambda m: m.sample([0, 1], steps=4, solver="heun")),
    ("measured samples", "dit", measured),
    ("generate", "masked", lambda m: m.generate([0, 1], steps=4)),
    ("generate, greedily", "masked", lambda m: m.generate([0, 1], steps=4, temperature=0)),
    ("infill", "masked", lambda m: m.generate([0], steps=4, template=torch.full((LENGTH,), VOCAB))),
    ("bits", "masked", bits),
    ("continue", "llama", lambda m: m.continue_texts([[1, 2]], 3)),
    ("continue, greedily", "llama", lambda m: m.continue_texts([[1, 2]], 3, temperature=0)),
    ("continue, top-p", "llama", lambda m: m.continue_texts([[1, 2]], 3, top_p=0.5, feedback="top-k")),
    ("cross-entropies", "llama", lambda m: language_row(m, batches("llama"), levels=4)),
]


@pytest.mark.parametrize(("family", "answer"), [case[1:] for case in ANSWERS], ids=[case[0] for case in ANSWERS])
def test_what_a_block_gives_is_no_answer_unless_it_is_finite(
    family: str, answer: Callable[[db.DiffusionBlocks], Any]
) -> None:
    answer(convert(family, layers=2, num_blocks=2).eval())  # the positive control
    for value in BAD if HEADS[family].endswith("bias") else BAD[:2]:
        with pytest.raises(ValueError, match=r"block \d: (logits|D|nats) .*NaN or infinite"):
            answer(spoiled(family, value))


def test_a_message_names_the_block_that_owns_the_level() -> None:
    images = image_batch(6)["pixel_values"]
    levels = convert("vit", layers=2, num_blocks=2).predict(images, steps=2).levels
    for block, level in enumerate(levels):
        with pytest.raises(ValueError, match=rf"block {block}: logits at level {level:g} hold NaN"):
            spoiled("vit", blocks=(block,)).predict(images, steps=2)


def test_controls_are_held_to_the_same() -> None:
    vit, llama = tiny("vit"), tiny("llama")
    with torch.no_grad():
        vit.classifier.bias[0], llama.lm_head.weight[3, 0] = math.nan, math.nan
    with pytest.raises(ValueError, match="ViTForImageClassification: logits hold NaN"):
        accuracy_grid(EndToEnd(vit), batches("vit"))
    with pytest.raises(ValueError, match="LlamaForCausalLM: logits hold NaN"):
        continue_plainly(llama, [[1, 2]], max_new_tokens=2, seeds=[0])
    with pytest.raises(ValueError, match="LlamaForCausalLM: cross-entropies hold NaN"):
        plain_language_row(EndToEnd(llama), batches("llama"))
    with pytest.raises(ValueError, match="the teacher LlamaForCausalLM gives NaN for the tokens of text 0"):
        generative_perplexity(llama, [[1, 2, 3]], 1)
    with torch.no_grad():
        llama.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="LlamaModel: features of texts hold NaN"):
        HiddenFeatures(llama)([[1, 2, 3]])


def test_numbers_that_come_from_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no examples"):
        accuracy_grid(convert("vit"), list)
    with pytest.raises(ValueError, match="no examples"):
        accuracy_by_level(convert("vit"), list)
    with pytest.raises(ValueError, match="the batch has no examples"):
        convert("vit")(pixel_values=torch.empty(0, 3, 8, 8), labels=torch.empty(0, dtype=torch.int64))
    llama = convert("llama")
    with pytest.raises(ValueError, match="no tokens"):
        decodable_share(llama.noise, llama.target, torch.empty(0, dtype=torch.int64))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples must be >= 1, got 0"):
        measure_samples(convert("dit"), [], samples=0, batch_size=1, pixels=lambda x: x, measures=None)


def test_a_loss_of_the_clean_stream_needs_a_second_token() -> None:
    target = {"kind": "next-token", "clean_weight": 0.5}
    model = db.convert(tiny("llama"), db.BlocksConfig(num_blocks=1, target=target))  # type: ignore[arg-type]
    assert model.loss(token_batch(2, length=2), 0, generator=seeded()).isfinite().all()
    with pytest.raises(ValueError, match="length > 1"):
        model.loss(token_batch(2, length=1), 0)
    plain = EndToEnd(tiny("llama"))
    assert plain.loss(token_batch(2, length=2)).isfinite().all()
    with pytest.raises(ValueError, match="length >= 2"):
        plain.loss(token_batch(2, length=1))


def test_distances_and_fits_of_what_is_not_finite() -> None:
    # Finite features whose covariance is not: max(0, NaN) would be 0, the best distance there is.
    a, b = FeatureStatistics(2), FeatureStatistics(2)
    for statistics, size in ((a, 1.0), (b, 1e200)):
        statistics.update(size * torch.randn(8, 2, dtype=torch.float64, generator=seeded()))
    with pytest.raises(ValueError, match=r"finite|NaN|too large"):
        frechet_distance(a, b)
    with pytest.raises(ValueError, match="values must be finite, got nan among 3"):
        isotonic([1.0, math.nan, 0.5])


# ---- JSON --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", BAD)
def test_json_has_finite_numbers_only(value: float, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"rows": [{"accuracy": 0.5}]})
    with pytest.raises(ValueError, match=rf"result.json is not written: rows.1.fd_test is {value}"):
        write_json(path, {"rows": [{"accuracy": 0.5}, {"fd_test": value}]})
    assert read_json(path) == {"rows": [{"accuracy": 0.5}]}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    log = JsonLines(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match=rf"log.jsonl is not written: loss is {value}"):
        log.log({"iteration": 1, "loss": value})
    log.close()
    path.write_text(json.dumps({"loss": value}))
    with pytest.raises(ValueError, match=r"result.json is not JSON: .* is no number"):
        read_json(path)


def test_an_infinite_perplexity_is_null_in_json(tmp_path: Path) -> None:
    class Never(nn.Module):
        """A teacher that rules token 1 out."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(3, 3)
            self.config = type("Config", (), {})()

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
            logits = self.embedding(input_ids)
            logits[..., 1] = -math.inf
            return type("Output", (), {"logits": logits})

    perplexity = generative_perplexity(Never(), [[0, 2, 1]], 1)
    assert perplexity.perplexity == math.inf
    row = generated_text("it", [[1, 2]], teacher="never", perplexity=perplexity)
    write_json(tmp_path / "row.json", row.to_dict())
    written = read_json(tmp_path / "row.json")["perplexity"]
    assert (written["perplexity"], written["cross_entropy"], written["tokens"]) == (None, None, 2)


# ---- the check itself --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", BAD)
def test_all_finite(dtype: torch.dtype, value: float) -> None:
    values = torch.randn(5, 7, generator=seeded()).to(dtype)
    assert all_finite(values)
    assert all_finite(values[:0])
    assert all_finite(torch.full((2,), torch.finfo(dtype).max, dtype=dtype))  # whose sum is none
    values[2, 3] = value
    assert not all_finite(values)
    assert not all_finite(values[:, 1:5:2])
    assert first_not_finite([("n", torch.ones(2, dtype=torch.int64)), ("a", values[:2]), ("b", values)]) == "b"
    assert first_not_finite([("a", values[:2]), ("meta", values.to("meta"))]) is None


def test_a_network_that_is_no_block_may_rule_classes_out() -> None:
    check = FiniteCheck("the denoiser")
    check.logits(torch.tensor([[0.0, -math.inf], [1.0, 2.0]]))
    for row in ([math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]):
        with pytest.raises(ValueError, match="the denoiser: logits hold NaN"):
            check.logits(torch.tensor([[1.0, 2.0], row]))
    with pytest.raises(ValueError, match="block 7: logits at level 2 hold NaN"):
        FiniteCheck(owner=lambda level: 7).logits(torch.tensor([[0.0, -math.inf]]), 2.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_asked_once() -> None:
    check = FiniteCheck(owner=lambda level: int(level))
    good = torch.ones(4, 5, device="cuda")
    bad = good.clone()
    bad[1, 2] = math.nan
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for level, logits in enumerate((good, good, bad, good, bad)):
            check.logits(logits, float(level))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(ValueError, match="block 2: logits at level 2 hold NaN"):
        check.read()
    model = spoiled("llama", blocks=(1,)).to("cuda")
    with pytest.raises(ValueError, match=re.escape("block 1: logits at level")):
        model.continue_texts([[1, 2]], 3)
