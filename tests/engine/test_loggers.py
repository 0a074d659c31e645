"""TensorBoard for real; Weights & Biases and MLflow through stand-ins that have the functions we call."""

import sys
import types

import numpy as np
import pytest

from segvit.contracts import UserError
from segvit.engine.loggers import TOOLS, open_loggers

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
CONFIG = {"model": "segvit_vit_tiny", "augment": {"crop": (32, 32)}}


def module(name, **content):
    made = types.ModuleType(name)
    made.__dict__.update(content)
    return made


def use(logger):
    logger.log(3, {"loss": 0.5, "val_miou": 0.25})
    logger.picture(3, "val", PIXELS)
    logger.close()


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_that_is_not_installed_is_named(tmp_path, monkeypatch, name):
    for missing in ("torch.utils.tensorboard", "wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"{name} is not installed; pip install segvit\[logs\]"):
        open_loggers([name], tmp_path, start=0, config=CONFIG)


def test_no_tool_unless_asked_for(tmp_path):
    assert open_loggers([], tmp_path, start=0, config=CONFIG) == []
    assert list(tmp_path.iterdir()) == []


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tb")).Reload()


@pytest.fixture
def tensorboard():
    pytest.importorskip("tensorboard")


def test_tensorboard(tmp_path, tensorboard):
    use(*open_loggers(["tensorboard", "tensorboard"], tmp_path, start=0, config=CONFIG))
    found = events(tmp_path)
    assert [(event.step, event.value) for event in found.Scalars("val_miou")] == [(3, 0.25)]
    assert found.Images("val")[0].width == 6
    assert "config/text_summary" in found.Tags()["tensors"]


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path, tensorboard):
    for start, value in ((0, 1.0), (2, 7.0)):
        (logger,) = open_loggers(["tensorboard"], tmp_path, start=start, config=CONFIG)
        for step in range(start + 1, 5):
            logger.log(step, {"loss": value})
        logger.close()
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("loss")] == [
        (1, 1.0), (2, 1.0), (3, 7.0), (4, 7.0)
    ]  # fmt: skip


@pytest.mark.parametrize("mode", [None, "online"])
def test_wandb(tmp_path, monkeypatch, mode):
    told = []
    run = types.SimpleNamespace(
        log=lambda values, step: told.append((step, values)), finish=lambda: told.append("finished")
    )

    def init(**options):
        told.append(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=init, Image=lambda pixels: ("image", pixels.shape)))
    for key in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(key, raising=False)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    folder = tmp_path / "run"
    use(*open_loggers(["wandb"], folder, start=2, config=CONFIG))
    options = {"project": "segvit", "name": "run", "dir": str(folder), "mode": mode or "offline"}
    assert told == [
        {**options, "config": {**CONFIG, "start": 2}},
        (3, {"loss": 0.5, "val_miou": 0.25}), (3, {"val": ("image", (4, 6, 3))}), "finished",
    ]  # fmt: skip


class Client:
    """What we use of mlflow.MlflowClient."""

    def __init__(self, tracking_uri):
        self.told = [tracking_uri]
        clients.append(self)

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return f"experiment {name}"

    def create_run(self, experiment, run_name):
        self.told.append((experiment, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

    def log_dict(self, run, values, file):
        self.told.append((run, file, values["model"]))

    def log_batch(self, run, metrics):
        self.told.append((run, [(key, value, step) for key, value, _, step in metrics]))

    def log_image(self, run, pixels, key, step):
        self.told.append((run, key, step, pixels.shape))

    def set_terminated(self, run):
        self.told.append((run, "over"))


clients = []


@pytest.mark.parametrize("store", [None, "http://localhost:5000"])
def test_mlflow(tmp_path, monkeypatch, store):
    clients.clear()
    entities = module("mlflow.entities", Metric=lambda *values: values)
    monkeypatch.setitem(sys.modules, "mlflow", module("mlflow", MlflowClient=Client, entities=entities))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store or "")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")
    use(*open_loggers(["mlflow"], tmp_path / "run", start=0, config=CONFIG))
    assert clients[0].told == [
        store or (tmp_path / "run" / "mlflow").as_uri(),
        ("experiment segvit", "run"), ("r1", "config.json", "segvit_vit_tiny"),
        ("r1", [("loss", 0.5, 3), ("val_miou", 0.25, 3)]), ("r1", "val", 3, (4, 6, 3)), ("r1", "over"),
    ]  # fmt: skip
