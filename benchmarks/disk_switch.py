"""Measure in GB/s how a waiting block gets from disk into page-locked memory and back (`train.offload: disk`).

    PYTHONPATH=src python benchmarks/disk_switch.py --folder /nvme --size 4GiB --out disk_switch.json
    PYTHONPATH=src python benchmarks/disk_switch.py --folder /tmp --size 64MiB

`mapped` is a copy from and to the file's mapping; `calls`, which the trainer uses, are preadv and pwritev on the same
file and see the mapping's pages; `direct` is these with O_DIRECT, past the page cache. Linux does not promise that a
mapping sees what is written past it, so the trainer leaves that. Writes end when the disk has all. Mapped pages cannot
be dropped from the cache: with enough memory only `direct` reads are the disk's own. Windows take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffusionblocks.planning import parse_budget
from diffusionblocks.reports.results import write_results
from diffusionblocks.training.arena import Layout, host_memory, mapped_file

_PIECE = 2**26


def moved(call: Callable[[int, list[Any], int], int], file: int, memory: Any, start: int) -> None:
    """Read or write all of a buffer, from a place in the file on."""
    done = 0
    while done < len(memory):
        count = call(file, [memory[done : done + _PIECE]], start + done)
        if count <= 0:
            raise OSError("the file is shorter than its buffer")
        done += count


def ways(path: Path, mapping: torch.Tensor, buffer: torch.Tensor) -> dict[str, tuple[Callable[[], Any], ...]]:
    """Each way's reading and writing."""
    memory, start = memoryview(buffer.numpy()), path.stat().st_size - len(mapping)
    usual = os.open(path, os.O_RDWR)
    found: dict[str, tuple[Callable[[], Any], ...]] = {
        "mapped": (lambda: buffer.copy_(mapping), lambda: mapping.copy_(buffer)),
        "calls": (
            lambda: moved(os.preadv, usual, memory, start),
            lambda: moved(os.pwritev, usual, memory, start),
        ),
    }
    try:
        direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        os.preadv(direct, [memory[:4096]], start)
    except OSError as error:
        print(f"no direct I/O in this folder: {error}")
        return found
    return found | {
        "direct": (lambda: moved(os.preadv, direct, memory, start), lambda: moved(os.pwritev, direct, memory, start))
    }


def drop(path: Path) -> None:
    """Write the file out, and forget it in the page cache."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Measure all ways side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure")
    parser.add_argument("--size", default="1GiB", help="bytes of a block with its state (default 1GiB)")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    size = parse_budget(options.size) // 4096 * 4096
    buffer = host_memory(size, pinned=torch.cuda.is_available())
    buffer.random_(0, 255)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "unit.safetensors"
        mapping = mapped_file(path, Layout({"all": torch.empty(size, dtype=torch.uint8, device="meta")}))
        found = ways(path, mapping, buffer)
        seconds: dict[tuple[str, str], list[float]] = {(way, do): [] for way in found for do in ("read", "write")}
        mapping.copy_(buffer)
        for _ in range(options.windows):
            for way, (read, write) in found.items():
                for do, act in (("write", write), ("read", read)):
                    drop(path)
                    begin = time.perf_counter()
                    act()
                    if do == "write":
                        with path.open("rb+") as file:
                            os.fsync(file.fileno())
                    seconds[way, do].append(time.perf_counter() - begin)
    rows = [
        {"way": way, "what": do, "bytes": size, "gigabytes_per_second": size / statistics.median(times) / 1e9}
        for (way, do), times in seconds.items()
    ]
    for row in rows:
        print(row)
    if options.out is not None:
        write_results(options.out, rows)


if __name__ == "__main__":
    main()
