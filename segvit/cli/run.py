"""The main job at the command line: train, evaluate, predict, and what to paste into a bug report."""

from __future__ import annotations

from typing import Any, Literal

from segvit.cli.parsing import show
from segvit.contracts import UserError

Precision = Literal["fp32", "bf16", "fp16"]
Device = Literal["cpu", "cuda"]


def train(**options: Any) -> None:
    """Train a model; --data and --out are required, everything else may stand in a recipe (--config)."""
    from segvit.tasks.dense import train as run
    from segvit.tasks.experiment import Experiment

    run(Experiment(**options))


def find_lr(*, json: bool = False, **options: Any) -> None:
    """Suggest a learning rate: a short sweep over rates with a recipe's model, data and batch; nothing is written."""
    from segvit.tasks.experiment import Experiment
    from segvit.tasks.find_lr import find_lr as sweep

    if options["steps"] is None and options["epochs"] is None:  # the sweep has its own length
        options["steps"] = 1
    found = sweep(Experiment(**options))
    show(found.report, json, found.text)


def val(
    run: str, *, data: str | None = None, split: str = "val", out: str | None = None,
    scales: tuple[float, ...] = (1.0,), flip: bool = False,
    precision: Precision = "fp32", device: Device | None = None, workers: int = 2, polyp: bool = False,
    json: bool = False,
) -> None:  # fmt: skip
    """Evaluate a model at the original resolution; writes metrics.json and a report.

    Args:
        run: Run folder, model folder or hub id.
        data: Dataset; None = the one that the run was trained on.
        split: Split to evaluate.
        out: Folder for metrics.json and index.html; None = evaluation/SPLIT in the run folder, or here.
        scales: Scales whose softmax scores are averaged.
        flip: Whether each scale is also seen mirrored.
        precision: Of the network.
        device: cpu or cuda; None = cuda where there is one.
        workers: Processes that decode images.
        polyp: Of two classes, also the second one's measures of polyp papers: mean Dice and IoU over thresholds ...
        json: Print JSON instead of a table.
    """
    from segvit.inference.predictor import Views
    from segvit.tasks.commands import evaluate_run

    views = Views(scales=tuple(scales), flip=flip)
    result = evaluate_run(
        run, data, split, out, views=views, precision=precision, device=device, workers=workers, polyp=polyp
    )
    show(result.report, json, result.text)


def predict(
    source: str, *, model: str, out: str | None = None, overlay: bool = False, scores: bool = False,
    areas: bool = False, scales: tuple[float, ...] = (1.0,), flip: bool = False, precision: Precision = "fp32",
    device: Device | None = None, json: bool = False,
) -> None:  # fmt: skip
    """Segment images, folders of images or a glob pattern; writes palette PNGs that hold class ids.

    Args:
        source: Image, folder or pattern; several may be given.
        model: Run folder, model folder or hub id.
        out: Folder to write; None = predictions/ in the run folder, or here.
        overlay: Also write NAME_overlay.png, the image under its labels with a legend.
        scores: Also write NAME_scores.npz, all class scores as float16.
        areas: Also write NAME.json, pixels and fraction by class.
        scales: Scales whose softmax scores are averaged.
        flip: Whether each scale is also seen mirrored.
        precision: Of the network.
        device: cpu or cuda; None = cuda where there is one.
        json: Print what was written as JSON.
    """
    from segvit.inference.predictor import Views
    from segvit.tasks.commands import predict_files

    extra = {"overlay": overlay, "scores": scores, "areas": areas}
    views = Views(scales=tuple(scales), flip=flip)
    result = predict_files(source, model, out, extra, views=views, precision=precision, device=device)
    if result.written:
        show(result.written, json, "\n".join(item["labels"] for item in result.written))
    if result.failed:
        raise UserError(f"{len(result.failed)} images were left out: {'; '.join(result.failed[:3])}")


def watch(run: str, *, once: bool = False) -> None:
    """Draw the curves of a run in the terminal while it goes on; ends with it, or with Ctrl-C.

    Args:
        run: Run folder.
        once: Print the present state and exit.
    """
    from segvit.tasks.watch import watch_run

    watch_run(run, once=once)


def doctor(*, json: bool = False) -> None:
    """Versions, devices and settings, to paste into a bug report.

    Args:
        json: Print JSON.
    """
    from segvit.tasks.commands import environment

    report = environment()
    show(report, json, "\n".join(f"{key}: {value}" for key, value in report.items()))
