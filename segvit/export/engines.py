"""The engine of a command: torch as it is, torch compiled, or an exported file that is made once and kept."""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml
from torch import Tensor

from segvit import __version__
from segvit.adapters.files import digest
from segvit.contracts import Classes, Dense, InputSpec, Readout, Runtime, UserError
from segvit.data.dataset import is_generated, open_dataset
from segvit.data.sources import named_source
from segvit.export.build import Plan, export_model
from segvit.export.graph import quiet
from segvit.export.packages import need
from segvit.export.record import SUFFIXES, Format, Precision
from segvit.export.runtimes import GraphRuntime, is_exported, open_exported
from segvit.files import cache_folder
from segvit.inference.casting import cast_layers
from segvit.inference.predictor import Precision as AnyPrecision
from segvit.inference.predictor import TorchRuntime
from segvit.model_folder import load_model

if TYPE_CHECKING:
    from segvit.contracts import Model

Engine = Literal["torch", "compile", "onnxruntime", "openvino"]
FORMATS: dict[str, Format] = {"onnxruntime": "onnx", "openvino": "openvino"}
CHECKED = 8  # validation images of the gate, whose cost delays the first image
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BF16_FLAGS = ("avx512_bf16", "amx_bf16")


def load(source: str | Path, **options: Any) -> Model | GraphRuntime:
    """A model from a run folder, a model folder, an adapter folder or a hub id; or what `segvit export` wrote.

    `options` are those of `segvit.model_folder.load_model`; an exported file (.onnx, .xml, .pt2) takes none. Raises
    UserError for what cannot be read.
    """
    if not is_exported(source):
        return load_model(source, **options)
    if options:
        raise UserError(f"{source} is an exported model, already made for a device; leave out {', '.join(options)}")
    return open_exported(source)


def start(
    source: str, device: str, tell: Callable[[Model], None] | None, *, engine: Engine | None, precision: AnyPrecision
) -> Runtime:
    """What runs a model: a folder with the engine (None = torch) and precision asked for, an exported file as it is.

    `tell` tells a model other classes. Raises UserError for what does not go together.
    """
    if is_exported(source):
        return _as_it_is(source, tell, engine=engine, precision=precision)
    check_device(engine, device)
    model = load_model(source, device=device)
    if tell is not None:
        tell(model)
    return on_engine(model, source, engine=engine, precision=precision)


def on_engine(model: Model, source: str, *, engine: Engine | None, precision: AnyPrecision) -> Runtime:
    """A loaded model on an engine (None = torch); the model itself stays as it is.

    `source` is where it was loaded from: exported files are kept there. Raises UserError for what the engine lacks.
    """
    device = next(model.parameters()).device.type
    check_device(engine, device)
    if engine is not None and engine in FORMATS:
        return exported_engine(model, source, engine=engine, precision=precision)
    if device == "cpu" and precision == "bf16" and not cpu_has_bf16():
        print("segvit: this CPU has no bf16 instructions, so bf16 is emulated: slower than fp32", file=sys.stderr)
    if precision in HALVES:
        model = cast_layers(copy.deepcopy(model), HALVES[precision])
    if engine == "compile":
        return CompiledRuntime(model, precision=precision)
    return TorchRuntime(model, precision=precision)


def check_device(engine: Engine | None, device: str) -> None:
    """Raise UserError for an engine that does not run there."""
    if engine in FORMATS and device != "cpu":
        raise UserError(f"{engine} runs on the CPU here; give --device cpu, or leave out --engine {engine}")


def _as_it_is(
    source: str, tell: Callable[[Model], None] | None, *, engine: Engine | None, precision: AnyPrecision
) -> Runtime:
    run = open_exported(source)
    own = {"pt2": "torch", "onnx": "onnxruntime", "openvino": "openvino"}[run.record.format]
    if engine not in (None, own):
        raise UserError(f"{source} runs with {own}; leave out --engine {engine}, or give the run folder")
    if precision not in ("fp32", run.record.precision):  # fp32 is what the option is when it is not given
        raise UserError(f"{source} was exported in {run.record.precision}; leave out --precision {precision}")
    if tell is not None:
        raise UserError(f"{source} has its classes in its weights; give other classes to segvit export or a run folder")
    return run


class CompiledRuntime:
    """torch.compile with weights frozen into the code on a CPU; what compiling costs is kept on disk.

    A second image size compiles once or twice more, for all sizes then. Only the first call says what it cost. Raises
    UserError where the compiler fails, such as without a C++ compiler.
    """

    def __init__(self, model: Model, *, precision: AnyPrecision) -> None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
        self.eager = TorchRuntime(model, precision=precision)
        self.spec: InputSpec = model.spec
        self.classes: Classes = model.classes
        self.readout: Readout = model.readout
        frozen = self.eager.device.type == "cpu"
        compiled: Any = torch.compile(model, options={"freezing": True} if frozen else None)
        self.eager.model = compiled
        self.called = False

    def __call__(self, images: Tensor) -> Dense:
        """Normalised images (B, C, H, W) -> the system's output."""
        from torch._dynamo.exc import TorchDynamoException  # takes seconds, which torch.compile has spent already

        started = time.perf_counter()
        try:
            with nullcontext() if self.called else quiet():
                out = self.eager(images)
        except TorchDynamoException as error:
            line = str(error).strip().replace("\n", " ").partition(" Set TORCHDYNAMO")[0]
            raise UserError(f"torch cannot compile this model here ({line}); leave out --engine compile") from error
        if self.called:
            return out
        print(f"segvit: compile: the first image took {time.perf_counter() - started:.1f} s", file=sys.stderr)
        self.called = True
        return out


def exported_engine(model: Model, source: str, *, engine: Engine, precision: AnyPrecision) -> GraphRuntime:
    """The model as a file for the engine, exported and checked the first time and kept beside the model."""
    if precision == "fp16":
        raise UserError(f"{engine} has no fp16 on CPUs; use --precision fp32, bf16 or int8")
    need(engine)
    format, exact = FORMATS[engine], _exported_precision(precision)
    suffix = next(suffix for suffix, known in SUFFIXES.items() if known == format)
    path = engine_folder(source) / f"{engine}-{precision}-{fingerprint(model, engine)}{suffix}"
    started = time.perf_counter()
    if not path.is_file():
        data = own_data(source)
        if data is not None and open_dataset(data).classes.names != model.classes.names:
            data = None  # a model that was told other classes
        if data is None and exact == "int8":
            raise UserError(
                f"int8 is calibrated on images, and those that {source} was trained on are not known or not there; "
                "write a file with segvit export --precision int8 --data DATA and predict with that"
            )
        print(f"segvit: {engine}: exporting {source} for the first time ...", file=sys.stderr)
        export_model(model, path, Plan(format=format, precision=exact, data=data, images=CHECKED))
        print(f"segvit: {engine}: took {time.perf_counter() - started:.1f} s, kept as {path}", file=sys.stderr)
    return open_exported(path)


def _exported_precision(precision: AnyPrecision) -> Precision:
    assert precision != "fp16"
    return precision


def own_data(source: str) -> str | None:
    """The data that a run was trained on; None for what is no run, and where the data are no longer there."""
    config = Path(source) / "config.yaml"
    if not config.is_file():
        return None
    data = str(yaml.safe_load(config.read_text(encoding="utf-8"))["data"])
    named = named_source(data)
    there = is_generated(data) or (named[1] if named else Path(data).expanduser()).exists()
    return data if there else None


def engine_folder(source: str) -> Path:
    """engines/ in a folder of the user's that can be written, else in the cache."""
    folder = Path(source).expanduser()
    inside = folder.is_dir() and os.access(folder, os.W_OK)
    return folder / "engines" if inside else cache_folder() / "engines"


def fingerprint(model: Model, engine: str) -> str:
    """What an exported file depends on: weights, classes, input, and the versions of what writes it."""
    state = model.state_dict()
    packages = {"onnxruntime": ("onnxruntime", "onnx", "nncf"), "openvino": ("openvino", "nncf")}[engine]
    versions = [__version__, torch.__version__, *map(version, packages)]
    described = [sorted(state), model.config.to_json(__version__), model.spec.to_json(), versions]
    return digest([state[name] for name in sorted(state)], json.dumps(described, sort_keys=True))


def version(package: str) -> str:
    """The version of an installed package; "none" where it is not, or goes by another name."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices itself; on other systems than Linux it is taken for granted."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True
    return any(flag in flags for flag in BF16_FLAGS)
