"""Comparing models: the budget in steps, what is left undone is done later, and one failure does not stop the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from segvit import cli
from segvit.contracts import UserError
from segvit.engine.history import read_history
from segvit.tasks import compare
from segvit.tasks.compare import Budget
from tests.tasks.tiny import DATA

SMALL: dict[str, Any] = {"crop": (32, 32), "batch_size": 4, "workers": 0, "device": "cpu"}


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compare.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, compare.Compared]:
    """Two models, three steps."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    return folder, compare.compare(DATA, ["lraspp", "pspnet"], str(folder), Budget(steps=3), **SMALL)


def test_every_figure_is_there(finished: tuple[Path, compare.Compared]) -> None:
    folder, result = finished
    assert result.complete
    rows = {row["name"]: row for row in result.report["models"]}
    assert rows["lraspp"]["parameters"] == 3_219_328  # torchvision tells 3,221,538 for 21 classes
    for name, row in rows.items():
        assert row["steps"] == 3
        assert len([line for line in read_history(folder / name) if "val" not in line]) == 3
        assert row["miou"] == json.loads((folder / name / "val.json").read_text())["miou"]
        assert min(row["gflops"], row["latency"], row["seconds"]) > 0
    table = (folder / "compare.md").read_text().splitlines()
    assert table[0].startswith("| model | mIoU |")
    assert {line.split(" | ")[0].removeprefix("| ") for line in table[2:4]} == {"lraspp", "pspnet"}
    assert "12 training and 4 validation images, 8 classes" in table[-1]
    assert str(folder) not in "\n".join(table)
    page = (folder / "index.html").read_text()
    assert page.count("<svg") == 3
    assert 'href="pspnet/report/index.html"' in page
    assert (folder / "pspnet" / "report" / "index.html").is_file()


def test_what_is_done_is_not_done_again(
    finished: tuple[Path, compare.Compared], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, first = finished
    monkeypatch.setattr(compare, "train", lambda experiment: pytest.fail("trained again"))
    again = compare.compare(DATA, ["pspnet", "lraspp"], str(folder), Budget(steps=3), **SMALL)
    known = {row["name"]: row["miou"] for row in first.report["models"]}
    assert {row["name"]: row["miou"] for row in again.report["models"]} == known


def test_other_settings_are_refused(finished: tuple[Path, compare.Compared]) -> None:
    folder, _ = finished
    with pytest.raises(UserError, match=r"other settings \(settings.steps: 3 -> 4\)"):
        compare.compare(DATA, ["lraspp"], str(folder), Budget(steps=4), **SMALL)
    with pytest.raises(UserError, match=r"other settings \(settings.batch_size: 4 -> 2\)"):
        compare.compare(DATA, ["lraspp"], str(folder), Budget(steps=3), **SMALL | {"batch_size": 2})


def test_minutes_become_steps_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "seconds_a_step", lambda experiment, dataset: 30.0)
    real = compare.train

    def interrupted(experiment: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare.compare(DATA, ["lraspp"], str(tmp_path / "out"), Budget(minutes=1), **SMALL)
    assert record(tmp_path / "out")["models"]["lraspp"]["steps"] == 2
    monkeypatch.setattr(compare, "train", real)
    monkeypatch.setattr(compare, "seconds_a_step", lambda experiment, dataset: pytest.fail("timed again"))
    result = compare.compare(DATA, ["lraspp"], str(tmp_path / "out"), Budget(minutes=1), **SMALL)
    assert result.report["models"][0]["steps"] == 2
    assert len([line for line in read_history(tmp_path / "out" / "lraspp") if "val" not in line]) == 2


def test_steps_are_timed_with_the_real_loop(tmp_path: Path) -> None:
    from segvit.data.dataset import open_dataset

    base = compare.shared_experiment(DATA, None, **SMALL)
    assert 0 < compare.seconds_a_step(compare.of_model(base, "lraspp", None), open_dataset(DATA)) < 60


def test_a_failure_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:  # DeepLab needs two images for its BatchNorm
        cli.main(
            ["compare", "--data", DATA, "--models", "deeplabv3, lraspp", "--steps", "1", "--out", str(out), "--crop",
             "[32,32]", "--batch_size", "1", "--workers", "0", "--device", "cpu"]
        )  # fmt: skip
    assert stop.value.code == 1
    told = capsys.readouterr().out
    assert "deeplabv3 failed: this network pools the whole image" in told
    rows = record(out)["models"]
    assert rows["lraspp"]["miou"] is not None
    assert rows["deeplabv3"]["error"].startswith("this network pools")
    assert "| deeplabv3 | failed |" in (out / "compare.md").read_text()
    assert (out / "index.html").read_text().count("<circle") == 3  # the one that came through, in three charts


def test_optimisers_and_sizes_by_kind_of_model() -> None:
    base = compare.shared_experiment(DATA, None, crop=(32, 48), batch_size=None, workers=None, device=None)
    unet, setr = (compare.of_model(base, name, None) for name in ("unet", "setr_pup_tiny"))
    assert (unet.optim.name, unet.options) == ("sgd", {})
    assert (setr.optim.name, setr.options) == ("adamw", {"image_size": [32, 48]})


def test_a_recipe_serves_all_but_keeps_its_model_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: segvit_vit_tiny\noptions: {depth: 2, image_size: 32}\nloss: {alpha: 0.5}\nsteps: 9\n"
        "augment: {crop: [32, 32]}\noptim: {lr: 0.1}\n"
    )
    base = compare.shared_experiment(DATA, str(path), crop=None, batch_size=None, workers=None, device=None)
    own, other = (compare.of_model(base, name, str(path)) for name in ("segvit_vit_tiny", "unet"))
    assert (own.options, own.loss) == ({"depth": 2, "image_size": 32}, {"alpha": 0.5})
    assert (other.options, other.loss, other.optim.lr) == ({}, {}, 0.1)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give --minutes or --steps, exactly one"):
        Budget()
    with pytest.raises(UserError, match="budget must be positive"):
        Budget(minutes=0)
    with pytest.raises(UserError, match="did you mean unet"):
        compare.compare(DATA, ["unett"], str(tmp_path), Budget(steps=1))
    with pytest.raises(UserError, match="give --models"):
        compare.compare(DATA, [], str(tmp_path), Budget(steps=1))
