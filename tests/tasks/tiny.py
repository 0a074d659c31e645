"""The smallest real training run, as an experiment and as a recipe, and what to read from its folder."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import yaml

from segvit.data.transforms import Augment
from segvit.engine.settings import Optim, Schedule
from segvit.tasks.experiment import Experiment

DATA = "synthetic:shapes?train=12&val=4&size=32"
OPTIONS = {
    "image_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64, "out_indices": [0, 1], "layers": 1,
    "drop_path": 0.1, "dropout": 0.1,
}  # fmt: skip
RECIPE = {
    "data": DATA, "model": "segvit_vit_tiny", "options": OPTIONS, "steps": 6, "batch_size": 4,
    "augment": {"crop": [32, 32]}, "optim": {"lr": 0.001}, "schedule": {"warmup": 2}, "workers": 0, "device": "cpu",
    "precision": "fp32",
}  # fmt: skip


def experiment(out: Path, **changes) -> Experiment:
    base = Experiment(
        **RECIPE | {"out": str(out), "augment": Augment(crop=(32, 32)), "optim": Optim(lr=0.001),
                    "schedule": Schedule(warmup=2)},
    )  # fmt: skip
    return replace(base, **changes)


def write_recipe(path: Path, **changes) -> Path:
    path.write_text(yaml.safe_dump(RECIPE | changes, sort_keys=False))
    return path


def command(*arguments: object) -> list[str]:
    """`segvit ...` as a process of its own, warnings as errors like in the tests."""
    return [sys.executable, "-m", "segvit", *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[dict]:
    """The rows of training steps, without what a clock says."""
    return [{key: row[key] for key in row if key != "seconds"} for row in history(folder) if "val" not in row]
