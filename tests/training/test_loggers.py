"""Loggers: what training logs arrives in the package that it is sent to, read back by that package."""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffusionblocks.training.run_log import LOGGERS, PictureLogger, scalars

RECORDS: list[dict[str, Any]] = [
    {"iteration": 2, "unit": "block 0", "step": 1, "loss": 2.5, "gradient_norm": None, "lr": 0.1},
    {"iteration": 2, "unit": "block 1", "step": 1, "loss": 3.5, "gradient_norm": None, "lr": 0.1},
    {"iteration": 4, "unit": "block 0", "step": 2, "loss": 1.25, "gradient_norm": 0.5, "lr": 0.2},
]
CONFIG = {"train": {"steps": 2}}


def test_scalars_are_the_numbers_of_a_unit() -> None:
    assert scalars(RECORDS[0]) == {"block 0/step": 1, "block 0/loss": 2.5, "block 0/lr": 0.1}
    assert scalars({"iteration": 1, "loss": 2.0}) == {"run/loss": 2.0}


def _log(name: str, folder: Path) -> None:
    logger = LOGGERS[name](folder, "a run", CONFIG)
    for record in RECORDS:
        logger.log(record)
    logger.close()


def _read_tensorboard(folder: Path) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("block 0/loss")]


def _read_wandb(folder: Path) -> list[tuple[int, float]]:
    """The file of an offline run: after 7 bytes records of wandb's protocol, each after its checksum, length, kind."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # writes what is left, as the end of a process does
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    content, place, losses = file.read_bytes(), 7, []
    while place < len(content):
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        assert kind == 1, "a whole record: the file is of one block"
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content[place + 7 : place + 7 + length])
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if "block 0/loss" in items:
            losses.append((items["_step"], items["block 0/loss"]))
        place += 7 + length
    return losses


def _read_trackio(folder: Path) -> list[tuple[int, float]]:
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("diffusionblocks", "a run")
    return [(entry["step"], entry["block 0/loss"]) for entry in logs if "block 0/loss" in entry]


def _read_mlflow(folder: Path) -> list[tuple[int, float]]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("diffusionblocks")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("a run", "FINISHED")
    assert json.loads(Path(client.download_artifacts(run.info.run_id, "recipe.json")).read_text()) == CONFIG
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "block 0/loss")]


READERS: Mapping[str, Callable[[Path], list[tuple[int, float]]]] = {
    "tensorboard": _read_tensorboard,
    "wandb": _read_wandb,
    "trackio": _read_trackio,
    "mlflow": _read_mlflow,
}


@pytest.fixture(params=LOGGERS)
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A logger that is installed, and writes nowhere but into the test's folder."""
    name: str = request.param
    pytest.importorskip(name, reason=f"the extra {name} is not installed")
    for variable in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    return name


def test_records_arrive(name: str, tmp_path: Path) -> None:
    _log(name, tmp_path / name)
    assert READERS[name](tmp_path / name) == [(2, 2.5), (4, 1.25)]


@pytest.mark.parametrize("name", LOGGERS)
def test_a_missing_package_is_told_with_its_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape(f"pip install 'diffusionblocks[{name}]'")):
        LOGGERS[name](tmp_path, "a run", CONFIG)


# ---- pictures --------------------------------------------------------------------------------------------------


def _tensorboard_picture(folder: Path) -> tuple[int, bytes]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    (event,) = events.Images("samples")
    return event.step, event.encoded_image_string


def _wandb_picture(folder: Path) -> tuple[int, bytes]:
    import wandb

    wandb.teardown()
    (file,) = folder.glob("wandb/offline-run-*/files/media/images/samples_*.png")
    return int(file.name.split("_")[1]), file.read_bytes()


def _trackio_picture(folder: Path) -> tuple[int, bytes]:
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import MEDIA_DIR

    (entry,) = (each for each in SQLiteStorage.get_logs("diffusionblocks", "a run") if "samples" in each)
    return entry["step"], Path(MEDIA_DIR, entry["samples"]["file_path"]).read_bytes()


def _mlflow_picture(folder: Path) -> tuple[int, bytes]:
    (file,) = folder.glob("files/*/artifacts/samples/step-*.png")
    return int(file.stem.removeprefix("step-")), file.read_bytes()


PICTURES: Mapping[str, Callable[[Path], tuple[int, bytes]]] = {
    "tensorboard": _tensorboard_picture,
    "wandb": _wandb_picture,
    "trackio": _trackio_picture,
    "mlflow": _mlflow_picture,
}


def test_pictures_arrive(name: str, tmp_path: Path) -> None:
    picture = tmp_path / "step-000000002.png"
    Image.effect_noise((9, 5), 64).save(picture)
    logger = LOGGERS[name](tmp_path / name, "a run", CONFIG)
    assert isinstance(logger, PictureLogger)
    logger.log(RECORDS[0])
    logger.picture(picture, 2)
    logger.close()
    step, content = PICTURES[name](tmp_path / name)
    assert step == 2
    assert Image.open(BytesIO(content)).convert("L").tobytes() == Image.open(picture).tobytes()
