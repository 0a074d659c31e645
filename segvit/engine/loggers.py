"""Other tools that a run reports to: TensorBoard, Weights & Biases and MLflow, each behind three functions.

Nothing leaves the machine unless the tool's own environment variables say so. A resumed run goes on in TensorBoard; in
the other two it is a second run of the same name.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import UserError

Name = Literal["tensorboard", "wandb", "mlflow"]


class Logger(Protocol):
    """What a run needs of a tool."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step."""

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        """A picture (H, W, 3)."""

    def close(self) -> None:
        """The end of the run, or of this part of it."""


def open_loggers(names: Sequence[Name], folder: Path, *, start: int, config: Mapping[str, Any]) -> list[Logger]:
    """The named tools for a run in `folder` that goes on after step `start` with the settings `config`.

    Raises UserError for a tool that is not installed.
    """
    loggers: list[Logger] = []
    for name in dict.fromkeys(names):
        try:
            loggers.append(TOOLS[name](folder, start, config))
        except ImportError as error:
            raise UserError(f"log: {name} is not installed; pip install segvit[logs], or leave it out") from error
    return loggers


class TensorBoard:
    """Event files in RUN/tb; see them with `tensorboard --logdir RUN`."""

    def __init__(self, folder: Path, start: int, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps after the checkpoint are about to be done again.
        self.writer = SummaryWriter(str(folder / "tb"), purge_step=start + 1 if start else None)
        self.writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```", start)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of the project "segvit", kept in RUN/wandb for `wandb sync` unless WANDB_MODE says otherwise."""

    def __init__(self, folder: Path, start: int, config: Mapping[str, Any]) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE") or "offline"
        self.image = wandb.Image
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "segvit", name=folder.name, dir=str(folder), mode=mode,
            config={**config, "start": start},
        )  # fmt: skip

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        self.run.log({name: self.image(pixels)}, step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run of the experiment "segvit", in files below RUN/mlflow unless MLFLOW_TRACKING_URI names another store."""

    def __init__(self, folder: Path, start: int, config: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        store = os.environ.get("MLFLOW_TRACKING_URI")
        if not store:  # new versions refuse files unless told; the small package knows no other store
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            store = (folder / "mlflow").resolve().as_uri()
        self.client, self.metric = MlflowClient(tracking_uri=store), Metric
        known = self.client.get_experiment_by_name("segvit")
        experiment = known.experiment_id if known else self.client.create_experiment("segvit")
        self.run: str = self.client.create_run(experiment, run_name=folder.name).info.run_id
        self.client.log_dict(self.run, {**config, "start": start}, "config.json")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        self.client.log_batch(self.run, metrics=[self.metric(key, value, now, step) for key, value in values.items()])

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        self.client.log_image(self.run, pixels, key=name, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.run)


TOOLS: dict[Name, Callable[[Path, int, Mapping[str, Any]], Logger]] = {
    "tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow,
}  # fmt: skip
