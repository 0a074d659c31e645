"""One tiny model, traced once (which is what takes time), and its files in every format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch.export import ExportedProgram

from segvit.data.synthetic import CLASSES
from segvit.export.formats import to_onnx, to_openvino, write_onnx, write_openvino, write_pt2
from segvit.export.graph import kept_extras, trace
from segvit.export.record import describe
from segvit.zoo import create_model

if TYPE_CHECKING:
    from segvit.contracts import Model

SIZES = ((32, 64), (37, 50), (48, 48))
TINY = {
    "image_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 64, "out_indices": [0], "layers": 1, "dim": 16,
    "heads": 2,
}  # fmt: skip


def tiny_model() -> Model:
    """SegViT with one block; its class logits differ, so that labels are no ties."""
    torch.manual_seed(0)
    model = create_model("segvit_vit_tiny", classes=CLASSES, **TINY).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("head."):
                parameter.mul_(4)
    return model


@pytest.fixture(scope="session")
def model() -> Model:
    return tiny_model()


@pytest.fixture(scope="session")
def program(model: Model) -> ExportedProgram:
    return trace(model, inside=False)


@pytest.fixture(scope="session")
def files(model: Model, program: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model in every format, in fp32 with the readout outside."""
    folder = tmp_path_factory.mktemp("exported")
    record = describe(model, format="onnx", precision="fp32", readout="outside", extras=kept_extras(model))
    write_pt2(program, folder / "model.pt2", replace(record, format="pt2"))
    write_onnx(to_onnx(program, record), folder / "model.onnx", record)
    write_openvino(to_openvino(folder / "model.onnx"), folder / "model.xml", replace(record, format="openvino"))
    return {"pt2": folder / "model.pt2", "onnx": folder / "model.onnx", "openvino": folder / "model.xml"}
