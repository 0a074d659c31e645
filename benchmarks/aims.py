"""The aims of fast and exact inference in one run: each row with its aim, what was measured, and whether it is reached.

    python benchmarks/aims.py                                   # all rows; about half an hour on two cores
    python benchmarks/aims.py --weights tiny.pt --huge 0        # training only once, without the large TIFF

A SegViT-Tiny of four blocks learns `synthetic:shapes` with a head of 150 classes first. Speed is that of SegViT
ViT-B/16 at 512 x 512 with random weights, whose readout is fed with the outputs of the trained network, since random
masks are noise. What is compared is timed in turns, the machine's matrix rate among it. The official way runs the same
network eagerly with the attention of `nn.MultiheadAttention`, which holds all weights, as the official code does; it
makes all masks at full size, takes their sigmoids, mixes, resizes, and takes softmax and arg max. Agreement, mIoU and
gaps are those of the trained network on scenes that it has not seen.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from readout import CLASSES, new_model, official, train
from torch import Tensor, nn

from segvit.bench.bench import Ready
from segvit.bench.measure import in_turns, matrix_product, matrix_rate, medians, peak_memory, processor
from segvit.bench.rivals import build_rival
from segvit.contracts import Dense, InputSpec, Runtime
from segvit.data.prepare import normalise, prepare
from segvit.data.synthetic import draw_shapes
from segvit.export.build import is_transformer, write
from segvit.export.engines import FORMATS, cpu_has_bf16
from segvit.export.graph import kept_extras, trace
from segvit.export.record import SUFFIXES, describe
from segvit.export.runtimes import open_exported
from segvit.files import write_text
from segvit.inference.predictor import Predictor, TorchRuntime
from segvit.metrics.confusion import ConfusionMatrix
from segvit.nn.flops import count_gflops
from segvit.zoo import create_model

SIDE, SCENES, CALIBRATION = 512, 200, 64
ENGINES = {"fp32": ("openvino", "onnxruntime"), "bf16": ("openvino",), "int8": ("openvino", "onnxruntime")}


class Aim(NamedTuple):
    """One row."""

    what: str
    aim: str
    found: str
    reached: bool | None  # None = not measured

    def __str__(self) -> str:
        verdict = {True: "yes", False: "no", None: "-"}[self.reached]
        return f"| {self.what} | {self.aim} | {self.found} | {verdict} |"


class Fed:
    """Runs a network and hands on other outputs, so that the readout works on those of a trained one."""

    def __init__(self, run: Runtime, out: Dense) -> None:
        self.run, self.out = run, out
        self.spec, self.classes, self.readout = run.spec, run.classes, run.readout

    def __call__(self, images: Tensor) -> Dense:
        self.run(images)
        return self.out


def on_engines(model: nn.Module, side: int, count: int, folder: Path) -> dict[tuple[str, str], Runtime]:
    """The model on every engine that exported files are for; int8 is calibrated on `count` scenes of that size."""
    program, found = trace(model, inside=False), {}
    scenes = [normalise(draw_shapes(side, (1, 0, number))[0], model.spec) for number in range(count)]
    for precision, engines in ENGINES.items():
        for engine in engines:
            suffix = next(suffix for suffix, kind in SUFFIXES.items() if kind == FORMATS[engine])
            path = folder / f"{model.config.name}-{engine}-{precision}{suffix}"
            record = describe(
                model, format=FORMATS[engine], precision=precision, readout="outside", extras=kept_extras(model)
            )
            write(program, path, record, scenes, transformer=is_transformer(model))
            found[engine, precision] = open_exported(path)
    return found


def as_official(model: nn.Module) -> nn.Module:
    """A copy whose self-attention makes all weights, softmax and products one after the other."""
    plain = copy.deepcopy(model)
    for block in plain.backbone.blocks:
        block.attn.fused_attn = False
    return plain


def timed_rows(trained: Dense, repeats: int, folder: Path) -> list[Aim]:
    """Speed of ViT-B by precision beside the official way, its share of the matrix rate, and EoMT."""
    torch.manual_seed(0)
    spec = InputSpec(exact=(SIDE, SIDE))
    model = create_model("segvit_vit_base", classes=CLASSES, spec=spec, image_size=SIDE).eval()
    image = draw_shapes(SIDE, (0, 1, 3))[0]
    pixels = prepare(image, spec)[None]
    # Random weights: 16 scenes calibrate what is only timed. Emulated, bf16 takes a minute an image.
    found = on_engines(model, SIDE, 16, folder)
    if not cpu_has_bf16():
        del found["openvino", "bf16"]
    plain = as_official(model)
    runs: dict[str, Callable[[], object]] = {
        f"{engine} {precision}": lambda run=run: Predictor(Fed(run, trained)).segment(image)
        for (engine, precision), run in found.items()
    }
    runs["torch fp32"] = lambda: Predictor(Fed(TorchRuntime(model), trained)).segment(image)
    rival = build_rival("eomt", len(CLASSES), (SIDE, SIDE))
    others: dict[str, Callable[[], object]] = {
        "official": lambda: (plain(prepare(image, spec)[None]), official(trained, SIDE)),
        "official, fused": lambda: (model(prepare(image, spec)[None]), official(trained, SIDE)),
        "eomt": lambda: rival.labels(pixels), "matrix": matrix_product(),
    }  # fmt: skip
    with torch.inference_mode():
        seconds = in_turns(runs | others, repeats)
    median = medians(seconds)
    print("medians: " + ", ".join(f"{name} {1e3 * spent:.0f} ms" for name, spent in median.items()), flush=True)
    rate, rows = matrix_rate(median["matrix"]), []
    for precision, aim in (("fp32", 2.2), ("bf16", 4.0), ("int8", 6.0)):
        what, wanted = f"ViT-B image -> labels, {precision}, beside the official way", f">= {aim} times faster"
        names = [name for name in runs if name.endswith(precision)]
        if not names:
            rows.append(Aim(what, wanted, "not timed: this CPU has no bf16 instructions", None))
            continue
        best = min(names, key=median.__getitem__)
        times, fused = (median[way] / median[best] for way in ("official", "official, fused"))
        spread = [slow / fast for slow, fast in zip(seconds["official"], seconds[best], strict=True)]
        rows.append(Aim(
            what, wanted,
            f"{times:.2f} times ({min(spread):.2f} to {max(spread):.2f}): {median[best]:.3f} s by {best}, "
            f"{median['official']:.3f} s; {fused:.2f} times where the official way too has fused attention",
            times >= aim,
        ))  # fmt: skip
        if precision == "fp32":
            share = count_gflops(model, (SIDE, SIDE), readout=False) / rate / median[best]
            rows.append(Aim(
                "share of the fp32 matrix rate, whole pipeline", ">= 75 %",
                f"{100 * share:.0f} % of {rate:.0f} G multiply-adds a second, at which those of the network alone "
                f"would take {share * median[best]:.3f} s", share >= 0.75,
            ))  # fmt: skip
    times = median["eomt"] / median["torch fp32"]
    rows.append(Aim("against EoMT-B of transformers, both on eager torch", "faster",
                    f"{times:.2f} times: {median['torch fp32']:.3f} s, {median['eomt']:.3f} s", times > 1))  # fmt: skip
    return rows


def agreement_rows(model: nn.Module, folder: Path) -> list[Aim]:
    """Labels of the engines on the trained network beside torch's in fp32, and mIoU."""
    scenes = [draw_shapes(128, (0, number, 2)) for number in range(SCENES)]
    runs = {
        "torch fp32": TorchRuntime(model), "torch bf16": TorchRuntime(model, precision="bf16"),
        **{" ".join(key): run for key, run in on_engines(model, 128, CALIBRATION, folder).items()},
    }  # fmt: skip
    labels = {name: [Predictor(run).segment(image)[0] for image, _ in scenes] for name, run in runs.items()}
    miou = {}
    for name, found in labels.items():
        confusion = ConfusionMatrix(len(CLASSES), ignore_index=255)
        for one, (_, mask) in zip(found, scenes, strict=True):
            confusion.update(one, mask)
        miou[name] = confusion.metrics().miou
    rows = []
    for name, found in labels.items():
        if name == "torch fp32":
            continue
        same = float(np.mean([np.mean(a == b) for a, b in zip(found, labels["torch fp32"], strict=True)]))
        change = 100 * (miou[name] - miou["torch fp32"])
        what, said = (
            f"trained Tiny, {name}, beside torch fp32",
            f"{100 * same:.4f} % of labels, mIoU {change:+.2f} points in {SCENES} scenes",
        )
        if name.endswith("int8"):
            rows.append(Aim(what, "mIoU change <= 0.5 points", said, abs(change) <= 0.5))
        elif name.endswith("bf16"):
            rows.append(Aim(what, ">= 99.9 % of labels", said, same >= 0.999))
        else:
            gap = largest_gap(model, scenes, found, labels["torch fp32"])
            rows.append(Aim(what, ">= 99.999 % of labels, others within 1e-4", f"{said}; largest gap {gap:.1e}",
                            same >= 0.99999 and gap <= 1e-4))  # fmt: skip
    return rows


def largest_gap(model: nn.Module, scenes: list[Any], found: list[Any], expected: list[Any]) -> float:
    """Between the two best scores, at pixels whose labels differ."""
    gap = 0.0
    for (image, _), one, other in zip(scenes, found, expected, strict=True):
        if (one != other).any():
            best = Predictor(model).top(image, 2)[1][:, one != other]
            gap = max(gap, float((best[0] - best[1]).max()))
    return gap


def readout_row(model: nn.Module, repeats: int) -> Aim:
    """The readout of the trained network's outputs at 2048 x 2048."""
    side = 2048
    scene = draw_shapes(side, (0, 1, 2))[0]
    run = TorchRuntime(model)
    out = model.readout.trim(run(normalise(scene, model.spec)[None]))
    reader = Predictor(Ready(run, out))
    ways: dict[str, Callable[[], object]] = {
        "official": lambda: official(out, side),
        "ours": lambda: reader.segment(scene),
    }
    with torch.inference_mode():
        median = medians(in_turns(ways, repeats))
        memory = peak_memory(ways["ours"])
    times = median["official"] / median["ours"]
    return Aim("readout 2048 x 2048, 150 classes, trained", ">= 50 times faster than naive, <= 300 MB",
               f"{times:.1f} times: {median['ours']:.3f} s, {median['official']:.2f} s; {memory:.0f} MB",
               times >= 50 and memory <= 300)  # fmt: skip


LARGE = """
import sys, time
from pathlib import Path
import numpy as np, tifffile, torch
from segvit.data.synthetic import draw_shapes
from segvit.data.tiff_regions import open_regions
from segvit.inference.large import Windowed, segment_large
from segvit.inference.predictor import TorchRuntime
from readout import new_model
folder, side, weights = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
tile = draw_shapes(512, (0, 1, 4))[0]
count = -(-side // 512)
tifffile.imwrite(folder / "a.tif", (tile for _ in range(count * count)), shape=(side, side, 3), dtype=np.uint8,
                 photometric="rgb", tile=(512, 512), compression="zlib")
model = new_model()
model.load_state_dict(torch.load(weights, weights_only=True))
start = time.perf_counter()
with open_regions(folder / "a.tif") as regions:
    run = Windowed(TorchRuntime(model.eval()), (512, 512), (384, 384))
    segment_large(run, regions, folder / "b.tif", identity={})
# Not ru_maxrss, which a process inherits from the one that started it.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) / 2**20, time.perf_counter() - start)
"""


def large_row(weights: Path, side: int, folder: Path) -> Aim:
    """Resident memory of a process that segments a large tiled TIFF."""
    what, aim = f"{side:,} x {side:,} tiled TIFF, SegViT-Tiny", "<= 2 GB resident"
    if not side:
        return Aim("20,000 x 20,000 tiled TIFF, SegViT-Tiny", aim, "not run", None)
    command = [sys.executable, "-c", LARGE, str(folder), str(side), str(weights.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    if done.returncode:
        return Aim(what, aim, done.stderr.strip().splitlines()[-1], False)
    gigabytes, seconds = map(float, done.stdout.split())
    return Aim(what, aim, f"{gigabytes:.2f} GB in {seconds / 60:.1f} min", gigabytes <= 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=Path("runs/aims/tiny.pt"), help="of the trained network")
    parser.add_argument("--minutes", type=float, default=6.0, help="of training, where the weights are not there")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--huge", type=int, default=20_000, help="side of the large TIFF; 0 leaves it out")
    parser.add_argument("--table", type=Path, help="Where to write the report, a Markdown file.")
    options = parser.parse_args()
    model = new_model()
    if options.weights.is_file():
        model.load_state_dict(torch.load(options.weights, weights_only=True))
    else:
        train(model.train(), options.minutes)
        options.weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), options.weights)
    model.eval()
    with torch.inference_mode():
        scene, mask = draw_shapes(SIDE, (0, 1, 3))
        fed = model.readout.trim(model(normalise(scene, model.spec)[None]))
        right = float((Predictor(model).segment(scene)[0] == mask).mean())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = timed_rows(fed, options.repeats, folder)
        rows += agreement_rows(model, folder)
        rows.append(readout_row(model, options.repeats))
        rows.append(large_row(options.weights, options.huge, folder))
    text = report(rows, right, options.repeats)
    print(text)
    if options.table is not None:
        write_text(options.table, text)


def report(rows: list[Aim], right: float, repeats: int) -> str:
    """The table, and what it was measured on."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "onnxruntime", "openvino", "nncf"))
    lines = [
        "# Aims of fast and exact inference", "", "| what | aim | measured | reached |", "|---|---|---|---|",
        *map(str, rows), "",
        f"{processor()}; bf16 instructions: {'yes' if cpu_has_bf16() else 'no'}; {versions}; "
        f"{date.today().isoformat()}. Medians of {repeats} rounds in turns. The trained network is right at "
        f"{100 * right:.0f} % of the pixels of the scene whose masks are fed.", "",
        f"    python benchmarks/aims.py {' '.join(sys.argv[1:])}".rstrip(), "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
