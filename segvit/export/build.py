"""`segvit export`: trace, write, prove. Nothing is left in place that the gate refuses."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from segvit.contracts import InputSpec, Size, UserError
from segvit.data.dataset import Dataset, open_dataset
from segvit.data.loading import samples
from segvit.data.prepare import prepare
from segvit.export.exportable import why_not
from segvit.export.formats import clamp_products, to_onnx, to_openvino, write_onnx, write_openvino, write_pt2
from segvit.export.gate import Gate, compare, drawn_image
from segvit.export.graph import chosen, kept_extras, trace
from segvit.export.quantise import quantise
from segvit.export.record import SUFFIXES, Format, Place, Precision, Record, describe
from segvit.export.runtimes import open_exported
from segvit.export.sensitivity import Loss, rank_layers
from segvit.files import open_atomic, write_json, write_text
from segvit.inference.predictor import TorchRuntime

if TYPE_CHECKING:
    from segvit.contracts import Model

NAMED = 5  # layers that a refusal proposes
REFUSALS = {  # why a format has not that precision
    ("onnx", "bf16"): "ONNX Runtime has no bf16 kernels for CPUs; use --format openvino or pt2",
    ("pt2", "int8"): "torch runs no int8 graph of ours; use --format openvino or onnx",
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is wanted of an export.

    `data` is a data set: its training images calibrate int8 (`calibration` of them), its validation images go through
    the gate (`images` of them). `sizes` (height, width) are compared besides; none = three around the model's own.
    `keep_fp32` names layers, or modules with layers in them, that stay in fp32.
    """

    format: Format = "onnx"
    precision: Precision = "fp32"
    readout: Place = "outside"
    data: str | None = None
    sizes: tuple[Size, ...] = ()
    keep_fp32: tuple[str, ...] = ()
    images: int = 32
    calibration: int = 64

    def check(self) -> None:
        """Raise UserError for what does not go together."""
        if (self.format, self.precision) in REFUSALS:
            raise UserError(f"{self.format} in {self.precision}: {REFUSALS[self.format, self.precision]}")
        if self.precision == "int8" and self.data is None:
            raise UserError("int8 is calibrated on images; give --data DATA")
        if self.keep_fp32 and self.precision != "int8":
            raise UserError(f"keep_fp32 is for int8; with --precision {self.precision} leave it out")
        if self.sizes and len(set(self.sizes)) < 3:
            raise UserError(f"the gate needs three sizes or more, got {len(set(self.sizes))}; add some to --sizes")
        if min(self.images, self.calibration) < 1:
            raise UserError("images and calibration must be 1 or more")


@dataclass(frozen=True)
class Exported:
    """What an export made."""

    path: Path
    gate: Gate
    seconds: float
    losses: list[Loss] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report for machines."""
        files = [file for file in (self.path, self.path.with_suffix(".bin")) if file.is_file()]
        size = None if self.gate.failures else sum(file.stat().st_size for file in files)
        costly = [loss._asdict() for loss in self.losses[:NAMED]]
        return {"path": str(self.path), "bytes": size, "seconds": round(self.seconds, 1), "costly_layers": costly} | (
            self.gate.to_json()
        )

    def to_text(self) -> str:
        """The report for people, in Markdown."""
        lines = [f"# Gate of {self.path.name}", "", self.gate.to_text()]
        if self.losses:
            lines += ["", "Layers that cost most in this precision (labels changed by that layer alone):", ""]
            lines += [f"- `{loss.layer}`: {loss.differing:.3%}" for loss in self.losses[:NAMED]]
        return "\n".join(lines) + "\n"


def export_model(model: Model, out: str | Path, plan: Plan = Plan()) -> Exported:
    """Write a model as a file that runs without its builder, and prove that the file says the same.

    Beside `out` (.pt2, .onnx or .xml) stand `NAME.gate.json` and `NAME.gate.md`, also after a refusal. Raises UserError
    for a system that cannot be exported, and when the file is above the bounds: it is then not left in place.
    """
    plan.check()
    path, start = Path(out), time.perf_counter()
    if SUFFIXES.get(path.suffix.lower()) != plan.format:
        suffix = next(suffix for suffix, format in SUFFIXES.items() if format == plan.format)
        raise UserError(f"{path} does not fit the format {plan.format}; end its name in {suffix}")
    reason = why_not(model.config.name, model.config.options)
    if reason is not None:
        raise UserError(f"{model.config.name} is not exported: {reason}")
    keep = chosen(model, plan.keep_fp32)
    dataset = None if plan.data is None else open_dataset(plan.data)
    calibration = training_images(dataset, model.spec, plan.calibration) if plan.precision == "int8" else []
    record = describe(
        model, format=plan.format, precision=plan.precision, readout=plan.readout, extras=kept_extras(model)
    )
    with tempfile.TemporaryDirectory(prefix="segvit-export-") as folder:
        staged = Path(folder) / path.name
        print(f"segvit: tracing {record.config.name} ...", file=sys.stderr)
        bf16 = plan.format == "pt2" and plan.precision == "bf16"  # of OpenVINO it is a hint when the file is opened
        program = trace(model, inside=plan.readout == "inside", bf16=bf16)
        record = replace(record, kept_fp32=plan.keep_fp32)
        write(program, staged, record, calibration, transformer=is_transformer(model))
        sizes = plan.sizes or natural_sizes(model)
        gate = compare(
            TorchRuntime(model), open_exported(staged), precision=plan.precision, sizes=sizes, dataset=dataset,
            count=plan.images,
        )  # fmt: skip
        if not gate.failures:
            put_in_place(staged, path)
    losses: list[Loss] = []
    if gate.failures and plan.precision != "fp32":
        probes = calibration[:2] or [drawn_image(model.spec, sizes[0], seed=0)]
        losses = [loss for loss in rank_layers(model, probes, plan.precision) if loss.layer not in keep]
    result = Exported(path, gate, time.perf_counter() - start, losses)
    write_json(path.with_name(f"{path.name}.gate.json"), result.to_json())
    write_text(path.with_name(f"{path.name}.gate.md"), result.to_text())
    if gate.failures:
        raise UserError(refusal(result, plan.precision))
    return result


def refusal(result: Exported, precision: Precision) -> str:
    """Why a file was not left in place, and what to do."""
    names = ",".join(loss.layer for loss in result.losses[:NAMED])
    remedy = {
        "fp32": f"see {result.path.name}.gate.md beside it; use another --format",
        "bf16": f"use --precision fp32; the layers that lose most are {names}",
        "int8": f"keep the layers in fp32 that lose most (segvit export --keep_fp32 {names})",
    }[precision]
    return f"{result.path} was refused: {'; '.join(result.gate.failures)}; {remedy}"


def write(
    program: ExportedProgram, path: Path, record: Record, calibration: Sequence[Tensor] = (), *, transformer: bool
) -> None:  # fmt: skip
    """The file itself, unproven. int8 needs images and whether the network is a `transformer`."""
    if record.format == "pt2":
        write_pt2(program, path, record)
        return
    onnx = to_onnx(program, record)
    to_int8 = partial(
        quantise, images=calibration, format=record.format, transformer=transformer, keep_fp32=record.kept_fp32
    )
    quantised = record.precision == "int8"
    if record.format == "onnx":
        write_onnx(to_int8(onnx) if quantised else onnx, path, record)
        return
    source = path.with_suffix(".onnx")
    write_onnx(onnx, source, record)
    openvino = to_openvino(source)
    if record.precision == "fp32":
        clamp_products(openvino)
    write_openvino(to_int8(openvino) if quantised else openvino, path, record)


def put_in_place(staged: Path, path: Path) -> None:
    """Copy the file and, of OpenVINO, its weights; each atomically, the one that is opened last.

    An older file goes first: stopped in between, it would stand beside the new weights.
    """
    path.unlink(missing_ok=True)
    for suffix in (".bin", staged.suffix):
        source = staged.with_suffix(suffix)
        if source.is_file():
            with source.open("rb") as read, open_atomic(path.with_suffix(suffix)) as file:
                shutil.copyfileobj(read, file)


def training_images(dataset: Dataset | None, spec: InputSpec, count: int) -> list[Tensor]:
    """Up to `count` prepared training images, spread evenly; windows are cut out of the middle."""
    if dataset is None:
        return []
    split = "train" if "train" in dataset.splits else dataset.splits[0]
    total = dataset.count(split)
    count = min(count, total)
    indices = [i * total // count for i in range(count)]
    found = []
    for sample in samples(dataset, split, indices=indices):
        image = prepare(sample.image, spec)
        if spec.window:
            top, left = (max(0, (side - part) // 2) for side, part in zip(image.shape[1:], spec.window, strict=True))
            image = image[:, top : top + spec.window[0], left : left + spec.window[1]]
        found.append(image)
    return found


def natural_sizes(model: Model) -> tuple[Size, ...]:
    """Three sizes around the model's own: as it is, wide and not of whole cells, and smaller."""
    given = model.config.options.get("image_size", 256)
    side = model.spec.window or model.spec.exact or (given if isinstance(given, list) else (given, given))
    height, width = int(side[0]), int(side[1])
    return (
        (height, width),
        (height + 3, width + width // 2 + 5),
        (max(64, 3 * height // 4) + 16, max(64, 3 * width // 4)),
    )


def is_transformer(model: nn.Module) -> bool:
    """Whether most of the weights are in linear layers."""
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return 2 * linear > sum(parameter.numel() for parameter in model.parameters())


def default_path(run: str, plan: Plan) -> Path:
    """export/ in the run folder, or here when the model is no run; the precision is part of the name."""
    folder = Path(run) / "export" if (Path(run) / "config.yaml").is_file() else Path()
    suffix = next(suffix for suffix, format in SUFFIXES.items() if format == plan.format)
    return folder / f"{'model' if plan.precision == 'fp32' else f'model-{plan.precision}'}{suffix}"
