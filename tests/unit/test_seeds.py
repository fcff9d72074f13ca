"""Seeds: what was trained, initialised and measured with them before has the same draws today."""

import torch

from diffusionblocks.common.seeds import key, keyed_generator, seed_from
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
