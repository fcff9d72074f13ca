"""Where the examples are kept while a GPU trains on them."""

from __future__ import annotations

import torch

PLACEMENTS = ("auto", "device", "host")
#: `auto` keeps them on a GPU where they take at most this share of its free memory.
SHARE = 1 / 4


def on_device(placement: str, num_bytes: int, device: torch.device) -> bool:
    """Whether examples of so many bytes are kept on the device; on a CPU `auto` leaves them where they are.

    Raises:
        ValueError: placement is none of `PLACEMENTS`.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement = {placement!r}: must be one of {list(PLACEMENTS)}")
    if placement != "auto":
        return placement == "device"
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return num_bytes <= free * SHARE
