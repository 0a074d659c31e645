"""Detection: a run that resumes exactly, figures that COCO's tool agrees with, folders, the command line; it learns."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from segvit import cli
from segvit.contracts import UserError
from segvit.data.boxes import open_boxes
from segvit.engine.settings import Optim, Schedule
from segvit.tasks import detect
from segvit.tasks.detect import Detection, Detector

DATA = "synthetic:shapes?train=6&val=3&size=64"
TINY: dict[str, Any] = {"depths": [1, 1, 1, 1], "dims": [8, 16, 40, 64], "fpn_dim": 16}
CPU = torch.device("cpu")


def run(out: Path, **changes: Any) -> Detection:
    base = Detection(
        data=DATA, out=str(out), options=TINY, steps=4, batch_size=2, size=(64, 64), device="cpu", workers=0,
        schedule=Schedule(warmup=1), checkpoint_every=2,
    )  # fmt: skip
    return replace(base, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("detect") / "run"
    return folder, detect.train_detector(run(folder))


def test_a_run_leaves_what_it_should(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, figures = trained
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["loss"] == pytest.approx(lines[0]["loss_classification"] + lines[0]["loss_bbox_regression"])
    assert json.loads((folder / "val.json").read_text()) == figures
    assert set(figures["classes"]) == {"ball", "box", "tent", "flag", "dice"}
    assert figures["images"] == 3
    detector = detect.load_detector(folder)
    assert detector.names == ["ball", "box", "tent", "flag", "dice"]
    assert detector.config["options"]["size"] == [64, 64]


def test_a_resumed_run_ends_the_same(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = detect.batches

    def cut(*arguments: Any) -> Any:
        for number, batch in enumerate(draws(*arguments)):
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(detect, "batches", cut)
    with pytest.raises(KeyboardInterrupt):
        detect.train_detector(run(tmp_path / "run"))
    monkeypatch.setattr(detect, "batches", draws)
    detect.train_detector(run(tmp_path / "run", resume=True))
    first, again = (detect.load_detector(folder).network.state_dict() for folder in (trained[0], tmp_path / "run"))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


def test_mirrored_boxes_lie_on_their_objects() -> None:
    data = open_boxes(DATA)
    for draw in range(4):
        plain, target, name = detect.Draws(data, seed=0, flip=0.0)[draw]
        mirrored, turned, again = detect.Draws(data, seed=0, flip=1.0)[draw]
        assert name == again
        for before, after in zip(target["boxes"].int().tolist(), turned["boxes"].int().tolist(), strict=True):
            part = plain[:, before[1] : before[3], before[0] : before[2]]
            torch.testing.assert_close(mirrored[:, after[1] : after[3], after[0] : after[2]], part.flip(-1))


class Oracle(torch.nn.Module):
    """Says what it is told, image by image."""

    def __init__(self, answers: list[dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self.answers = iter(answers)

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [next(self.answers)]


def truths(shift: float = 0.0) -> list[dict[str, torch.Tensor]]:
    data, found = open_boxes(DATA), []
    for i in range(3):
        boxes = data.read("val", i).boxes
        corners = torch.from_numpy(boxes.corners) + shift
        found.append(
            {"boxes": corners, "labels": torch.from_numpy(boxes.labels), "scores": torch.full((len(corners),), 0.9)}
        )
    return found


def figures(answers: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    detector = Detector(Oracle(answers), {"classes": list(open_boxes(DATA).names)})
    return detect.coco_figures(detector, open_boxes(DATA), "val", device=CPU)


def test_coco_figures(capsys: pytest.CaptureFixture[str]) -> None:
    perfect, shifted = figures(truths()), figures(truths(shift=6.0))
    assert perfect["AP"] == pytest.approx(1.0)
    assert all(value in (None, pytest.approx(1.0)) for value in perfect["classes"].values())
    assert shifted["AP"] < 0.9
    assert shifted["AP50"] >= shifted["AP75"]
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    assert figures([nothing] * 3)["AP"] == 0.0
    assert capsys.readouterr().out == ""


def test_the_command_line(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, known = trained
    cli.main(["detect", "val", str(folder), "--data", DATA, "--device", "cpu", "--json"])
    assert json.loads(capsys.readouterr().out) == known
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(tmp_path / "a.png")
    arguments = ["--model", str(folder), "--out", str(tmp_path / "o"), "--threshold", "0", "--device", "cpu"]
    cli.main(["detect", "predict", str(tmp_path / "a.png"), *arguments])
    assert capsys.readouterr().out.strip() == str(tmp_path / "o" / "a.json")
    rows = json.loads((tmp_path / "o" / "a.json").read_text())
    assert all(set(row) == {"class", "score", "box"} for row in rows)
    with Image.open(tmp_path / "o" / "a.png") as drawn:
        assert drawn.size == (64, 48)


def test_training_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(
        ["detect", "train", DATA, "--out", str(tmp_path / "run"), "--options", json.dumps(TINY), "--steps", "1",
         "--batch_size", "2", "--size", "[64,64]", "--workers", "0", "--device", "cpu"]
    )  # fmt: skip
    assert capsys.readouterr().out.startswith("AP ")


def test_mistakes(trained: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="holds a run; pass --resume"):
        detect.train_detector(run(trained[0]))
    with pytest.raises(UserError, match=r"has no option 'depth'; it has .*depths"):
        detect.train_detector(run(tmp_path / "run", options={"depth": 3}))
    with pytest.raises(UserError, match="unknown detector 'yolo'"):
        run(tmp_path, model="yolo")
    with pytest.raises(UserError, match="size is"):
        run(tmp_path, size=(64, 32))
    with pytest.raises(UserError, match="holds no detector"):
        detect.load_detector(tmp_path / "nothing")
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(UserError, match=r"pip install segvit\[detect\]"):
        figures(truths())


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    options = {"depths": [1, 1, 1, 1], "dims": [32, 64, 80, 64], "fpn_dim": 64, "anchor_scale": 3.0, "drop_path": 0.0}
    found = detect.train_detector(
        run(
            tmp_path / "run", data="synthetic:shapes?train=200&val=20&size=64", options=options, steps=300,
            batch_size=8, optim=Optim(lr=1e-3, weight_decay=1e-4, lr_mult={}, clip=5.0),
            schedule=Schedule(warmup=40), checkpoint_every=300,
        )
    )  # fmt: skip
    assert found["AP50"] > 0.1  # from nothing; 0.30 after 400 steps, about 0 before the first
