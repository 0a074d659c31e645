"""Self-training of open-vocabulary models as zsseg does it: unseen classes labelled by the model, in a folder of masks.

Paper     M. Xu et al., "A Simple Baseline for Zero-shot Semantic Segmentation with Pre-trained Vision-language Model",
          ECCV 2022, arXiv 2112.14757.
Then      `segvit train` on the folder, with all classes: the rounds and lengths of the paper's runs are not known.

Shapes    K classes, H W pixels, R rows of a band.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from segvit.contracts import UserError
from segvit.data.dataset import Dataset, FolderDataset, open_dataset
from segvit.files import open_atomic, write_bytes, write_text
from segvit.inference.prediction import Prediction
from segvit.inference.predictor import Predictor
from segvit.model_folder import load_model
from segvit.tasks.commands import trained_on
from segvit.tasks.console import progress_bar
from segvit.tasks.sources import default_device
from segvit.text.splits import unseen_ids

if TYPE_CHECKING:
    from segvit.contracts import Model


def pseudo_labels(scores: Tensor, masks: Tensor | None, *, seen: Tensor, rejected: int, least: float = 0.0) -> Tensor:
    """Labels for self-training (H, W): seen classes as labelled in `masks`, else the best unseen class.

    `scores` (K, H, W) are the summed maps, whose softmax over all classes is the confidence although they are no
    logits, as in the official code. Unseen and ignored pixels below the confidence `least` become `rejected`. Without
    `masks` (H, W) every pixel is named. `seen` (K,) bool. Raises UserError when there is no unseen class.
    """
    if bool(seen.all()):
        raise UserError("every class is seen; pseudo labels need one unseen class or more")
    confidence, labels = torch.where(seen[:, None, None], 0, scores.softmax(0)).max(0)
    labels = torch.where(confidence < least, rejected, labels)
    if masks is None:
        return labels
    ids = masks.long()
    known = torch.isin(ids, seen.nonzero().flatten())
    return torch.where(known, ids, labels)


def write_pseudo_labels(
    model: str, data: str | None, out: str, *, unseen: str | Sequence[int] | None = None, least: float = 0.0,
    device: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a dataset whose training masks are completed by a model; other splits keep their labels.

    Images are linked (copied where a link cannot be), masks are palette PNGs of class ids. `unseen` are ids or a split
    of `segvit.text.splits`, by default what the model was trained without. Returns what was written and the share of
    training pixels that the model named. Raises UserError for an `out` in use, another class table and no unseen class.
    """
    folder, network = Path(out), load_model(model, device=device or default_device())
    segment = Predictor(network)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose another --out")
    source = data or trained_on(model)
    dataset = open_dataset(source)
    if dataset.classes.names != segment.run.classes.names:
        raise UserError(f"the model knows {segment.run.classes.names[:5]} and {source} has {dataset.classes.names[:5]}")
    if "train" not in dataset.splits:
        raise UserError(f"{source} has no training images; it has {', '.join(dataset.splits)}")
    seen = _seen(network, unseen)
    pixels = {"named": 0, "all": 0}
    with progress_bar("labelling") as progress:
        for split in dataset.splits:
            for i in range(dataset.count(split)):
                name = Path(dataset.name(split, i))
                name = name.relative_to(name.anchor).with_suffix("")
                sample = dataset.read(split, i)
                labels = sample.mask
                if split == "train":
                    labels = _completed(segment, sample.image, labels, seen=seen, least=least)
                    known = np.isin(sample.mask, seen.nonzero().flatten().numpy())
                    pixels["named"] += int((~known & (labels != dataset.classes.ignore_index)).sum())
                    pixels["all"] += labels.size
                    progress(i + 1, dataset.count(split))
                _put_image(dataset, split, i, sample.image, folder / "images" / split / name)
                target = folder / "masks" / split / f"{name}.png"
                Prediction(labels=labels, classes=dataset.classes).save(target)
    write_text(folder / "dataset.yaml", _description(dataset))
    share = round(pixels["named"] / max(1, pixels["all"]), 4)
    return {"dataset": str(folder / "dataset.yaml"), "images": dataset.count("train"), "named": share}


def _seen(network: Model, unseen: str | Sequence[int] | None) -> Tensor:
    """Which classes are seen (K,): as asked for, or as the model was trained."""
    count = len(network.classes)
    if unseen is None:
        own = dict(network.named_buffers()).get("seen")
        if own is None:
            raise UserError("this model does not say which classes it has not seen; give --unseen")
        seen = own.cpu()
    else:
        seen = torch.ones(count, dtype=torch.bool)
        seen[list(unseen_ids(unseen, num_classes=count, class_names=network.classes.names))] = False
    if bool(seen.all()):
        raise UserError("every class is seen; pseudo labels need one unseen class or more: give --unseen")
    return seen


@torch.inference_mode()
def _completed(
    segment: Predictor, image: NDArray[np.uint8], mask: NDArray[Any], *, seen: Tensor, least: float
) -> NDArray[Any]:  # fmt: skip
    """A training mask with the model's opinion where it names no seen class."""
    rejected, labels = segment.run.classes.ignore_index, np.empty_like(mask)
    for rows, band in segment.bands(image):
        cut = slice(rows.start, rows.stop)
        part = torch.from_numpy(mask[cut].astype(np.int64))
        labels[cut] = pseudo_labels(band.float().cpu(), part, seen=seen, rejected=rejected, least=least).numpy()
    return labels


def _put_image(dataset: Dataset, split: str, i: int, image: NDArray[np.uint8], target: Path) -> None:
    if not isinstance(dataset, FolderDataset):  # generated: there is no file yet
        with open_atomic(target.with_name(f"{target.name}.png")) as file:
            Image.fromarray(image).save(file, "PNG")
        return
    source = dataset.image_path(split, i)
    place = target.with_name(f"{target.name}{source.suffix}")
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, place)
    except OSError:  # another file system, or one without links
        write_bytes(place, source.read_bytes())


def _description(dataset: Dataset) -> str:
    """The YAML of the folder."""
    classes = {
        number: {"name": name, "color": list(color)}
        for number, (name, color) in enumerate(zip(dataset.classes.names, dataset.classes.palette, strict=True))
    }  # fmt: skip
    splits = {split: {"images": f"images/{split}", "masks": f"masks/{split}"} for split in dataset.splits}
    rest: dict[str, Any] = {"classes": classes, "ignore": [dataset.classes.ignore_index]}
    if dataset.levels is not None:
        rest["range"] = list(dataset.levels)
    return yaml.safe_dump(splits | rest | {"channels": dataset.channels}, sort_keys=False)
