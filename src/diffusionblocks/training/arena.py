"""One stretch of memory with named tensors in it, so that all of them move between devices in a few large copies."""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

_ALIGNMENT = 256  # bytes; vectorised kernels want 16
_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Layout:
    """Where tensors lie.

    Attributes:
        bytes: length of the whole stretch.
        changing: length of its beginning, with the tensors that training changes.

    Args:
        tensors: by name.
        fixed: names of those that training only reads; they lie last.
    """

    def __init__(self, tensors: Mapping[str, Tensor], fixed: Collection[str] = ()) -> None:
        self.places: dict[str, tuple[int, int, torch.Size, torch.dtype]] = {}
        self.bytes = self.changing = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: item[0] in fixed):  # stable
            size = tensor.numel() * tensor.element_size()
            self.places[name] = (self.bytes, size, tensor.shape, tensor.dtype)
            self.bytes += -(-size // _ALIGNMENT) * _ALIGNMENT
            if name not in fixed:
                self.changing = self.bytes


class Arena:
    """Memory with tensors in it.

    Args:
        layout: where they lie.
        memory: uint8, of `layout.bytes` bytes, on any device.
    """

    def __init__(self, layout: Layout, memory: Tensor) -> None:
        assert memory.dtype == torch.uint8
        assert memory.shape == (layout.bytes,)
        self.layout = layout
        self.memory = memory

    @property
    def changing(self) -> Tensor:
        """The memory of the tensors that training changes."""
        return self.memory[: self.layout.changing]

    def __getitem__(self, name: str) -> Tensor:
        start, size, shape, dtype = self.layout.places[name]
        return self.memory[start : start + size].view(dtype).view(shape)


def host_memory(size: int, *, pinned: bool) -> Tensor:
    """Bytes on the host, zero; page-locked if wished and possible, so that a GPU copies to and from it by itself.

    The memory is registered with the driver rather than taken from torch's pinned allocator, which rounds up to a power
    of two. `unpin` before it is let go.
    """
    memory = torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)[:size]
    if pinned and size and int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 1)) != 0:
        warnings.warn(
            f"{size:,} bytes of host memory cannot be page-locked, so switches of blocks will be slow: raise the "
            "limit (ulimit -l), or use train.offload: disk",
            stacklevel=2,
        )
    return memory


def unpin(memories: list[Tensor]) -> None:
    """Tell the driver that page-locked memory may go; what lies there stays."""
    for memory in memories:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def mapped_file(path: Path, layout: Layout) -> Tensor:
    """A new safetensors file with these tensors, zero, mapped into memory: what is written there is in the file.

    Raises:
        OSError: the disk is full.
    """
    entries: dict[str, object] = {}
    end = 0
    for name, (start, size, shape, dtype) in layout.places.items():
        if start > end:  # the format allows no gaps
            entries[f"padding.{end}"] = {"dtype": "U8", "shape": [start - end], "data_offsets": [end, start]}
        end = start + size
        entries[name] = {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [start, end]}
    if layout.bytes > end:
        entries[f"padding.{end}"] = {"dtype": "U8", "shape": [layout.bytes - end], "data_offsets": [end, layout.bytes]}
    text = json.dumps(entries).encode()
    length = math.ceil((8 + len(text)) / mmap.PAGESIZE) * mmap.PAGESIZE - 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length) + text.ljust(length))
        file.flush()
        if layout.bytes:  # a full disk is told now: a mapped file that cannot grow would kill the process
            os.posix_fallocate(file.fileno(), 8 + length, layout.bytes)
    whole = torch.from_file(str(path), shared=True, size=8 + length + layout.bytes, dtype=torch.uint8)
    return whole[8 + length :]
