"""Switches of blocks with frozen weights: what nothing changes is not moved back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import differing, everything, model_of, trainer

from diffusionblocks.training import Trainer


@pytest.mark.parametrize("offload", ["host", "disk"])
def test_frozen_weights_do_not_go_back_to_the_host(offload: str, tmp_path: Path) -> None:
    """What training changes goes back, bit for bit; what it only reads stays on the host as it was."""

    def run(folder: str, **options: Any) -> Trainer:
        model = model_of("replicated")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("attention" not in name)
        return trainer("replicated", tmp_path / folder, model=model, **options)

    active, resident = run("active", resident="active", offload=offload), run("all")
    before = {n: p.detach().clone() for n, p in active.model.named_parameters() if not p.requires_grad}
    assert before
    for each in (active, resident):
        each.train(until=7)
    here: Any = active.residency
    layouts = [slot.memory.weights.layout for slot in here._slots.values()]
    assert all(0 < layout.changing < layout.bytes for layout in layouts)
    here._memory[0][max(layout.changing for layout in layouts) :] = 0xFF  # would be seen if it went to the host
    here.flush()
    assert all(torch.equal(p, before[n]) for n, p in active.model.named_parameters() if n in before)
    here.refresh()  # read anew
    for each in (active, resident):
        each.train()
    assert differing(everything(active), everything(resident)) == []
