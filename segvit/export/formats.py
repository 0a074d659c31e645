"""Writing a traced graph as .pt2, ONNX or OpenVINO IR, with its record inside the file."""

from __future__ import annotations

import ast
import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
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
        weights = [name for name in node.input if name.startswith("model.") and name.endswith(".weight")]
        if weights:  # the scope of a convolution that a BatchNorm was folded into is the norm's
            layer = weights[0].removeprefix("model.").removesuffix(".weight")
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


def clamp_products(model: Any) -> None:
    """Put a clamp to the range of float32, which changes no number, behind plain linear layers of an OpenVINO model.

    OpenVINO runs layers that something is fused to by oneDNN and the others by MLAS, which took a third longer for the
    second layer of a ViT's MLP (AVX-512, OpenVINO 2026.4).
    """
    opset = need("openvino").opset13

    limit = float(np.finfo(np.float32).max)
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul" or not has_weights(node):
            continue
        output = node.output(0)
        readers = list(output.get_target_inputs())
        if len(readers) == 1 and readers[0].get_node().get_type_name() == "Add":  # the bias
            output = readers[0].get_node().output(0)
            readers = list(output.get_target_inputs())
        if any(reader.get_node().get_type_name() == "Gelu" for reader in readers):
            continue
        clamp = opset.clamp(output, -limit, limit)
        for reader in readers:
            reader.replace_source_output(clamp.output(0))


def has_weights(product: Any) -> bool:
    """Whether the second factor of an OpenVINO matrix product is a constant."""
    factor = product.input_value(1).get_node()
    while factor.get_type_name() in ("Transpose", "Convert", "Reshape"):
        factor = factor.input_value(0).get_node()
    return bool(factor.get_type_name() == "Constant")


def write_openvino(model: Any, path: Path, record: Record) -> None:
    """OpenVINO IR: `path` (.xml) and beside it the weights (.bin)."""
    model.set_rt_info(record.to_text(), [KEY])
    need("openvino").save_model(model, path, compress_to_fp16=False)
