"""Running exported files: each is a `Runtime`, so that Predictor, evaluation and serving take it like a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from segvit.contracts import Dense, UserError
from segvit.export.graph import quiet
from segvit.export.packages import need
from segvit.export.record import KEY, SUFFIXES, Format, Precision, Record
from segvit.files import cache_folder

Call = Callable[[Tensor], Sequence[Tensor]]  # images (B, C, H, W) -> the graph's outputs


class GraphRuntime:
    """An exported file, ready to run. `spec`, `classes` and `readout` come out of the file."""

    def __init__(self, record: Record, call: Call) -> None:
        self.record, self.call = record, call
        self.spec, self.classes, self.readout = record.spec, record.classes, record.find_readout()

    def __call__(self, images: Tensor) -> Dense:
        """Normalised images (B, C, H, W) on the CPU -> the system's output."""
        outputs = self.call(images.contiguous())
        if self.record.readout == "inside":
            return Dense(outputs[0], {}, (images.shape[-2], images.shape[-1]))
        logits, *extras, covers = outputs
        return Dense(logits, dict(zip(self.record.extras, extras, strict=True)), (int(covers[0]), int(covers[1])))


def is_exported(source: str | Path) -> bool:
    """Whether a source is an exported file by its name."""
    return Path(source).suffix.lower() in SUFFIXES and not Path(source).is_dir()


def open_exported(source: str | Path) -> GraphRuntime:
    """An exported file (.onnx, .xml, .pt2) as a runtime.

    Raises UserError for a file that is missing, damaged, or not written by `segvit export`.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} is no exported model; give a file that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"{path} does not exist; segvit export writes such files")
    record, call = READERS[SUFFIXES[path.suffix.lower()]](path)
    return GraphRuntime(record, call)


def unreadable(path: Path, error: Exception) -> UserError:
    """What to say of a file that its own library refuses."""
    line = str(error).strip().partition("\n")[0]
    return UserError(f"{path} cannot be read ({line}); export the model again")


def open_pt2(path: Path) -> tuple[Record, Call]:
    """A .pt2 file, run by torch."""
    extra = {f"{KEY}.json": ""}
    try:
        with quiet():
            program = torch.export.load(path, extra_files=extra)
    except Exception as error:  # zip, JSON, pickle and version errors
        raise unreadable(path, error) from error
    record = Record.from_text(extra[f"{KEY}.json"], str(path))
    module = runnable(program)

    def call(images: Tensor) -> Sequence[Tensor]:
        with torch.inference_mode():
            return list(module(images))

    return record, call


def runnable(program: ExportedProgram) -> Callable[[Tensor], Sequence[Tensor]]:
    """A traced graph as a function without the tracer's guards and ranges of sizes.

    These say where strides are as they were assumed and refuse small images that the graph computes exactly, as tests
    over all systems show.
    """
    known = "check_guards" in inspect.signature(program.module).parameters  # older versions of torch have no guards
    module = program.module(check_guards=False) if known else program.module()
    module.range_constraints = {}  # type: ignore[assignment]  # what its hook checks inputs against
    return module


def open_onnx(path: Path) -> tuple[Record, Call]:
    """An ONNX file, run by ONNX Runtime on the CPU."""
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    try:
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # an exception class for each status code, none of them public
        raise unreadable(path, error) from error
    record = Record.from_text(session.get_modelmeta().custom_metadata_map.get(KEY, ""), str(path))
    wanted = ["scores"] if record.readout == "inside" else list(record.outputs)

    def call(images: Tensor) -> Sequence[Tensor]:
        return [torch.from_numpy(value) for value in session.run(wanted, {"images": images.numpy()})]

    return record, call


def open_openvino(path: Path) -> tuple[Record, Call]:
    """An OpenVINO IR, compiled for the CPU; what compiling costs is paid once, the result is kept on disk."""
    openvino = need("openvino")
    core = openvino.Core()
    try:
        model = core.read_model(path)
        text = model.get_rt_info([KEY]).astype(str) if KEY in model.rt_info else ""
        record = Record.from_text(text, str(path))
        compiled = core.compile_model(model, "CPU", openvino_settings(record.precision))
    except RuntimeError as error:
        raise unreadable(path, error) from error
    wanted = ("scores",) if record.readout == "inside" else record.outputs

    def call(images: Tensor) -> Sequence[Tensor]:
        results = compiled([images.numpy()])
        return [torch.from_numpy(results[name]) for name in wanted]

    return record, call


def openvino_settings(precision: Precision) -> dict[str, Any]:
    """One request at a time, as fast as possible; fp32 is said aloud, since some CPUs would choose bf16."""
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32", "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(), "CACHE_DIR": str(cache_folder() / "openvino"),
    }  # fmt: skip


READERS: dict[Format, Callable[[Path], tuple[Record, Call]]] = {
    "pt2": open_pt2,
    "onnx": open_onnx,
    "openvino": open_openvino,
}
