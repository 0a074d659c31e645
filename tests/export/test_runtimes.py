"""Exported files against the model that they were made from, and files that cannot be run."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import segvit
from segvit.contracts import UserError
from segvit.export import packages
from segvit.export.gate import compare_batch
from segvit.export.runtimes import open_exported
from segvit.inference.predictor import Predictor, TorchRuntime, Views

if TYPE_CHECKING:
    from segvit.contracts import Model

FORMATS = ["pt2", "onnx", "openvino"]


@pytest.mark.parametrize("format", FORMATS)
def test_any_number_and_size_of_images_gives_the_labels_of_torch(
    format: str, model: Model, files: dict[str, Path]
) -> None:
    run = open_exported(files[format])
    for shape in ((1, 3, 32, 32), (3, 3, 61, 87), (2, 3, 16, 40), (1, 3, 96, 33)):
        found = compare_batch(TorchRuntime(model), run, torch.randn(shape))
        assert found.error < 1e-5, shape
        assert found.differing == 0 or (found.gap < 1e-4 and found.differing < 3), shape
        assert found.pixels == shape[0] * shape[2] * shape[3]


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_says_what_it_needs_to_run_alone(format: str, model: Model, files: dict[str, Path]) -> None:
    run = open_exported(files[format])
    assert run.spec == model.spec
    assert run.classes == model.classes
    assert run.record.extras == ("class_logits", "masks")
    assert run.record.outputs == ("logits", "class_logits", "masks", "covers")
    assert run.readout.scores is model.readout.scores
    assert run(torch.zeros(1, 3, 20, 33)).covers == (24, 40)


@pytest.mark.parametrize("format", FORMATS)
def test_a_predictor_takes_a_file_like_a_model(format: str, model: Model, files: dict[str, Path]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    several = (Views(scales=(0.5, 1.0), flip=True),) if format == "onnx" else ()
    for views in (Views(), *several):
        wanted = Predictor(model, views=views)(image)
        found = Predictor(segvit.load(files[format]), views=views)(image)
        assert (found.labels != wanted.labels).sum() <= 1, views
        assert found.classes == model.classes


@pytest.mark.parametrize("format", FORMATS)
def test_no_path_of_the_machine_is_in_a_file(format: str, files: dict[str, Path]) -> None:
    names = [files[format]]
    content = b"".join(path.read_bytes() for path in names)
    if format == "pt2":
        with zipfile.ZipFile(files[format]) as archive:
            content = b"".join(archive.read(name) for name in archive.namelist())
    assert str(Path(segvit.__file__).parent).encode() not in content


def test_no_resize_is_antialiased(files: dict[str, Path]) -> None:
    """OpenVINO ignores that flag of a cubic resize without a word."""
    import onnx

    resizes = [node for node in onnx.load(files["onnx"]).graph.node if node.op_type == "Resize"]
    modes = [{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in resizes]
    assert any(mode["mode"] == b"cubic" for mode in modes)  # the position embedding's
    assert not any(mode.get("antialias") for mode in modes)


@pytest.mark.parametrize("name", ["model.onnx", "model.xml", "model.pt2"])
def test_a_damaged_or_missing_file_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_exported(tmp_path / name)
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="export the model again") as caught:
        open_exported(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_of_somebody_else_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    import onnx

    foreign = onnx.load(files["onnx"])
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match="not written by segvit export"):
        open_exported(tmp_path / "foreign.onnx")


def test_other_names_and_options_are_refused(files: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"\.pt2, \.onnx, \.xml"):
        open_exported("model.engine")
    with pytest.raises(UserError, match="leave out base"):
        segvit.load(files["onnx"], base="other")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, files: dict[str, Path]) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(packages, "import_module", absent)
    for format, name in (("onnx", "onnxruntime"), ("openvino", "openvino")):
        with pytest.raises(UserError, match=rf"{name} is not installed; pip install 'segvit\[export\]'"):
            open_exported(files[format])
