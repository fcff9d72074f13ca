"""What the interpreter itself costs: pieces of its stack that come and go, and collections that find nothing."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable

import pytest

from diffusionblocks.common.interpreter import on_a_large_stack, uncollected, without_older_objects


def _leaf() -> None:
    a = b = c = d = e = f = g = h = None  # noqa: F841 - the frame is to have some size


def _faults(depth: int) -> int:
    """Pages that are mapped anew while a loop, so many frames deep, calls a function."""
    if depth:
        return _faults(depth - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(200):
        _leaf()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _most_faults() -> int:
    return max(_faults(depth) for depth in range(300))


def test_no_loop_maps_memory_anew_on_a_large_stack() -> None:
    assert _most_faults() >= 200, "the positive control: somewhere a loop calls across a border"
    assert on_a_large_stack(_most_faults) < 20


def test_what_is_called_on_a_large_stack_returns_and_raises_as_ever() -> None:
    assert on_a_large_stack(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        on_a_large_stack(lambda: 1 / 0)


def _fail_uncollected() -> None:
    with uncollected():
        assert not gc.isenabled()
        raise KeyError


@pytest.mark.parametrize("switch", [gc.enable, gc.disable])
def test_collection_waits_and_is_then_what_it_was(switch: Callable[[], None]) -> None:
    try:
        switch()
        before = gc.isenabled()
        with pytest.raises(KeyError):
            _fail_uncollected()
        assert gc.isenabled() == before
    finally:
        gc.enable()


def test_older_objects_are_passed_over_and_then_looked_at_again() -> None:
    with without_older_objects():
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0
