"""Evaluation, prediction and the doctor, as the command line offers them."""

from __future__ import annotations

import glob
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from segvit import __version__
from segvit.contracts import UserError
from segvit.data.dataset import IMAGE_SUFFIXES, open_dataset
from segvit.engine.evaluate import evaluate
from segvit.files import open_atomic, write_json
from segvit.inference.prediction import Prediction
from segvit.inference.predictor import Precision, Predictor, Views
from segvit.metrics.confusion import COLUMNS
from segvit.model_folder import load_model
from segvit.tasks.console import aligned, progress_bar
from segvit.tasks.finish import protocol, write_evaluation

PACKAGES = ("segvit", "torch", "torchvision", "timm", "accelerate", "safetensors", "huggingface_hub", "numpy", "pillow")


@dataclass(frozen=True)
class Evaluated:
    """What `segvit val` prints: for machines and for people."""

    report: dict[str, Any]
    text: str


def predictor(model: str, *, views: Views, precision: Precision, device: str | None) -> Predictor:
    """A predictor from a run or model folder, on the GPU where there is one."""
    where = device or default_device()
    if where.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("device is cuda but torch sees no GPU; use --device cpu, or see segvit doctor")
    return Predictor(load_model(model, device=where), precision=precision, views=views)


def default_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def evaluate_run(
    run: str, data: str | None, split: str, out: str | None, *, views: Views, precision: Precision,
    device: str | None, workers: int, polyp: bool = False,
) -> Evaluated:  # fmt: skip
    """Evaluate a run on a dataset, by default its own, and write metrics.json and index.html."""
    segment = predictor(run, views=views, precision=precision, device=device)
    source = data or _trained_on(run)
    dataset = open_dataset(source)
    with progress_bar("evaluating") as progress:
        found = evaluate(segment, dataset, split, workers=workers, details=True, polyp=polyp, progress=progress)
    metrics = found.confusion.metrics()
    folder = Path(out) if out else _evaluation_folder(run, split)
    words = protocol(segment.run.spec, views)
    facts = {
        "Model": run, "Data": source, "Split": split, "Images": f"{dataset.count(split)}", "Protocol": words,
        "Precision": precision, "Device": device or default_device(), "Version": f"segvit {__version__}",
    }  # fmt: skip
    report = write_evaluation(folder, segment, dataset, split, found, facts) | {"report": str(folder / "index.html")}
    summary = f"mIoU {metrics.miou:.4f}  mAcc {metrics.macc:.4f}  aAcc {metrics.aacc:.4f}  fwIoU {metrics.fwiou:.4f}"
    if "boundary" in report and report["boundary"]["miou"] is not None:
        summary += f"  boundary IoU {report['boundary']['miou']:.4f}"
    if "calibration" in report and report["calibration"]["ece"] is not None:
        summary += f"  ECE {report['calibration']['ece']:.4f}"
    if "polyp" in report:
        names = ("mdice", "miou", "weighted_f", "s", "mean_e", "max_e", "mae")
        summary += "\npolyp: " + "  ".join(f"{name} {report['polyp'][name]:.4f}" for name in names)
    table = aligned([COLUMNS, *metrics.table(dataset.classes)])
    closing = f"{summary}  over {metrics.counted} classes\n{split} of {source}: {words}\n{folder / 'index.html'}"
    return Evaluated(report, f"{table}\n\n{closing}")


def _evaluation_folder(run: str, split: str) -> Path:
    """evaluation/SPLIT in the run folder, or here when the model is no run."""
    inside = Path(run) if (Path(run) / "config.yaml").is_file() else Path()
    return inside / "evaluation" / split


def _trained_on(run: str) -> str:
    config = Path(run) / "config.yaml"
    if not config.is_file():
        raise UserError(f"{run} does not say what it was trained on; give --data")
    return str(yaml.safe_load(config.read_text(encoding="utf-8"))["data"])


@dataclass(frozen=True)
class Predicted:
    """What `segvit predict` wrote, and what it could not read."""

    written: list[dict[str, str]]
    failed: list[str]


def predict_files(
    source: str, model: str, out: str | None, extra: dict[str, bool], *, views: Views, precision: Precision,
    device: str | None,
) -> Predicted:  # fmt: skip
    """Segment files one by one and write the results; a file that cannot be read does not stop the others."""
    images = find_images(source)
    folder = Path(out) if out else default_folder(model)
    targets = {image: folder / name.with_suffix(".png") for image, name in images.items()}
    if len(set(targets.values())) < len(targets):  # a.jpg and a.png
        targets = {image: folder / name.parent / f"{name.name}.png" for image, name in images.items()}
    names = {image: output_names(target, extra) for image, target in targets.items()}
    check_names(list(images), [path for paths in names.values() for path in paths.values()])
    segment = predictor(model, views=views, precision=precision, device=device)
    written, failed = [], []
    with progress_bar("segmenting") as progress:
        for done, (image, paths) in enumerate(names.items()):
            progress(done, len(names))
            try:
                result = segment(image, scores=extra["scores"])
            except UserError as error:
                failed.append(str(error))
                continue
            write_prediction(result, paths)
            written.append({"image": str(image)} | {kind: str(path) for kind, path in paths.items()})
    return Predicted(written, failed)


def write_prediction(result: Prediction, paths: dict[str, Path]) -> None:
    """Write what `paths` names: always the labels."""
    result.save(paths["labels"])
    if "overlay" in paths:
        save_overlay(result, paths["overlay"])
    if "scores" in paths:
        result.save_scores(paths["scores"])
    if "areas" in paths:
        write_json(paths["areas"], result.areas())


def output_names(labels: Path, extra: dict[str, bool]) -> dict[str, Path]:
    """The files of one image: the label map, and beside it what was asked for."""
    others = {
        "overlay": labels.with_name(f"{labels.stem}_overlay.png"),
        "scores": labels.with_name(f"{labels.stem}_scores.npz"),
        "areas": labels.with_suffix(".json"),
    }
    return {"labels": labels} | {kind: path for kind, path in others.items() if extra[kind]}


def check_names(images: list[Path], outputs: list[Path]) -> None:
    """Raise UserError when an output would replace an input or another output."""
    inputs = {path.resolve() for path in images}
    seen: set[Path] = set()
    for path in outputs:
        if path.resolve() in inputs:
            raise UserError(f"{path} would replace an input image; choose another --out")
        if path in seen:
            raise UserError(f"{path} would be written for two images; rename one, or segment them into two folders")
        seen.add(path)


def save_overlay(result: Prediction, path: Path) -> None:
    """Write a prediction's overlay as PNG, atomically."""
    with open_atomic(path) as file:
        result.overlay().save(file, "PNG")


def find_images(source: str) -> dict[Path, Path]:
    """Images of a file, folder (recursively) or glob pattern, each with its name below the source.

    Several sources stand on lines of their own, as the command line passes `photos/*.jpg` once a shell has expanded it.
    Raises UserError when there are none.
    """
    path = Path(source).expanduser()
    if "\n" in source:
        found = sorted({file for part in source.split("\n") for file in find_images(part)})
        shared = os.path.commonpath([file.parent for file in found])
        named = {file: file.relative_to(shared) for file in found}
    elif path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        named = {file: file.relative_to(path) for file in found}
    elif path.is_file():
        named = {path: Path(path.name)}
    else:
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        shared = os.path.commonpath([file.parent for file in found]) if found else ""
        named = {file: file.relative_to(shared) for file in found}  # two folders may hold files of one name
    if not named:
        kinds = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        raise UserError(f"{source}: no such image, and no images in it or matching it ({kinds})")
    return named


def default_folder(model: str) -> Path:
    """predictions/ in the run folder, or here when the model is no run."""
    run = Path(model)
    return run / "predictions" if (run / "config.yaml").is_file() else Path("predictions")


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
