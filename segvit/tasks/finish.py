"""The end of a run: the saved model's figures on the whole val split, the model card and the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from segvit import __version__
from segvit.contracts import InputSpec
from segvit.data.dataset import Dataset
from segvit.engine.evaluate import Evaluation, evaluate, worst_images
from segvit.engine.report import Picture, write_report
from segvit.engine.run import RunLog, read_history
from segvit.files import write_json, write_text
from segvit.inference.predictor import Predictor
from segvit.metrics.confusion import Metrics
from segvit.tasks.experiment import Experiment
from segvit.zoo import load_model

if TYPE_CHECKING:
    from segvit.contracts import Model

PICTURES = 6


def finish(folder: Path, dataset: Dataset, experiment: Experiment, *, log: RunLog) -> Metrics | None:
    """Evaluate the saved model and write its card, val.json and report/index.html; None where there is no val split."""
    device = "cuda" if experiment.device != "cpu" and torch.cuda.is_available() else "cpu"
    model = load_model(folder / "model", device=device)
    metrics, found = None, None
    if "val" in dataset.splits and dataset.count("val"):
        found = evaluate(Predictor(model), dataset, "val", workers=experiment.workers)
        metrics = found.confusion.metrics()
        write_json(folder / "val.json", metrics.to_json(dataset.classes) | {"protocol": protocol(model.spec)})
    write_text(folder / "model" / "README.md", model_card(model, experiment, metrics))
    path = folder / "report" / "index.html"
    write_run_report(path, folder, dataset, model, experiment, found)
    if metrics is not None:
        log.message(
            f"mIoU {metrics.miou:.4f} over {metrics.counted} classes on {dataset.count('val')} validation images"
        )
    log.message(f"model {folder / 'model'}, report {path}")
    return metrics


def write_run_report(
    path: Path, folder: Path, dataset: Dataset, model: Model, experiment: Experiment, found: Evaluation | None
) -> None:
    """The self-contained HTML report of a run."""
    metrics = found.confusion.metrics() if found else None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = [
        ("Model", experiment.model),
        ("Options", ", ".join(f"{key}={value}" for key, value in model.config.options.items()) or "none"),
        ("Parameters", f"{parameters / 1e6:.2f} M"),
        ("Weights", experiment.init or experiment.weights or "none (trained from nothing)"),
        ("Data", f"{experiment.data}: {dataset.count('train')} training images"),
        ("Batch", f"{experiment.batch_size} images, crop {experiment.augment.crop}"),
        ("Optimiser", f"{experiment.optim.name}, rate {experiment.optim.lr}, {experiment.schedule.kind} schedule"),
        ("Evaluation", protocol(model.spec)),
        ("Version", f"segvit {__version__}"),
    ]
    write_report(
        path, title=f"{experiment.model} on {Path(experiment.data).name or experiment.data}", facts=facts,
        history=read_history(folder), metrics=metrics.to_json(dataset.classes) if metrics else None,
        confusion=found.confusion.matrix if found else None, classes=dataset.classes,
        pictures=pictures(dataset, model, found) if found else [],
    )  # fmt: skip


def pictures(dataset: Dataset, model: Model, found: Evaluation) -> list[Picture]:
    """The worst validation images and what the model makes of them."""
    predictor, shown = Predictor(model), []
    for index in worst_images(found, PICTURES):
        sample = dataset.read("val", index)
        labels, _ = predictor.segment(sample.image)
        shown.append(Picture(sample.name, sample.image, sample.mask, labels, found.image_miou[index]))
    return shown


def protocol(spec: InputSpec) -> str:
    """How figures were measured, in words."""
    size = "images at their own size"
    if spec.scale:
        size = f"short side {min(spec.scale)}, long side at most {max(spec.scale)}"
    elif spec.exact:
        size = f"resized to {spec.exact[0]} x {spec.exact[1]}"
    windows = f"windows of {spec.window} by steps of {spec.stride}" if spec.window else "whole images"
    return f"single scale, {windows}, {size}, labels at the original resolution, ignored pixels left out"


def model_card(model: Model, experiment: Experiment, metrics: Metrics | None) -> str:
    """README.md of the model folder, with the hub's metadata."""
    lines = ["---", "library_name: segvit", "pipeline_tag: image-segmentation", "tags: [semantic-segmentation]"]
    if metrics is not None and not np.isnan(metrics.miou):
        lines += [
            "model-index:", f"- name: {experiment.model}", "  results:", "  - task: {type: image-segmentation}",
            f"    dataset: {{name: {Path(experiment.data).name!r}, type: custom}}",
            f"    metrics: [{{type: mean_iou, value: {metrics.miou:.4f}}}]",
        ]  # fmt: skip
    lines += ["---", "", f"# {experiment.model}", "", f"Trained with segvit {__version__} on `{experiment.data}`."]
    if metrics is not None:
        lines += ["", f"mIoU {metrics.miou:.4f} over {metrics.counted} classes ({protocol(model.spec)})."]
    lines += ["", "Classes: " + ", ".join(model.classes.names) + ".", "", "```python", "import segvit", ""]
    lines += [
        'result = segvit.Predictor(segvit.load("this folder"))("photo.jpg")',
        'result.save("photo.png")',
        "```",
        "",
    ]
    return "\n".join(lines)
