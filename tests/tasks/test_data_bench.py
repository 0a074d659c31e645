"""The bench of loading: every figure is there for each cache, the advice follows from the figures, recipes are read."""

import json
from dataclasses import replace

import pytest

from segvit.cli import main
from segvit.contracts import UserError
from segvit.data.dataset import FolderDataset
from segvit.tasks import data_bench
from segvit.tasks.data_bench import Speeds, bench, bench_loading, read_experiment, verdict
from tests.data.folders import two_folders
from tests.tasks.tiny import RECIPE, experiment, write_recipe

SPEEDS = Speeds(loader=38, model=120, decode=0.04, augment=0.01, workers=2, cache="none", cores=8)


@pytest.mark.parametrize(
    ("changes", "brake", "sentence"),
    [
        ({}, "loader", "loader 38 images/s < model 120 images/s: use --workers 7 or --cache ram"),
        ({"fits_ram": False}, "loader", "loader 38 images/s < model 120 images/s: use --workers 7 or --cache disk"),
        ({"cores": 4}, "loader", "loader 38 images/s < model 120 images/s: use --cache ram"),
        ({"cores": 4, "decode": 0.02}, "loader",
         "loader 38 images/s < model 120 images/s: use --cache ram with --workers 3"),
        ({"cores": 4, "cache": "ram"}, "loader",
         "loader 38 images/s < model 120 images/s: all 4 cores would load about 76 images/s; shrink the image files to "
         "the size they are trained at, or use a machine with more cores"),
        ({"workers": 0, "loader": 20}, "loader",
         "loader 20 images/s < model 120 images/s: use --workers 7"),
        ({"model": 30}, "model",
         "model 30 images/s < loader 38 images/s: loading is fast enough, the model sets the pace"),
        ({"model": 30, "workers": 0}, "model",
         "model 30 images/s < loader 38 images/s, but without workers each waits for the other: use --workers 1"),
    ],
)  # fmt: skip
def test_verdict(changes, brake, sentence):
    assert verdict(replace(SPEEDS, **changes)) == (brake, sentence)


def test_more_workers_alone_are_not_offered_beyond_the_cores():
    assert "--workers" not in verdict(replace(SPEEDS, cores=6))[1]


@pytest.mark.parametrize(("cache", "workers"), [("none", 2), ("none", 0), ("ram", 0), ("disk", 0)])
def test_figures(cache, workers, tmp_path, monkeypatch):
    monkeypatch.setenv("SEGVIT_CACHE", str(tmp_path / "cache"))
    data = str(two_folders(tmp_path / "data", counts={"train": 6, "val": 2}, size=(40, 40)))
    run = experiment(tmp_path / "out", data=data, cache=cache, workers=workers)
    result = bench_loading(run, seconds=0.05)
    report = json.loads(json.dumps(result.report))
    assert report["cache"] == cache
    assert report["workers"] == workers
    assert report["brake"] in ("loader", "model")
    for name in ("loader_images_per_second", "main_process_images_per_second", "model_images_per_second", "decode_ms"):
        assert report[name] > 0, name
    both = report["decode_ms"] + report["augment_ms"]
    assert both == pytest.approx(1e3 / report["main_process_images_per_second"], rel=0.01)
    assert report["advice"] in result.text
    assert f"{report['model_images_per_second']:.1f}" in result.text
    assert ("2 workers" in result.text) == (workers == 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_a_cache_is_measured_once_it_is_filled(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("SEGVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data_bench, "CACHED_IMAGES", 3)
    data = str(two_folders(tmp_path / "data", counts={"train": 30, "val": 1}, size=(40, 40)))
    read, reads = FolderDataset.read, []
    monkeypatch.setattr(FolderDataset, "read", lambda self, *place: reads.append(place) or read(self, *place))
    bench_loading(experiment(tmp_path / "out", data=data, cache=cache, workers=0), seconds=0.05)
    assert len(reads) <= 4 * 8 + 3  # estimates from eight images each and the three that are measured


def test_a_recipe_with_changes(tmp_path):
    recipe = write_recipe(tmp_path / "a.yaml", weights="vit_tiny_patch16_384", optim={"lr": 0.5})
    found = read_experiment(str(recipe), {"data": None, "workers": 3, "augment": {"crop": [16, 24]}})
    assert (found.data, found.workers, found.augment.crop) == (RECIPE["data"], 3, (16, 24))
    assert (found.options, found.optim.lr, found.weights) == (RECIPE["options"], 0.5, None)
    plain = read_experiment(None, {"data": "x", "batch_size": None})
    assert (plain.model, plain.batch_size, plain.augment.crop, plain.cache) == (
        "segvit_vit_small",
        16,
        (512, 512),
        "none",
    )


def test_command(tmp_path, capsys):
    recipe = write_recipe(tmp_path / "a.yaml")
    main(["data", "bench", "--config", str(recipe), "--workers", "1", "--seconds", "0.05", "--json"])
    assert json.loads(capsys.readouterr().out)["workers"] == 1
    main(["data", "bench", "--config", str(recipe), "--seconds=0.05", "--crop", "[16, 16]"])
    assert "at 16 x 16 on" in capsys.readouterr().out


def test_what_cannot_be_measured(tmp_path):
    with pytest.raises(UserError, match="give a dataset, or a --config"):
        bench()
    with pytest.raises(UserError, match="cannot be read as a recipe"):
        bench(config=str(tmp_path / "none.yaml"))
    (tmp_path / "a.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="is not a recipe"):
        bench(config=str(tmp_path / "a.yaml"))
    with pytest.raises(UserError, match=r"a.yaml: .*sttps"):
        bench(config=str(write_recipe(tmp_path / "a.yaml", sttps=3)))
    with pytest.raises(UserError, match="seconds is 0"):
        bench(config=str(write_recipe(tmp_path / "a.yaml")), seconds=0)
    with pytest.raises(UserError, match=r"no such folder|no such file|not a dataset|cannot be read"):
        bench(str(tmp_path / "nowhere"), config=str(write_recipe(tmp_path / "a.yaml")))
