#!/usr/bin/env bash
# Averages of ema-pytorch that are updated every 100th step are not the averages they are named for: the decay is still that of one step.
#
# Libraries: ema-pytorch 0.8.3 (`KarrasEMA`, `PostHocEMA`, `EMA`), torch 2.13.0.
# Expected: `update_every` says how often the average is brought up to date. EDM2's power-function average (arXiv 2312.02696) of
#   `sigma_rel` is over that part of the run, whatever is skipped: over 100 steps the old average is multiplied by the product of 100 decays.
# What happens: it is multiplied by the decay of one step. With the default of 100, an average of 2,000 steps is mostly the untrained weights. What
#   `synthesize_ema_model` makes for a new sigma_rel is as wrong, as its weights are solved for the right averages.
#   `EMA` has a default of 10, and its decay of 0.9999 reaches 100,000 steps back instead of 10,000.
# Why it matters: post-hoc averages are how EDM2 chooses its average after the run. A sweep over sigma_rel is then a sweep over something else, and best
#   values do not carry over from the paper or to another `update_every`.
# Way round: update_every=1 (run below); with EMA also beta ** update_every.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 ema-pytorch==0.8.3
"$dir/venv/bin/python" - 2>/dev/null <<'PY'
import inspect
import tempfile
from importlib.metadata import version

import torch
from ema_pytorch import EMA, KarrasEMA, PostHocEMA
from ema_pytorch.post_hoc_ema import sigma_rel_to_gamma

print("torch", torch.__version__, "ema-pytorch", version("ema-pytorch"))
STEPS = 2000


def exact(sigma_rel: float) -> float:
    """The power-function average of a weight that grows evenly from 0 to 1."""
    gamma = sigma_rel_to_gamma(sigma_rel)
    return (gamma + 1) / (gamma + 2)


def averages(**options) -> dict[str, float]:
    """What KarrasEMA, and PostHocEMA for a sigma_rel that was not followed, hold of that weight at the end."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    with tempfile.TemporaryDirectory() as folder:
        one = KarrasEMA(model, sigma_rel=0.1, **options)
        many = PostHocEMA(model, sigma_rels=(0.05, 0.28), checkpoint_every_num_steps=200, checkpoint_folder=folder,
                          checkpoint_dtype=torch.float32, **options)
        for step in range(1, STEPS + 1):
            model.weight.data.fill_(step / STEPS)
            one.update()
            many.update()
        synthesized = many.synthesize_ema_model(sigma_rel=0.15)
    return {"0.1": round(one.ema_model.weight.item(), 3), "0.15, synthesized": round(synthesized.ema_model.weight.item(), 3)}


right = {"0.1": round(exact(0.1), 3), "0.15, synthesized": round(exact(0.15), 3)}
every = {"default (100)": averages(), "10": averages(update_every=10), "1": averages(update_every=1)}
print("exact, by sigma_rel:", right)
for name, values in every.items():
    print("update_every", name, ":", values)
assert inspect.signature(KarrasEMA.__init__).parameters["update_every"].default == 100
assert all(value < 0.2 for value in every["default (100)"].values())
assert all(abs(every["1"][name] - value) < 0.01 for name, value in right.items())


def response(**options) -> float:
    """What an average of decay 0.999 holds of weights that went from 0 to 1, 2,000 steps ago."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    average = EMA(model, update_after_step=0, power=10.0, **options)  # a power that leaves no warm-up
    for _ in range(100):
        average.update()
    model.weight.data.fill_(1.0)
    for _ in range(STEPS):
        average.update()
    return average.ema_model.weight.item()


seen = {"update_every 10": response(beta=0.999), "1": response(beta=0.999, update_every=1), "10, beta ** 10": response(beta=0.999**10)}
print("EMA, decay 0.999, exact", round(1 - 0.999**STEPS, 3), ":", {name: round(value, 3) for name, value in seen.items()})
assert seen["update_every 10"] < 0.25 and min(seen["1"], seen["10, beta ** 10"]) > 0.85
print("as described")
PY
