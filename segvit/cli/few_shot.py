"""Few-shot segmentation at the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from segvit.cli.parsing import show

Device = Literal["cpu", "cuda"]


def train(
    data: str, *, out: str, folds: str = "pascal", fold: int = 0, model: str = "few_shot_baseline_resnet50",
    options: dict[str, Any] | None = None, weights: str | None = None, shots: int = 1, svf: bool = False,
    keep_novel: bool = False, min_pixels: int = 2048, size: int = 473, steps: int = 100_000, batch_size: int = 8,
    lr: float = 0.05, episodes: int = 1000, seeds: int = 5, seed: int = 0, device: Device | None = None,
    workers: int = 2, checkpoint_every: int = 1000, resume: bool = False, overwrite: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Train on episodes of a fold's base classes and test on its novel ones.

    Args:
        data: Dataset YAML, folder or generated data, as for train.
        out: Run folder to write.
        folds: pascal (5i), coco_fwb or coco_panet (20i), or a YAML file with the novel classes of each fold.
        fold: Number of the fold, from 0.
        model: few_shot_baseline_resnet50, few_shot_baseline_resnet101, pfenet_resnet50 or pfenet_resnet101.
        options: Keywords of the network's builder; None = none.
        weights: Official ImageNet file of the backbone, such as resnet50_v2.pth; None = none.
        shots: Supports of an episode.
        svf: Train the singular values of the backbone's stages 2 to 4 too; else it is frozen.
        keep_novel: Keep training images that show novel classes, as background.
        min_pixels: Pixels of a class that make an image show it.
        size: Side of the square crops; best 8 n + 1.
        steps: Optimiser steps.
        batch_size: Episodes in a step.
        lr: Learning rate of SGD for the head; singular values have a tenth.
        episodes: Episodes of one test.
        seeds: Tests to take the mean of, each with its own draws.
        seed: Of initialisation, episodes and augmentation.
        device: cpu or cuda; None = cuda where there is one.
        workers: Processes that load data.
        checkpoint_every: Steps between checkpoints that the run can be resumed from.
        resume: Go on with the run in out from its last checkpoint.
        overwrite: Replace the run in out.
        json: Print the figures as JSON.
    """
    from segvit.tasks.few_shot import FewShot, train_few_shot

    run = FewShot(
        data=data, out=out, folds=folds, fold=fold, model=model, options=options or {}, weights=weights, shots=shots,
        svf=svf, keep_novel=keep_novel, min_pixels=min_pixels, size=size, steps=steps, batch_size=batch_size,
        episodes=episodes, seeds=seeds, seed=seed, device=device, workers=workers, checkpoint_every=checkpoint_every,
        resume=resume, overwrite=overwrite,
    )  # fmt: skip
    found = train_few_shot(replace(run, optim=replace(run.optim, lr=lr)))
    show(found, json, _table(found) if found else str(Path(out) / "model"))


def val(
    run: str, *, data: str, folds: str | None = None, fold: int | None = None, shots: int | None = None,
    split: str = "val", episodes: int = 1000, seeds: int = 5, out: str | None = None, device: Device | None = None,
    json: bool = False,
) -> None:  # fmt: skip
    """mIoU and FB-IoU of a few-shot model on novel classes.

    Args:
        run: Run or model folder of a few-shot model.
        data: Dataset YAML, folder or generated data.
        folds: Benchmark or fold file; None = that of the training.
        fold: Number of the fold; None = that of the training.
        shots: Supports of an episode; None = those of the training.
        split: Split to evaluate.
        episodes: Episodes of one test.
        seeds: Tests to take the mean of, each with its own draws.
        out: File for the figures as JSON; None = none.
        device: cpu or cuda; None = cuda where there is one.
        json: Print JSON.
    """
    from segvit.files import write_json
    from segvit.tasks.few_shot import evaluate_few_shot

    found = evaluate_few_shot(
        run, data, folds=folds, fold=fold, shots=shots, split=split, episodes=episodes, seeds=seeds, device=device
    )
    if out is not None:
        write_json(out, found)
    show(found, json, _table(found))


def _table(found: dict[str, Any]) -> str:
    """mIoU, FB-IoU and the IoU of each novel class in percent."""
    rows = [("mIoU", found["miou"]), ("FB-IoU", found["fb_iou"]), *found["classes"].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {100 * value:6.2f}" for name, value in rows)
