"""Steps around open-vocabulary models at the command line: learned words, masks of any source, self-training."""

from __future__ import annotations

from typing import Literal

from segvit.cli.parsing import show

Device = Literal["cpu", "cuda"]


def crops(
    data: str, *, out: str, unseen: str | list[int] | None = None, per_class: int | None = None, least: int = 1024,
    json: bool = False,
) -> None:  # fmt: skip
    """Cut the labelled regions out of a dataset, to learn prompts on with classify train.

    Args:
        data: Dataset YAML, folder or generated data, as for train.
        out: Folder to write: SPLIT/CLASS/NAME.png.
        unseen: Classes to leave out: their ids, or voc12, coco_stuff164k, pascal_context59; None = none.
        per_class: Crops of a class in a split at most; None = all.
        least: Pixels of a region at least.
        json: Print JSON.
    """
    from segvit.tasks.regions import write_crops

    found = write_crops(data, out, unseen=() if unseen is None else unseen, per_class=per_class, least=least)
    show(found, json, "\n".join(f"{split}: {count} crops" for split, count in found.items()))


def words(run: str, *, classes: str, out: str) -> None:
    """Write the class vectors that learned prompts make of names, for zsseg's option vectors.

    Args:
        run: Run or model folder of classify train with dpt_clip_vit_base.
        classes: Names with commas between, or a text file with one a line; any names, not only those trained on.
        out: File to write, .safetensors.
    """
    from segvit.tasks.regions import write_words

    write_words(run, classes, out)
    show(None, False, out)


def name(
    source: str, *, masks: str, model: str, out: str, components: bool = False, device: Device | None = None,
    json: bool = False,
) -> None:  # fmt: skip
    """Name masks of any source with a zsseg's CLIP; writes palette PNGs that hold class ids.

    Args:
        source: Image, folder or pattern.
        masks: Folder with NAME.png, whose numbers stand for regions, or NAME.npy (masks, height, width).
        model: Run or model folder of a zsseg.
        out: Folder to write.
        components: Part each number of a map into its connected pieces.
        device: cpu or cuda; None = cuda where there is one.
        json: Print what was written as JSON.
    """
    from segvit.tasks.console import progress_bar
    from segvit.tasks.regions import name_files

    with progress_bar("naming") as progress:
        rows = name_files(source, masks, model, out, components=components, device=device, done=progress)
    show(rows, json, "\n".join(row["labels"] for row in rows))


def pseudo_labels(
    run: str, *, out: str, data: str | None = None, unseen: str | list[int] | None = None, least: float = 0.0,
    device: Device | None = None, json: bool = False,
) -> None:  # fmt: skip
    """Complete training masks with what a model says of unseen classes, as a dataset for train.

    Args:
        run: Run or model folder.
        out: Folder to write: images, masks and dataset.yaml.
        data: Dataset; None = the one that the run was trained on.
        unseen: Unseen classes: ids or a split such as voc12; None = those that the model was trained without.
        least: Confidence below which a pixel stays ignored, 0..1.
        device: cpu or cuda; None = cuda where there is one.
        json: Print JSON.
    """
    from segvit.tasks.pseudo_labels import write_pseudo_labels

    found = write_pseudo_labels(run, data, out, unseen=unseen, least=least, device=device)
    show(found, json, f"{found['dataset']}: {found['images']} masks, {100 * found['named']:.1f} % of pixels named")
