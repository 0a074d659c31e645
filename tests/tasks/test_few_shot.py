"""The few-shot task: a run on a fold file, exact resuming, SVF folded into the model, the command line, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from segvit import cli
from segvit.backbones.deep_stem import DeepStemResNet
from segvit.contracts import UserError
from segvit.systems import few_shot as system
from segvit.tasks import few_shot, few_shot_base
from segvit.tasks.few_shot import FewShot

DATA = "synthetic:shapes?train=12&val=10&size=64"
FOLDS = "folds: [[ball, box], [tent, flag]]"


@pytest.fixture(autouse=True, scope="module")
def small() -> Any:
    """Four blocks of four planes, also where the model is loaded again."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (system, few_shot_base):
            patch.setattr(
                module, "deep_stem_resnet", lambda name, weights: DeepStemResNet((1, 1, 1, 1), stem=4, planes=4)
            )
        yield


def run(folder: Path, name: str, **changes: Any) -> FewShot:
    (folder / "folds.yaml").write_text(FOLDS, encoding="utf-8")
    base = FewShot(
        data=DATA, out=str(folder / name), folds=str(folder / "folds.yaml"), options={"dim": 8}, tune="svf", size=49,
        min_pixels=20, keep_novel=True, steps=4, batch_size=2, episodes=4, seeds=2, device="cpu", workers=0,
        checkpoint_every=2,
    )  # fmt: skip
    return replace(base, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("few_shot")
    return folder, few_shot.train_few_shot(run(folder, "run"))


def test_a_run_leaves_what_it_should(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, figures = trained
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert set(figures["classes"]) == {"ball", "box"}
    assert [sum(part["episodes"].values()) for part in figures["runs"]] == [4, 4]
    stored = json.loads((folder / "run/val.json").read_text())
    assert stored["miou"] == pytest.approx(figures["miou"])
    assert not any("singular" in key for key in load_file(folder / "run/model/model.safetensors"))


def test_svf_changes_the_backbone_and_frozen_leaves_it(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = trained
    few_shot.train_few_shot(run(folder, "frozen", tune="frozen"))
    tuned, frozen = (load_file(folder / name / "model/model.safetensors") for name in ("run", "frozen"))
    assert set(tuned) == set(frozen)
    changed = {key for key in tuned if "backbone" in key and not torch.equal(tuned[key], frozen[key])}
    assert {key.split(".")[2] for key in changed} == {"layer2", "layer3", "layer4"}


def test_a_resumed_run_ends_the_same(trained: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, figures = trained
    all_batches = few_shot.batches

    def cut(*arguments: Any) -> Any:
        for i, batch in enumerate(all_batches(*arguments)):
            if i == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(few_shot, "batches", cut)
    with pytest.raises(KeyboardInterrupt):
        few_shot.train_few_shot(run(folder, "again"))
    monkeypatch.setattr(few_shot, "batches", all_batches)
    assert few_shot.train_few_shot(run(folder, "again", resume=True)) == figures
    once, twice = (load_file(folder / name / "model/model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(once[key], twice[key]) for key in once)


def test_the_command_line(trained: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    folder, figures = trained
    options = ["--data", DATA, "--episodes", "4", "--seeds", "2", "--device", "cpu"]
    cli.main(["few_shot", "val", str(folder / "run"), *options, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["miou"], found["fb_iou"]) == (pytest.approx(figures["miou"]), pytest.approx(figures["fb_iou"]))
    cli.main(["few_shot", "val", str(folder / "run"), *options, "--fold", "1", "--shots", "2"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["mIoU", "FB-IoU", "tent", "flag"]


def test_bad_input(tmp_path: Path) -> None:
    wrong = partial(run, tmp_path, "run")
    with pytest.raises(UserError, match=r"class '.*' \(id \d+\) has 0 usable images in train"):
        few_shot.train_few_shot(wrong(min_pixels=64 * 64))
    with pytest.raises(UserError, match=r"has folds 0\.\.1, not 2"):
        few_shot.train_few_shot(wrong(fold=2))
    with pytest.raises(UserError, match="unknown few-shot network"):
        few_shot.train_few_shot(wrong(model="pfenet"))
    with pytest.raises(UserError, match="no option 'width'"):
        few_shot.train_few_shot(wrong(options={"width": 8}))
    with pytest.raises(UserError, match="size is 17"):
        wrong(size=17)
    with pytest.raises(UserError, match="must be 1 or more"):
        wrong(steps=0)
    with pytest.raises(UserError, match="holds no few-shot model"):
        few_shot.evaluate_few_shot(str(tmp_path), DATA)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    (folder / "folds.yaml").write_text(FOLDS, encoding="utf-8")
    arguments = ["--out", str(folder / "base"), "--folds", str(folder / "folds.yaml"), "--hidden", "8", "--size", "49"]
    arguments += ["--backbone", "tiny", "--min_pixels", "20", "--keep_novel", "true", "--steps", "2"]
    arguments += ["--batch_size", "2", "--device", "cpu", "--workers", "0"]
    cli.main(["few_shot", "train_base", DATA, *arguments])
    return folder


def test_bam_takes_its_base_learner(base: Path) -> None:
    figures = json.loads((base / "base/val.json").read_text())
    assert list(figures["classes"]) == ["background", "tent", "flag"]
    settings = run(base, "bam", model="bam_tiny", base=str(base / "base"), tune="svf")
    few_shot.train_few_shot(settings)
    learned = load_file(base / "base/model/model.safetensors")
    whole = load_file(base / "bam/model/model.safetensors")
    heads = {key.removeprefix("head."): value for key, value in learned.items() if key.startswith("head.")}
    assert all(torch.equal(whole[f"base.{key}"], value) for key, value in heads.items())
    stem = "backbone.layer1.0.conv1.weight"
    assert torch.equal(whole[f"meta.matcher.{stem}"], learned[stem])
    line = json.loads((base / "bam/metrics.jsonl").read_text().splitlines()[0])
    assert {"loss_ce", "loss_meta", "loss_base"} <= set(line)


def test_a_base_learner_must_fit(base: Path) -> None:
    wrong = partial(run, base, "other", base=str(base / "base"))
    with pytest.raises(UserError, match="was trained on the base classes"):
        few_shot.train_few_shot(wrong(model="bam_tiny", fold=1))
    with pytest.raises(UserError, match="has another backbone"):
        few_shot.train_few_shot(wrong(model="pfenet_resnet50"))
    with pytest.raises(UserError, match="BAM needs a base learner"):
        few_shot.train_few_shot(wrong(model="bam_tiny", base=None))
    with pytest.raises(UserError, match="holds no base learner"):
        few_shot.train_few_shot(wrong(model="bam_tiny", base=str(base)))
    with pytest.raises(UserError, match="leave one out"):
        wrong(weights="file.pth")
