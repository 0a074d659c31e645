"""What a model costs, measured: parameters, GFLOPs, seconds by part, throughput, memory, share of the machine's rate.

Everything that is compared is timed in turns in one process, and the machine's matrix rate among it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segvit import __version__
from segvit.bench.measure import in_turns, matrix_product, matrix_rate, medians, peak_memory, processor
from segvit.bench.rivals import build_rival, versions
from segvit.contracts import Classes, Dense, InputSpec, Readout, Runtime, Size, UserError
from segvit.data.prepare import normalise, prepare
from segvit.inference.predictor import Predictor, TorchRuntime
from segvit.model_folder import load_model
from segvit.nn.flops import count_gflops, count_parameters
from segvit.zoo import MODELS, create_model, find_system


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure.

    Args:
        size: Height and width of the image.
        batches: Batch sizes whose throughput is measured.
        repeats: Rounds whose median counts.
        against: Rivals, see `segvit.bench.rivals`.
        num_classes: Of a model that is given by its zoo name, and of the rivals then.
        device: Where all of them run.
    """

    size: Size
    batches: tuple[int, ...] = (1, 2, 4)
    repeats: int = 5
    against: tuple[str, ...] = ()
    num_classes: int = 150
    device: str = "cpu"

    def __post_init__(self) -> None:
        if min(*self.size, self.repeats, self.num_classes, *self.batches) < 1:
            raise UserError("sizes, batches, repeats and num_classes must be 1 or more")


@dataclass(frozen=True)
class Row:
    """One network: ours or a rival's."""

    name: str
    parameters: int | None  # None where an exported file runs
    seconds: float  # image -> label map, median
    spread: float  # slowest over fastest round
    memory: float  # MB above what stood before

    @property
    def rate(self) -> float:
        """Images a second, one at a time."""
        return 1 / self.seconds


@dataclass(frozen=True)
class Bench:
    """All that was measured."""

    rows: list[Row]  # ours first
    parts: dict[str, float]  # seconds
    throughput: dict[int, float]  # batch size -> images a second of the network
    gflops: float | None  # of the papers' convention, readout included; None where an exported file runs
    network_gflops: float | None  # without the readout
    matrix: float  # GFLOP/s of the machine, a multiply-add as one
    facts: dict[str, str]

    @property
    def share(self) -> float | None:
        """Of the machine's matrix rate, image -> label map. How scores are read is our choice, so it does not count."""
        return None if self.network_gflops is None else self.network_gflops / self.matrix / self.rows[0].seconds

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        rows = [asdict(row) | {"times_ours": row.seconds / self.rows[0].seconds} for row in self.rows]
        return {
            "networks": rows, "parts_s": self.parts, "images_per_s_by_batch": self.throughput, "gflops": self.gflops,
            "matrix_gflop_per_s": self.matrix, "share_of_matrix_rate": self.share, **self.facts,
        }  # fmt: skip


class Ready:
    """A runtime whose network has already run, so that only the readout is timed."""

    def __init__(self, run: Runtime, out: Dense) -> None:
        self.spec: InputSpec = run.spec
        self.classes: Classes = run.classes
        self.readout: Readout = run.readout
        self.out = out

    def __call__(self, images: Tensor) -> Dense:
        return self.out


def open_model(name: str, options: Options) -> Any:
    """A model of the zoo by its name, with random weights, or one from a folder.

    It takes images as large as they are and whole, whatever it was made for: `size` says what is measured.
    Raises UserError for tasks other than dense prediction.
    """
    if name in MODELS and not Path(name).exists():
        torch.manual_seed(0)
        model = create_model(name, num_classes=options.num_classes, spec=InputSpec()).eval()
    else:
        model = load_model(name)
    task = find_system(model.config.name).task
    if task != "dense":
        raise UserError(f"{name} makes no label maps (its task is {task}); bench measures dense models")
    model.spec = as_it_comes(model.spec)
    return model.to(options.device)


def as_it_comes(spec: InputSpec) -> InputSpec:
    """The spec without a size rule and without windows."""
    return replace(spec, scale=None, min_side=None, exact=None, window=None, stride=None)


@torch.inference_mode()
def run_bench(
    name: str, options: Options, start: Callable[[Any], Runtime] = TorchRuntime, *, exported: Runtime | None = None
) -> Bench:  # fmt: skip
    """Measure a model of the zoo or a folder, which `start` puts on an engine, or an `exported` file.

    Raises UserError for tasks other than dense prediction and for rivals that cannot be built.
    """
    gflops = network_gflops = parameters = backbone = None
    if exported is not None:
        run = exported
        run.spec = as_it_comes(run.spec)
    else:
        model = open_model(name, options)
        gflops, network_gflops = (count_gflops(model, options.size, readout=whole) for whole in (True, False))
        parameters, run = count_parameters(model), start(model)
        # On other engines and in other precisions it would not be a part of what `run` does.
        if type(run) is TorchRuntime and run.dtype == torch.float32:
            backbone = dict(model.named_children()).get("backbone")
    image = np.random.default_rng(0).integers(0, 256, (*options.size, run.spec.channels), dtype=np.uint8)
    predictor = Predictor(run)
    pixels = prepare(image, run.spec)[None]
    out = run.readout.trim(run(pixels))
    reader = Predictor(Ready(run, out))
    rivals = {rival: build_rival(rival, len(run.classes), options.size) for rival in options.against}
    where = torch.device(options.device)
    tried: dict[str, Callable[[], object]] = {name: lambda: predictor.segment(image)}
    for rival, found in rivals.items():
        found.network.to(where)
        tried[rival] = lambda labels=found.labels: labels(normalise(image, run.spec)[None].to(where)).cpu()  # type: ignore[misc]
    parts: dict[str, Callable[[], object]] = {
        "prepare": lambda: prepare(image, run.spec), "network": lambda: run(pixels),
        "readout": lambda: reader.segment(image), "matrix": matrix_product(where.type),
    }  # fmt: skip
    if backbone is not None:
        parts["backbone"] = lambda: backbone(pixels.to(where))
    seconds = in_turns(tried | parts, options.repeats)
    median = medians(seconds)
    sizes = {name: parameters} | {rival: count_parameters(found.network) for rival, found in rivals.items()}
    rows = [
        Row(one, sizes[one], median[one], max(seconds[one]) / min(seconds[one]), peak_memory(tried[one], where))
        for one in tried
    ]
    if "backbone" in median:
        median["decoder"] = median["network"] - median["backbone"]
    order = ("prepare", "backbone", "decoder", "network", "readout")
    return Bench(
        rows, {part: median[part] for part in order if part in median}, throughput(run, pixels, options),
        gflops, network_gflops, matrix_rate(median["matrix"]),
        facts(options, run) | {rival: one.what for rival, one in rivals.items()},
    )  # fmt: skip


def throughput(run: Runtime, pixels: Tensor, options: Options) -> dict[int, float]:
    """Images a second of the network at each batch size, in turns."""
    batches = {str(size): pixels.expand(size, -1, -1, -1).contiguous() for size in options.batches}
    calls: dict[str, Callable[[], object]] = {
        size: lambda batch=batch: run(batch) for size, batch in batches.items()  # type: ignore[misc]
    }  # fmt: skip
    return {int(size): int(size) / spent for size, spent in medians(in_turns(calls, options.repeats)).items()}


def facts(options: Options, run: Runtime) -> dict[str, str]:
    """Where, when and how."""
    return {
        "image": f"{options.size[0]} x {options.size[1]}", "classes": str(len(run.classes)),
        "rounds": str(options.repeats), "machine": processor(options.device), "torch": torch.__version__,
        **versions(options.against), "segvit": __version__, "date": date.today().isoformat(),
    }  # fmt: skip


def table(found: Bench) -> tuple[list[str], list[list[str]]]:
    """Head and rows: networks beside ours."""
    head = ["network", "parameters", "image -> labels", "times ours", "images/s", "memory", "slowest / fastest"]
    rows = [
        [row.name, "-" if row.parameters is None else f"{row.parameters / 1e6:.2f} M", f"{1e3 * row.seconds:.1f} ms",
         f"{row.seconds / found.rows[0].seconds:.2f}", f"{row.rate:.2f}", f"{row.memory:.0f} MB", f"{row.spread:.2f}"]
        for row in found.rows
    ]  # fmt: skip
    return head, rows


def parts_table(found: Bench) -> tuple[list[str], list[list[str]]]:
    """Head and rows: seconds by part of ours, throughput, and the machine's rate."""
    whole = found.rows[0].seconds
    rows = [[part, f"{1e3 * spent:.1f} ms", f"{100 * spent / whole:.1f} %"] for part, spent in found.parts.items()]
    rows += [[f"network, batch {size}", f"{rate:.2f} images/s", ""] for size, rate in found.throughput.items()]
    rows.append(["matrix rate of the machine, fp32", f"{found.matrix:.1f} GFLOP/s", ""])
    if found.gflops is not None and found.share is not None:
        rows.append(
            [
                "multiply-adds of network and readout",
                f"{found.gflops:.2f} GFLOPs",
                f"the network's {100 * found.share:.1f} % of the rate",
            ]
        )
    return ["part", "median", "of the whole"], rows


def markdown(found: Bench) -> str:
    """Both tables and the facts."""
    lines: list[str] = []
    for head, rows in (table(found), parts_table(found)):
        lines += ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines.append("")
    return "\n".join([*lines, "; ".join(f"{key}: {value}" for key, value in found.facts.items()) + ".", ""])


def plain(found: Bench, aligned: Callable[[Sequence[Sequence[str]]], str]) -> str:
    """Both tables for a terminal."""
    return "\n\n".join(aligned([head, *rows]) for head, rows in (table(found), parts_table(found)))
