"""What other tools make of an exported block: another process, pipelines, torch.export and ONNX."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import convert, image_batch, noise_batch, randomise_adaptive, seeded, tiny, token_batch, train_a_little
from PIL import Image
from torch import Tensor, nn

import diffusionblocks as db
from diffusionblocks.core.exporting import export_facts, write_export
from diffusionblocks.data.image_config import ImageFilesConfig


def classifier(family: str = "vit") -> nn.Module:
    """Block 1 of a classifier that was trained a little, at its own level."""
    model = convert(family)
    randomise_adaptive(model)
    train_a_little(model, noise_batch, steps=1)
    return model.eval().export_block(1)


def language_model() -> nn.Module:
    target: Any = {"kind": "next-token", "noise_input": False, "logit_scale": 1.3}
    model = db.convert(tiny("llama"), db.BlocksConfig(num_blocks=3, target=target))
    train_a_little(model, token_batch, steps=1)
    return model.eval().export_block(1)


def diffusion_transformer() -> nn.Module:
    model = convert("diffusers-dit")
    train_a_little(model, image_batch, steps=1)
    return model.eval().export_block(1)


IMAGES = noise_batch()["pixel_values"]
TOKENS = token_batch(4)["input_ids"]
LABELS = torch.arange(6) % 4
TIMES = torch.linspace(-0.4, -0.2, 6)

#: name -> (what is exported, its inputs)
EXPORTS: dict[str, tuple[Any, dict[str, Tensor]]] = {
    "vit": (classifier, {"pixel_values": IMAGES}),
    "dinov2": (lambda: classifier("dinov2"), {"pixel_values": IMAGES}),
    "llama": (language_model, {"input_ids": TOKENS}),
    "dit": (diffusion_transformer, {"hidden_states": IMAGES, "timestep": TIMES, "class_labels": LABELS}),
}


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        made = model(**inputs)
    return made["logits"] if "logits" in made else made["sample"]


# ---- another process ---------------------------------------------------------------------------------------------

#: Loads the folders by the libraries' own classes; it never imports this package.
ELSEWHERE = """
import json, sys
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, pipeline

folder = sys.argv[1]
given = load_file(f"{folder}/given.safetensors")
with torch.no_grad():
    vit = AutoModelForImageClassification.from_pretrained(f"{folder}/vit").eval()
    assert torch.equal(vit(given["images"]).logits, given["vit"]), "the classifier's logits"
    lm = AutoModelForCausalLM.from_pretrained(f"{folder}/llama").eval()
    assert torch.equal(lm(given["tokens"]).logits, given["llama"]), "the language model's logits"
    dit = DiTTransformer2DModel.from_pretrained(f"{folder}/dit").eval()
    made = dit(given["images"], given["times"], given["labels"]).sample
    assert torch.equal(made, given["dit"]), "the diffusion transformer's F"
    text = lm.generate(given["tokens"][:1, :5], max_new_tokens=6, do_sample=False)
    for place in range(5, 11):  # the greedy token of the logits, which were compared
        assert text[0, place] == lm(text[:, :place]).logits[0, -1].argmax(), place
answers = pipeline("image-classification", model=f"{folder}/vit", top_k=4)(f"{folder}/picture.png")
print(json.dumps({
    "classes": [type(vit).__name__, type(lm).__name__], "ours": [n for n in sys.modules if "diffusionblocks" in n],
    "scores": {each["label"]: each["score"] for each in answers},
}))
"""


@pytest.mark.slow
def test_libraries_load_and_run_blocks_in_another_process(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    given = {"images": IMAGES, "tokens": TOKENS, "times": TIMES, "labels": LABELS}
    for name in ("vit", "llama", "dit"):
        make, inputs = EXPORTS[name]
        exported = make()
        exported.save_pretrained(tmp_path / name)
        given[name] = output(exported, inputs)
        if name == "vit":
            vit = exported
    save_file({n: t.contiguous() for n, t in given.items()}, tmp_path / "given.safetensors")
    data = ImageFilesConfig.model_construct(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(data.image_processor((3, 8, 8))))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    here = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=here, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    said = json.loads(run.stdout.splitlines()[-1])
    assert said["classes"] == ["DeiTForImageClassification", "LlamaForCausalLM"]
    assert said["ours"] == []
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255  # as the data section makes inputs of pixels
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    scores = output(vit, {"pixel_values": (image - mean) / std}).softmax(dim=-1)[0]
    assert [said["scores"][f"LABEL_{i}"] for i in range(4)] == pytest.approx(scores.tolist(), rel=1e-5)


def test_a_folder_says_what_it_holds(tmp_path: Path) -> None:
    model = convert("diffusers-dit").eval()
    facts = export_facts(model, 1)
    write_export(model.export_block(1), tmp_path / "out", facts, {"tokenizer.json": b"{}"})
    assert json.loads((tmp_path / "out" / "block.json").read_text()) == json.loads(json.dumps(facts))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"
    assert (facts["block"], facts["blocks"], facts["layers"], facts["level"]) == (1, 3, [1], None)
    low, high = model.partition.interval(1)
    assert facts["levels"] == [low, high]
    levels = [row["level"] for row in facts["coefficients"]]
    assert levels == pytest.approx([high, (low * high) ** 0.5, low])
    c = model.noise.precondition(torch.tensor(levels, dtype=torch.float64))  # type: ignore[attr-defined]
    assert [row["c_out"] for row in facts["coefficients"]] == pytest.approx(c.c_out.tolist())
    write_export(model.export_block(2), tmp_path / "out", export_facts(model, 2), {})  # replaces it whole
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="thesis"):
        write_export(model.export_block(2), tmp_path / "other", facts, {})


# ---- torch.export and ONNX ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTS)
def test_torch_export_runs_and_equals(name: str) -> None:
    make, inputs = EXPORTS[name]
    exported = make().eval()
    if name == "llama":
        exported.config.use_cache = False
    batch: Any = torch.export.Dim("batch", min=2, max=64)
    shapes = {entry: {0: batch} for entry in inputs}
    program = torch.export.export(exported, (), inputs, dynamic_shapes=shapes, strict=False)
    torch.testing.assert_close(output(program.module(), inputs), output(exported, inputs), rtol=0, atol=5e-6)
    fewer = {entry: tensor[:3].flip(0) for entry, tensor in inputs.items()}  # the batch is not baked in
    torch.testing.assert_close(output(program.module(), fewer), output(exported, fewer), rtol=0, atol=5e-6)


class OnlyTensors(nn.Module):
    """The one output of a model, which ONNX names."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        made = self.model(**dict(zip(self.names, inputs, strict=True)))
        return made["logits"] if "logits" in made else made["sample"]  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTS)
def test_onnxruntime_runs_and_equals(name: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra: onnx)")
    import onnxruntime

    make, inputs = EXPORTS[name]
    exported = make().eval()
    if name == "llama":
        exported.config.use_cache = False
    wrapped, file = OnlyTensors(exported, list(inputs)).eval(), tmp_path / "model.onnx"
    batch: Any = torch.export.Dim("batch", min=2, max=64)
    shapes = ({0: batch},) * len(inputs)
    torch.onnx.export(
        wrapped,
        tuple(inputs.values()),
        file,
        dynamo=True,
        input_names=list(inputs),
        dynamic_shapes=(shapes,),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for rows in (slice(None), slice(0, 3)):
        given = {entry: tensor[rows] for entry, tensor in inputs.items()}
        (made,) = session.run(None, {entry: tensor.numpy() for entry, tensor in given.items()})
        torch.testing.assert_close(torch.from_numpy(made), output(exported, given), rtol=1e-4, atol=1e-5)
    assert not np.array_equal(made, session.run(None, {e: t.flip(0)[:3].numpy() for e, t in inputs.items()})[0])


def test_seeds_are_of_the_export_alone() -> None:
    """The same export twice, whatever was drawn in between; and the global generator is left alone."""
    model = convert("vit").eval()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = model.export_block(0).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3, generator=seeded())
    assert all(torch.equal(first[name], tensor) for name, tensor in model.export_block(0).state_dict().items())
