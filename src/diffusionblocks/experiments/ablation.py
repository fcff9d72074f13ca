"""Ablations: one recipe with other values in some of its fields, row by row, over one seed or several.

Rows come from presets (the paper's tables 7, 8 and A2: `partition`, `block-count`, `overlap`), from lists of values for
any fields, or from the recipe itself, which can name some. A recipe with a trunk has each row of a preset twice,
branched and from scratch, and all of them with its layer-updates. A row is trained by the same code as a row of a
comparison. Its result lies in its folder, so a finished row is not trained again, and processes that run some of the
rows each share one table.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from ..common.formats import leaves, read_json, write_json
from ..common.messages import perhaps
from ..reports.results import write_results
from ..reports.tables import format_table
from ..training import units_of
from .baselines import Variant, from_scratch, length_field
from .comparison import columns, run_row
from .experiment import Experiment
from .identity import check_same_run
from .preflight import check_machine, check_with_data
from .recipe import Recipe, parse_recipe, put
from .recipe_changes import depth_of, largest_block, layers_of_all_blocks, with_train
from .run import TABLE, forget
from .tasks.task import Task

#: A row leaves its result in its folder under this name.
ROW = "row.json"

#: Of a row's name; folders are called by it.
_ODD = re.compile(r"[^\w.,=+-]+")
_LONGEST = 100

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """A row of an ablation: a recipe, and what tells it from the others.

    Attributes:
        key: name of the row and of its folder.
        recipe: what is trained, but for its seed.
        values: fields, dotted, and the values that they were given.
    """

    key: str
    recipe: Recipe
    values: Values = field(default_factory=dict)


# ---- presets: the paper's tables ---------------------------------------------------------------------------------


def _partition(recipe: Recipe) -> list[Values]:
    """Strategies, and layers of three blocks in the paper's ratios (table 7)."""
    depth = depth_of(recipe)
    if depth % 12:
        raise ValueError(
            f"the preset partition gives three blocks a third, half, a quarter or a sixth of the layers each, and "
            f"{depth} layers do not divide by 12: give lists of your own, as in --over 'blocks.layers=[1,2,1],[2,1,1]'"
        )
    ratios = [(4, 4, 4), (3, 6, 3), (6, 4, 2), (2, 4, 6)]
    return [
        {"blocks.partition": strategy, "blocks.num_blocks": 3, "blocks.layers": [n * depth // 12 for n in layers]}
        for strategy, layers in product(("uniform", "equi-probability", "log-uniform"), ratios)
    ]


def _block_count(recipe: Recipe) -> list[Values]:
    """Numbers of blocks that divide the layers (table 8)."""
    counts = [n for n in (1, 2, 3, 4, 6, 12) if depth_of(recipe) % n == 0]
    return [{"blocks.num_blocks": n, "blocks.layers": None} for n in counts]


def _overlap(recipe: Recipe) -> list[Values]:
    """Overlaps (table A2)."""
    return [{"blocks.overlap": value} for value in (0.0, 0.05, 0.1, 0.2)]


#: Rows by the name of a preset.
PRESETS: Mapping[str, Callable[[Recipe], list[Values]]] = {
    "partition": _partition,
    "block-count": _block_count,
    "overlap": _overlap,
}


def _of_equal_updates(recipe: Recipe, rows: list[Values]) -> list[Values]:
    """Rows branched and from scratch, all with as many layer-updates as the recipe; without a trunk as they are.

    A trunk of more layers than the recipe's is as much shorter.
    """
    if recipe.trunk is None:
        return rows
    field = length_field(recipe)
    result: list[Values] = []
    for values in rows:
        key = _key(values, _short_names(set(values)))
        changed = _changed(recipe, values, key)
        length = getattr(recipe.trunk, field) * largest_block(recipe) / largest_block(changed)
        of_trunk = {**values, f"trunk.{field}": round(length) if field == "steps" else length}
        scratch = from_scratch(_changed(recipe, of_trunk, key))
        without = {"trunk": None, f"train.{field}": getattr(scratch.train, field)}
        if scratch.blocks.partition != changed.blocks.partition:  # which is measured on a trunk
            without["blocks.partition"] = scratch.blocks.partition
        result += [of_trunk, {**values, **without}]
    return result


# ---- rows --------------------------------------------------------------------------------------------------------


def settings(
    recipe: Recipe,
    over: Mapping[str, Sequence[Any]] | None = None,
    presets: Sequence[str] = (),
    *,
    one_at_a_time: bool = False,
) -> list[Setting]:
    """The rows of an ablation, each a valid recipe; one that equals an earlier row is left out.

    Args:
        recipe: what they change.
        over: fields, dotted, and the values that each takes.
        presets: names of `PRESETS`, whose rows come first, with and without a trunk where the recipe has one. Without
            these and `over`: the recipe's own rows.
        one_at_a_time: the recipe as it is, then each value of each field alone; else all combinations.

    Raises:
        ValueError: an unknown preset, a field without values, nothing to vary, or values that no recipe has; the
            message names the row.
    """
    over = over or {}
    if recipe.train.blocks is not None:
        raise ValueError(f"ablate trains all blocks, not train.blocks = {list(recipe.train.blocks)}; leave it out")
    if unknown := [name for name in presets if name not in PRESETS]:
        raise ValueError(f"unknown presets {unknown}{perhaps(unknown, PRESETS)}; allowed: {', '.join(PRESETS)}")
    if empty := [name for name, values in over.items() if not values]:
        raise ValueError(f"{empty[0]} is given no values; give some, as in --over {empty[0]}=VALUE,VALUE")
    if not over and not presets:
        if not recipe.rows:
            raise ValueError(
                f"nothing to vary: give fields and values, as in --over blocks.overlap=0,0.05, one of the presets "
                f"{', '.join(PRESETS)}, or rows in the recipe"
            )
        if TABLE in recipe.rows:
            raise ValueError(f"rows: {TABLE} is the file of the table, beside the folders of rows; name the row anew")
        own = {key: dict(leaves(sections)) for key, sections in recipe.rows.items()}
        return [Setting(key, _changed(recipe, values, key), values) for key, values in own.items()]
    if "train.seed" in over:
        raise ValueError("train.seed is varied by the seeds of an ablation, which averages over them: --seeds 0,1,2")
    rows = _of_equal_updates(recipe, [values for name in presets for values in PRESETS[name](recipe)])
    if one_at_a_time:
        rows = [{}, *rows, *({name: value} for name, values in over.items() for value in values)]
    elif over:
        rows += [dict(zip(over, values, strict=True)) for values in product(*over.values())]
    names = _short_names({name for values in rows for name in values})
    result: dict[str, Setting] = {}
    for values in rows:
        key = _key(values, names)
        changed = _changed(recipe, values, key)
        if any(changed == row.recipe for row in result.values()):
            continue
        while key in result:  # values that differ in odd letters alone
            key += "+"
        result[key] = Setting(key, changed, values)
    return list(result.values())


def _changed(recipe: Recipe, values: Values, key: str) -> Recipe:
    plain = recipe.model_dump(mode="json") | {"rows": None}
    for name, value in values.items():
        put(plain, name, value, key)
    changed = parse_recipe(plain, key)
    # By what came of it: a section that is given as a whole, or a row of the recipe, may say it as well.
    if changed.train.seed != recipe.train.seed:
        raise ValueError(
            f"{key} has train.seed = {changed.train.seed}, which the seeds of an ablation would replace; leave it out, "
            "and name seeds for all rows: --seeds 0,1,2"
        )
    if changed.train.blocks is not None:
        raise ValueError(
            f"{key} trains only train.blocks = {list(changed.train.blocks)}, and a row is measured whole; leave it out"
        )
    if changed.evaluate.kind != recipe.evaluate.kind:
        raise ValueError(
            f"{key} is measured by evaluate.kind = {changed.evaluate.kind}, the recipe by {recipe.evaluate.kind}: the "
            "rows of one table have the same measures; give it an ablation of its own"
        )
    return changed


def _short_names(names: set[str]) -> dict[str, str]:
    """Fields by the shortest end of their dotted names that tells them apart."""

    def end(name: str, parts: int) -> str:
        return ".".join(name.split(".")[-parts:])

    return {
        name: next(
            end(name, parts)
            for parts in range(1, name.count(".") + 2)
            if sum(end(other, parts) == end(name, parts) for other in names) == 1
        )
        for name in names
    }


def _key(values: Values, names: Mapping[str, str]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, list | tuple):
            return "-".join(map(text, value))
        if isinstance(value, dict):
            return "-".join(f"{name}-{text(part)}" for name, part in value.items())
        return "null" if value is None else str(value)

    # A field without a value is left out where others tell the row apart.
    parts = [f"{names[name]}={text(value)}" for name, value in values.items() if value is not None or len(values) == 1]
    return _ODD.sub("-", ",".join(parts))[:_LONGEST] or "recipe"


# ---- the run -----------------------------------------------------------------------------------------------------


def ablate(
    experiment: Experiment,
    folder: Path,
    rows: Sequence[Setting],
    *,
    only: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    resume: bool = True,
    progress: bool = True,
    show: Callable[[str], None] = print,
) -> str:
    """Train and evaluate rows one after another; leave `folder`/table.json; return the lines table.

    Args:
        experiment: of the recipe that the rows change; rows of the same data share them.
        folder: each row's runs go to `folder`/KEY/seed-N. A finished one is not trained again.
        rows: what `settings` gave.
        only: keys of the rows to run; default all. The table has those of other processes too, once they are finished.
        seeds: values of `train.seed`, over which the table averages; default the recipe's own.
        resume: False trains the selected rows anew.
        progress: show progress bars.
        show: is given the table so far whenever a row is finished.

    Raises:
        ValueError: unknown rows, a seed twice, or a row that cannot be trained or is another run's; before any row is
            trained.
    """
    if only is not None and (unknown := sorted(set(only) - {row.key for row in rows})):
        keys = [row.key for row in rows]
        raise ValueError(f"unknown rows {unknown}{perhaps(unknown, keys)}; allowed: {keys}")
    if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
        raise ValueError(f"seeds must be whole numbers, each once; got {list(seeds)}")
    seeds = [experiment.recipe.train.seed] if seeds is None else seeds
    runs = _runs(experiment, rows, seeds, folder)
    selection = [run for run in runs if only is None or run.key in only]
    for run in selection:  # no row is trained before it is known that all can be
        for split in ("train", "test"):
            run.experiment.data(split)
        if not resume or run.result() is None:
            check_machine(run.experiment, run.folder)
            check_with_data(run.experiment, run.folder)
    if not resume:
        for run in selection:
            run.forget()
    table = ""
    for run in selection:
        run.finish(progress)
        table = _write_table(experiment, folder, runs)
        show(table)
    return table


@dataclass(frozen=True)
class _Run:
    """A row with a seed: its experiment, and the folder of its run."""

    key: str
    values: Values
    experiment: Experiment
    folder: Path

    def result(self) -> dict[str, Any] | None:
        """The row as JSON values where it is finished; None where there is something to do.

        Raises:
            ValueError: the folder has the result of another run.
        """
        file = self.folder / ROW
        if not file.is_file():
            return None
        values = read_json(file)
        run, row, now = values.get("run"), values.get("row"), self.experiment.describe()
        if not isinstance(run, dict) or not isinstance(row, dict):
            raise ValueError(f"{file} holds no row of an ablation; remove it to have the row measured again")
        check_same_run(run, now, file)
        return row if run.get("evaluate") == now["evaluate"] else None

    def forget(self) -> None:
        """Delete its row, and what it would resume from."""
        (self.folder / ROW).unlink(missing_ok=True)
        forget(self.folder)

    def finish(self, progress: bool) -> None:
        """Train and evaluate, where that is not done."""
        if self.result() is not None:
            return
        recipe = self.experiment.recipe
        units, _ = units_of(self.experiment.outline)
        layers = layers_of_all_blocks(recipe) if self.experiment.of_method_blocks else depth_of(recipe)
        variant = Variant(self.key, recipe, layers, len(units))
        row, _ = run_row(self.experiment, variant, self.folder, progress=progress)
        row |= {"seed": recipe.train.seed, "values": dict(self.values)}
        write_json(self.folder / ROW, {"run": self.experiment.describe(), "row": row})


def _runs(base: Experiment, rows: Sequence[Setting], seeds: Sequence[int], folder: Path) -> list[_Run]:
    """Every row with every seed; those whose sections `data` are equal share what is read of them."""
    readers = [base]
    runs = []
    for row in rows:
        reader = next((reader for reader in readers if reader.recipe.data == row.recipe.data), None)
        if reader is None:
            readers.append(reader := Experiment(row.recipe))
        for seed in seeds:
            experiment = reader.derive(with_train(row.recipe, seed=seed))
            runs.append(_Run(row.key, row.values, experiment, folder / row.key / f"seed-{seed}"))
    return runs


def _write_table(experiment: Experiment, folder: Path, runs: Sequence[_Run]) -> str:
    """Write all rows that are finished, by whichever process, and return their means over the seeds as a text."""
    results = _results(runs)
    means, lines = means_over_seeds(experiment.task, results, several=len(runs) > len({run.key for run in runs}))
    rows = [row for rows in results.values() for row in rows]
    write_results(folder / TABLE, rows, None, finished=len(rows) == len(runs), means=means)
    if _results(runs) != results:  # another process wrote its row since, and its table maybe before ours
        return _write_table(experiment, folder, runs)
    return format_table(lines)


def means_over_seeds(
    task: Task[Any], results: Mapping[str, Sequence[dict[str, Any]]], *, several: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Average the rows of an ablation over their seeds.

    Args:
        task: of the recipe.
        results: rows by key.
        several: whether there is more than one seed, so that the score has a spread.

    Returns:
        (means, lines): the score of each key with its standard deviation over the seeds, `spread`; and the lines of the
        printed table.
    """
    score = task.score if several else ""
    means, lines = [], []
    for key, rows in results.items():
        mean, seeds = _mean(rows), [row["seed"] for row in rows]
        line = {"row": key, **columns(task, mean)}
        del line["name"]
        about: dict[str, Any] = {"key": key, "seeds": seeds}
        if several:
            line["train.seed"] = ", ".join(map(str, seeds))  # beside the noise seeds of an evaluation
        if score:
            scores = [row[score] for row in rows]
            deviation = statistics.stdev(scores) if len(scores) > 1 and None not in scores else None
            name = f"spread of {score.replace('_', ' ')}"
            line[name] = None if deviation is None else task.spread_text(deviation)
            about |= {score: mean[score], "spread": deviation}
        means.append(about)
        lines.append(line)
    return means, lines


def _results(runs: Sequence[_Run]) -> dict[str, list[dict[str, Any]]]:
    """The finished rows, by their keys."""
    results: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if (row := run.result()) is not None:
            results.setdefault(run.key, []).append(row)
    return results


def _mean(values: Sequence[Any]) -> Any:
    """The mean of JSON values of one form, number by number; what is no number, or is equal in all, is the first's.

    Where one of them has no number, null: the first's would pass for a mean.
    """
    first = values[0]
    if all(value == first for value in values):
        return first
    if isinstance(first, dict):
        return {name: _mean([value.get(name) for value in values]) for name in first}
    if isinstance(first, list) and all(isinstance(value, list) and len(value) == len(first) for value in values):
        return [_mean(parts) for parts in zip(*values, strict=True)]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return statistics.fmean(values)
    return None if None in values else first
