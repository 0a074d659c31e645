"""Image -> label map with every engine and precision in turns, beside the machine's own matrix rate.

    python benchmarks/engines.py                                      # SegViT ViT-B/16, 512 x 512, 150 classes
    python benchmarks/engines.py --model segvit_vit_tiny --size 128 --classes 8 --runs 3

Weights are random: times are those of trained weights, except for the pruned readout, which random masks make slower
than trained ones do; it is the same for every engine. Labels are compared with torch's in fp32. int8 is calibrated on
generated scenes.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from segvit.contracts import InputSpec
from segvit.data.prepare import normalise
from segvit.data.synthetic import draw_shapes
from segvit.export.build import is_transformer, write
from segvit.export.engines import FORMATS, CompiledRuntime, cpu_has_bf16
from segvit.export.graph import kept_extras, trace
from segvit.export.record import Precision, describe
from segvit.export.runtimes import GraphRuntime, open_exported
from segvit.inference.casting import cast_layers
from segvit.inference.predictor import Predictor, TorchRuntime
from segvit.nn.flops import count_gflops
from segvit.zoo import create_model

if TYPE_CHECKING:
    from segvit.contracts import Model

Choice = tuple[str, str]  # engine and precision
CHOICES = [
    ("torch", "fp32"), ("torch", "bf16"), ("compile", "fp32"), ("onnxruntime", "fp32"), ("onnxruntime", "int8"),
    ("openvino", "fp32"), ("openvino", "bf16"), ("openvino", "int8"),
]  # fmt: skip


def matrix_rate(side: int = 1536) -> float:
    """GFLOP/s of a square fp32 matrix product, the best of five."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    return 2e-9 * side**3 / min(seconds(lambda: a @ b) for _ in range(5))


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def exported(model: Model, program: ExportedProgram, name: str, precision: Precision, folder: Path) -> GraphRuntime:
    """The model as a file for that engine, without the gate: untrained weights have no mIoU worth keeping."""
    format, size = FORMATS[name], model.spec.exact
    assert size is not None
    suffix = {"onnx": ".onnx", "openvino": ".xml"}[format]
    record = describe(model, format=format, precision=precision, readout="outside", extras=kept_extras(model))
    scenes = [normalise(draw_shapes(size[0], (1, 0, number))[0], model.spec) for number in range(4)]
    write(program, folder / f"{name}-{precision}{suffix}", record, scenes, transformer=is_transformer(model))
    return open_exported(folder / f"{name}-{precision}{suffix}")


def runtimes(model: Model, wanted: list[str], folder: Path) -> dict[Choice, tuple[Predictor, NDArray[Any], float]]:
    """What segments, the labels of the first image, and the seconds until these were there."""
    image, program = draw_shapes(model.spec.exact[0], (1, 0, 0))[0], None
    found = {}
    for name, precision in [choice for choice in CHOICES if choice[0] in wanted]:
        if program is None and name in FORMATS:
            program = trace(model, inside=False)
        started = time.perf_counter()
        if name in FORMATS:
            run = exported(model, program, name, precision, folder)
        else:
            own = copy.deepcopy(model)
            own = cast_layers(own, torch.bfloat16) if precision == "bf16" else own
            make = CompiledRuntime if name == "compile" else TorchRuntime
            run = make(own, precision=precision)
        predictor = Predictor(run)
        labels, _ = predictor.segment(image)
        found[name, precision] = (predictor, labels, time.perf_counter() - started)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="segvit_vit_base")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--engines", default="torch,compile,onnxruntime,openvino", help="parted by commas")
    options = parser.parse_args()
    torch.manual_seed(0)
    spec = InputSpec(exact=(options.size, options.size))
    sized = {"image_size": options.size} if "vit" in options.model else {}
    model = create_model(options.model, num_classes=options.classes, spec=spec, **sized).eval()
    gflops = count_gflops(model, (options.size, options.size))
    image = draw_shapes(options.size, (1, 0, 0))[0]
    with tempfile.TemporaryDirectory() as folder:
        found = runtimes(model, ["torch", *options.engines.split(",")], Path(folder))
        rates, times = [], {choice: [] for choice in found}
        for _ in range(options.runs):
            rates.append(matrix_rate())
            for choice, (predictor, _, _) in found.items():
                times[choice].append(seconds(partial(predictor.segment, image)))
    medians, rate = {choice: statistics.median(values) for choice, values in times.items()}, statistics.median(rates)
    plain = "torch", "fp32"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "onnxruntime", "openvino", "nncf"))
    print(f"{options.model}, {options.size} x {options.size}, {options.classes} classes, {gflops:.1f} GFLOPs, batch 1")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, bf16 instructions: {cpu_has_bf16()}; {versions}")
    print(f"fp32 matrix rate {rate:.0f} GFLOP/s (median of {options.runs}, {min(rates):.0f} to {max(rates):.0f})")
    print(f"Medians of {options.runs} rounds in which every engine ran once.\n")
    print("| engine | precision | seconds | times torch fp32 | share of fp32 rate | same labels | first image, s |")
    print("|---|---|---|---|---|---|---|")
    for choice, (_, labels, first) in found.items():
        median, same = medians[choice], float(np.mean(labels == found[plain][1]))
        print(f"| {choice[0]} | {choice[1]} | {median:.3f} | {medians[plain] / median:.2f} | "
              f"{gflops / median / rate:.0%} | {same:.3%} | {first:.1f} |")  # fmt: skip


if __name__ == "__main__":
    main()
