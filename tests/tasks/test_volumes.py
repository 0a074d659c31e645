"""Whole volumes at the command line: train on a folder of NIfTI files, measure each volume, write label volumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segvit.cli import main
from segvit.contracts import Classes, Sample, UserError
from segvit.data.balance import class_weights
from segvit.data.cache import cached
from segvit.data.dataset import open_dataset
from segvit.data.synthetic_medical import ORGANS, write_organs
from segvit.data.volumes import Case, cases, read_slice
from segvit.inference.predictor import Predictor
from segvit.metrics.volume import VolumeTable, volume_scores
from segvit.model_folder import load_model
from segvit.tasks.balance import class_balance
from segvit.tasks.volumes import Protocol, VolumeCollector, make_protocol
from tests.tasks.tiny import experiment, write_recipe

nibabel = pytest.importorskip("nibabel")
CLASSES = Classes(("background", "organ"), ((0, 0, 0), (255, 0, 0)))
OWN = Protocol("medpy", "exclude", None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trained run and its data."""
    root = tmp_path_factory.mktemp("volumes")
    data = write_organs(root / "data", train=2, val=2, shape=(5, 32, 32))
    recipe = write_recipe(root / "recipe.yaml", data=data, steps=3)
    main(["train", "--config", str(recipe), "--out", str(root / "run"), "--cache", "ram"])
    return root / "run", root / "data"


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    main([*map(str, arguments), "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("convention", ["medpy", "monai", "deepmind", "transunet"])
def test_val_measures_each_volume(
    convention: Any, run: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, data = run
    record = printed(capsys, "val", folder, "--volumes", convention, "--workers", 0, "--out", tmp_path)["volumes"]
    package = "medpy" if convention == "transunet" else convention
    empty = "transunet" if convention == "transunet" else "exclude"
    table, dataset, predictor = VolumeTable(6, 255, package=package, empty=empty), open_dataset(data), None
    predictor = Predictor(load_model(folder))
    for case in cases(dataset, "val"):
        pairs = [(predictor.segment((sample := dataset.read("val", i)).image)[0], sample.mask) for i in case.indices]
        spacing: Any = "voxel" if convention == "transunet" else case.spacing
        table.update(case.name, *(np.stack(part) for part in zip(*pairs, strict=True)), spacing=spacing)
    for name, value in table.means()._asdict().items():
        assert record[name] == (None if np.isnan(value) else pytest.approx(value, abs=1e-12))
    assert [row["name"] for row in record["volumes"]] == [f"images/val/case00{i}.nii.gz" for i in (0, 1)]
    assert record["volumes"][0]["dice"] == pytest.approx(np.nanmean(table.cases["images/val/case000.nii.gz"][:, 0]))
    assert [row["name"] for row in record["classes"]] == list(ORGANS[1:])
    assert (record["package"], record["empty"]) == (package, empty)
    assert record["spacing"] == ("voxel" if convention == "transunet" else "own")
    assert json.loads((tmp_path / "metrics.json").read_text())["volumes"] == record


def test_the_table_for_people(run: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["val", str(run[0]), "--volumes", "monai", "--workers", "0", "--out", str(tmp_path), "--empty", "penalty"])
    out = capsys.readouterr().out
    assert "volume or class" in out
    assert "images/val/case001.nii.gz" in out
    assert "volumes: surfaces of monai, mm, empty masks: penalty" in out


def test_predict_writes_a_volume_with_the_affine_of_the_scan(
    run: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, data = run
    scan = data / "images" / "val" / "case001.nii.gz"
    written = printed(capsys, "predict", scan, "--model", folder, "--out", tmp_path, "--areas")
    assert written == [
        {"image": str(scan), "labels": str(tmp_path / scan.name), "areas": str(tmp_path / "case001.json")}
    ]
    labels, source = nibabel.load(tmp_path / scan.name), nibabel.load(scan)
    np.testing.assert_array_equal(labels.affine, source.affine)
    assert labels.shape == source.shape
    dataset, predictor = open_dataset(data), Predictor(load_model(folder))
    first = cases(dataset, "val")[1].indices[0]
    np.testing.assert_array_equal(
        read_slice(tmp_path / scan.name, 2), predictor.segment(dataset.read("val", first + 2).image)[0]
    )
    rows = json.loads((tmp_path / "case001.json").read_text())["classes"]
    assert sum(row["voxels"] for row in rows) == 5 * 32 * 32
    voxel = np.prod(np.abs(np.diag(source.affine))[:3]) / 1000
    assert rows[0]["millilitres"] == pytest.approx(rows[0]["voxels"] * voxel, rel=1e-5)


def test_a_folder_of_volumes_and_numpy_volumes(
    run: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    scan = np.stack([read_slice(run[1] / "images" / "val" / "case000.nii.gz", k) for k in range(5)])
    (tmp_path / "in").mkdir()
    np.savez(tmp_path / "in" / "a.npz", image=scan, spacing=np.array([3.0, 0.8, 0.8]))
    (tmp_path / "in" / "b.nii.gz").write_bytes(b"no volume")
    with pytest.raises(SystemExit):
        main(["predict", str(tmp_path / "in"), "--model", str(run[0]), "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert captured.out.strip() == str(tmp_path / "out" / "a.npz")
    assert "1 images were left out" in captured.err
    assert "b.nii.gz: the volume cannot be read" in captured.err
    with np.load(tmp_path / "out" / "a.npz") as arrays:
        assert arrays["label"].shape == (5, 32, 32)
        assert arrays["spacing"].tolist() == [3.0, 0.8, 0.8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "SCAN", "--overlay"], "a volume or large image has no overlay"),
        (["predict", "SCAN", "--out", "SCANS"], "would replace an input image"),
        (["val", "--spacing", "voxel"], "--spacing and --empty belong to --volumes"),
        (["val", "--volumes", "medpy", "--spacing", "1,2"], "spacing is '1,2'; give own, voxel, or millimetres"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    scan = run[1] / "images" / "val" / "case000.nii.gz"
    places = {"SCAN": str(scan), "SCANS": str(scan.parent)}
    command, *rest = (places.get(word, word) for word in arguments)
    whose = [str(run[0])] if command == "val" else ["--model", str(run[0])]
    with pytest.raises(SystemExit):
        main([command, *rest, *whose])
    assert message in capsys.readouterr().err


def test_the_doctor_leaves_volumes_alone(run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "check", str(run[1])])
    assert "holds volumes, which are checked as they are read" in capsys.readouterr().err


def test_counts_are_those_of_the_volumes(run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(capsys, "data", "stats", run[1], "--images", 1)["splits"]["val"]["classes"]
    labels = np.stack([open_dataset(run[1]).read("val", i).mask for i in range(10)])
    assert [row["pixels"] for row in rows] == np.bincount(labels.ravel(), minlength=len(ORGANS)).tolist()
    dataset, weighed = open_dataset(run[1]), experiment(run[0], data=str(run[1]), class_balance="log")
    wanted = class_weights(np.bincount(np.stack([dataset.read("train", i).mask for i in range(10)]).ravel()), "log")
    found = class_balance(weighed, cached(dataset, "ram", workers=0)).weights
    assert found is not None
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-6)


def feed(collector: VolumeCollector, pred: np.ndarray, label: np.ndarray, order: list[int]) -> None:
    for k in order:
        collector(k, Sample(np.zeros((*label[k].shape, 1), np.uint8), label[k], f"slice {k}"), pred[k])


@pytest.mark.parametrize("convention", ["medpy", "monai", "deepmind"])
def test_unequal_steps_count_along_their_axes(convention: Any) -> None:
    label = np.zeros((7, 6, 6), np.uint8)
    label[1:4, 2:4, 2:4] = 1
    for axis, step in enumerate((5.0, 0.8, 0.5)):
        pred, protocol = np.roll(label, 1, axis=axis), make_protocol(convention, spacing=None, empty=None)
        collector = VolumeCollector([Case("a", tuple(range(7)), (5.0, 0.8, 0.5))], CLASSES, protocol)
        feed(collector, pred, label, [3, 0, 4, 2, 1, 6, 5])
        record = collector.record()
        assert record["hd95"] == pytest.approx(step)
        wanted = volume_scores(pred == 1, label == 1, spacing=(5.0, 0.8, 0.5), package=convention)
        assert record["asd"] == pytest.approx(wanted.asd)


def test_a_spacing_that_is_given_wins(tmp_path: Path) -> None:
    label = np.zeros((3, 8, 8), np.uint8)
    label[1, 2:4, 2:4] = 1
    pred = np.roll(label, 2, axis=2)
    found = {}
    for given in ("own", "voxel", "9,2,3"):
        protocol = make_protocol("medpy", spacing=given, empty=None)
        collector = VolumeCollector([Case("a", (0, 1, 2), (5.0, 0.5, 0.5))], CLASSES, protocol)
        feed(collector, pred, label, [0, 1, 2])
        found[given] = collector.table.means().hd95
    assert found == {"own": 1.0, "voxel": 2.0, "9,2,3": 6.0}


def test_volumes_without_spacing() -> None:
    with pytest.raises(UserError, match="a has no spacing; give --spacing D,H,W in millimetres, or --spacing voxel"):
        VolumeCollector([Case("a", (0,), None)], CLASSES, OWN)
    VolumeCollector([Case("a", (0,), None)], CLASSES, OWN._replace(spacing="voxel"))


@pytest.mark.parametrize(
    ("empty", "no_label", "no_prediction", "neither"),
    [
        (None, (0.0, None), (0.0, None), (None, None)), ("transunet", (1.0, 0.0), (0.0, 0.0), (0.0, 0.0)),
        ("zero", (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)), ("penalty", (0.0, 373.13), (0.0, 373.13), (1.0, 0.0)),
    ],
)  # fmt: skip
def test_empty_masks_are_worth_what_the_rule_says(empty: Any, no_label: Any, no_prediction: Any, neither: Any) -> None:
    full, none = np.ones((2, 4, 4), np.uint8), np.zeros((2, 4, 4), np.uint8)
    for pred, label, worth in ((full, none, no_label), (none, full, no_prediction), (none, none, neither)):
        protocol = make_protocol("monai", spacing="voxel", empty=empty)
        collector = VolumeCollector([Case("a", (0, 1), None)], CLASSES, protocol)
        feed(collector, pred, label, [0, 1])
        assert (collector.record()["dice"], collector.record()["hd95"]) == worth


def test_slices_of_other_sizes() -> None:
    collector = VolumeCollector([Case("a", (0, 1), (1.0, 1.0, 1.0))], CLASSES, OWN)
    collector(0, Sample(np.zeros((4, 4, 1), np.uint8), np.zeros((4, 4), np.uint8), "x"), np.zeros((4, 4), np.uint8))
    with pytest.raises(UserError, match=r"y is \(5, 4\) but other slices of a are \(4, 4\)"):
        collector(1, Sample(np.zeros((5, 4, 1), np.uint8), np.zeros((5, 4), np.uint8), "y"), np.zeros((5, 4), np.uint8))


def test_transunet_is_the_protocol_of_the_synapse_tables() -> None:
    assert make_protocol("transunet", spacing=None, empty=None) == Protocol("medpy", "transunet", "voxel")
    assert make_protocol("transunet", spacing="own", empty="zero") == Protocol("medpy", "zero", None)
