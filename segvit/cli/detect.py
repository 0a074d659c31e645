"""Object detection at the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from segvit.cli.parsing import show

Device = Literal["cpu", "cuda"]


def train(
    data: str, *, out: str, model: str = "retinanet_pvt_tiny", options: dict[str, Any] | None = None,
    weights: str | None = None, steps: int = 90_000, batch_size: int = 16, size: tuple[int, int] = (800, 1333),
    lr: float = 1e-4, seed: int = 0, device: Device | None = None, workers: int = 2, checkpoint_every: int = 1000,
    resume: bool = False, overwrite: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Train a detector on boxes in COCO's format.

    Args:
        data: COCO JSON, folder with one for each split, or synthetic:shapes.
        out: Run folder to write.
        model: retinanet_pvt_tiny, _small, _medium, _large, _v2_b0 or _v2_b2.
        options: Keywords of the detector's builder; None = none.
        weights: Weights of the backbone: a local official file for PVT v1, else a hub name or a file; None = none.
        steps: Optimiser steps.
        batch_size: Images in a step.
        size: Short side that images are resized to, and the most that the long side may be.
        lr: Learning rate of AdamW after 500 steps of warm-up (at most a tenth of all), then falling to 0.
        seed: Of initialisation, order and mirroring.
        device: cpu or cuda; None = cuda where there is one.
        workers: Processes that load data.
        checkpoint_every: Steps between checkpoints that the run can be resumed from.
        resume: Go on with the run in out from its last checkpoint.
        overwrite: Replace the run in out.
        json: Print COCO's figures as JSON.
    """
    from segvit.tasks.detect import Detection, train_detector

    run = Detection(
        data=data, out=out, model=model, options=options or {}, weights=weights, steps=steps, batch_size=batch_size,
        size=(size[0], size[1]), seed=seed, device=device, workers=workers, checkpoint_every=checkpoint_every,
        resume=resume, overwrite=overwrite,
    )  # fmt: skip
    schedule = replace(run.schedule, warmup=min(run.schedule.warmup, steps // 10))
    found = train_detector(replace(run, optim=replace(run.optim, lr=lr), schedule=schedule))
    show(found, json, _table(found) if found else str(Path(out) / "model"))


def val(
    run: str, *, data: str, split: str = "val", out: str | None = None, device: Device | None = None, json: bool = False
) -> None:
    """COCO's mAP of a detector.

    Args:
        run: Run or model folder of a detector.
        data: COCO JSON, folder with one for each split, or synthetic:shapes.
        split: Split to evaluate.
        out: File for the figures as JSON; None = none.
        device: cpu or cuda; None = cuda where there is one.
        json: Print JSON.
    """
    import torch

    from segvit.data.boxes import open_boxes
    from segvit.files import write_json
    from segvit.tasks.detect import coco_figures, load_detector
    from segvit.tasks.sources import default_device

    where = torch.device(device or default_device())
    found = coco_figures(load_detector(run, device=where), open_boxes(data), split, device=where)
    if out is not None:
        write_json(out, found)
    show(found, json, _table(found))


def predict(
    source: str, *, model: str, out: str = "detections", threshold: float = 0.5, device: Device | None = None,
    json: bool = False,
) -> None:  # fmt: skip
    """Find objects in images; writes NAME.json and NAME.png with the boxes drawn.

    Args:
        source: Image, folder or pattern.
        model: Run or model folder of a detector.
        out: Folder to write.
        threshold: Least score of a box that is kept.
        device: cpu or cuda; None = cuda where there is one.
        json: Print what was written as JSON.
    """
    from segvit.tasks.detect import detect_files

    written = detect_files(source, model, Path(out), threshold=threshold, device=device)
    show(written, json, "\n".join(row["boxes"] for row in written))


def _table(found: dict[str, Any]) -> str:
    """AP and its parts in percent, then each class."""
    rows = [(name, value) for name, value in found.items() if name.startswith("AP")]
    rows += [(f"AP of {name}", value) for name, value in found["classes"].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {'-' if value is None else f'{100 * value:.1f}':>5}" for name, value in rows)
