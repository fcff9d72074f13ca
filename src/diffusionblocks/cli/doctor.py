"""diffusionblocks doctor."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: Below this a run of a model worth training soon has no room for its checkpoints.
_LITTLE_DISK = 5 * 2**30

#: Extras that are for those who change this package.
_OF_DEVELOPERS = {"dev", "docs", "savers"}


@dataclass(frozen=True)
class Check:
    """What was looked at.

    Attributes:
        name: of it.
        about: what there is.
        fix: how to have what is missing; empty: nothing is.
        is_needed: whether anything depends on it; else it is an option, and this machine is fine without.
    """

    name: str
    about: str
    fix: str = ""
    is_needed: bool = False

    def __str__(self) -> str:
        state = "OK" if not self.fix else "missing" if self.is_needed else "option"
        line = f"{state:7}  {self.name:17}  {self.about}"
        return f"{line}\n{'':28}{'fix' if self.is_needed else 'for it'}: {self.fix}" if self.fix else line


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `doctor`: none."""
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Show what of this machine the package can use, how to mend what is missing, and how to have what is an option."""
    missing = 0
    for check in checks():
        print(check, flush=True)
        missing += check.is_needed and bool(check.fix)
    print(f"{missing} missing, see the fixes" if missing else "all that is needed is there")


def checks() -> Iterator[Check]:
    """Look at Python, torch, GPU, kernels, extras, disk, data and cache."""
    yield _python()
    yield _torch()
    yield _gpu()
    yield _triton()
    yield _flash_attention()
    yield from _extras()
    yield _disk()
    yield _data()
    yield _cache()


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    fix = "install Python 3.11 or newer" if sys.version_info < (3, 11) else ""
    return Check("Python", f"{version}, {sys.executable}", fix, is_needed=True)


def _torch() -> Check:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    return Check("torch", f"{torch.__version__}, {build}, {torch.get_num_threads()} threads")


def _gpu() -> Check:
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        texts = [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices]
        dtype = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16: use train.precision: float32"
        return Check("GPU", f"{'; '.join(texts)}; {dtype}")
    if torch.version.cuda is None:
        return Check("GPU", "none for this torch; it trains on the CPU", "of an NVIDIA GPU: a CUDA build (pytorch.org)")
    return Check("GPU", "torch sees none; it trains on the CPU", "see what `nvidia-smi` says, and CUDA_VISIBLE_DEVICES")


def _triton() -> Check:
    if importlib.util.find_spec("triton") is not None:
        return Check("Triton kernels", importlib.metadata.version("triton"))
    fix = "a CUDA build of torch brings it (Linux); without it fused kernels are left out"
    return Check("Triton kernels", "not installed", fix)


def _flash_attention() -> Check:
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        return Check("flash attention", importlib.metadata.version("flash-attn"))
    fix = "on a CUDA GPU: pip install flash-attn; attn_implementation: sdpa or flex_attention need it not"
    return Check("flash attention", "not installed, or no GPU for it", fix)


def _extras() -> Iterator[Check]:
    """What each extra of the package needs, as its own metadata say."""
    from packaging.requirements import Requirement

    try:
        metadata = importlib.metadata.metadata("diffusionblocks")
    except importlib.metadata.PackageNotFoundError:
        yield Check("extras", "this package is not installed: not known", "pip install diffusionblocks", is_needed=True)
        return
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    for extra in metadata.get_all("Provides-Extra") or []:
        if extra in _OF_DEVELOPERS:
            continue
        own = [r for r in requirements if r.marker is not None and r.marker.evaluate({"extra": extra})]
        missing = [str(requirement.name) for requirement in own if not _is_there(requirement.name, requirement)]
        if missing:
            fix = f"pip install 'diffusionblocks[{extra}]'"
            yield Check(f"extra {extra}", f"without {', '.join(missing)}", fix)
        else:
            yield Check(f"extra {extra}", ", ".join(f"{r.name} {importlib.metadata.version(r.name)}" for r in own))


def _is_there(name: str, requirement: object) -> bool:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return bool(getattr(requirement, "specifier").contains(version, prereleases=True))  # noqa: B009 - it is untyped


def _disk() -> Check:
    from ..common.files import RUNS, free_space

    free = free_space(RUNS)
    fix = "make room, or name another folder with --out" if free < _LITTLE_DISK else ""
    return Check("disk", f"{free / 2**30:.1f} GiB free for runs in {Path.cwd()}", fix, is_needed=True)


def _data() -> Check:
    from pydantic import TypeAdapter

    from ..common.yaml_values import read_yaml
    from ..data.data_config import DATA_VARIABLE, DataConfig, FilesSection
    from ..experiments.shipped_recipes import shipped_recipes

    root = os.environ.get(DATA_VARIABLE)
    values = [read_yaml(file.read_bytes(), str(file))["data"] for file in shipped_recipes().values()]
    every = [TypeAdapter(DataConfig).validate_python(section) for section in values if "folder" in section]
    sections = [section for section in every if isinstance(section, FilesSection)]
    folders = sorted({section.name for section in sections})
    fix = f"export {DATA_VARIABLE}=FOLDER, with {', '.join(folders)} below it as far as you have them"
    if not root:
        return Check("data", f"{DATA_VARIABLE} is not set: data come from the hub, or data.source", fix)
    if not Path(root).is_dir():
        return Check("data", f"{DATA_VARIABLE} = {root} is no folder", fix, is_needed=True)
    reasons: dict[str, dict[str, str]] = {name: {} for name in folders if (Path(root) / name).is_dir()}
    for section in sections:
        if section.name in reasons:
            reasons[section.name] |= section.unreadable_splits()
    whole, lacking = ([name for name in reasons if bool(reasons[name]) is lacks] for lacks in (False, True))
    about = f"{root}: of the recipes' {', '.join(whole) or 'none'}"
    for name in lacking:
        about += f"; not {name}: " + ", ".join(reason.partition("; ")[0] for reason in reasons[name].values())
    if lacking:
        fix = f"complete {', '.join(lacking)}, or move what recipes cannot read out of {root}"
    return Check("data", about, "" if whole and not lacking else fix, is_needed=True)


def _cache() -> Check:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    offline = ", HF_HUB_OFFLINE is set: nothing is downloaded" if constants.HF_HUB_OFFLINE else ""
    place = folder
    while not place.exists():
        place = place.parent
    fix = "" if os.access(place, os.W_OK) else "export HF_HOME=FOLDER that you may write to"
    return Check("cache of the hub", f"{folder}{offline}", fix, is_needed=True)
