"""The end of a run, and of an evaluation: figures on a whole split, galleries of what went wrong, the model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from segvit import __version__
from segvit.contracts import InputSpec
from segvit.data.dataset import Dataset
from segvit.engine.evaluate import Evaluation, Suspect, evaluate, evaluation_record, ranked_images
from segvit.engine.history import read_history
from segvit.engine.report import Gallery, Picture, write_report
from segvit.engine.run import RunLog
from segvit.files import write_json, write_text
from segvit.inference.prediction import as_picture
from segvit.inference.predictor import Predictor, Views
from segvit.metrics.confusion import Metrics
from segvit.model_folder import load_model
from segvit.tasks.experiment import Experiment
from segvit.tasks.open_vocabulary import seen_and_unseen, unseen_classes

if TYPE_CHECKING:
    from segvit.contracts import Model

PICTURES = 6  # worst, and best, images of a report
MARGIN, CONTEXT = 0.6, 24  # what is shown around a suspicious region: a part of its sides, and pixels


def finish(folder: Path, dataset: Dataset, experiment: Experiment, *, log: RunLog) -> Metrics | None:
    """Evaluate the saved model and write its card, val.json and report/index.html; None where there is no val split."""
    device = "cuda" if experiment.device != "cpu" and torch.cuda.is_available() else "cpu"
    model = load_model(folder / "model", device=device)
    predictor = Predictor(model)
    metrics, record, shown = None, None, []
    if "val" in dataset.splits and dataset.count("val"):
        found = evaluate(predictor, dataset, "val", workers=experiment.workers, details=True)
        metrics = found.confusion.metrics()
        record = evaluation_record(found, dataset.classes) | {"protocol": protocol(model.spec)}
        shown = galleries(predictor, dataset, "val", found)
        if hidden := unseen_classes(model):
            record["open_vocabulary"], line = seen_and_unseen(metrics, hidden, dataset.classes)
            log.message(line)
        write_json(folder / "val.json", record)
    write_text(folder / "model" / "README.md", model_card(model, experiment, metrics))
    path = folder / "report" / "index.html"
    write_report(
        path, title=f"{experiment.model} on {Path(experiment.data).name or experiment.data}",
        facts=run_facts(model, experiment, dataset), history=read_history(folder), record=record,
        classes=dataset.classes, galleries=shown,
    )  # fmt: skip
    if metrics is not None:
        log.message(
            f"mIoU {metrics.miou:.4f} over {metrics.counted} classes on {dataset.count('val')} validation images"
        )
    log.message(f"model {folder / 'model'}, report {path}")
    return metrics


def run_facts(model: Model, experiment: Experiment, dataset: Dataset) -> list[tuple[str, str]]:
    """What the report says of how a run was made."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return [
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


def write_evaluation(
    folder: Path, predictor: Predictor, dataset: Dataset, split: str, found: Evaluation, facts: dict[str, str]
) -> dict[str, Any]:
    """metrics.json with the raw confusion matrix and index.html; returns what metrics.json holds."""
    record = evaluation_record(found, dataset.classes) | {name.lower(): value for name, value in facts.items()}
    write_json(folder / "metrics.json", record)
    write_report(
        folder / "index.html", title=f"{facts['Model']} on {split} of {Path(facts['Data']).name or facts['Data']}",
        facts=list(facts.items()), record=record, classes=dataset.classes,
        galleries=galleries(predictor, dataset, split, found),
    )  # fmt: skip
    return record


def galleries(predictor: Predictor, dataset: Dataset, split: str, found: Evaluation) -> list[Gallery]:
    """The worst and the best images, and the regions where label or prediction must be wrong."""
    order = ranked_images(found)
    worst = order[:PICTURES]
    best = [index for index in reversed(order) if index not in worst][:PICTURES]
    shown = [
        Gallery(
            title=title, text=text, pictures=[_picture(predictor, dataset, split, found, index) for index in chosen]
        )
        for title, text, chosen in (
            ("Worst images", "Errors are red on the grey image; black pixels of a label are ignored and count neither "
             "way.", worst),
            ("Best images", "", best),
        )
    ]  # fmt: skip
    suspects = Gallery(
        title="Likely label errors",
        text="Regions that the model reads with a confidence of 90 % or more as something else than their label, the "
        "largest first. Some are mistakes of the model; many are mistakes of the label.",
        pictures=[_cut_out(predictor, dataset, split, suspect) for suspect in found.suspects],
    )
    return [*shown, suspects]


def _picture(predictor: Predictor, dataset: Dataset, split: str, found: Evaluation, index: int) -> Picture:
    sample = dataset.read(split, index)
    labels, _ = predictor.segment(sample.image)
    return Picture(
        sample.name, as_picture(sample.image), sample.mask, labels, f"mIoU {100 * found.image_miou[index]:.2f} %"
    )


def _cut_out(predictor: Predictor, dataset: Dataset, split: str, suspect: Suspect) -> Picture:
    sample = dataset.read(split, suspect.image)
    labels, _ = predictor.segment(sample.image)
    top, bottom, left, right = suspect.box
    above, aside = round(MARGIN * (bottom - top)) + CONTEXT, round(MARGIN * (right - left)) + CONTEXT
    window = slice(max(0, top - above), bottom + above), slice(max(0, left - aside), right + aside)
    names = dataset.classes.names
    return Picture(
        sample.name, as_picture(sample.image)[window], sample.mask[window], labels[window],
        f"labelled {names[suspect.label]}, read as {names[suspect.prediction]} with {100 * suspect.confidence:.0f} % "
        f"confidence, {suspect.pixels:,} pixels at row {top}, column {left}",
    )  # fmt: skip


def protocol(spec: InputSpec, views: Views = Views()) -> str:
    """How figures were measured, in words."""
    size = "images at their own size"
    if spec.scale:
        size = f"short side {min(spec.scale)}, long side at most {max(spec.scale)}"
    elif spec.exact:
        size = f"resized to {spec.exact[0]} x {spec.exact[1]}"
    windows = f"windows of {spec.window} by steps of {spec.stride}" if spec.window else "whole images"
    scales = "single scale" if views.scales == (1.0,) else f"scales {list(views.scales)}"
    mirrored = " and flip" if views.flip else ""
    return f"{scales}{mirrored}, {windows}, {size}, labels at the original resolution, ignored pixels left out"


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
