"""Scripts for machines that share nothing: one that trains each block, and one that joins what comes back."""

from __future__ import annotations

import re
import shlex
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Literal, get_args

import yaml

from ..common.files import whole_file
from .experiment import Experiment
from .parts import Part, has_parts, parts_of
from .recipe_changes import stages
from .run import write_recipe
from .shipped_recipes import RECIPE

#: `plain`: shell scripts; `slurm`: with a job array beside them; `skypilot`: with a task file each.
Format = Literal["plain", "slurm", "skypilot"]
FORMATS: tuple[Format, ...] = get_args(Format)

#: Trains what the blocks start from; trains all parts, an array; joins them; hands all to Slurm in this order.
START, ARRAY, MERGE, SUBMIT = "start.sh", "blocks.sbatch", "merge.sh", "submit.sh"

_HEAD = """\
#!/bin/sh
# {about}
set -eu
here=$(cd "$(dirname "$0")" && pwd)
db=${{DIFFUSIONBLOCKS:-diffusionblocks}}
"""

# A block goes on from what start.sh left: its run finds both stages at their end.
_COPY = """\
start=${{1:-"$here/start"}}
mkdir -p "$out"
for stage in {stages}; do
  [ -e "$out/$stage" ] && continue
  [ -d "$start/$stage" ] || {{ echo "no $start/$stage: run start.sh first, or give its folder" >&2; exit 2; }}
  rm -rf "$out/.$stage" && cp -R "$start/$stage" "$out/.$stage" && mv "$out/.$stage" "$out/$stage"
done
"""


def write_jobs(experiment: Experiment, folder: Path, kind: Format = "plain") -> list[Path]:
    """Write the recipe, overrides applied, and the scripts that train its parts on machines that share nothing.

    No path of this machine is in them, but those that the recipe gives. Where the recipe has a noise fit or a trunk, a
    first script trains these, and the others start from the folder that it leaves.

    Args:
        experiment: what to train.
        folder: where they go; new, or empty.
        kind: `plain`; `slurm` for a job array beside them; `skypilot` for a task file of each.

    Returns:
        The scripts, in the order in which they run.

    Raises:
        ValueError: what cannot train apart, with the reason and the fix, or a folder that is not empty.
    """
    if not has_parts(experiment):
        raise ValueError(
            f"{experiment.recipe.name} trains one unit, so there is nothing to do apart: run it with diffusionblocks "
            "train"
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose a new or empty folder for the jobs")
    write_recipe(experiment.recipe, folder)
    parts = parts_of(experiment, folder)
    before = [key for key, *_ in stages(experiment.recipe) if key != "train"]
    texts = {START: _start_script(experiment)} if before else {}
    texts |= {f"{part.folder.name}.sh": _part_script(part, before) for part in parts}
    if experiment.recipe.train.blocks is None:  # else the others come from elsewhere
        texts[MERGE] = _merge_script(experiment, parts)
    if kind == "skypilot":
        texts |= {Path(name).with_suffix(".yaml").name: _sky_task(experiment, name, texts) for name in [*texts]}
    if kind == "slurm":
        texts[ARRAY] = _array_script(experiment, folder, parts)
        texts[SUBMIT] = _submit_script(experiment, folder, [name for name in (START, MERGE) if name in texts])
    for name, text in texts.items():
        with whole_file(folder / name) as temporary:
            temporary.write_text(text)
            temporary.chmod(0o755)
    return [folder / name for name in texts]


def _start_script(experiment: Experiment) -> str:
    about = f"What all blocks of {experiment.recipe.name} start from, in the folder start; run it again to resume."
    return _HEAD.format(about=about) + f'exec $db train "$here/{RECIPE}" --before-blocks --out "$here/start"\n'


def _part_script(part: Part, before: Sequence[str]) -> str:
    name, run = part.folder.name, part.experiment.recipe.name
    usage = f" sh {name}.sh START: from the folder that {START} left." if before else ""
    text = _HEAD.format(about=f"Trains {part.name} of {run}, in the folder {name}; run it again to resume.{usage}")
    text += f'out="$here/{name}"\n' + (_COPY.format(stages=" ".join(before)) if before else "")
    return text + f'exec $db train "$here/{RECIPE}" --set \'train.blocks=[{part.index}]\' --out "$out"\n'


def _merge_script(experiment: Experiment, parts: Sequence[Part]) -> str:
    about = f"Joins the folders of {experiment.recipe.name}, once all lie beside this script, and measures the model."
    folders = " ".join(f'"$here/{part.folder.name}"' for part in parts)
    merge = f'$db merge {folders} --out "$here/model"\n'
    return _HEAD.format(about=about) + merge + f'exec $db evaluate "$here/{RECIPE}" --model "$here/model"\n'


# ---- Slurm -----------------------------------------------------------------------------------------------------


def _directives(experiment: Experiment, *more: str) -> str:
    gpu = () if experiment.recipe.device == "cpu" else ("--gpus=1",)
    options = (f"--job-name={shlex.quote(experiment.recipe.name)}", *gpu, "--requeue", "--open-mode=append", *more)
    return "".join(f"#SBATCH {option}\n" for option in options)


def _array_script(experiment: Experiment, folder: Path, parts: Sequence[Part]) -> str:
    """A job array; Slurm runs a copy of the script elsewhere, so that it must be told the folder."""
    indices = ",".join(str(part.index) for part in parts)
    name = parts[0].folder.name.rpartition("-")[0]
    return (
        f"#!/bin/sh\n# All blocks of {experiment.recipe.name}, a task each; submit it from where jobs was called.\n"
        f"{_directives(experiment, f'--array={indices}', '--output=%x-%a.log')}"
        "set -eu\n"
        f"here=${{JOBS:-{shlex.quote(str(folder))}}}\n"
        f'exec sh "$here/{name}-$(printf %02d "$SLURM_ARRAY_TASK_ID").sh"\n'
    )


def _submit_script(experiment: Experiment, folder: Path, others: Sequence[str]) -> str:
    """Submits all in their order."""
    options = _directives(experiment, "--output=%x-%j.log").replace("#SBATCH ", "").replace("\n", " ").strip()
    lines = [
        "#!/bin/sh",
        f"# Submits the jobs of {experiment.recipe.name} to Slurm, from where jobs was called.",
        "set -eu",
        f"here=${{JOBS:-{shlex.quote(str(folder))}}}",
        "export JOBS=$here",
    ]
    after = ""
    if START in others:
        lines.append(f"start=$(sbatch --parsable {options} --wrap \"sh '$here/{START}'\")")
        after = "--dependency=afterok:$start "
    lines.append(f'blocks=$(sbatch --parsable {after}"$here/{ARRAY}")')
    if MERGE in others:
        lines.append(f"sbatch --dependency=afterok:$blocks {options} --wrap \"sh '$here/{MERGE}'\"")
    return "\n".join(lines) + "\n"


# ---- SkyPilot --------------------------------------------------------------------------------------------------

#: Where a task sees the bucket. What is in it was copied there whole; a run's own folder is on the machine's disk, for
#: a bucket has neither locks nor renames.
_BUCKET = "/results"


def _sky_task(experiment: Experiment, script: str, scripts: Container[str]) -> str:
    """A task of SkyPilot: runs a script in a copy of this folder, and puts the folder that it leaves in a bucket."""
    stem, recipe = Path(script).stem, experiment.recipe
    lines = ["set -e"] if recipe.device == "cpu" else ["set -e", "nvidia-smi -L"]  # who forgets --gpus is told so
    if script == MERGE:
        lines += [f"cp -R {_BUCKET}/{part.folder.name} ." for part in parts_of(experiment, Path())]
        lines += [f"sh {script}", f"cp -R model {_BUCKET}/"]
    else:
        start = f" {_BUCKET}/start" if script != START and START in scripts else ""
        lines += [f"sh {script}{start}", f"cp -R {stem} {_BUCKET}/"]
    task = {
        "name": re.sub("[^a-z0-9]+", "-", f"{stem}-{recipe.name}".lower()).strip("-"),
        "workdir": ".",
        "envs": {"BUCKET": None, "INSTALL": None},
        "resources": {"job_recovery": {"max_restarts_on_errors": 1}},
        "file_mounts": {_BUCKET: {"source": "${BUCKET}", "mode": "MOUNT"}},
        "setup": 'eval "$INSTALL"',
        "run": "\n".join(lines) + "\n",
    }
    gpus = "" if recipe.device == "cpu" else "--gpus L4:1 "
    return (
        f"# Runs {script} by SkyPilot, from this folder:\n"
        f"#   sky jobs launch {gpus}--env BUCKET=s3://NAME --env INSTALL='pip install ...' {stem}.yaml\n"
        f"{yaml.safe_dump(task, sort_keys=False)}"
    )
