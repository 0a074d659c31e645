"""Few-shot segmentation at the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from segvit.cli.parsing import show
from segvit.contracts import UserError

Device = Literal["cpu", "cuda"]


def train(
    data: str, *, out: str, folds: str = "pascal", fold: int = 0, model: str = "few_shot_baseline_resnet50",
    options: dict[str, Any] | None = None, weights: str | None = None, base: str | None = None, shots: int = 1,
    tune: Literal["frozen", "svf", "full"] = "frozen", keep_novel: bool = False, min_pixels: int = 2048,
    size: int = 473, steps: int = 100_000, batch_size: int = 8, lr: float = 0.05, backbone_rate: float = 0.1,
    episodes: int = 1000, seeds: int = 5, seed: int = 0, device: Device | None = None, workers: int = 2,
    checkpoint_every: int = 1000, resume: bool = False, overwrite: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Train on episodes of a fold's base classes and test on its novel ones.

    Args:
        data: Dataset YAML, folder or generated data, as for train.
        out: Run folder to write.
        folds: pascal (5i), coco_fwb or coco_panet (20i), or a YAML or text file with the novel classes of each fold.
        fold: Number of the fold, from 0.
        model: few_shot_baseline, pfenet or bam with _resnet50, _resnet101 or _tiny.
        options: Keywords of the network's builder; None = none.
        weights: Official ImageNet file of the backbone, such as resnet50_v2.pth; None = none.
        base: Run folder of a base learner from train_base: its backbone is taken, and by BAM the learner too.
        shots: Supports of an episode.
        tune: What of the backbone trains: nothing, its singular values (SVF) or all weights, of stages 2 to 4.
        keep_novel: Keep training images that show novel classes, as background.
        min_pixels: Pixels of a class that make an image show it.
        size: Side of the square crops; best 8 n + 1.
        steps: Optimiser steps.
        batch_size: Episodes in a step.
        lr: Learning rate of SGD for the head.
        backbone_rate: Factor on the rate for what of the backbone trains.
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
        data=data, out=out, folds=folds, fold=fold, model=model, options=options or {}, weights=weights, base=base,
        shots=shots, tune=tune, keep_novel=keep_novel, min_pixels=min_pixels, size=size, steps=steps,
        batch_size=batch_size, episodes=episodes, seeds=seeds, seed=seed, device=device, workers=workers,
        checkpoint_every=checkpoint_every, resume=resume, overwrite=overwrite,
    )  # fmt: skip
    rates = {"matcher.backbone": backbone_rate}
    found = train_few_shot(replace(run, optim=replace(run.optim, lr=lr, lr_mult=rates)))
    show(found, json, _table(found) if found else str(Path(out) / "model"))


def train_base(
    data: str, *, out: str, folds: str = "pascal", fold: int = 0, backbone: str = "resnet50", hidden: int = 512,
    weights: str | None = None, keep_novel: bool = False, min_pixels: int = 2048, size: int = 417,
    steps: int = 50_000, batch_size: int = 12, lr: float = 2.5e-4, seed: int = 0, device: Device | None = None,
    workers: int = 2, checkpoint_every: int = 1000, resume: bool = False, overwrite: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Train a base learner, a PSPNet on the base classes of a fold: what BAM needs first, and a start for all others.

    Args:
        data: Dataset YAML, folder or generated data, as for train.
        out: Run folder to write.
        folds: As for few_shot train.
        fold: Number of the fold, from 0.
        backbone: resnet50, resnet101 or tiny, as in the name of the few-shot network to come.
        hidden: Channels of the last hidden layer.
        weights: Official ImageNet file of the backbone, such as resnet50_v2.pth; None = none.
        keep_novel: Keep training images that show novel classes, as background.
        min_pixels: Pixels of a base class that make an image show it.
        size: Side of the square crops; best 8 n + 1.
        steps: Optimiser steps.
        batch_size: Images in a step.
        lr: Learning rate of SGD for the backbone; the head has ten times that.
        seed: Of initialisation, order and augmentation.
        device: cpu or cuda; None = cuda where there is one.
        workers: Processes that load data.
        checkpoint_every: Steps between checkpoints that the run can be resumed from.
        resume: Go on with the run in out from its last checkpoint.
        overwrite: Replace the run in out.
        json: Print the figures as JSON.
    """
    from segvit.tasks.few_shot_base import BaseLearning, learn_base

    run = BaseLearning(
        data=data, out=out, folds=folds, fold=fold, backbone=backbone, hidden=hidden, weights=weights,
        keep_novel=keep_novel, min_pixels=min_pixels, size=size, steps=steps, batch_size=batch_size, seed=seed,
        device=device, workers=workers, checkpoint_every=checkpoint_every, resume=resume, overwrite=overwrite,
    )  # fmt: skip
    found = learn_base(replace(run, optim=replace(run.optim, lr=lr)))
    show(found, json, _table(found) if found else str(Path(out) / "model"))


def predict(
    source: str, *, model: str, support: str, support_masks: str, label: int | None = None, name: str = "object",
    out: str | None = None, overlay: bool = False, device: Device | None = None, json: bool = False,
) -> None:  # fmt: skip
    """Segment images by a few images with masks; writes palette PNGs, 0 background and 1 the object.

    Args:
        source: Image, folder or pattern; several may be given.
        model: Run or model folder of a few-shot model.
        support: Image, folder or pattern of the supports.
        support_masks: Their masks, one file or a folder with the same names (the ending may differ).
        label: Value of the object in the masks; None = every value but 0.
        name: What the object is called.
        out: Folder to write; None = predictions/ in the run folder, or here.
        overlay: Also write NAME_overlay.png, the image under its labels with a legend.
        device: cpu or cuda; None = cuda where there is one.
        json: Print what was written as JSON.
    """
    from segvit.tasks.few_shot_support import predict_by_support

    result = predict_by_support(
        source, model, support, support_masks, label=label, name=name, out=out, overlay=overlay, device=device
    )
    if result.written:
        show(result.written, json, "\n".join(item["labels"] for item in result.written))
    if result.failed:
        raise UserError(f"{len(result.failed)} images were left out: {'; '.join(result.failed[:3])}")


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
    """mIoU, FB-IoU where there is one, and the IoU of each class in percent."""
    means = [(words, found[key]) for words, key in (("mIoU", "miou"), ("FB-IoU", "fb_iou")) if key in found]
    rows = [*means, *found["classes"].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {100 * value:6.2f}" for name, value in rows)
