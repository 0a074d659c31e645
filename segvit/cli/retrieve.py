"""Image retrieval at the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from segvit.cli.parsing import show
from segvit.contracts import UserError

Device = Literal["cpu", "cuda"]


def train(
    data: str, *, out: str, model: str = "frpt_resnet50", options: dict[str, Any] | None = None,
    weights: str | None = None, init: str | None = None, steps: int = 2000, batch_size: int = 32, size: int = 224,
    crop: tuple[float, float] = (0.875, 0.875), jitter: float = 0.0, erase: float = 0.0,
    optimizer: Literal["adamw", "sgd"] = "adamw", lr: float = 1e-3, prompt_lr: float = 1.0, weight_decay: float = 1e-4,
    warmup: int = 100, label_smoothing: float = 0.0, seed: int = 0, device: Device | None = None, workers: int = 2,
    checkpoint_every: int = 1000, resume: bool = False, overwrite: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Train FRPT over a frozen backbone, to find images of classes that it has not seen.

    Args:
        data: Folder with train/CLASS/ and, of other classes, test/CLASS/.
        out: Run folder to write.
        model: frpt_resnet50, frpt_resnet101, frpt_released_resnet50, frpt_released_resnet101, or frpt with form and
            backbone in options.
        options: Keywords of the model's builder; None = none.
        weights: Pretrained backbone weights: a hub name or a local file; none leaves it random.
        init: Run whose model's backbone is taken instead, such as one of segvit classify train.
        steps: Optimiser steps.
        batch_size: Images in a step.
        size: Side of the square that images enter the network as.
        crop: Least and greatest side of the square that training cuts out, in shares of the short side.
        jitter: Brightness, contrast and saturation change by factors in 1 +- this.
        erase: Probability that an image loses a rectangle.
        optimizer: AdamW, or SGD with momentum 0.9 as in the paper.
        lr: Learning rate after the warm-up; falls to 0.
        prompt_lr: The prompt's own, in shares of lr.
        weight_decay: Of the optimiser.
        warmup: Steps of linear warm-up; at most a tenth of all.
        label_smoothing: Share of the target that goes to the other classes.
        seed: Of initialisation, order, cuts and mirroring.
        device: cpu or cuda; None = cuda where there is one.
        workers: Processes that load data.
        checkpoint_every: Steps between checkpoints that the run can be resumed from.
        resume: Go on with the run in out from its last checkpoint.
        overwrite: Replace the run in out.
        json: Print the figures as JSON.
    """
    from segvit.tasks.retrieve import Retrieval, train_retriever

    run = Retrieval(
        data=data, out=out, model=model, options=options or {}, weights=weights, init=init, steps=steps,
        batch_size=batch_size, size=size, crop=crop, jitter=jitter, erase=erase, label_smoothing=label_smoothing,
        seed=seed, device=device, workers=workers, checkpoint_every=checkpoint_every, resume=resume,
        overwrite=overwrite,
    )  # fmt: skip
    optim = replace(run.optim, name=optimizer, lr=lr, weight_decay=weight_decay, lr_mult={"prompt": prompt_lr})
    schedule = replace(run.schedule, warmup=min(warmup, steps // 10))
    found = train_retriever(replace(run, optim=optim, schedule=schedule))
    show(found, json, _table(found) if found else str(Path(out) / "model"))


def val(
    run: str, *, data: str | None = None, split: str = "test", ks: tuple[int, ...] | None = None,
    out: str | None = None, device: Device | None = None, workers: int = 2, json: bool = False,
) -> None:  # fmt: skip
    """Recall@K: every image of a split searches all others of it.

    Args:
        run: Run or model folder of a retrieval model, or of a classifier as a baseline.
        data: Folder with one folder for each split, and in it one for each class; None = the run's.
        split: Split to search.
        ks: Numbers of neighbours; None = those of 1, 2, 4, 8 that there are images for.
        out: File for the figures as JSON; None = none.
        device: cpu or cuda; None = cuda where there is one.
        workers: Processes that decode images.
        json: Print JSON.
    """
    from segvit.data.image_folder import open_image_folder
    from segvit.files import write_json
    from segvit.tasks.commands import trained_on
    from segvit.tasks.retrieve import load_retriever, retrieval_figures

    source = open_image_folder(data or trained_on(run), own_classes=True)
    found = retrieval_figures(load_retriever(run, device=device), source, split, ks=ks, workers=workers)
    if out is not None:
        write_json(out, found)
    show(found, json, _table(found))


def embed(
    source: str, *, model: str, out: str, device: Device | None = None, workers: int = 2, json: bool = False
) -> None:
    """Write the embeddings of images to a gallery that can be searched.

    Args:
        source: Image, folder or pattern; the folders just below a folder are the classes of the images in them.
        model: Run or model folder of a retrieval model or of a classifier.
        out: File to write, a .npz.
        device: cpu or cuda; None = cuda where there is one.
        workers: Processes that decode images.
        json: Print what was written as JSON.
    """
    from segvit.tasks.gallery import read_gallery, write_gallery

    failed = write_gallery(source, model, out, device=device, workers=workers)
    count = len(read_gallery(out).names)
    show({"gallery": out, "images": count}, json, f"{count} images in {out}")
    if failed:
        raise UserError(f"{len(failed)} images were left out: {'; '.join(failed[:3])}")


def search(
    query: str, *, gallery: str, model: str, top: int = 10, sheet: str | None = None, index: str | None = None,
    images: str | None = None, out: str | None = None, device: Device | None = None, workers: int = 2,
    json: bool = False,
) -> None:  # fmt: skip
    """The images of a gallery that are most like the query, which itself is left out.

    Args:
        query: Image, folder or pattern.
        gallery: File written by segvit retrieve embed.
        model: The model that made it.
        top: Number of neighbours.
        sheet: PNG to draw with the first 24 queries and their neighbours, framed by right and wrong; None = none.
        index: File of an approximate index for large galleries, made where there is none: compares a query with a
            sixteenth of the images and may miss some; None = exact, all are compared.
        images: Folder where the gallery's images are now; None = where they were.
        out: File for the neighbours as JSON; None = none.
        device: cpu or cuda; None = cuda where there is one.
        workers: Processes that decode images.
        json: Print JSON.
    """
    from segvit.files import write_json
    from segvit.tasks.contact_sheet import save_sheet
    from segvit.tasks.gallery import read_gallery, rows, search_files

    known = read_gallery(gallery, images=images)
    found = search_files(query, known, model, top=top, index=index, device=device, workers=workers)
    listed = rows(found, known)
    if out is not None:
        write_json(out, listed)
    if sheet is not None:
        save_sheet(sheet, found, known)
    lines = [
        row["query"] + "".join(f"\n  {one['score']:.4f}  {one['image']}" for one in row["found"]) for row in listed
    ]
    show(listed, json, "\n".join(lines))


def _table(found: dict[str, Any]) -> str:
    """Recall in percent, by K."""
    figures = [(name.removeprefix("recall_at_"), value) for name, value in found.items() if name.startswith("recall")]
    lines = [f"Recall@{k:3} {100 * value:6.2f}" for k, value in figures]
    return "\n".join([*lines, f"{found['images']} images of {found['classes']} classes, {found['split']}"])
