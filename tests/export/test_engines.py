"""Engines of run folders: the file is made once, checked, and made again when the weights are others."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.export import ExportedProgram

from segvit.cli import main
from segvit.contracts import UserError
from segvit.export import build, engines
from segvit.export.engines import exported_engine, fingerprint, start
from segvit.export.record import Record
from segvit.inference.predictor import Predictor, TorchRuntime
from segvit.model_folder import load_model, save_model
from tests.export.conftest import tiny_model

if TYPE_CHECKING:
    from segvit.contracts import Model

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


@pytest.fixture
def folder(model: Model, program: ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder; tracing is done once for all tests."""
    save_model(model, tmp_path / "model")
    monkeypatch.setattr(build, "trace", lambda model, **options: program)
    monkeypatch.setattr(build, "natural_sizes", lambda model: ((32, 32), (40, 56), (33, 64)))
    return tmp_path / "model"


def copy_file(files: dict[str, Path]) -> Any:
    """Stands for writing a file, where the one of the fixture will do."""

    def write(program: ExportedProgram, path: Path, record: Record, *rest: Any, **options: Any) -> None:
        shutil.copy(files[record.format], path)

    return write


@pytest.mark.parametrize(
    ("engine", "quick"),
    [
        ("onnxruntime", True),
        *(pytest.param(engine, False, marks=pytest.mark.slow) for engine in ("onnxruntime", "openvino")),
    ],
)
def test_an_engine_is_exported_once_and_gives_the_labels_of_torch(
    engine: Any, quick: bool, folder: Path, model: Model, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if quick:
        monkeypatch.setattr(build, "write", copy_file(files))
    wanted = Predictor(model)(IMAGE).labels
    run = start(str(folder), "cpu", None, engine=engine, precision="fp32")
    assert "kept as" in capsys.readouterr().err
    assert (Predictor(run)(IMAGE).labels != wanted).sum() <= 1
    kept = {path: path.stat().st_mtime_ns for path in (folder / "engines").iterdir()}
    assert any(path.name.endswith(".gate.json") for path in kept)
    monkeypatch.setattr(engines, "export_model", None)  # must not be called again
    again = start(str(folder), "cpu", None, engine=engine, precision="fp32")
    assert capsys.readouterr().err == ""
    assert (Predictor(again)(IMAGE).labels == Predictor(run)(IMAGE).labels).all()
    assert {path: path.stat().st_mtime_ns for path in (folder / "engines").iterdir()} == kept


def test_other_weights_classes_or_inputs_make_another_file() -> None:
    marks = [fingerprint(tiny_model(), "onnxruntime")]
    assert marks[0] == fingerprint(tiny_model(), "onnxruntime")
    for change in ("weights", "spec", "classes"):
        model = tiny_model()
        if change == "weights":
            next(model.parameters()).data.view(-1)[0] += 1e-3
        elif change == "spec":
            model.spec = type(model.spec)(scale=(64, 32))
        else:
            names = ("lawn", *model.config.classes.names[1:])
            classes = type(model.classes)(names, model.classes.palette)
            model.config = type(model.config)(name=model.config.name, options=model.config.options, classes=classes)
        marks.append(fingerprint(model, "onnxruntime"))
    assert len(set(marks)) == 4


def test_packages_that_are_not_there_are_part_of_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime may go by the name of another package."""
    model, plain = tiny_model(), engines.metadata.version
    mark = fingerprint(model, "onnxruntime")

    def version(package: str) -> str:
        if package in ("onnxruntime", "nncf"):
            raise engines.metadata.PackageNotFoundError(package)
        return plain(package)

    monkeypatch.setattr(engines.metadata, "version", version)
    assert fingerprint(model, "onnxruntime") != mark


def test_data_of_a_named_source_are_found(tmp_path: Path) -> None:
    (tmp_path / "camvid").mkdir()
    config = tmp_path / "config.yaml"
    for text, there in ((f"camvid:{tmp_path / 'camvid'}", True), (f"camvid:{tmp_path / 'gone'}", False)):
        config.write_text(f"data: {text}\n")
        assert engines.own_data(str(tmp_path)) == (text if there else None)


def test_a_precision_that_an_engine_has_not(folder: Path) -> None:
    for engine, precision, message in (
        ("torch", "int8", "use --engine openvino or onnxruntime"),
        ("openvino", "fp16", "no fp16"),
        ("onnxruntime", "bf16", "no bf16"),
        ("openvino", "int8", "segvit export --precision int8 --data"),
    ):
        with pytest.raises(UserError, match=message):
            start(str(folder), "cpu", None, engine=engine, precision=precision)


def test_an_exported_file_runs_as_it_is(files: dict[str, Path]) -> None:
    assert start(str(files["onnx"]), "cpu", None, engine=None, precision="fp32").classes.names[0] == "grass"
    for options, message in (
        ({"engine": "openvino", "precision": "fp32"}, "runs with onnxruntime"),
        ({"engine": None, "precision": "bf16"}, "was exported in fp32"),
    ):
        with pytest.raises(UserError, match=message):
            start(str(files["onnx"]), "cpu", None, **options)
    with pytest.raises(UserError, match="classes in its weights"):
        start(str(files["onnx"]), "cpu", lambda model: None, engine=None, precision="fp32")


def test_bf16_weights_give_what_autocast_gives(folder: Path, capsys: pytest.CaptureFixture[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(engines, "cpu_has_bf16", lambda: False)
    run = start(str(folder), "cpu", None, engine="torch", precision="bf16")
    assert "no bf16 instructions" in capsys.readouterr().err
    assert next(run.model.backbone.blocks.parameters()).dtype == torch.float32  # a norm's
    assert run.model.backbone.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    images = torch.randn(2, 3, 40, 40)
    plain = TorchRuntime(load_model(folder), precision="bf16")
    torch.testing.assert_close(run(images).logits, plain(images).logits, rtol=0, atol=0)


@pytest.mark.slow
def test_the_compiled_engine_gives_the_labels_of_torch(
    folder: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(str(folder), "cpu", None, engine="compile", precision="fp32")
    for size in ((40, 56), (64, 64), (33, 47)):
        image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
        assert (Predictor(run)(image).labels != Predictor(model)(image).labels).sum() <= 1
    assert capsys.readouterr().err.count("the first image took") == 1


def test_predict_and_val_take_files_and_engines(
    files: dict[str, Path], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    labels = []
    for number, options in enumerate(
        ([files["onnx"]], [files["openvino"]], [files["pt2"]], [folder], [folder, "--engine", "torch"])
    ):
        out = tmp_path / f"out{number}"
        main(["predict", str(tmp_path / "a.png"), "--out", str(out), "--model", *map(str, options)])
        labels.append(np.asarray(Image.open(out / "a.png")))
    assert all((other != labels[3]).sum() <= 1 for other in labels)
    capsys.readouterr()
    mious = []
    for number, run in enumerate((files["onnx"], folder)):
        out = tmp_path / f"val{number}"
        main(["val", str(run), "--data", "synthetic:shapes?val=3", "--out", str(out), "--workers", "0", "--json"])
        mious.append(capsys.readouterr().out.split('"miou": ')[1].split(",")[0])
    assert abs(float(mious[0]) - float(mious[1])) < 1e-3


def test_other_devices_are_refused(model: Model, folder: Path) -> None:
    with pytest.raises(UserError, match="runs on the CPU here"):
        start(str(folder), "cuda", None, engine="openvino", precision="fp32")
    with pytest.raises(UserError, match="no fp16"):
        exported_engine(model, str(folder), engine="openvino", precision="fp16")


@pytest.mark.slow
def test_a_process_of_its_own_gives_the_labels_of_torch(model: Model, files: dict[str, Path], tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    line = ["predict", str(tmp_path / "a.png"), "--model", str(files["onnx"]), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-m", "segvit", *line], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    assert (found != Predictor(model)(IMAGE).labels).sum() <= 1
