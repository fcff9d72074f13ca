"""Tiny real models of transformers and diffusers, and a toy problem, for tests that need a network."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import diffusionblocks as db
from diffusionblocks.core.saved_model import INDEX
from diffusionblocks.data import ImageData, digits
from diffusionblocks.experiments.recipe import Recipe, parse_recipe

FAMILIES = ("vit", "deit", "dinov2")
#: further classifiers: name -> class of transformers, and what its config needs beside the common sizes
MORE_CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit-msn": ("ViTMSNForImageClassification", {"intermediate_size": 64}),
    "dinov2-registers": ("Dinov2WithRegistersForImageClassification", {"mlp_ratio": 2, "num_register_tokens": 3}),
    "ijepa": ("IJepaForImageClassification", {"intermediate_size": 64}),
    "siglip": ("SiglipForImageClassification", {"intermediate_size": 64}),
    "siglip2": ("Siglip2ForImageClassification", {"intermediate_size": 64, "num_patches": 4}),
    "clip": ("CLIPForImageClassification", {"intermediate_size": 64}),
    "metaclip2": ("MetaClip2ForImageClassification", {"intermediate_size": 64}),
    "dinov3": (
        "DINOv3ViTForImageClassification",
        {"intermediate_size": 64, "num_register_tokens": 3, "pos_embed_rescale": None},
    ),
    "beit": ("BeitForImageClassification", {"intermediate_size": 64, "use_relative_position_bias": True}),
}
DIT_FAMILIES = ("dit", "diffusers-dit")
CAUSAL_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
CAUSAL_FAMILIES = tuple(CAUSAL_CLASSES)
#: classes whose layers are Llama's, or nearly: `test_causal_variants_parity.py` goes through them
CAUSAL_VARIANTS = {
    "ministral": "MinistralForCausalLM",
    "granite": "GraniteForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "gpt-oss": "GptOssForCausalLM",
    "gpt-neox": "GPTNeoXForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2-moe": "Qwen2MoeForCausalLM",
    "qwen3-moe": "Qwen3MoeForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "olmo": "OlmoForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "phi": "PhiForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "granite-moe": "GraniteMoeForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "opt": "OPTForCausalLM",
}
#: masked language models of transformers: name -> class, and what its config needs beside the common sizes
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", {}),
    "roberta": ("RobertaForMaskedLM", {}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", {}),
    "camembert": ("CamembertForMaskedLM", {}),
    "electra": ("ElectraForMaskedLM", {"embedding_size": 16}),
    "distilbert": ("DistilBertForMaskedLM", {}),
    "modernbert": ("ModernBertForMaskedLM", {"local_attention": 6}),
}
VOCAB = 27
LENGTH = 12
POLICIES = ("joint", "replicated", "frozen")
NUM_LABELS = 4
HIDDEN = 32
IMAGE = 8


def tiny(family: str = "vit", *, layers: int = 3, seed: int = 0, **overrides: Any) -> nn.Module:
    """A tiny model whose every parameter is random, as in a pretrained model (none zero, none one).

    `family` is a classifier of `FAMILIES` or `MORE_CLASSIFIERS`, a diffusion transformer of `DIT_FAMILIES`, a
    language model of `CAUSAL_FAMILIES` or `CAUSAL_VARIANTS`, one of `ENCODERS`, or `masked`.
    """
    common = {
        "image_size": IMAGE,
        "patch_size": 4,
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_labels": NUM_LABELS,
    } | overrides
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module
        if family == "vit":
            model = ViTForImageClassification(ViTConfig(**({"intermediate_size": 64} | common)))
        elif family == "deit":
            model = DeiTForImageClassification(DeiTConfig(**({"intermediate_size": 64} | common)))
        elif family == "dinov2":
            model = Dinov2ForImageClassification(Dinov2Config(**({"mlp_ratio": 2} | common)))
        elif family in MORE_CLASSIFIERS:
            model = fresh_classifier(family, **common)
        elif family in DIT_FAMILIES:
            model = fresh_dit(family, layers=layers, **overrides)
        elif family == "masked":
            model = fresh_masked(layers=layers, **overrides)
        elif family in ENCODERS:
            model = fresh_encoder(family, layers=layers, **overrides)
        elif family in {*CAUSAL_FAMILIES, *CAUSAL_VARIANTS}:
            model = fresh_causal(family, layers=layers, **overrides)
        else:
            raise ValueError(family)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def fresh_classifier(family: str, **values: Any) -> nn.Module:
    """A tiny classifier of `MORE_CLASSIFIERS` as its class initialises it; sizes go to the part that has them."""
    name, more = MORE_CLASSIFIERS[family]
    found = db.families.model_class_named(name)
    part = db.families.family_named(name).config_part
    values = more | values
    if "num_patches" in values:  # which says the size of an image
        del values["image_size"]
    if part is not None:
        whole = {key: values.pop(key) for key in ("num_labels", "attn_implementation") if key in values}
        values = whole | {part: values}
    return found(found.config_class(**values))  # type: ignore[no-any-return]


def fresh_dit(family: str = "dit", *, layers: int = 3, **overrides: Any) -> nn.Module:
    """A tiny diffusion transformer as its class initialises it: ours with a zero head and zero modulations."""
    from diffusers import DiTTransformer2DModel  # takes seconds to import: only where it is needed

    from diffusionblocks.models import DiT

    common = {"sample_size": IMAGE, "patch_size": 2, "in_channels": 3, "num_layers": layers, "num_attention_heads": 2}
    if family == "dit":
        ours = {"hidden_size": HIDDEN, "mlp_ratio": 2.0, "num_classes": NUM_LABELS}
        return DiT(**(common | ours | overrides)).eval()
    theirs = {"attention_head_dim": HIDDEN // 2, "num_embeds_ada_norm": NUM_LABELS}
    return DiTTransformer2DModel(**(common | theirs | overrides)).eval()  # type: ignore[no-any-return]


def fresh_masked(*, layers: int = 3, **overrides: Any) -> nn.Module:
    """A tiny masked text model as its class initialises it, with a zero head and zero modulations."""
    from diffusionblocks.models import MaskedTransformer

    common = {"vocab_size": VOCAB, "sequence_length": LENGTH, "num_layers": layers, "num_attention_heads": 2}
    sizes = {"hidden_size": HIDDEN, "embedding_size": 16, "mlp_size": 48}
    return MaskedTransformer(**(common | sizes | overrides)).eval()


def fresh_causal(family: str = "llama", *, layers: int = 3, **overrides: Any) -> nn.Module:
    """A tiny causal language model as its class initialises it: two queries share a key; untied unless overridden."""
    common = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HIDDEN // 4}
    rest = {"max_position_embeddings": 64, "tie_word_embeddings": False, "eos_token_id": None, "pad_token_id": None}
    found = getattr(transformers, (CAUSAL_CLASSES | CAUSAL_VARIANTS)[family])
    return found(found.config_class(**(common | heads | rest | overrides))).eval()  # type: ignore[no-any-return]


def fresh_encoder(family: str = "bert", *, layers: int = 3, **overrides: Any) -> nn.Module:
    """A tiny masked language model of `ENCODERS` as its class initialises it: its last token, `VOCAB`, is the mask."""
    name, more = ENCODERS[family]
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 2}
    if family == "distilbert":
        sizes = {"dim": HIDDEN, "hidden_dim": 48, "n_layers": layers, "n_heads": 2}
    rest = {"vocab_size": VOCAB + 1, "max_position_embeddings": 24, "pad_token_id": 1}
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
    found = getattr(transformers, name)
    return found(found.config_class(**(sizes | rest | none | more | overrides))).eval()  # type: ignore[no-any-return]


def token_batch(size: int = 6, seed: int = 0, length: int = LENGTH) -> dict[str, Tensor]:
    """Random sequences."""
    return {"input_ids": torch.randint(VOCAB, (size, length), generator=seeded(seed))}


def convert(family: str = "vit", *, layers: int = 3, seed: int = 0, **config: Any) -> db.DiffusionBlocks:
    """A converted tiny model; `config` goes to BlocksConfig."""
    return db.convert(tiny(family, layers=layers, seed=seed), db.BlocksConfig(**config))


def seeded(seed: int = 0) -> torch.Generator:
    """A generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def noise_batch(size: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random images with labels that cycle."""
    images = torch.randn(size, 3, IMAGE, IMAGE, generator=seeded(seed)).to(dtype)
    return {"pixel_values": images, "labels": torch.arange(size) % NUM_LABELS}


def image_batch(size: int = 6, seed: int = 0, std: float = 0.5) -> dict[str, Tensor]:
    """Gaussian images of the standard deviation that EDM's preconditioning assumes, with labels that cycle."""
    batch = noise_batch(size, seed)
    return {**batch, "pixel_values": std * batch["pixel_values"]}


def toy_batch(size: int, seed: int, spread: float = 2.0) -> dict[str, Tensor]:
    """A separable problem: one fixed pattern a class, plus so much noise that a low-noise block had better read z."""
    patterns = torch.randn(NUM_LABELS, 3, IMAGE, IMAGE, generator=seeded(1234))
    g = seeded(seed)
    labels = torch.randint(NUM_LABELS, (size,), generator=g)
    return {
        "pixel_values": patterns[labels] + spread * torch.randn(size, 3, IMAGE, IMAGE, generator=g),
        "labels": labels,
    }


def randomise_adaptive(model: nn.Module, std: float = 0.3, seed: int = 5) -> None:
    """Give what starts at zero random weights: adaptive norms, so that the level matters, and the way in for z."""
    g = seeded(seed)
    done: set[int] = set()
    for module in model.modules():
        if type(module).__name__ in ("AdaptiveNorms", "NoisyToken", "LinearLabelToken"):
            for parameter in module.linear.parameters():
                if id(parameter) not in done:
                    done.add(id(parameter))
                    with torch.no_grad():
                        parameter.copy_(std * torch.randn(parameter.shape, generator=g))


def record_calls(model: db.DiffusionBlocks) -> list[tuple[int, float]]:
    """(place in the list of blocks, level) of every call of a block."""
    calls: list[tuple[int, float]] = []
    for place, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda _, args, place=place: calls.append((place, args[2][0].item())))
    return calls


def train_a_little(
    model: db.DiffusionBlocks, batch_of: Callable[..., dict[str, Tensor]] = token_batch, steps: int = 3
) -> None:
    """Each block in turn, on batches of `batch_of(size, seed=step)`."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(steps):
        for b in range(model.partition.num_blocks):
            model.loss(batch_of(8, seed=step), block=b, generator=seeded(step)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


def train_blocks(model: db.DiffusionBlocks, steps: int = 80, *, seed: int = 0, lr: float = 3e-3) -> None:
    """Train every block for `steps` real AdamW steps on the toy problem, the blocks taking turns."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    g = seeded(seed)
    for step in range(steps):
        for b in range(model.partition.num_blocks):
            loss = model.loss(toy_batch(32, seed=step), block=b, generator=g).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@contextmanager
def without_generated_code(backend: str = "aot_eager") -> Iterator[None]:
    """torch.compile captures graphs as ever, and runs them without generating code for a CPU, which takes long.

    Args:
        backend: `eager` runs what dynamo captured, `aot_eager` also traces its backward pass.
    """
    torch._dynamo.reset()
    try:
        with torch.compiler.set_stance("default", force_backend=backend):
            yield
    finally:
        torch._dynamo.reset()


@contextmanager
def without_compiler() -> Iterator[None]:
    """What torch.compile would run is run as it stands: for tests of other things than graphs."""
    with torch.compiler.set_stance("force_eager"):
        yield


def listing(folder: Path) -> dict[str, bytes]:
    """Path below the folder -> content, of all files in it."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def edit_index(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the index of a saved model in place, as one who means it: without the digest of what it said."""
    values = json.loads((folder / INDEX).read_text())
    values.pop("sha256", None)
    change(values)
    (folder / INDEX).write_text(json.dumps(values))


def same_states(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same names, dtypes and bits."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def parameter_names(model: nn.Module, *, with_grad: bool) -> set[str]:
    """Names (every alias counted) of the parameters that have, or lack, a gradient."""
    return {n for n, p in model.named_parameters(remove_duplicate=False) if (p.grad is not None) == with_grad}


def few_digits(count: int = 40) -> ImageData:
    """The first training images of the digits, in memory of their own."""
    whole = digits("train")
    return ImageData(whole.images[:count].clone(), whole.labels[:count].clone(), whole.class_names)


def changed_recipe(values: dict[str, Any], changes: Mapping[str, Any]) -> Recipe:
    """A recipe of values, some of whose sections are changed field by field."""
    changed = dict(values)
    for name, change in changes.items():
        changed[name] = (values.get(name) or {}) | change if isinstance(change, dict) else change
    return parse_recipe(changed, "test")


#: Changes that make `recipes/dit/digits.yaml` tiny, and its steps eager, on a CPU.
TINY_DIT: Mapping[str, Any] = {
    "device": "cpu",
    "model.config.hidden_size": 16,
    "model.config.num_attention_heads": 2,
    "model.config.num_layers": 3,
    "train.warmup_steps": 0,
    "train.batch_size": 8,
    "train.compile": "false",
    "train.cuda_graph": "false",
    "evaluate.features": "null",
    "evaluate.samples": 2,
}


def vit_config(layers: int, **more: Any) -> dict[str, Any]:
    """Config values of a tiny ViT on the digits."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2}
    return size | {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10} | more


def vit_recipe(config: Mapping[str, Any], sections: Mapping[str, Any], changes: Mapping[str, Any]) -> Recipe:
    """A recipe of a ViT on the digits, some of whose sections are changed field by field."""
    model = {"type": "ViTForImageClassification", "config": dict(config)}
    values = {"name": "tiny", "model": model, "data": {"kind": "digits"}, "device": "cpu", **sections}
    return changed_recipe(values, changes)


@contextmanager
def started(train: Callable[[int, Path], None], folder: Path, ranks: int = 2) -> Iterator[list[BaseProcess]]:
    """Processes, called with their rank and the folder; those that have not ended by then are killed."""
    context = multiprocessing.get_context("fork")  # a fresh process would import for longer than these tests run
    processes = [context.Process(target=train, args=(rank, folder), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        yield [*processes]
    finally:
        for process in processes:
            process.kill()


def run_ranks(
    train: Callable[[int, Path], None], folder: Path, *, timeout: float, ranks: int = 2, statuses: Sequence[int] = ()
) -> None:
    """Run processes, called with their rank and the folder, and see that all end well within so many seconds.

    Args:
        train: what each does.
        folder: for what they leave.
        timeout: seconds.
        ranks: how many.
        statuses: their exit statuses, where they do not all end well.
    """
    with started(train, folder, ranks) as processes:
        assert exit_statuses(processes, timeout) == list(statuses or [0] * ranks)


def exit_statuses(processes: Sequence[BaseProcess], timeout: float) -> list[int | None]:
    """Those of processes that have so many seconds to end, one after another."""
    for process in processes:
        process.join(timeout=timeout)
        process.kill()
    return [process.exitcode for process in processes]


@contextmanager
def started_like_torchrun(
    command: Callable[[int], int], folder: Path, *, ranks: int, restarts: int = 0
) -> Iterator[list[BaseProcess]]:
    """Processes with the variables of torchrun, but forked; what each says on standard error goes to a file.

    Args:
        command: called with the rank; returns the exit status.
        folder: for what they say, in rank-0.err, ...
        ranks: how many.
        restarts: how often torchrun would have started them again.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank: int, folder: Path) -> None:
        torch.set_num_threads(1)
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RESTART_COUNT": restarts}
        os.environ |= {name: str(value) for name, value in variables.items()}
        sys.stderr = (folder / f"rank-{rank}.err").open("w")
        status = command(rank)
        sys.stderr.flush()
        os._exit(status)

    with started(one, folder, ranks) as processes:
        yield processes


def run_like_torchrun(
    command: Callable[[int], int], folder: Path, *, ranks: int, timeout: float = 120, statuses: Sequence[int] = ()
) -> list[str]:
    """Run processes with the variables of torchrun, but forked; returns what each said on standard error.

    Args:
        command: called with the rank; returns the exit status.
        folder: for what they say.
        ranks: how many.
        timeout: seconds.
        statuses: their exit statuses, where they do not all end well.
    """
    with started_like_torchrun(command, folder, ranks=ranks) as processes:
        ended = exit_statuses(processes, timeout)
    said = [(folder / f"rank-{rank}.err").read_text() for rank in range(ranks)]
    assert ended == list(statuses or [0] * ranks), "\n".join(said)
    return said
