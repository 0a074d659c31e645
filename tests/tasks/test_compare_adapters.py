"""Comparing tuning methods: the same base weights and head rate, what trains, failures, the study as an example."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from segvit import cli
from segvit.adapters.catalogue import ADAPTERS
from segvit.contracts import UserError
from segvit.data.dataset import open_dataset
from segvit.engine.settings import Optim
from segvit.model_folder import load_model, save_model
from segvit.tasks import compare
from segvit.tasks.compare import Budget
from segvit.tasks.compare_adapters import BACKBONE_RATES, HEAD_RATE, compare_adapters, of_method
from segvit.tasks.experiment import Experiment
from segvit.zoo import create_model
from tests.tasks.tiny import DATA

SMALL: dict[str, Any] = {"batch_size": 4, "workers": 0, "device": "cpu"}
VIT: dict[str, Any] = {"image_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64, "decoder": "linear"}
STUDY = Path(__file__).parents[2] / "examples" / "transfer_study.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "start"
    save_model(create_model("segmenter_vit_tiny", num_classes=5, **VIT), folder)
    return folder


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, compare.Compared]:
    folder = tmp_path_factory.mktemp("compare") / "out"
    methods = ["head", "head_only", "ssf", "full"]
    return folder, compare_adapters(DATA, methods, str(folder), Budget(steps=2), init=str(base), **SMALL)


def test_what_trains_is_counted(finished: tuple[Path, compare.Compared]) -> None:
    folder, result = finished
    assert result.complete
    rows = {row["name"]: row for row in result.report["models"]}
    head = 64 * 8 + 8
    assert rows.keys() == {"head_only", "ssf", "full"}
    assert (rows["head_only"]["trained"], rows["head_only"]["inside"]) == (head, 0)
    assert rows["ssf"]["inside"] == 2 * 22 * 64 + 4 * 64
    assert rows["ssf"]["trained"] == head + rows["ssf"]["inside"]
    assert rows["full"]["trained"] == rows["full"]["parameters"]
    assert result.report["facts"]["crop"] == [32, 32]  # of the base model
    table = (folder / "compare.md").read_text()
    assert table.startswith("| method | mIoU | pixel accuracy | trained | in the backbone |")
    assert "from start, 2 steps a method" in table
    page = (folder / "index.html").read_text()
    assert page.count("<svg") == 1
    assert "mIoU over trained parameters" in page


def test_all_start_from_the_same_weights(finished: tuple[Path, compare.Compared], base: Path) -> None:
    start = load_model(base).backbone.state_dict()
    tuned = load_model(finished[0] / "head_only").backbone.state_dict()
    assert all(torch.equal(value, tuned[key]) for key, value in start.items())
    adapted = load_model(finished[0] / "ssf")
    adapted.adapter.disable()
    assert all(torch.equal(value, adapted.backbone.state_dict()[key]) for key, value in start.items())
    assert (finished[0] / "ssf" / "adapter").is_dir()


def test_what_is_done_is_not_done_again(
    finished: tuple[Path, compare.Compared], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, first = finished
    monkeypatch.setattr(compare, "train", lambda experiment: pytest.fail("trained again"))
    again = compare_adapters(DATA, ["full", "ssf"], str(folder), Budget(steps=2), init=str(base), **SMALL)
    known = {row["name"]: row["miou"] for row in first.report["models"]}
    assert {row["name"]: row["miou"] for row in again.report["models"]} == {key: known[key] for key in ("full", "ssf")}
    with pytest.raises(UserError, match="other settings"):
        compare_adapters(DATA, ["ssf"], str(folder), Budget(steps=3), init=str(base), **SMALL)


def test_a_method_that_does_not_fit_is_a_row_with_its_reason(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unfit(backbone: Any) -> Any:
        raise UserError("unfit needs another backbone")

    monkeypatch.setitem(ADAPTERS, "unfit", unfit)
    with pytest.raises(SystemExit) as stop:
        cli.main(
            ["compare", "--data", DATA, "--adapters", "unfit, head", "--init", str(base), "--steps", "1", "--out",
             str(tmp_path / "out"), "--batch_size", "4", "--workers", "0", "--device", "cpu"]
        )  # fmt: skip
    assert stop.value.code == 1
    assert "unfit failed: unfit needs another backbone" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["models"]
    assert rows["head_only"]["miou"] is not None


def rates(experiment: Experiment) -> tuple[float, float]:
    """Of the head and of the backbone."""
    return experiment.optim.lr, experiment.optim.lr * experiment.optim.lr_mult.get("backbone.", 1.0)


def test_rates() -> None:
    assert ADAPTERS.keys() >= BACKBONE_RATES.keys()
    plain = Experiment(data=DATA, out="", steps=1, init="x", adapter="lora", adapter_options={"rank": 2})
    for name in BACKBONE_RATES:
        experiment = of_method(plain, name, recipe=False)
        assert rates(experiment) == pytest.approx((HEAD_RATE, BACKBONE_RATES[name]))
        assert experiment.optim.decay_mult["backbone."] == 0
        assert bool(experiment.adapter_options) == (name == "lora")
    recipe = Experiment(data=DATA, out="", steps=1, init="x", optim=Optim(lr=1e-5, lr_mult={"head": 10.0}))
    assert of_method(recipe, "full", recipe=True).optim == recipe.optim
    tuned = of_method(recipe, "lora", recipe=True)
    assert rates(tuned) == pytest.approx((1e-5, 1e-5 * BACKBONE_RATES["lora"] / BACKBONE_RATES["full"]))
    assert tuned.optim.lr_mult["head"] == 10


def test_the_loss_of_a_method_is_timed_too(base: Path) -> None:
    shared = compare.shared_experiment(DATA, None, crop=(32, 32), **SMALL)
    experiment = Experiment(
        data=DATA, out="", model="segmenter_vit_tiny", options=VIT, init=str(base), adapter="spm", steps=1,
        batch_size=4, workers=0, device="cpu", augment=shared.augment,
    )  # fmt: skip
    assert 0 < compare.seconds_a_step(experiment, open_dataset(DATA)) < 60


def test_mistakes(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(**options: Any) -> None:
        compare_adapters(DATA, ["ssf"], str(tmp_path / "out"), Budget(steps=1), **options)

    with pytest.raises(UserError, match="did you mean ssf"):
        compare_adapters(DATA, ["sssf"], str(tmp_path / "out"), Budget(steps=1), init=str(base))
    with pytest.raises(UserError, match="give --models NAME"):
        call(weights="vit.safetensors")
    with pytest.raises(UserError, match=r"give --init RUN or --weights NAME, exactly one; got None, None"):
        call(model="segmenter_vit_tiny")
    with pytest.raises(UserError, match=r"holds a segmenter_vit_tiny, not a unet"):
        call(init=str(base), model="unet")
    adapted = create_model("segmenter_vit_tiny", num_classes=5, adapter="ssf", **VIT)
    save_model(adapted, tmp_path / "adapted")
    with pytest.raises(UserError, match="holds a ssf adapter itself; merge it"):
        call(init=str(tmp_path / "adapted"))
    for options, words in (
        (["--models", "unet,fcn", "--adapters", "ssf"], "tunes one model, but --models names 2"),
        (["--models", "unet", "--init", "x"], "go with --adapters"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["compare", "--data", DATA, "--steps", "1", "--out", str(tmp_path / "out"), *options])
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_the_study_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.md"
    command = ["--out", str(tmp_path / "study"), "--base_steps", "2", "--steps", "2", "--table", str(table)]
    monkeypatch.setattr(sys, "argv", ["study", *command, "--methods", "head_only,bitfit"])
    runpy.run_path(str(STUDY), run_name="__main__")
    assert "bitfit" in capsys.readouterr().out
    text = table.read_text()
    assert text.startswith("# Transfer study")
    assert "| head_only |" in text
