"""What every input must end in: success, or one clear line; and nothing half done left behind."""

from __future__ import annotations

import hashlib
import os
import signal
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox import Outcome

from diffusionblocks.common.progress import is_progress

#: exit statuses that `diffusionblocks.cli.main` documents, but for those of signals
DIVERGED = 3
REFUSALS = {2, DIVERGED, 4, 5}
INTERRUPTED = {128 + signal.SIGINT, 128 + signal.SIGTERM}
#: characters of the line
LONGEST = 1000


@dataclass(frozen=True)
class Case:
    """An input laid out in a workspace, and what is to be done with it.

    Attributes:
        actions: of the sandbox.
        inputs: folders and files that a refusal leaves as they are.
        outputs: names that are not there after a refusal, unless they were before.
        same: whether success must give what sound input gives: it is damage that cannot mean anything else.
        interrupt: whether the user chose how long it takes, so that Ctrl-C may end it.
        seconds: CPU time allowed.
    """

    actions: list[dict[str, Any]]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    same: bool = False
    interrupt: bool = False
    seconds: float = 10


@dataclass(frozen=True)
class Verdict:
    """How an input ended: `success`, `refusal` or `interrupted`, or what is wrong, by a short name and in words."""

    ending: str
    fault: str | None = None
    detail: str = ""


Listing = dict[str, str]


def listing(workspace: Path, names: Iterable[str]) -> Listing:
    """What lies in a workspace at or below some names; hidden files come and go."""
    found: Listing = {}
    for name in names:
        top = workspace / name
        below = sorted(top.rglob("*")) if top.is_dir() and not top.is_symlink() else []
        for path in [top, *below]:
            relative = path.relative_to(workspace)
            if not os.path.lexists(path) or any(part.startswith(".") for part in relative.parts):
                continue
            if path.is_symlink():
                found[str(relative)] = f"link to {path.readlink()}"
            elif path.is_file():
                found[str(relative)] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[str(relative)] = "folder" if path.is_dir() else "other"
    return found


def hidden(workspace: Path) -> set[str]:
    """Hidden names in a workspace: temporaries, where they were not there before."""
    return {str(path.relative_to(workspace)) for path in workspace.rglob(".*") if not path.name.endswith(".lock")}


def judge(
    outcome: Outcome,
    case: Case,
    before: tuple[Listing, Listing, set[str]],
    after: tuple[Listing, Listing, set[str]],
    sound: Any = None,
    original: Listing | None = None,
) -> Verdict:
    """Whether an outcome keeps the contract.

    Args:
        outcome: of the sandbox.
        case: what was done.
        before, after: listings of the case's inputs and outputs, and the workspace's hidden names.
        sound: the product of sound input, where `case.same`.
        original: listing of the inputs before they were damaged: what is again as it was has been mended.
    """
    lines = [line for line in outcome.err.splitlines() if line.strip() and not is_progress(line)]
    last = lines[-1] if lines else ""
    if outcome.code < 0:
        name = signal.Signals(-outcome.code).name
        how = "time" if name in ("SIGKILL", "SIGXCPU") else "crash"
        return Verdict("killed", how, f"{name} after {outcome.seconds:.1f} CPU seconds: {last[-300:]}")
    if "Traceback (most recent call last)" in outcome.err:
        return Verdict("traceback", "traceback", last[:300])
    if outcome.interrupted:
        ending = "interrupted"
        if outcome.code not in INTERRUPTED | {0} | REFUSALS:
            return Verdict(ending, "status", f"exit status {outcome.code}: {last[:300]}")
        return Verdict(ending) if len(lines) <= 1 else Verdict(ending, "lines", f"{len(lines)} lines: {lines[:3]}")
    if outcome.code == 0:
        spill = [line for line in lines if not line.startswith("warning: ")]
        if spill:
            return Verdict("success", "spill", f"{len(spill)} lines: {spill[0][:200]}")
        if after[2] - before[2]:
            return Verdict("success", "temporaries", f"left {sorted(after[2] - before[2])[:3]}")
        if case.same and outcome.product != sound:
            return Verdict("success", "silent difference", difference(sound, outcome.product))
        return Verdict("success")
    ending = "refusal"
    if outcome.code not in REFUSALS:
        return Verdict(ending, "status", f"exit status {outcome.code}: {last[:300]}")
    if len(lines) != 1:
        return Verdict(ending, "lines", f"{len(lines)} lines: {[line[:120] for line in lines[:4]]}")
    if not last.startswith("error: "):
        return Verdict(ending, "words", f"{last[:200]}")
    if len(last) > LONGEST:
        return Verdict(ending, "length", f"{len(last)} characters: {last[:200]}")
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in last):
        return Verdict(ending, "characters", f"{last[:200]!r}")
    if outcome.code == DIVERGED:  # after work, whose checkpoints are kept
        return Verdict(ending, None, last)
    mended = {name for name in after[0] if (original or {}).get(name) == after[0][name]}
    if any(before[0].get(name) != after[0].get(name) for name in (before[0].keys() | after[0].keys()) - mended):
        return Verdict(ending, "input changed", f"{difference(before[0], after[0])}; {last[:200]}")
    if after[1] != before[1]:
        return Verdict(ending, "output left", f"{difference(before[1], after[1])}; {last[:200]}")
    if after[2] - before[2]:
        return Verdict(ending, "temporaries", f"left {sorted(after[2] - before[2])[:3]}; {last[:200]}")
    return Verdict(ending, None, last)


def difference(one: Any, other: Any, where: str = "") -> str:
    """The first place where two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in [*one, *(name for name in other if name not in one)]:
            if one.get(name, "absent") != other.get(name, "absent"):
                return difference(one.get(name, "absent"), other.get(name, "absent"), f"{where}/{name}")
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            if a != b:
                return difference(a, b, f"{where}/{index}")
    return f"{where}: {str(one)[:80]} became {str(other)[:80]}"
