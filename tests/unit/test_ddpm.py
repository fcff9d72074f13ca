"""Noise prediction at discrete timesteps: levels against diffusers' schedulers, blocks against the network itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from helpers import NUM_LABELS, image_batch, noise_batch, same_states, seeded, tiny, train_a_little
from torch import Tensor, nn

import diffusionblocks as db
from diffusionblocks.core.materialise import build
from diffusionblocks.experiments.original import Original
from diffusionblocks.experiments.recipe import ModelConfig
from diffusionblocks.noise import DDPM

NOISE = DDPM()
LABELS = torch.tensor([0, 1, 2, 3, NUM_LABELS, 0])


def predictor(**overrides: Any) -> nn.Module:
    """A tiny network of the published kind: noise and variance in twice the channels."""
    return tiny("diffusers-dit", **({"out_channels": 6} | overrides))


def predicted_noise(network: nn.Module, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return network(x, timestep=t, class_labels=labels).sample[:, :3]  # type: ignore[no-any-return]


# ---- levels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "theirs", "start", "end"),
    [("linear", "linear", 1e-4, 0.02), ("scaled-linear", "scaled_linear", 0.00085, 0.012)],
)
def test_levels_are_those_of_the_library_s_schedule(schedule: Any, theirs: str, start: float, end: float) -> None:
    noise = DDPM(schedule=schedule, beta_start=start, beta_end=end)
    abar = DDPMScheduler(beta_schedule=theirs, beta_start=start, beta_end=end).alphas_cumprod.double()
    expected = ((1 - abar) / abar).sqrt()
    torch.testing.assert_close(torch.tensor(noise.table, dtype=torch.float64), expected, rtol=1e-4, atol=0)
    assert (noise.level_min, noise.level_max) == (noise.table[0], noise.table[-1])
    # Told of them, the network is told t; between two, t is even over log sigma; beyond them there is none.
    sigmas = torch.tensor(noise.table, dtype=torch.float64)
    t = noise.precondition(sigmas).c_noise
    torch.testing.assert_close(t, torch.arange(1000, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(noise.precondition((sigmas[:-1] * sigmas[1:]).sqrt()).c_noise, t[:-1] + 0.5)
    assert noise.condition(torch.tensor([1e-3, 1e3])).tolist() == pytest.approx([0, 999], abs=1e-6)
    # In float32 t is right to a hundredth of a step.
    assert (noise.condition(sigmas.float()) - t).abs().max() < 0.01


def test_timesteps_are_drawn_evenly() -> None:
    assert NOISE.cdf(torch.tensor([NOISE.table[0], NOISE.table[333], NOISE.table[999]])).tolist() == pytest.approx(
        [0, 1 / 3, 1], abs=1e-6
    )
    t = NOISE.condition(NOISE.sample(4000, generator=seeded()))
    counts = torch.histc(t, 4, 0, 999)
    assert ((counts - 1000).abs() < 120).all()
    assert NOISE.boundaries(3)[1:-1] == pytest.approx([NOISE.table[333], NOISE.table[666]], rel=1e-4)


# ---- blocks are the network -----------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, {"out_channels": 3}, {"patch_size": 4}])
def test_one_block_denoises_by_the_network_s_own_noise(overrides: dict[str, Any]) -> None:
    original = predictor(**overrides)
    model = db.convert(original, db.BlocksConfig(num_blocks=1, noise=NOISE)).eval()
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    sigma = torch.tensor(NOISE.table)[t].float()
    s = sigma[:, None, None, None]
    z = noise_batch()["pixel_values"] * (1 + s)
    with torch.no_grad():
        denoised = model.blocks[0]({"labels": LABELS}, z, sigma)
    told = NOISE.condition(sigma)
    exact = predicted_noise(original, (1 + s**2).rsqrt() * z, told, LABELS)
    assert torch.equal(denoised, z - s * exact)
    noise = predicted_noise(original, z / (1 + s**2).sqrt(), t, LABELS)
    torch.testing.assert_close((z - denoised) / s, noise, rtol=2e-3, atol=2e-3)
    assert (noise.flatten(1).abs().mean(1) > 0.05).all()  # it takes part
    other = predicted_noise(original, z / (1 + s**2).sqrt(), 999 - t, LABELS)
    assert (other - noise).flatten(1).abs().amax(1).min() > 0.02  # and t does


def test_sampling_by_euler_is_ddim() -> None:
    original = predictor()
    model = db.convert(original, db.BlocksConfig(num_blocks=1, noise=DDPM(timesteps=13))).eval()
    scheduler = DDIMScheduler(num_train_timesteps=13, clip_sample=False, set_alpha_to_one=True)
    seen: list[tuple[float, Tensor]] = []
    labels = torch.tensor([1, 2])
    images = model.sample(
        labels, steps=4, grid="equal-quantile", callback=lambda step, level, z, D: seen.append((level, z.clone()))
    )
    levels = [level for level, _ in seen]
    assert levels == pytest.approx([DDPM(timesteps=13).table[t] for t in (12, 8, 4, 0)], rel=1e-6)
    z, sigma = seen[0][1], levels[0]
    x = z / (1 + sigma**2) ** 0.5
    scheduler.num_inference_steps = 3  # it steps from t to t - 13 // 3 = t - 4
    for t in (12, 8, 4, 0):
        noise = predicted_noise(original, x, torch.full((2,), t), labels)
        x = scheduler.step(noise, t, x).prev_sample
    torch.testing.assert_close(images, x, rtol=1e-3, atol=1e-3)


def test_the_loss_is_the_squared_error_of_the_noise() -> None:
    original = predictor()
    model = db.convert(
        original, db.BlocksConfig(num_blocks=1, noise=NOISE, target={"kind": "image", "label_dropout": 0})
    )
    batch, sigma = image_batch(), torch.tensor([0.01, 0.1, 1.0, 3.0, 20.0, 150.0])
    loss = model.blocks[0].loss(batch, seeded(), sigma)
    s = sigma[:, None, None, None]
    noise = torch.randn(batch["pixel_values"].shape, generator=seeded())
    x = (batch["pixel_values"] + s * noise) / (1 + s**2).sqrt()
    error = predicted_noise(original, x, NOISE.condition(sigma), batch["labels"]) - noise
    torch.testing.assert_close(loss, error.square().flatten(1).mean(1), rtol=2e-3, atol=1e-4)


def test_blocks_train_save_load_and_export(tmp_path: Path) -> None:
    original = predictor()
    model = db.convert(original, db.BlocksConfig(noise=NOISE))
    assert same_states(model.export_initialisation().state_dict(), original.state_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_a_little(model, image_batch)
    assert all(
        not torch.equal(before[n], p) for n, p in model.named_parameters() if "transformer_blocks" in n and ".ff." in n
    )
    model.save_pretrained(tmp_path / "model")
    again = db.load(tmp_path / "model").eval()
    assert again.noise == model.noise == NOISE.with_coverage((0.0, 1.0))
    images = model.sample([0, 1], steps=3)
    assert images.isfinite().all()
    assert torch.equal(images, again.sample([0, 1], steps=3))


@pytest.mark.parametrize("published", [True, False])
def test_a_recipe_takes_published_weights_and_their_scheduler(published: bool, tmp_path: Path) -> None:
    """Files call the class `Transformer2DModel`, and its config has values that the class of today has not."""
    original: Any = predictor()
    original.save_pretrained(tmp_path / "transformer")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    if published:
        file = tmp_path / "transformer" / "config.json"
        older = {"_class_name": "Transformer2DModel", "cross_attention_dim": None, "num_vector_embeds": None}
        file.write_text(json.dumps(json.loads(file.read_text()) | older | {"use_linear_projection": False}))
    expected = db.convert(original, db.BlocksConfig(noise=NOISE))
    loaded = type(original).from_pretrained(tmp_path / "transformer")
    assert same_states(db.convert(loaded, db.BlocksConfig(noise=NOISE)).state_dict(), expected.state_dict())
    options = ModelConfig(type="DiTTransformer2DModel", pretrained=str(tmp_path / "transformer"))
    model = build(Original(options, seed=0).weights(), db.BlocksConfig(noise=DDPM.from_scheduler(tmp_path)))
    assert same_states(model.state_dict(), expected.state_dict())
    model.save_pretrained(tmp_path / "blocks")
    assert same_states(db.load(tmp_path / "blocks").state_dict(), expected.state_dict())
    with pytest.raises(ValueError, match="kind: ddpm"):
        build(Original(options, seed=0).weights(), db.BlocksConfig())


# ---- what must be said ----------------------------------------------------------------------------------------


def test_a_network_that_predicts_noise_is_not_taken_for_another() -> None:
    with pytest.raises(ValueError, match=r"out_channels = 6 for in_channels = 3: it predicts noise .* kind: ddpm"):
        db.convert(predictor())
    with pytest.raises(ValueError, match="out_channels = 9 for in_channels = 3: set out_channels to 3, or to 6"):
        db.convert(predictor(out_channels=9), db.BlocksConfig(noise=NOISE))


def test_the_process_is_read_from_a_scheduler_beside_the_weights(tmp_path: Path) -> None:
    DDIMScheduler(num_train_timesteps=500, beta_schedule="scaled_linear", beta_end=0.012).save_pretrained(
        tmp_path / "scheduler"
    )
    expected = DDPM(schedule="scaled-linear", timesteps=500, beta_end=0.012)
    assert DDPM.from_scheduler(tmp_path) == DDPM.from_scheduler(tmp_path / "scheduler") == expected
    with pytest.raises(FileNotFoundError, match=r"no scheduler_config\.json"):
        DDPM.from_scheduler(tmp_path / "nowhere")
    file = tmp_path / "scheduler" / "scheduler_config.json"
    values = json.loads(file.read_text())
    for name, value, words in (
        ("prediction_type", "v_prediction", "prediction_type = 'v_prediction'; kind ddpm needs 'epsilon'"),
        ("trained_betas", [0.1, 0.2], "trained_betas = .* needs None"),
        ("rescale_betas_zero_snr", True, "rescale_betas_zero_snr = True"),
        ("beta_schedule", "squaredcos_cap_v2", "beta_schedule = 'squaredcos_cap_v2'; allowed: linear, scaled_linear"),
    ):
        file.write_text(json.dumps(values | {name: value}))
        with pytest.raises(ValueError, match=words):
            DDPM.from_scheduler(tmp_path)
    file.write_text(json.dumps({name: value for name, value in values.items() if name != "beta_end"}))
    with pytest.raises(ValueError, match="does not say beta_end"):
        DDPM.from_scheduler(tmp_path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"timesteps": 1}, "timesteps = 1: there must be at least 2"),
        ({"beta_start": 0.0}, "0 < beta_start <= beta_end < 1"),
        ({"beta_end": 1.0}, "0 < beta_start <= beta_end < 1"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine'; allowed: linear, scaled-linear"),
    ],
)
def test_parameters_out_of_range_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DDPM(**values)
