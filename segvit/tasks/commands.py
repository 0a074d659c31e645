"""Evaluation, prediction and the doctor, as the command line offers them."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import yaml

from segvit import __version__
from segvit.contracts import Runtime, Size, UserError
from segvit.data.dataset import open_dataset
from segvit.data.volumes import cases
from segvit.engine.evaluate import evaluate
from segvit.files import write_json
from segvit.inference.predictor import Precision, Predictor, Views
from segvit.metrics.confusion import COLUMNS
from segvit.model_folder import load_model
from segvit.tasks.console import aligned, progress_bar
from segvit.tasks.finish import protocol, write_evaluation
from segvit.tasks.open_vocabulary import Vocabulary, find_unseen, seen_and_unseen
from segvit.tasks.predict import Plan, Predicted, segment_files
from segvit.tasks.sources import default_device, default_folder
from segvit.tasks.volumes import Protocol, VolumeCollector

if TYPE_CHECKING:
    from segvit.contracts import Model

PACKAGES = ("segvit", "torch", "torchvision", "timm", "accelerate", "safetensors", "huggingface_hub", "numpy", "pillow")

# (model, device, what tells it other words or None) -> what runs it
Start = Callable[[str, str, Callable[["Model"], None] | None], Runtime]


@dataclass(frozen=True)
class Evaluated:
    """What `segvit val` prints: for machines and for people."""

    report: dict[str, Any]
    text: str


def predictor(
    model: str, *, views: Views, precision: Precision, device: str | None, vocabulary: Vocabulary = Vocabulary(),
    start: Start | None = None,
) -> Predictor:  # fmt: skip
    """A predictor from a run or model folder, on the GPU where there is one; told other words if wanted.

    `start` makes another runtime of the model (or of a file that was exported from one) than torch as it is.
    """
    where = device or default_device()
    if where.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("device is cuda but torch sees no GPU; use --device cpu, or see segvit doctor")
    if start is not None:
        told = None if vocabulary == Vocabulary() else vocabulary.apply
        return Predictor(start(model, where, told), views=views)
    network = load_model(model, device=where)
    vocabulary.apply(network)
    return Predictor(network, precision=precision, views=views)


def evaluate_run(
    run: str, data: str | None, split: str, out: str | None, *, views: Views, precision: Precision,
    device: str | None, workers: int, polyp: bool = False, vocabulary: Vocabulary = Vocabulary(),
    unseen: str | None = None, volumes: Protocol | None = None, start: Start | None = None,
    ran: Mapping[str, str] = MappingProxyType({}),
) -> Evaluated:  # fmt: skip
    """Evaluate a run on a dataset, by default its own, and write metrics.json and index.html.

    With `volumes`, slices are also put together and measured by that protocol. `ran` is what the page says besides of
    what `start` started.
    """
    source = data or trained_on(run)
    dataset = open_dataset(source)
    segment = predictor(
        run, views=views, precision=precision, device=device, vocabulary=vocabulary.of_data(dataset.classes),
        start=start,
    )  # fmt: skip
    hidden = find_unseen(unseen, segment.run, dataset.classes)
    collector = None if volumes is None else VolumeCollector(cases(dataset, split), dataset.classes, volumes)
    with progress_bar("evaluating") as progress:
        found = evaluate(
            segment, dataset, split, workers=workers, details=True, polyp=polyp, watch=collector, progress=progress
        )
    found.volumes = None if collector is None else collector.record()
    metrics = found.confusion.metrics()
    folder = Path(out) if out else _evaluation_folder(run, split)
    words = protocol(segment.run.spec, views)
    facts = {
        "Model": run, "Data": source, "Split": split, "Images": f"{dataset.count(split)}", "Protocol": words,
        "Precision": precision, "Device": device or default_device(), "Version": f"segvit {__version__}",
    } | dict(ran)  # fmt: skip
    report = write_evaluation(folder, segment, dataset, split, found, facts)
    summary = f"mIoU {metrics.miou:.4f}  mAcc {metrics.macc:.4f}  aAcc {metrics.aacc:.4f}  fwIoU {metrics.fwiou:.4f}"
    if "boundary" in report and report["boundary"]["miou"] is not None:
        summary += f"  boundary IoU {report['boundary']['miou']:.4f}"
    if "calibration" in report and report["calibration"]["ece"] is not None:
        summary += f"  ECE {report['calibration']['ece']:.4f}"
    if "polyp" in report:
        names = ("mdice", "miou", "weighted_f", "s", "mean_e", "max_e", "mae")
        summary += "\npolyp: " + "  ".join(f"{name} {report['polyp'][name]:.4f}" for name in names)
    if hidden:
        report["open_vocabulary"], line = seen_and_unseen(metrics, hidden, dataset.classes)
        summary += f"\n{line}"
        write_json(folder / "metrics.json", report)
    report["report"] = str(folder / "index.html")
    if collector is not None:
        summary += f"\n\n{collector.text()}\n"
    table = aligned([COLUMNS, *metrics.table(dataset.classes)])
    closing = f"{summary}  over {metrics.counted} classes\n{split} of {source}: {words}\n{folder / 'index.html'}"
    return Evaluated(report, f"{table}\n\n{closing}")


def _evaluation_folder(run: str, split: str) -> Path:
    """evaluation/SPLIT in the run folder, or here when the model is no run."""
    inside = Path(run) if (Path(run) / "config.yaml").is_file() else Path()
    return inside / "evaluation" / split


def trained_on(run: str) -> str:
    """The data of a run folder. Raises UserError for a folder that is none."""
    config = Path(run) / "config.yaml"
    if not config.is_file():
        raise UserError(f"{run} does not say what it was trained on; give --data")
    return str(yaml.safe_load(config.read_text(encoding="utf-8"))["data"])


def predict_files(
    source: str, model: str, out: str | None, extra: dict[str, bool], *, views: Views, precision: Precision,
    device: str | None, vocabulary: Vocabulary = Vocabulary(), start: Start | None = None,
    window: Size | None = None, stride: Size | None = None, resume: bool = False, engine: str | None = None,
) -> Predicted:  # fmt: skip
    """Segment files with the model of a run; see `segment_files`. `engine` is what `start` starts, for the record."""
    folder = Path(out) if out else default_folder(model)
    identity = {
        "model": made_of(model), "views": asdict(views), "precision": precision, "engine": engine,
        "vocabulary": asdict(vocabulary), "extra": sorted(name for name, wanted in extra.items() if wanted),
    }  # fmt: skip
    plan = Plan(extra=extra, window=window, stride=stride, resume=resume, identity=identity)
    return segment_files(
        source, folder, plan,
        lambda: predictor(model, views=views, precision=precision, device=device, vocabulary=vocabulary, start=start),
    )  # fmt: skip


def made_of(model: str) -> dict[str, Any]:
    """The files of a model with their sizes and times; only the name where it lies on a hub."""
    path = Path(model).expanduser()
    inside = path / "model" if (path / "model").is_dir() else path
    files = [path] if path.is_file() else sorted(inside.glob("*.safetensors"))
    told = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    return {"name": str(path.resolve()) if path.exists() else model, "files": told}


def environment() -> dict[str, Any]:
    """Versions, machine and devices."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        **versions, "python": platform.python_version(), "platform": platform.platform(),
        "cpus": os.cpu_count(), "torch threads": torch.get_num_threads(), "gpus": ", ".join(gpus) or "none",
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "hub offline": os.environ.get("HF_HUB_OFFLINE", "0"), "telemetry": "none, ever",
    }  # fmt: skip
