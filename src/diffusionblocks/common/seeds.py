"""Randomness that is a function of what is named, not of what ran before: keyed seeds, and what `forward` draws.

`forward` may be given a generator. Where it is not, torch's global one would be the wrong source. Evaluation would move
it, and so change the training that goes on; so does every `DataLoader` that evaluation opens, which draws its base seed
there. And ranks that share its seed would draw the same noise for different examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

#: What evaluation draws from: one generator for a whole batch, or one for each example.
Generators = torch.Generator | Sequence[torch.Generator]

_SEEDS = 64  # whose calls are counted, the latest


def seed_from(content: str | bytes, *, person: bytes = b"") -> int:
    """Hash content to a seed of 63 bits; other content, or another `person`, has an independent one.

    Args:
        content: text counts as its UTF-8 bytes.
        person: keeps apart what hashes the same content for another purpose, at most 16 bytes.
    """
    data = content.encode() if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=person).digest(), "little") >> 1


def key(seed: int, unit: int, step: int, purpose: str) -> int:
    """A seed of 63 bits that is independent between any two different arguments."""
    return seed_from(f"{seed}/{unit}/{step}/{purpose}")


def keyed_generator(
    seed: int, unit: int, step: int, purpose: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A fresh generator on a device, seeded with `key` of the same arguments."""
    return torch.Generator(device).manual_seed(key(seed, unit, step, purpose))


def seed_global(seed: int, device: torch.device | None = None) -> None:
    """Seed torch's global generators, as `torch.manual_seed` does.

    Where only the CPU's counts, only that is seeded. `torch.manual_seed` would also note the call for each kind of
    device that may come, with a traceback.

    Args:
        seed: the seed.
        device: where draws will be made; None: anywhere.
    """
    only_cpu = not torch.accelerator.is_available() if device is None else device.type == "cpu"
    if only_cpu:
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


class TrainingDraws:
    """Generators of the training calls of `forward`, keyed by (torch's global seed, number of the call, rank).

    The seed is the one that `torch.manual_seed` set last, and setting it starts the count anew. Between calls the
    global generator may move as it likes: only its seed counts. The count belongs to the model's state dict.
    """

    def __init__(self) -> None:
        self._calls: dict[int, int] = {}

    def next(self, device: torch.device) -> tuple[torch.Generator, torch.Generator]:
        """The generators of the next call: of the block, on the CPU, and of the rest, on `device`.

        The first is the same on all ranks that share the seed: they must train one block, or some would wait for
        gradients that others do not make. The second differs from rank to rank.
        """
        seed = torch.initial_seed()
        if _just_seeded(seed):
            self._calls.pop(seed, None)
            torch.rand((), device="cpu")  # so that the next call does not find it so again
        call = self._calls.pop(seed, 0)
        self._calls[seed] = call + 1  # last, as the latest
        if len(self._calls) > _SEEDS:
            del self._calls[next(iter(self._calls))]
        return keyed_generator(seed, 0, call, "block"), keyed_generator(seed, _rank(), call, "noise", device)

    def state(self) -> Tensor:
        """Each seed and its count, int64 (seeds, 2): what goes on where another process left off."""
        counts = [[seed - 2**64 if seed >= 2**63 else seed, calls] for seed, calls in self._calls.items()]
        return torch.tensor(counts, dtype=torch.int64, device="cpu").view(-1, 2)

    def restore(self, state: Tensor) -> None:
        """The inverse of `state`."""
        self._calls = {seed % 2**64: calls for seed, calls in state.tolist()}


def of_batch(seed: int, batch: Mapping[str, Tensor], device: torch.device) -> torch.Generator:
    """A generator that follows from a seed and a batch alone: the same batch has the same draws, others have others.

    Were it the seed alone, all batches would be asked at the same few levels.
    """
    # Bytes are added up exactly, in any order, on any device; the sum is fetched once.
    sums = [tensor.detach().reshape(-1).view(torch.uint8).sum() for _, tensor in sorted(batch.items())]
    return keyed_generator(seed, 0, int(torch.stack(sums).sum()), "evaluation", device)


def _just_seeded(seed: int) -> bool:
    return torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(seed).get_state())


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
