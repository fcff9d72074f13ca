"""Where the examples are while a GPU trains on them, and how rows of them come to it."""

from __future__ import annotations

import torch
from torch import Tensor

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


def gather(source: Tensor, indices: Tensor, device: torch.device) -> Tensor:
    """Copy rows to a device; from ordinary memory to a GPU through page-locked memory, beside the GPU's work.

    Args:
        source: (N, ...), on the device or on the CPU.
        indices: int64 (n,), on either.
        device: where the rows go.

    Returns:
        (n, ...), on `device`.
    """
    # Fresh page-locked memory each time: its allocator keeps a buffer until the copy out of it has ended.
    pinned = device.type == "cuda" and source.device.type == "cpu"
    rows = torch.empty((len(indices), *source.shape[1:]), dtype=source.dtype, device=source.device, pin_memory=pinned)
    torch.index_select(source, 0, indices.to(source.device), out=rows)
    return rows.to(device, non_blocking=True)


def refuse_capture(device: torch.device, what: str) -> None:
    """ValueError while a CUDA graph is being captured: it cannot gather from ordinary memory."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            f"a CUDA graph cannot gather {what} from ordinary memory; set placement to 'device', or cuda_graph to false"
        )
