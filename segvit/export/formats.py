"""Writing a traced graph as .pt2, ONNX or OpenVINO IR, with its record inside the file."""

from __future__ import annotations

import ast
import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from segvit.contracts import UserError
from segvit.export.graph import quiet
from segvit.export.packages import need
from segvit.export.record import KEY, Record

SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter notes the module that a node came from
LARGEST = 2**31 - 1  # bytes of a protocol buffer


def write_pt2(program: ExportedProgram, path: Path, record: Record) -> None:
    """torch's own format; runs wherever torch does, without this library's builder."""
    with quiet():
        torch.export.save(program, path, extra_files={f"{KEY}.json": record.to_text()})


def to_onnx(program: ExportedProgram, record: Record) -> Any:
    """An ONNX model (`onnx.ModelProto`) whose node names begin with the name of the layer that they belong to."""
    need("onnx"), need("onnxscript")
    with torch.no_grad(), quiet(), redirect_stdout(io.StringIO()):
        made = torch.onnx.export(
            program, (), dynamo=True, input_names=["images"], output_names=list(record.outputs), verbose=False
        )
    assert made is not None  # None only without dynamo
    model = made.model_proto
    if model.ByteSize() > LARGEST:
        raise UserError(f"{record.config.name} is larger than ONNX files may be (2 GB); use --format pt2")
    for node in model.graph.node:
        scopes = [entry.value for entry in node.metadata_props if entry.key == SCOPES]
        layer = ast.literal_eval(scopes[0])[-2].removeprefix("model").removeprefix(".") if scopes else ""
        node.name = f"{layer}/{node.name}"
        del node.metadata_props[:]  # holds source paths of this machine
    return model


def write_onnx(model: Any, path: Path, record: Record) -> None:
    """An ONNX file with the record in its metadata."""
    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, record.to_text()
    path.write_bytes(model.SerializeToString())


def to_openvino(onnx_file: Path) -> Any:
    """The ONNX file as an OpenVINO model."""
    return need("openvino").Core().read_model(onnx_file)


def write_openvino(model: Any, path: Path, record: Record) -> None:
    """OpenVINO IR: `path` (.xml) and beside it the weights (.bin)."""
    model.set_rt_info(record.to_text(), [KEY])
    need("openvino").save_model(model, path, compress_to_fp16=False)
