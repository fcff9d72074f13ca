"""Further classifiers of transformers: blocks are the original, in every variant that its config has."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    HIDDEN,
    MORE_CLASSIFIERS,
    convert,
    noise_batch,
    randomise_adaptive,
    same_states,
    seeded,
    tiny,
    train_a_little,
)
from torch import Tensor
from transformers import DINOv3ViTModel, Siglip2ForImageClassification, ViTModel

import diffusionblocks as db
from diffusionblocks.core.materialise import build
from diffusionblocks.experiments.original import Original
from diffusionblocks.experiments.recipe import ModelConfig
from diffusionblocks.models import DINOv3ViTForImageClassification

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in MORE_CLASSIFIERS),
    *((name, {"attn_implementation": "eager"}) for name in MORE_CLASSIFIERS),
    ("vit-msn", {"qkv_bias": False}),
    ("dinov2-registers", {"use_swiglu_ffn": True, "num_register_tokens": 1}),
    ("dinov2-registers", {"drop_path_rate": 0.3, "qkv_bias": False}),
    ("dinov3", {"num_register_tokens": 0, "use_gated_mlp": True, "query_bias": False, "key_bias": True}),
    ("dinov3", {"drop_path_rate": 0.3, "layerscale_value": 0.5, "mlp_bias": False, "pos_embed_jitter": 2.0}),
    ("ijepa", {"qkv_bias": False, "hidden_act": "relu"}),
    ("siglip", {"vision_use_head": False}),
    ("siglip2", {"vision_use_head": False, "num_patches": 9}),  # positions are resized
    ("clip", {"hidden_act": "gelu"}),
    ("beit", {"use_mean_pooling": False}),
    ("beit", {"use_relative_position_bias": False, "use_absolute_position_embeddings": True}),
    ("beit", {"use_relative_position_bias": False, "use_shared_relative_position_bias": True}),
    ("beit", {"use_shared_relative_position_bias": True, "attn_implementation": "eager"}),
    ("beit", {"layer_scale_init_value": 0.0, "drop_path_rate": 0.2, "use_mask_token": True}),
    ("beit", {"use_mean_pooling": False, "use_shared_relative_position_bias": True}),
]


def logits(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        if not isinstance(model, Siglip2ForImageClassification):
            return model(images).logits  # type: ignore[no-any-return]
        # As `convert_image_to_patches` of its processor, which needs torchvision: in rows, channels last.
        n, channels, height, width = images.shape
        patches = images.reshape(n, channels, height // 4, 4, width // 4, 4).permute(0, 2, 4, 3, 5, 1)
        shapes = torch.tensor([[height // 4, width // 4]]).repeat(n, 1)
        return model(patches.reshape(n, -1, 16 * channels), None, shapes).logits  # type: ignore[no-any-return]


def context(model: db.DiffusionBlocks, block: int, images: Tensor, seed: int = 0) -> Tensor:
    z = torch.randn(len(images), HIDDEN, generator=seeded(seed))
    with torch.no_grad():
        return model.block(block)({"pixel_values": images}, z, torch.full((len(images),), 0.7), context=True)  # type: ignore[no-any-return]


def ids(variant: Any) -> str:
    return variant if isinstance(variant, str) else "-".join(map(str, variant)) or "default"


@pytest.mark.parametrize(("family", "options"), VARIANTS, ids=ids)
def test_one_block_that_sees_no_noise_has_the_original_logits(family: str, options: dict[str, Any]) -> None:
    original = tiny(family, **options)
    images = noise_batch()["pixel_values"]
    model = db.convert(original, db.BlocksConfig(num_blocks=1, target={"noise_input": False})).eval()
    expected = logits(original, images)
    assert torch.equal(context(model, 0, images), expected)
    # Control: logits depend on the images, and on the last layer.
    assert not torch.allclose(expected, logits(original, -images), atol=1e-2)
    last = model.block(0).layers()[-1]
    with torch.no_grad():
        next(p for p in last.parameters() if p.ndim == 2).mul_(-1)
    assert not torch.equal(context(model, 0, images), expected)


@pytest.mark.parametrize(("family", "options"), VARIANTS, ids=ids)
def test_a_token_that_nobody_attends_to_leaves_the_original_logits(family: str, options: dict[str, Any]) -> None:
    """With the label's token hidden from attention, a conversion is the original to rounding, at any level."""
    original = tiny(family, **options)
    images = noise_batch()["pixel_values"]
    model = db.convert(original, db.BlocksConfig(num_blocks=1)).eval()
    expected = logits(original, images)
    seen = context(model, 0, images)
    assert seen.shape == expected.shape
    assert not torch.allclose(seen, expected, atol=1e-4)  # the token is attended to
    assert not torch.allclose(seen, context(model, 0, images, seed=1), atol=1e-4)  # and z is in it
    _hide_last_token(model)
    hidden = context(model, 0, images)
    torch.testing.assert_close(hidden, expected, rtol=2e-4, atol=2e-5)
    randomise_adaptive(model)
    assert not torch.allclose(context(model, 0, images), expected, atol=1e-3)


def _hide_last_token(model: db.DiffusionBlocks) -> None:
    """Add -inf to every attention score of the last of the tokens, in each attention of the block."""
    from torch.nn import functional as F

    def without_last(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Any:
        key, value = key[..., :-1, :], value[..., :-1, :]
        mask = None if attn_mask is None else attn_mask[..., :-1]
        return plain(query, key, value, attn_mask=mask, **options)

    def softmax(scores: Tensor, *args: Any, **options: Any) -> Tensor:
        scores = scores.clone()
        scores[..., -1] = -torch.inf
        return plain_softmax(scores, *args, **options)

    plain, plain_softmax = F.scaled_dot_product_attention, F.softmax
    block: Any = model.block(0)
    forward = block.forward

    def patched(*args: Any, **options: Any) -> Any:
        torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.softmax = without_last, softmax
        try:
            return forward(*args, **options)
        finally:
            torch.nn.functional.scaled_dot_product_attention = plain
            torch.nn.functional.softmax = plain_softmax

    block.forward = patched


@pytest.mark.parametrize("family", MORE_CLASSIFIERS)
def test_a_classifier_trains_saves_and_predicts(family: str, tmp_path: Path) -> None:
    model = convert(family, shared="replicated")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_a_little(model, noise_batch)
    after = model.state_dict()
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert not {name for name in still if ".layer" in name and "key" not in name and "k_proj.bias" not in name}
    model.save_pretrained(tmp_path / "model")
    again = db.load(tmp_path / "model").eval()
    assert same_states(again.state_dict(), after)
    images = noise_batch()["pixel_values"]
    first, second = (m.predict(images, generator=seeded()).probabilities for m in (model, again))
    assert torch.equal(first, second)
    torch.testing.assert_close(first.sum(dim=1), torch.ones(6))


@pytest.mark.parametrize("shared", ["joint", "replicated"])
@pytest.mark.parametrize("family", MORE_CLASSIFIERS)
def test_exports_are_the_original_and_its_blocks(family: str, shared: str) -> None:
    original = tiny(family)
    images = noise_batch()["pixel_values"]
    assert torch.equal(
        logits(convert(family, shared=shared).eval().export_initialisation(), images), logits(original, images)
    )
    model = convert(family, shared=shared, target={"noise_input": False}).eval()
    train_a_little(model, noise_batch, steps=1)
    for index in range(3):
        ordinary: Any = model.export_block(index)
        assert type(ordinary) is type(original)
        assert torch.equal(logits(ordinary, images), context(model, index, images))


@pytest.mark.parametrize("family", MORE_CLASSIFIERS)
@pytest.mark.parametrize("likelihood", ["added", "learned"])
def test_the_loss_reaches_all_weights_in_bfloat16_too(family: str, likelihood: str) -> None:
    model = db.convert(tiny(family).bfloat16(), db.BlocksConfig(target={"likelihood": likelihood}))
    randomise_adaptive(model)
    block = model.block(1)
    loss = block.loss(noise_batch(), seeded())
    assert loss.dtype == torch.float32
    loss.sum().backward()
    without = {name for name, p in block.named_parameters() if p.grad is None and "mask_token" not in name}
    assert without <= {"shared.target.embedding"}, without


def test_a_mask_without_padding_changes_nothing() -> None:
    """Processors of SigLIP 2 give a mask, which says that all patches of such images are there."""
    original, images = tiny("siglip2"), noise_batch()["pixel_values"]
    patches = images.reshape(6, 3, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(6, 4, 48)
    with torch.no_grad():
        masked = original(patches, torch.ones(6, 4, dtype=torch.int32), torch.full((6, 2), 2)).logits
    torch.testing.assert_close(masked, logits(original, images))


@pytest.mark.parametrize("family", ["ijepa", "siglip", "siglip2", "clip", "metaclip2", "beit"])
def test_a_head_that_reads_no_cls_has_none_to_replace(family: str) -> None:
    with pytest.raises(
        ValueError, match=r"target.token = replace-cls: the head of a \w+ reads the mean .* use extra or linear"
    ):
        convert(family, target={"token": "replace-cls"})


@pytest.mark.parametrize(
    ("family", "options"),
    [("vit-msn", {}), ("dinov2-registers", {}), ("dinov3", {}), ("beit", {"use_mean_pooling": False})],
    ids=ids,
)
def test_the_label_takes_the_place_of_cls(family: str, options: dict[str, Any]) -> None:
    model = db.convert(tiny(family, **options), db.BlocksConfig(num_blocks=1, target={"token": "replace-cls"})).eval()
    lengths: list[int] = []
    model.block(0).layers()[0].register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))
    images = noise_batch()["pixel_values"]
    assert not torch.allclose(context(model, 0, images), context(model, 0, images, seed=1), atol=1e-4)
    assert set(lengths) == {4 + 1 + (3 if family in ("dinov2-registers", "dinov3") else 0)}


def test_dinov3_takes_the_weights_of_its_trunk_and_a_head_of_its_own(tmp_path: Path) -> None:
    """By its class, and read block by block, as a recipe's `pretrained` is."""
    trunk = DINOv3ViTModel(tiny("dinov3").config).eval()
    trunk.save_pretrained(tmp_path)
    model: Any = DINOv3ViTForImageClassification.from_pretrained(tmp_path, num_labels=7).eval()
    assert same_states(model.backbone.state_dict(), trunk.state_dict())
    images = noise_batch()["pixel_values"]
    with torch.no_grad():
        states = trunk(images).last_hidden_state
        expected = model.classifier(torch.cat([states[:, 0], states[:, 4:].mean(dim=1)], dim=1))
    assert torch.equal(logits(model, images), expected)
    labels = torch.arange(6)
    assert torch.equal(model(images, labels).loss, torch.nn.functional.cross_entropy(model(images).logits, labels))
    options = {"type": "DINOv3ViTForImageClassification", "pretrained": str(tmp_path)}
    source = Original(ModelConfig(**options, config={"num_labels": 7}), seed=0, new_head=True).weights()
    for block in build(source, db.BlocksConfig()).blocks:
        state = block.network.state_dict()
        assert len(state["classifier.bias"]) == 7
        read = {name.removeprefix("backbone."): t for name, t in state.items() if "classifier" not in name}
        assert all(torch.equal(tensor, trunk.state_dict()[name]) for name, tensor in read.items())


def test_a_trunk_without_a_head_is_refused_with_the_classes_that_have_one() -> None:
    trunk = DINOv3ViTModel(tiny("dinov3").config)
    with pytest.raises(
        ValueError, match=r"no head .*; use DINOv3ViTForImageClassification of diffusionblocks\.models$"
    ):
        db.convert(trunk)
    with pytest.raises(ValueError, match=r"no head .*; use ViTForImageClassification of transformers$"):
        db.convert(ViTModel(tiny("vit").config))  # type: ignore[arg-type]


def test_a_pretrained_model_has_its_own_part_of_the_config(tmp_path: Path) -> None:
    """Without it, as the message advises, its weights are read, and a head of other labels is drawn afresh."""
    original = tiny("siglip")
    original.save_pretrained(tmp_path)  # type: ignore[operator]
    options = {"type": "SiglipForImageClassification", "pretrained": str(tmp_path)}
    with pytest.raises(ValueError, match=r"model\.config\.vision_config: .*: leave model\.config\.vision_config out"):
        Original(ModelConfig(**options, config={"vision_config": {"num_hidden_layers": 2}}), seed=0).weights()
    source = Original(ModelConfig(**options, config={"num_labels": 7}), seed=0, new_head=True).weights()
    state, block = original.state_dict(), build(source, db.BlocksConfig()).block(0).network.state_dict()
    assert len(block["classifier.bias"]) == 7
    assert all(torch.equal(tensor, state[name]) for name, tensor in block.items() if "classifier" not in name)
