"""A medical run from end to end: two classes, DuAT with the loss read as the paper has it, and the polyp measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segvit.cli import main
from segvit.contracts import UserError
from segvit.data.dataset import open_dataset
from segvit.engine.evaluate import evaluate
from segvit.inference.predictor import Predictor
from segvit.metrics.polyp import PolypMeasures
from segvit.model_folder import load_model
from segvit.tasks.dense import check_loss, train
from segvit.zoo import create_model
from tests.data.folders import save
from tests.tasks.tiny import DATA, experiment

DUAT: dict[str, Any] = {"model": "duat_pvt_v2_b2", "options": {"backbone": "pvt_v2_b0", "dim": 8}}


def blobs(root: Path) -> str:
    """Bright ellipses on noise."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:32, :32]
    for split, count in {"train": 4, "val": 2}.items():
        for i in range(count):
            inside = ((rows - rng.integers(10, 22)) / 8) ** 2 + ((columns - rng.integers(10, 22)) / 6) ** 2 < 1
            noise = rng.integers(0, 120, (32, 32, 3)) + 100 * inside[..., None]
            save(root / "images" / split / f"{i}.png", noise.astype(np.uint8))
            save(root / "masks" / split / f"{i}.png", inside.astype(np.uint8))
    (root / "classes.txt").write_text("tissue\npolyp\n")
    return str(root)


def test_a_polyp_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = blobs(tmp_path / "data"), tmp_path / "run"
    train(experiment(out, data=data, steps=2, loss={"reading": "per_pixel", "weight": 3.0}, **DUAT))
    main(["val", str(out), "--workers", "0", "--polyp"])
    printed = capsys.readouterr().out
    record = json.loads((out / "evaluation" / "val" / "metrics.json").read_text())["polyp"]
    assert f"polyp: mdice {record['mdice']:.4f}  miou {record['miou']:.4f}" in printed
    model, dataset, wanted = load_model(out), open_dataset(data), PolypMeasures()
    for i in range(2):
        sample = dataset.read("val", i)
        labels, sure = Predictor(model).read(sample.image)
        wanted.update_from_labels(labels, sure, sample.mask)
    assert record == wanted.metrics().to_json()


def test_more_classes_have_no_polyp_measures() -> None:
    dataset = open_dataset(DATA)
    model = create_model("duat_pvt_v2_b2", classes=dataset.classes, **DUAT["options"])
    with pytest.raises(UserError, match="a background and one class; the data have 8 classes"):
        evaluate(Predictor(model), dataset, "val", polyp=True)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"reading": "paper"}, "reading is 'paper'; give one of released, per_pixel"),
        ({"reading": 1.0}, "reading is 1.0; give one of released, per_pixel"),
        ({"weight": "much"}, "weight is 'much'; give a number"),
    ],
)
def test_loss_options_of_the_wrong_kind(loss: dict[str, float | str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        check_loss(experiment(tmp_path, loss=loss, **DUAT))
