"""The run folder: who may write it, what it holds, and what the run says while it goes on.

`metrics.jsonl` has one flushed line a step; `metrics.csv` is made from it at every validation and at the end. The lock
is the operating system's, so it dies with the process.
"""

from __future__ import annotations

import fcntl
import json
import math
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from segvit import __version__
from segvit.contracts import UserError
from segvit.data.transforms import Augment
from segvit.engine.history import METRICS, flat, parse_row, write_csv
from segvit.engine.loggers import Logger
from segvit.engine.settings import Optim, Schedule
from segvit.files import open_atomic, write_json, write_text

STATE = Path("checkpoints") / "last" / "state.pt"
PREVIOUS_STATE = Path("checkpoints") / "previous" / "state.pt"
BEST_STATE = Path("checkpoints") / "best" / "state.pt"
# What may differ between a run and its continuation: where and how it is watched, not what is computed.
MAY_CHANGE = {
    "skip_check",
    "resume", "overwrite", "workers", "cache", "checkpoint_every", "val_every", "val_images", "steps", "epochs", "out",
    "log", "val_pictures",
}  # fmt: skip
# What a run of an older version, which did not write a setting yet, had: the defaults keep what was.
DEFAULTS = {
    "augment": asdict(Augment(crop=(1, 1))), "optim": asdict(Optim()), "schedule": asdict(Schedule()),
}  # fmt: skip
SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder. Raises UserError when another process is writing it, or it cannot be a folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder} is a file or lies below one; choose another --out") from None
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: that outlives us in forked loader workers
        except OSError:
            raise UserError(
                f"{folder} is being written by another process; wait for it or choose another --out"
            ) from None
        yield


def claim(folder: Path, config: dict[str, Any]) -> None:
    """Make the folder ours for this configuration.

    Raises UserError when it exists and neither resume nor overwrite is set, and on resuming another configuration.
    """
    stored = folder / "config.yaml"
    if config["resume"] and stored.exists():
        before = yaml.safe_load(stored.read_text(encoding="utf-8"))
        differences = list(changes(before, plain(config)))
        if differences:
            raise UserError(
                f"{folder} was started with other settings ({'; '.join(differences[:3])}); resume with the same ones, "
                "or start a new run in another --out"
            )
    elif stored.exists() and not config["overwrite"]:
        raise UserError(f"{folder} holds a run; pass --resume to go on, --overwrite to replace it, or another --out")
    elif stored.exists():
        for name in ("checkpoints", "model", "adapter", "report", "evaluation", "pictures", "tb", "wandb", "mlflow"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (METRICS, "metrics.csv", "train.log", "val.json"):
            (folder / name).unlink(missing_ok=True)
    for leftover in folder.rglob(".*.tmp"):  # of a process that was killed while it wrote
        leftover.unlink(missing_ok=True)
    # How this process was started is no part of the run: kept, it would stand against the next --resume.
    write_text(stored, yaml.safe_dump(plain(config) | {"resume": False, "overwrite": False}, sort_keys=False))


def changes(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """What differs between two nested configurations, as `path: before -> now`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            if path or key not in MAY_CHANGE:
                inner = f"{path}.{key}" if path else key
                known = DEFAULTS.get(path.removeprefix("settings."), {})
                yield from changes(before.get(key, plain(known.get(key))), now.get(key), inner)
    elif before != now:
        yield f"{path}: {before} -> {now}"


def plain(value: Any) -> Any:
    """Nested records with lists instead of tuples, as YAML gives them back."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def write_environment(folder: Path) -> None:
    """env.json: versions, machine and command line."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    write_json(
        folder / "env.json",
        {"segvit": __version__, "torch": torch.__version__, "python": platform.python_version(),
         "machine": platform.platform(), "gpu": gpu, "threads": torch.get_num_threads(), "command": sys.argv},
    )  # fmt: skip


class RunLog:
    """metrics.jsonl, train.log, pictures and the console of one run; only the main process writes.

    Rows and pictures also go to `loggers`.
    """

    def __init__(
        self, folder: Path, *, steps: int, start: int, batch_size: int, main: bool, loggers: Sequence[Logger] = ()
    ) -> None:
        self.folder, self.main, self.batch_size, self.steps, self.loggers = folder, main, batch_size, steps, loggers
        self.shown, self.miou = time.monotonic(), float("nan")
        if not main:
            return
        metrics = folder / METRICS
        if metrics.exists():  # steps after the checkpoint are about to be done again
            lines = metrics.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if (row := parse_row(line)) is not None and row["step"] <= start]
            write_text(metrics, "".join(line + "\n" for line in kept))
            write_csv(folder)
        self.metrics = metrics.open("a", encoding="utf-8")
        self.text = (folder / "train.log").open("a", encoding="utf-8")
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.bar.start()
        self.task = self.bar.add_task("", total=steps, completed=start)

    def row(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl, flushed; the console shows it when it is time."""
        if not self.main:
            return
        self.metrics.write(json.dumps(finite(row), allow_nan=False) + "\n")
        self.metrics.flush()
        numbers = {key: value for key, value in flat(finite(row)).items() if key != "step" and value is not None}
        for logger in self.loggers:
            logger.log(row["step"], numbers)
        if "val" in row:
            write_csv(self.folder)
            self.miou = row["val"]["miou"]
            return
        rate = self.batch_size / row["seconds"] if row.get("seconds") else float("nan")
        validated = "" if math.isnan(self.miou) else f"mIoU {self.miou:.4f}  "
        shown = f"loss {row['loss']:.4g}  {validated}{rate:.1f} images/s"
        self.bar.update(self.task, completed=row["step"], description=shown)
        now = time.monotonic()
        if self.bar.disable and (now - self.shown > SECONDS_BETWEEN_LINES or row["step"] in (1, self.steps)):
            self.shown = now
            left = (self.steps - row["step"]) * row.get("seconds", 0)
            self.message(f"step {row['step']}/{self.steps}  {shown}  {left / 60:.1f} min left")

    def message(self, text: str) -> None:
        """A line for train.log and the console."""
        if not self.main:
            return
        self.text.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")
        self.text.flush()
        self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        """Write pictures/step_000500.png (H, W, 3)."""
        if not self.main:
            return
        with open_atomic(self.folder / "pictures" / f"step_{step:06d}.png") as file:
            Image.fromarray(pixels).save(file, "PNG")
        for logger in self.loggers:
            logger.picture(step, name, pixels)

    def close(self) -> None:
        """Stop the bar and close the files."""
        if self.main:
            self.bar.stop()
            self.metrics.close()
            self.text.close()
            write_csv(self.folder)
            for logger in self.loggers:
                logger.close()


def finite(value: Any) -> Any:
    """The same row with None for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
