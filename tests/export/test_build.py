"""Exporting: what is written, what is refused, and what keeps a layer in fp32."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.export import ExportedProgram

from segvit.cli import main
from segvit.cli.export import parse_sizes
from segvit.contracts import InputSpec, UserError
from segvit.data.dataset import open_dataset
from segvit.export import build
from segvit.export.build import Plan, default_path, export_model, natural_sizes, training_images
from segvit.export.graph import chosen, layers
from segvit.export.runtimes import open_exported
from segvit.inference.predictor import TorchRuntime
from segvit.model_folder import save_model
from segvit.zoo import create_model
from tests.export.conftest import SIZES, TINY

if TYPE_CHECKING:
    from segvit.contracts import Model


@pytest.fixture
def traced(program: ExportedProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes most of the time and is done once for all tests."""
    monkeypatch.setattr(build, "trace", lambda model, **options: program)


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", ["a.onnx", "a.xml", "deeper/a.pt2"])
def test_a_file_and_its_report(name: str, model: Model, tmp_path: Path) -> None:
    path, format = tmp_path / name, {".onnx": "onnx", ".xml": "openvino", ".pt2": "pt2"}[Path(name).suffix]
    result = export_model(model, path, Plan(format=format, sizes=SIZES, data="synthetic:shapes", images=2))
    report = json.loads(path.with_name(f"{path.name}.gate.json").read_text())
    assert report["passed"]
    assert report["label_agreement"] == 1
    assert report["validation_images"] == 2
    assert report["miou_change"] == 0
    weights = path.with_suffix(".bin")
    assert report["bytes"] == path.stat().st_size + (weights.stat().st_size if weights.exists() else 0)
    assert [tuple(one["size"]) for one in report["compared"]] == [SIZES[0], *SIZES]
    assert path.with_name(f"{path.name}.gate.md").read_text() == result.to_text()
    expected = {path.name, f"{path.name}.gate.json", f"{path.name}.gate.md"}
    assert {file.name for file in path.parent.iterdir()} == expected | ({"a.bin"} if format == "openvino" else set())
    assert open_exported(path).record.format == format


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("a.pt2", "pt2"),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("a.onnx", "onnx"), ("a.xml", "openvino"))),
    ],
)
def test_a_broken_file_is_refused_and_not_left_in_place(
    name: str, format: str, model: Model, program: ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = copy.deepcopy(program)
    weight = next(key for key in broken.state_dict if key.endswith("blocks.0.mlp.fc1.weight"))
    broken.state_dict[weight].data.neg_()
    monkeypatch.setattr(build, "trace", lambda model, **options: broken)
    (tmp_path / name).write_text("what stood here before")
    with pytest.raises(UserError, match="was refused") as caught:
        export_model(model, tmp_path / name, Plan(format=format, sizes=SIZES))
    assert "labels agree" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tmp_path / name).read_text() == "what stood here before"
    report = json.loads((tmp_path / f"{name}.gate.json").read_text())
    assert not report["passed"]
    assert report["compared"][0]["error"] > 1e-3
    assert "FAILED" in (tmp_path / f"{name}.gate.md").read_text()


@pytest.mark.usefixtures("traced")
def test_the_command(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(model, tmp_path / "model")
    line = ["export", str(tmp_path / "model"), "--format", "pt2", "--out", str(tmp_path / "a.pt2"), "--json"]
    main([*line, "--sizes", "32x64,37x50,48x48"])
    report = json.loads(capsys.readouterr().out)
    assert (report["path"], report["passed"]) == (str(tmp_path / "a.pt2"), True)
    bounds = build.compare.__globals__["BOUNDS"]
    monkeypatch.setitem(bounds, "fp32", bounds["fp32"]._replace(gap=-1.0))  # nothing passes
    with pytest.raises(SystemExit) as stopped:
        main([*line, "--sizes", "32x64,37x50,48x48"])
    assert stopped.value.code == 2
    assert "a.pt2 was refused" in capsys.readouterr().err
    for wrong in (["--sizes", "32"], ["--format", "pt2", "--precision", "int8"], ["--keep-fp32", "head"]):
        with pytest.raises(SystemExit) as stopped:
            main([*line, *wrong])
        assert stopped.value.code == 2


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_int8_needs_images_names_what_it_costs_and_keeps_layers(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    plan = {"format": "openvino", "precision": "int8", "data": "synthetic:shapes", "sizes": SIZES}
    counts = []
    for keep in ((), ("head", "backbone.blocks.0.mlp")):
        result = export_model(model, path, Plan(**plan, images=2, calibration=3, keep_fp32=keep))
        assert result.gate.precision == "int8"
        assert open_exported(path).record.kept_fp32 == keep
        counts.append(path.read_text().count('type="FakeQuantize"'))
    assert 0 < counts[1] < counts[0]


@pytest.mark.usefixtures("traced")
def test_a_refusal_of_int8_names_the_layers_to_keep(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fragile = copy.deepcopy(model)
    with torch.no_grad():  # one huge weight leaves the others no levels
        fragile.get_parameter("backbone.blocks.0.mlp.fc2.weight")[:, 0] *= 1e4
        fragile.get_parameter("backbone.blocks.0.mlp.fc1.weight")[0] = 0
        fragile.get_parameter("backbone.blocks.0.mlp.fc1.bias")[0] = 0
    bounds = build.compare.__globals__["BOUNDS"]
    monkeypatch.setitem(bounds, "int8", bounds["int8"]._replace(miou=-1.0))  # nothing passes
    monkeypatch.setattr(build, "write", lambda program, path, *rest, **options: path.write_bytes(b""))
    monkeypatch.setattr(build, "open_exported", lambda path: TorchRuntime(model))
    plan = Plan(format="openvino", precision="int8", data="synthetic:shapes", sizes=SIZES, images=1, calibration=2)
    with pytest.raises(UserError, match=r"--keep_fp32 backbone\.blocks\.0\.mlp\.fc2,"):
        export_model(fragile, tmp_path / "a.xml", plan)
    assert "backbone.blocks.0.mlp.fc2" in (tmp_path / "a.xml.gate.md").read_text()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"precision": "int8"}, "give --data"),
        ({"precision": "bf16"}, "use --format openvino or pt2"),
        ({"format": "pt2", "precision": "int8", "data": "x"}, "use --format openvino or onnx"),
        ({"keep_fp32": ("head",)}, "is for int8"),
        ({"images": 0}, "1 or more"),
        ({"sizes": SIZES[:2]}, "three sizes or more, got 2"),
    ],
)
def test_what_does_not_go_together(plan: dict[str, object], message: str, model: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        export_model(model, tmp_path / "a.onnx", Plan(**plan))


def test_names_that_fit_nothing(model: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"end its name in \.xml"):
        export_model(model, tmp_path / "a.onnx", Plan(format="openvino"))
    plan = Plan(precision="int8", data="synthetic:shapes", keep_fp32=("heads",))
    with pytest.raises(UserError, match="keep_fp32 names 'heads', which is no layer"):
        export_model(model, tmp_path / "a.onnx", plan)


def test_a_module_stands_for_its_layers(model: Model) -> None:
    inside = chosen(model, ("backbone.blocks.0.mlp", "head.class_embed"))
    assert inside == ("backbone.blocks.0.mlp.fc1", "backbone.blocks.0.mlp.fc2", "head.class_embed")
    assert set(inside) < layers(model).keys()


def test_sizes_around_the_models_own() -> None:
    model = create_model("segvit_vit_tiny", num_classes=3, **TINY)
    assert natural_sizes(model) == ((32, 32), (35, 53), (80, 64))
    model.spec = InputSpec(window=(96, 64), stride=(64, 64))
    assert natural_sizes(model)[0] == (96, 64)
    assert parse_sizes("512x384, 64x64") == ((512, 384), (64, 64))
    for wrong in ("512", "0x9", "axb", "64x64,"):
        with pytest.raises(UserError, match="height x width"):
            parse_sizes(wrong)


def test_calibration_images_are_spread_and_prepared() -> None:
    dataset = open_dataset("synthetic:shapes")
    spec = InputSpec(window=(40, 56), stride=(40, 56))
    images = training_images(dataset, spec, 3)
    assert [tuple(image.shape) for image in images] == [(3, 40, 56)] * 3
    assert not np.allclose(images[0], images[1])
    few = open_dataset("synthetic:shapes?train=5")
    assert len(training_images(few, InputSpec(), 64)) == 5  # all that there are


def test_a_file_is_replaced_with_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between the two, no old graph stands beside new weights."""
    staged, path = tmp_path / "staged.xml", tmp_path / "a.xml"
    for file, text in ((staged, "new"), (path, "old")):
        file.write_text(f"{text} graph")
        file.with_suffix(".bin").write_text(f"{text} weights")
    copy = build.shutil.copyfileobj

    def stop(read: Any, file: Any) -> None:
        if Path(read.name).suffix == ".xml":
            raise KeyboardInterrupt
        copy(read, file)

    monkeypatch.setattr(build.shutil, "copyfileobj", stop)
    with pytest.raises(KeyboardInterrupt):
        build.put_in_place(staged, path)
    assert not path.exists()
    monkeypatch.undo()
    build.put_in_place(staged, path)
    assert (path.read_text(), path.with_suffix(".bin").read_text()) == ("new graph", "new weights")


def test_the_default_place(tmp_path: Path) -> None:
    assert default_path(str(tmp_path), Plan(format="pt2")) == Path("model.pt2")
    (tmp_path / "config.yaml").touch()
    plan = Plan(format="openvino", precision="bf16")
    assert default_path(str(tmp_path), plan) == tmp_path / "export" / "model-bf16.xml"


@pytest.mark.slow
def test_with_the_readout_inside_the_graph_gives_labels(model: Model, tmp_path: Path) -> None:
    import onnxruntime

    result = export_model(model, tmp_path / "a.onnx", Plan(readout="inside", sizes=SIZES))
    assert result.gate.all_differing <= 1
    images = torch.randn(2, 3, 37, 50)
    out = open_exported(tmp_path / "a.onnx")(images)
    assert (out.logits.shape, out.covers, out.extras) == ((2, 8, 37, 50), (37, 50), {})
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    labels = session.run(["labels"], {"images": images.numpy()})[0]
    assert labels.dtype == np.uint8
    assert (labels == out.logits.argmax(1).numpy()).all()
