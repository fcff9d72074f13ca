"""Logs: JSON lines always; TensorBoard, wandb, trackio and MLflow as extras, behind one small protocol."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from ..common.files import naming
from ..common.formats import json_text
from ..common.messages import announce


class Logger(Protocol):
    """Receives the records of a run."""

    def log(self, record: dict[str, Any]) -> None:
        """Receive one record; `iteration` orders them."""

    def close(self) -> None:
        """Flush and release."""


@runtime_checkable
class PictureLogger(Protocol):
    """A logger that receives pictures of samples, too."""

    def picture(self, path: Path, iteration: int) -> None:
        """Receive one picture, a PNG file, and the iteration that it is of."""


#: name of a run's log
LOG = "log.jsonl"


class JsonLines:
    """Appends records to a .jsonl file, with the host and the rank that they are of. On resume, records past the
    checkpoint are dropped.

    Args:
        path: the file.
        resume_at: keep records with iteration <= this; None starts the file anew.
    """

    def __init__(self, path: Path, resume_at: int | None = None) -> None:
        self._process = {"host": socket.gethostname(), "rank": int(os.environ.get("RANK", 0))}  # torchrun's
        lines: list[str] = []
        if resume_at is not None and path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line).get("iteration", 0) <= resume_at:
                        lines.append(line)
                except json.JSONDecodeError:
                    break  # the line that a killed run was writing
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")
        self._file.writelines(f"{line}\n" for line in lines)
        self._file.flush()

    def log(self, record: dict[str, Any]) -> None:
        """Write one line, and flush it."""
        with naming(self._file.name):
            self._file.write(json_text(record | self._process, self._file.name) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with naming(self._file.name):
            self._file.close()


class ProgressLines:
    """Prints how far each unit is in one line: every few seconds, and at its end.

    Args:
        steps: of each unit.
        units: that train in turns.
        seconds: between two lines of a unit, at least.
        name: stands in the lines for the unit's own; None: that.
    """

    def __init__(self, steps: int, units: int = 1, seconds: float = 10.0, name: str | None = None) -> None:
        self._steps, self._units, self._seconds, self._name = steps, units, seconds, name
        self._times: dict[str, float] = {}

    def log(self, record: dict[str, Any]) -> None:
        """Print a line, where one is due."""
        unit, now = record["unit"], time.monotonic()
        if record["step"] >= self._steps or now - self._times.get(unit, float("-inf")) >= self._seconds:
            self._times[unit] = now
            left = self._units * self._steps - record["iteration"]
            progress = {**record, "unit": self._name or unit}
            announce(progress_line(progress, self._steps, left / max(record["iterations_per_second"], 1e-9)))

    def close(self) -> None:
        """Nothing to release."""


def progress_line(record: Mapping[str, Any], steps: int, left: float) -> str:
    """A unit's progress in one line.

    `block 1: step 300 of 1,000, loss 0.0213, 0:00:42 left, peak 1.2 GiB, GPU 2.1 GiB`: the peak of the allocator, and
    what the driver counts in use on the GPU.

    Args:
        record: the newest of its log.
        steps: it takes in all.
        left: seconds of the training.
    """
    peak = f", peak {record['peak_bytes'] / 2**30:.1f} GiB" if record.get("peak_bytes") else ""
    peak += f", GPU {record['device_bytes'] / 2**30:.1f} GiB" if record.get("device_bytes") else ""
    left_text = datetime.timedelta(seconds=round(left))
    return f"{record['unit']}: step {record['step']:,} of {steps:,}, loss {record['loss']:.4g}, {left_text} left{peak}"


class TensorBoard:
    """Scalars and pictures to TensorBoard; needs the extra `tensorboard`.

    Args:
        folder: where its files go.
    """

    def __init__(self, folder: Path) -> None:
        with _extra("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._writer = SummaryWriter(str(folder))

    def log(self, record: dict[str, Any]) -> None:
        """Write the record's numbers under its unit's name."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.get("iteration", 0))

    def picture(self, path: Path, iteration: int) -> None:
        """Write the picture under the name `samples`."""
        pixels = np.asarray(Image.open(path).convert("RGB"))
        self._writer.add_image(_SAMPLES, pixels, iteration, dataformats="HWC")

    def close(self) -> None:
        """Flush and release the writer."""
        self._writer.close()


class Wandb:
    """Scalars and pictures to Weights & Biases; needs the extra `wandb`.

    Without the variable WANDB_MODE nothing leaves the machine: the run is kept offline, for `wandb sync`.

    Args:
        folder: where its files go; made.
        name: of the run.
        config: JSON values that are kept with the run.
    """

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        with _extra("wandb"):
            import wandb
        folder.mkdir(parents=True, exist_ok=True)
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._image = wandb.Image
        self._run = wandb.init(project=_PROJECT, name=name, dir=folder, config=dict(config), mode=mode)

    def log(self, record: dict[str, Any]) -> None:
        """Write the record's numbers under its unit's name."""
        self._run.log(scalars(record), step=record.get("iteration", 0))

    def picture(self, path: Path, iteration: int) -> None:
        """Write the picture under the name `samples`."""
        self._run.log({_SAMPLES: self._image(str(path))}, step=iteration)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Trackio:
    """Scalars and pictures to trackio; needs the extra `trackio`.

    It keeps all runs of the machine in one place, which the variable TRACKIO_DIR names; `trackio show` opens them.

    Args:
        folder: not used.
        name: of the run.
        config: JSON values that are kept with the run.
    """

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        with _extra("trackio"):
            import trackio
        self._image = trackio.Image
        self._run = trackio.init(project=_PROJECT, name=name, config=dict(config), embed=False)

    def log(self, record: dict[str, Any]) -> None:
        """Write the record's numbers under its unit's name."""
        self._run.log(scalars(record), step=record.get("iteration", 0))

    def picture(self, path: Path, iteration: int) -> None:
        """Write the picture under the name `samples`."""
        self._run.log({_SAMPLES: self._image(str(path))}, step=iteration)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflow:
    """Scalars and pictures to MLflow; needs the extra `mlflow`.

    Without the variable MLFLOW_TRACKING_URI they go to a database in the folder, for `mlflow ui --backend-store-uri`.

    Args:
        folder: where the database goes; made.
        name: of the run.
        config: JSON values that are kept with the run, as `recipe.json`.
    """

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        with _extra("mlflow"):
            import mlflow
        folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = mlflow.MlflowClient(uri or f"sqlite:///{folder / 'mlflow.db'}")
        experiment = self._client.get_experiment_by_name(_PROJECT)
        if experiment is None:
            place = None if uri else (folder / "files").as_uri()
            identity = self._client.create_experiment(_PROJECT, artifact_location=place)
        else:
            identity = experiment.experiment_id
        self._run = self._client.create_run(identity, run_name=name).info.run_id
        self._client.log_dict(self._run, dict(config), "recipe.json")

    def log(self, record: dict[str, Any]) -> None:
        """Write the record's numbers under its unit's name."""
        for name, value in scalars(record).items():
            self._client.log_metric(self._run, name, value, step=record.get("iteration", 0))

    def picture(self, path: Path, iteration: int) -> None:
        """Keep the file with the run, in the folder `samples`."""
        self._client.log_artifact(self._run, str(path), _SAMPLES)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run)


#: What a run is logged to, by name: made of a folder, the run's name, and what is kept with it.
LOGGERS: dict[str, Callable[[Path, str, Mapping[str, Any]], Logger]] = {
    "tensorboard": lambda folder, name, config: TensorBoard(folder),
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": MLflow,
}

_PROJECT = "diffusionblocks"

#: Name of the pictures of a run.
_SAMPLES = "samples"


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record, named `UNIT/NAME`, without the iteration that orders them."""
    unit = record.get("unit", "run")
    numbers = ((name, value) for name, value in record.items() if name != "iteration")
    return {f"{unit}/{name}": value for name, value in numbers if isinstance(value, int | float)}


@contextlib.contextmanager
def _extra(name: str) -> Iterator[None]:
    """Let a package that is not installed be told with the extra that brings it."""
    try:
        yield
    except ImportError:
        raise ImportError(f"{name} logging needs the extra: pip install 'diffusionblocks[{name}]'") from None
