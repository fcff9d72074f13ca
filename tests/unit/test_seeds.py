"""Seeds: what was trained, initialised and measured with them before has the same draws today."""

import traceback

import pytest
import torch

from diffusionblocks.common.seeds import key, keyed_generator, seed_from, seed_global
from diffusionblocks.models.recurrent_depth import depth_generator


def test_the_seeds_are_those_of_the_first_version():
    assert key(0, 0, 0, "noise") == 792011621244050106
    assert key(7, 3, 11, "dropout") == 5248715433128208286
    assert seed_from("3/shared") == seed_from(b"3/shared") == 5689578847581722263
    assert depth_generator(torch.Generator().manual_seed(5)).initial_seed() == 2837345392888381209


def test_every_part_of_a_key_counts():
    parts = [(0, 0, 0, "noise"), (1, 0, 0, "noise"), (0, 1, 0, "noise"), (0, 0, 1, "noise"), (0, 0, 0, "order")]
    assert len({key(*each) for each in parts}) == len(parts)
    assert seed_from("a") != seed_from("a", person=b"depth")
    draws = [torch.rand(3, generator=keyed_generator(*each)) for each in (parts[0], parts[0], parts[1])]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_the_global_generator_is_seeded_as_by_torch(device: torch.device | None) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    seed_global(4, device)
    assert not torch.equal(torch.rand(4), expected)
    seed_global(3, device)
    assert torch.initial_seed() == 3
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there a seed is for all devices")
def test_seeding_a_cpu_takes_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(traceback, "format_stack", lambda *_: taken.append(1) or [])
    seed_global(0)
    assert not taken
    torch.manual_seed(0)
    assert taken  # which is what it avoids
