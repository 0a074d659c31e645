"""Image classification at the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from segvit.cli.parsing import show
from segvit.contracts import UserError

Device = Literal["cpu", "cuda"]


def train(
    data: str, *, out: str, model: str = "classifier_vit_base", options: dict[str, Any] | None = None,
    weights: str | None = None, init: str | None = None, adapter: str | None = None,
    adapter_options: dict[str, Any] | None = None, steps: int = 2000, batch_size: int = 64, size: int = 224,
    lr: float = 1e-3, weight_decay: float = 1e-4, label_smoothing: float = 0.0, seed: int = 0,
    device: Device | None = None, workers: int = 2, checkpoint_every: int = 1000, resume: bool = False,
    overwrite: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Train an image classifier, whole or by an adapter.

    Args:
        data: Folder with train/CLASS/ and val/CLASS/.
        out: Run folder to write.
        model: classifier_vit_tiny, _vit_small, _vit_base, _vit_large, _resnet50, _convnext_base, _swin_base, or
            classifier with the backbone in options; dpt_clip_vit_base or dpt_clip_vit_base_patch32: CLIP with prompts.
        options: Keywords of the classifier's builder, such as backbone; None = none.
        weights: Pretrained backbone weights: a hub name or a local file; None = none.
        init: Start from another run's classifier; its head is matched by class name.
        adapter: Freeze the backbone and tune it by this method, see segvit adapters list; None = train everything.
        adapter_options: Options of the method; None = none.
        steps: Optimiser steps.
        batch_size: Images in a step.
        size: Side of the square that images enter the network as.
        lr: Learning rate of AdamW after 100 steps of warm-up (at most a tenth of all), then falling to 0.
        weight_decay: Of AdamW.
        label_smoothing: Share of the target that is spread over all classes.
        seed: Of initialisation, order, cuts and mirroring.
        device: cpu or cuda; None = cuda where there is one.
        workers: Processes that load data.
        checkpoint_every: Steps between checkpoints that the run can be resumed from.
        resume: Go on with the run in out from its last checkpoint.
        overwrite: Replace the run in out.
        json: Print the figures as JSON.
    """
    from segvit.tasks.classify import Classification, train_classifier

    run = Classification(
        data=data, out=out, model=model, options=options or {}, weights=weights, init=init, adapter=adapter,
        adapter_options=adapter_options or {}, steps=steps, batch_size=batch_size, size=size,
        label_smoothing=label_smoothing, seed=seed, device=device, workers=workers, checkpoint_every=checkpoint_every,
        resume=resume, overwrite=overwrite,
    )  # fmt: skip
    schedule = replace(run.schedule, warmup=min(run.schedule.warmup, steps // 10))
    optim = replace(run.optim, lr=lr, weight_decay=weight_decay)
    found = train_classifier(replace(run, optim=optim, schedule=schedule))
    show(found, json, _table(found) if found else str(Path(out) / "model"))


def val(
    run: str, *, data: str, split: str = "val", out: str | None = None, device: Device | None = None, workers: int = 2,
    json: bool = False,
) -> None:  # fmt: skip
    """Top-1 and top-5 accuracy of a classifier.

    Args:
        run: Run, model or adapter folder of a classifier.
        data: Folder with one folder for each split, and in it one for each class.
        split: Split to evaluate.
        out: File for the figures as JSON; None = none.
        device: cpu or cuda; None = cuda where there is one.
        workers: Processes that decode images.
        json: Print JSON.
    """
    from segvit.data.image_folder import open_image_folder
    from segvit.files import write_json
    from segvit.tasks.classify import accuracy, load_classifier

    found = accuracy(load_classifier(run, device=device), open_image_folder(data), split, workers=workers)
    if out is not None:
        write_json(out, found)
    show(found, json, _table(found))


def predict(
    source: str, *, model: str, out: str | None = None, top: int = 1, device: Device | None = None, json: bool = False
) -> None:
    """The most probable classes of images.

    Args:
        source: Image, folder or pattern.
        model: Run, model or adapter folder of a classifier.
        out: File for the classes as JSON; None = none.
        top: Number of classes of each image.
        device: cpu or cuda; None = cuda where there is one.
        json: Print JSON.
    """
    from segvit.files import write_json
    from segvit.tasks.classify import classify_files
    from segvit.tasks.console import progress_bar

    if top < 1:
        raise UserError(f"top must be 1 or more, got {top}")
    with progress_bar("classifying") as progress:
        rows = classify_files(source, model, top=top, device=device, done=progress)
    if out is not None:
        write_json(out, rows)
    lines = [
        f"{row['image']}  " + "  ".join(f"{one['class']} {one['score']:.4f}" for one in row["classes"]) for row in rows
    ]  # fmt: skip
    show(rows, json, "\n".join(lines))


def _table(found: dict[str, Any]) -> str:
    """Accuracy in percent, over all images and of each class."""
    rows: list[tuple[str, Any]] = [(name, found[name]) for name in ("top1", "top5") if name in found]
    rows += [(f"top1 of {name}", value) for name, value in found["classes"].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {'-' if value is None else f'{100 * value:.2f}':>6}" for name, value in rows)
