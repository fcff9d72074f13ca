"""Measures of generated text: perplexity under real teachers beside closed forms and a loop, diversity, MAUVE."""

import json
import lzma
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
from helpers import seeded
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from diffusionblocks.data.token_text import END, train_tokenizer
from diffusionblocks.evaluation.mauve import HiddenFeatures, mauve_score, reference_texts
from diffusionblocks.evaluation.perplexity import (
    distinct_n,
    generated_text,
    generative_perplexity,
    repetition_rate,
    self_bleu,
)
from diffusionblocks.evaluation.teachers import load_teacher, teacher_tokens
from diffusionblocks.experiments.recipe import EvaluateConfig
from diffusionblocks.experiments.tasks import LanguageConfig

VOCAB = 40


def teacher(family: str = "llama", **values: int) -> GPT2LMHeadModel | LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "gpt2":
            shape = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
            model = GPT2LMHeadModel(GPT2Config(**(shape | values)))
        else:
            shape = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
            model = LlamaForCausalLM(LlamaConfig(**(shape | {"intermediate_size": 32} | values)))
        with torch.no_grad():  # sharper than its initialisation, so that tokens differ in cost
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def texts(*lengths: int) -> list[Tensor]:
    g = seeded()
    return [torch.randint(VOCAB, (length,), generator=g) for length in lengths]


def plain_nats(model: torch.nn.Module, text: Tensor, prompt: int) -> Tensor:
    """One text at a time, without padding, in float64."""
    with torch.no_grad():
        logs = model(input_ids=text[None]).logits[0].double().log_softmax(-1)
    return torch.stack([-logs[i - 1, text[i]] for i in range(max(prompt, 1), len(text))])


# ---- perplexity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_perplexity_is_that_of_a_plain_loop(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, some, prompts = teacher(family), texts(9, 30, 4, 17, 30), [3, 20, 0, 1, 29]
    nats = [plain_nats(model, text, prompt) for text, prompt in zip(some, prompts, strict=True)]
    wanted = float(torch.cat(nats).mean())
    for batch_size, chunk in ((2, 64), (5, 3), (1, 64)):
        monkeypatch.setattr("diffusionblocks.evaluation.perplexity._CHUNK", chunk)
        found = generative_perplexity(model, some, prompts, batch_size=batch_size)
        assert found.cross_entropy == pytest.approx(wanted, rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(wanted), rel=1e-5)
        assert (found.tokens, found.texts) == (6 + 10 + 3 + 16 + 1, 5)
    lists = [text.tolist() for text in some]
    assert generative_perplexity(model, lists, prompts) == generative_perplexity(model, some, prompts)


def test_perplexity_is_exp_of_the_librarys_loss() -> None:
    model, (text,) = teacher(), texts(20)
    labels = text.clone()
    labels[:8] = -100
    found = generative_perplexity(model, [text], 8)
    assert found.cross_entropy == pytest.approx(model(input_ids=text[None], labels=labels[None]).loss.item(), rel=1e-5)
    assert found.standard_error is None


def test_a_teacher_that_knows_nothing_is_perplexed_by_its_vocabulary() -> None:
    model = teacher()
    model.lm_head.weight.data.zero_()
    found = generative_perplexity(model, texts(12, 7, 20), 5)
    assert found.perplexity == pytest.approx(VOCAB, rel=1e-6)
    assert found.standard_error == pytest.approx(0.0, abs=1e-4)


@pytest.mark.slow
def test_standard_error() -> None:
    model, some = teacher(), texts(*[12] * 50)
    found = generative_perplexity(model, some, 2)
    means = [float(plain_nats(model, text, 2).mean()) for text in some]
    # Of equal lengths the ratio's error is that of a mean; and exp's, to first order, times the perplexity.
    assert found.standard_error == pytest.approx(found.perplexity * statistics.stdev(means) / 50**0.5, rel=1e-4)
    # Of other lengths it is near the jackknife's.
    lengths = torch.randint(4, 25, (50,), generator=seeded(1)).tolist()
    some = texts(*lengths)
    found = generative_perplexity(model, some, 2)
    left = [generative_perplexity(model, some[:i] + some[i + 1 :], 2).perplexity for i in range(50)]
    jackknife = math.sqrt(49 / 50 * sum((p - statistics.fmean(left)) ** 2 for p in left))
    assert found.standard_error == pytest.approx(jackknife, rel=0.05)


def test_only_the_continuation_is_scored_and_the_prompt_is_read() -> None:
    model, (text,) = teacher(), texts(12)
    base = generative_perplexity(model, [text], 6)
    other = text.clone()
    other[11] = (other[11] + 1) % VOCAB
    assert generative_perplexity(model, [other], 6).cross_entropy != base.cross_entropy
    other = text.clone()
    other[3] = (other[3] + 1) % VOCAB
    assert (
        generative_perplexity(model, [other], 6).cross_entropy != base.cross_entropy
    )  # through what the teacher reads
    assert base.cross_entropy == pytest.approx(float(plain_nats(model, text, 6).mean()), rel=1e-5)
    assert base.cross_entropy != pytest.approx(float(plain_nats(model, text, 5).mean()), rel=1e-3)


def test_an_impossible_token_in_a_prompt_costs_nothing() -> None:
    model, (short, long) = teacher("gpt2"), texts(6, 12)
    model.lm_head = torch.nn.Linear(16, VOCAB)  # untied, with a bias
    model.lm_head.bias.data[7] = -math.inf
    short[short == 7], long[long == 7] = 8, 8
    long[5] = 7
    assert math.isfinite(generative_perplexity(model, [short, long], [2, 6]).cross_entropy)
    impossible = generative_perplexity(model, [short, long], [2, 5])
    assert (impossible.perplexity, impossible.standard_error) == (math.inf, None)


def test_start_token() -> None:
    model, (text,) = teacher(), texts(10)
    found = generative_perplexity(model, [text], 0, start=1)
    assert found.tokens == 10
    begun = torch.cat([torch.tensor([1]), text])
    assert found.cross_entropy == pytest.approx(float(plain_nats(model, begun, 1).mean()), rel=1e-5)
    assert generative_perplexity(model, [text], 0).tokens == 9  # nothing stands before the first


def test_a_teacher_comes_from_a_folder_of_safetensors_and_keeps_its_mode(tmp_path: Path) -> None:
    model, some = teacher(), texts(8, 9)
    model.save_pretrained(tmp_path / "kept")
    model.train()
    given = generative_perplexity(model, some, 2)
    assert model.training
    assert generative_perplexity(tmp_path / "kept", some, 2) == given
    assert not load_teacher(str(tmp_path / "kept")).training
    (tmp_path / "old").mkdir()
    model.config.save_pretrained(tmp_path / "old")
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_teacher(tmp_path / "old")


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    file = tmp_path / "text.txt"
    file.write_text("the cat sat on the mat. the théâtre was there. " * 40, encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_object=train_tokenizer([file], 300, tmp_path / "t.json"), bos_token=END)


def test_texts_become_the_teachers_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = ["the cat", "the th", "", "the théâ"]
    continuations = [" sat on", "éâtre was", "the mat", "tre"]
    tokens, lengths = teacher_tokens(tokenizer, prompts, continuations)
    for ids, length, prompt, continuation in zip(tokens, lengths, prompts, continuations, strict=True):
        assert ids[0] == 0  # the beginning
        assert tokenizer.decode(ids[1:]) == prompt + continuation
        assert tokenizer.decode(ids[length:]).endswith(continuation)
        assert prompt.startswith(tokenizer.decode(ids[1:length]))
    assert tokenizer.decode(tokens[0][lengths[0] :]) == " sat on"
    assert lengths[2] == 1
    straddling = tokenizer.decode(tokens[1][lengths[1] :])
    assert straddling == " théâtre was"  # the token " thé..." reaches across, and is scored
    with pytest.raises(ValueError, match="prompts: 1 for 2 texts"):
        teacher_tokens(tokenizer, ["a"], ["b", "c"])


def test_perplexity_refusals() -> None:
    model, some = teacher("gpt2"), texts(8, 9)
    with pytest.raises(ValueError, match=r"prompt_lengths: 1 for 2 texts"):
        generative_perplexity(model, some, [1])
    with pytest.raises(ValueError, match=r"prompt_lengths\[1\] = 10: must be from 0 to 9"):
        generative_perplexity(model, some, [1, 10])
    with pytest.raises(ValueError, match="no continuation has a token to score"):
        generative_perplexity(model, some, [8, 9])
    with pytest.raises(ValueError, match="ids from 3 to 40: the model has 0 to 39"):
        generative_perplexity(model, [[3, VOCAB]], 0)
    with pytest.raises(ValueError, match="has 65 tokens, the model takes at most 64"):
        generative_perplexity(model, texts(65), 0)
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        generative_perplexity(model, some, 0, batch_size=0)
    with pytest.raises(ValueError, match=r"whole numbers \(n,\), got torch.float32"):
        generative_perplexity(model, [torch.ones(3)], 0)


# ---- diversity -------------------------------------------------------------------------------------------


def test_references_are_the_first_documents_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [f"story {number} is told, word by word." for number in range(20)]
    text = "\n<|endoftext|>\n".join([documents[0], " \n", *documents[1:]])
    (tmp_path / "plain.txt").write_text(text)
    with lzma.open(tmp_path / "packed.txt.xz", "wt", encoding="utf-8") as file:
        file.write(text)
    for at_once in (7, 2**20):  # a separator may lie across two reads
        monkeypatch.setattr("diffusionblocks.evaluation.mauve._READ_AT_ONCE", at_once)
        for name in ("plain.txt", "packed.txt.xz"):
            for count in (1, 6, 20):
                assert reference_texts(tmp_path / name, count, "\n<|endoftext|>\n") == documents[:count]
    with pytest.raises(ValueError, match=r"has 20 documents between .*, and 21 references are needed"):
        reference_texts(tmp_path / "plain.txt", 21, "\n<|endoftext|>\n")
    with pytest.raises(FileNotFoundError, match="name a file of reference texts"):
        reference_texts(tmp_path / "none.txt", 1, "\n")


def bleu(candidate: list[str], references: list[list[str]], n: int) -> float:
    """BLEU-n of Papineni et al. 2002, word by word."""
    logs = 0.0
    for order in range(1, n + 1):
        grams = lambda text, k=order: [tuple(text[i : i + k]) for i in range(len(text) - k + 1)]  # noqa: E731
        own = grams(candidate)
        clipped = sum(min(own.count(g), max(grams(r).count(g) for r in references)) for g in set(own))
        logs += math.log(clipped / len(own)) / n if clipped else -math.inf
    nearest = min((len(r) for r in references), key=lambda length: (abs(length - len(candidate)), length))
    return math.exp(logs + min(0.0, 1 - nearest / len(candidate)))


def test_self_bleu_by_hand() -> None:
    texts = [
        "the cat sat on the mat",
        "the cat lay on the mat today",
        "a dog sat on the cat",
        "the the the the the cat",
    ]
    words = [text.split() for text in texts]
    for n in (1, 2, 3, 4):
        expected = statistics.fmean(bleu(w, words[:i] + words[i + 1 :], n) for i, w in enumerate(words))
        assert self_bleu(words, n) == pytest.approx(expected)
    assert self_bleu([words[0]] * 3) == pytest.approx(1)
    assert self_bleu([["a", "b"], ["c", "d"]], 2) == 0
    assert self_bleu([words[0], words[0], ["too", "short"]], 4) == pytest.approx(1)
    shorter = [words[0], words[0][:4]]
    assert self_bleu(shorter, 1) == pytest.approx((4 / 6 + math.exp(1 - 6 / 4)) / 2), "clipped; brevity"
    with pytest.raises(ValueError, match="self-BLEU needs two sequences of 4 items, of 2 there are 1"):
        self_bleu([words[0], ["a"]])


def test_diversity_by_hand() -> None:
    stuck, varied = ["the", "the", "the"], ["the", "cat", "saw", "the", "cat"]
    assert distinct_n([stuck], 1) == 1 / 3
    assert distinct_n([stuck], 2) == 1 / 2
    assert repetition_rate([stuck], 1) == pytest.approx(2 / 3)
    assert repetition_rate([stuck], 2) == 1 / 2
    assert distinct_n([varied], 2) == 3 / 4  # "the cat" twice
    assert repetition_rate([varied], 3) == 0.0
    # Pooled over the set: sequences that are all alike are seen; each sequence's own repetition does not see them.
    assert distinct_n([varied, varied], 2) == 3 / 8
    assert repetition_rate([varied, varied], 2) == pytest.approx(1 / 4)
    assert repetition_rate([stuck, varied, ["the"]], 2) == pytest.approx((1 / 2 + 1 / 4) / 2)  # the last is too short
    assert distinct_n([torch.tensor([5, 5, 5, 5]), [5, 5]], 2) == 1 / 4
    assert repetition_rate([torch.zeros(50, dtype=torch.int64)]) == pytest.approx(46 / 47)
    for measure in (distinct_n, repetition_rate):
        with pytest.raises(ValueError, match="no sequence has 3 items, of 1 sequences"):
            measure([[1, 2]], 3)
        with pytest.raises(ValueError, match="n must be >= 1, got 0"):
            measure([[1, 2]], 0)


def test_row() -> None:
    some = texts(8, 9)
    row = generated_text("model", some, teacher="t", perplexity=generative_perplexity(teacher(), some, 2))
    values = json.loads(json.dumps(row.to_dict()))
    assert values["continuations"] == 2
    assert values["distinct_2"] == distinct_n(some)
    assert values["perplexity"]["tokens"] == 13
    assert values["mauve"] == []
    assert generated_text("model", [[1, 2]]).repetition_4 is None


def test_recipe_section() -> None:
    section = TypeAdapter(EvaluateConfig)
    found = section.validate_python({"kind": "language", "prompt_length": 0, "teacher": "runs/judge/model"})
    assert isinstance(found, LanguageConfig)
    assert (found.samples, found.new_tokens, found.levels, found.steps, found.mauve) == (16, 50, 16, None, None)
    for wrong in ({"top_p": 0.0}, {"top_p": 1.1}, {"temperature": -1.0}, {"steps": 0}, {"bits": 1}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            section.validate_python({"kind": "language"} | wrong)


# ---- MAUVE -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_features_are_the_last_hidden_states(family: str) -> None:
    model, some = teacher(family), texts(5, 12, 1, 9)
    with torch.no_grad():
        states = [model(input_ids=text[None], output_hidden_states=True).hidden_states[-1][0] for text in some]
    last = HiddenFeatures(model, batch_size=3)(some)
    mean = HiddenFeatures(model, pooling="mean", batch_size=3)(some)
    assert last.dtype == torch.float32
    assert torch.allclose(last, torch.stack([state[-1] for state in states]), atol=1e-5)
    assert torch.allclose(mean, torch.stack([state.mean(0) for state in states]), atol=1e-5)
    cut = HiddenFeatures(model, max_tokens=5)(some)
    assert torch.allclose(cut[1], states[1][4], atol=1e-5)


def test_features_of_strings(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    teacher(vocab_size=300).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    features = HiddenFeatures(tmp_path / "model")
    words = ["the cat", "there"]
    assert torch.equal(features(words), features([tokenizer(text)["input_ids"] for text in words]))
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        features(["the", ""])
    with pytest.raises(ValueError, match="need the model's tokenizer"):
        HiddenFeatures(teacher())(words)
    with pytest.raises(ValueError, match="pooling = 'first': must be"):
        HiddenFeatures(teacher(), pooling="first")  # type: ignore[arg-type]


def test_mauve_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mauve", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"mauve-text.*pip install 'diffusionblocks\[mauve\]'"):
        mauve_score(torch.randn(20, 4), torch.randn(20, 4))


def test_mauve_refusals() -> None:
    some = torch.randn(20, 4)
    with pytest.raises(ValueError, match=r"got \(20, 4\) and \(20, 3\)"):
        mauve_score(some, some[:, :3])
    with pytest.raises(ValueError, match="must be finite"):
        mauve_score(some, some / 0)
    with pytest.raises(ValueError, match="at least one seed"):
        mauve_score(some, some, seeds=())
    with pytest.raises(ValueError, match="buckets = 21: must be from 2 to 20"):
        mauve_score(some, some, buckets=21)


def test_mauve_tells_texts_apart() -> None:
    package = pytest.importorskip("mauve", reason="mauve-text is not installed (extra: mauve)")
    g = seeded()
    real, alike = torch.randn(200, 8, generator=g), torch.randn(200, 8, generator=g)
    shifted = alike + 2.0
    seeds = (0, 1)
    near, near_small = mauve_score(real, alike, seeds=seeds)
    far, far_small = mauve_score(real, shifted, seeds=seeds)
    assert (near.scaling, near_small.scaling, near.buckets) == (5.0, 0.2, 20)
    assert near.mean > 0.7 > 0.2 > far.mean
    assert far_small.mean > far.mean + 0.3  # the small scaling inflates
    assert near.mean == statistics.fmean(near.scores)
    assert near.deviation == statistics.stdev(near.scores)
    reference = package.compute_mauve(p_features=real.numpy(), q_features=alike.numpy(), seed=1)
    assert near.scores[1] == reference.mauve
    assert mauve_score(real, real.clone(), seeds=(0,))[0].mean == pytest.approx(1.0, abs=0.01)


def test_features_are_the_references() -> None:
    utils = pytest.importorskip("mauve.utils", reason="mauve-text is not installed (extra: mauve)")
    model, some = teacher("gpt2"), texts(5, 12, 1, 9)
    theirs = utils.featurize_tokens_from_model(model, [text[None] for text in some], 2)
    assert torch.allclose(HiddenFeatures(model)(some), theirs, atol=1e-5)
