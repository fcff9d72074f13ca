"""`bench speed`: B blocks' steps against one end-to-end step, the cost of switching blocks, the trainer's own cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .methods import Spec
from .rows import measure_all, with_method, write_table
from .server import Measurer


def specs_of(
    models: Sequence[str], blocks: Sequence[int], methods: Sequence[str], offloads: Sequence[str], base: Spec
) -> list[Spec]:
    """What to measure, neighbours sharing compiled code.

    Args:
        models: names of models.
        blocks: values of B.
        methods: whose switches are timed.
        offloads: where blocks wait, for the cost of switching.
        base: all else.
    """
    specs = []
    for model in models:
        whole = dataclasses.replace(base, model=model)
        specs += [whole, dataclasses.replace(whole, task="overhead")]
        for count in blocks:
            specs.append(with_method(whole, "resident-all", count))
            if count == blocks[0]:
                specs.append(with_method(whole, "resident-all", count, task="overhead"))
            specs += [with_method(whole, m, count, task="switching", offload=o) for m in methods for o in offloads]
    return specs


def speed(specs: Sequence[Spec], out: Path, limit: float, measurer: Measurer) -> list[dict[str, Any]]:
    """Measure (see `measure_all`), and write rows and ratios to `out`; returns the ratios."""
    rows = measure_all(specs, out, limit, measurer)
    ratios = ratios_of(rows)
    write_table(out, rows, ratios=ratios)
    return ratios


def ratios_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the rows say, one line a comparison; rows with errors are left out.

    - `blocks over end to end`: B x a block's step / the end-to-end step (1: an epoch of all blocks takes as long).
    - `METHOD, N steps per switch`: a step with switches / the same process's step without, in windows of as many
      steps that take turns, and / that of `resident-all`.
    - `trainer over bare loop`.
    """
    rows = [row for row in rows if "error" not in row]
    whole = {row["model"]: row for row in rows if row["task"] == "row" and row["method"] == "end-to-end"}
    all_there = {(r["model"], r["blocks"]): r for r in rows if r["task"] == "row" and r["method"] == "resident-all"}
    ratios: list[dict[str, Any]] = []
    for row in rows:
        about = {"model": row["model"], "blocks": row["blocks"]}
        if row["task"] == "overhead":
            ratios.append(about | {"what": "trainer over bare loop", "ratio": row["trainer_over_bare"]})
        elif row["method"] == "resident-all" and row["model"] in whole:
            step = whole[row["model"]]["step_ms"]["median"]
            ratio = row["blocks"] * row["step_ms"]["median"] / step
            ratios.append(about | {"what": "blocks over end to end", "ratio": ratio})
        elif row["task"] == "switching":
            beside = all_there.get((row["model"], row["blocks"]))
            for entry in row["switching"]:
                step = entry["step_ms"]["median"]
                steps = entry["steps_per_switch"]
                per_switch = f"{steps} step{'s' if steps > 1 else ''} per switch"
                what = f"{row['method']}, {per_switch}, {row['offload']}"
                # Tables of older versions have one window without switches for all.
                ratio = entry.get("ratio", step / row["step_ms"]["median"])
                line = about | {"what": f"{what}, over no switch", "ratio": ratio}
                ratios.append(line)
                if beside is not None and row["method"] == "resident-active":
                    ratio = step / beside["step_ms"]["median"]
                    ratios.append(about | {"what": f"{what}, over resident all", "ratio": ratio})
    return ratios
