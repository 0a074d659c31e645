"""Regions for CLIP: crops that prompts are learned on, vectors of learned prompts, and names for masks of any source.

Paper     M. Xu et al., "A Simple Baseline for Zero-shot Semantic Segmentation with Pre-trained Vision-language Model",
          ECCV 2022, arXiv 2112.14757 (zsseg).
Prompts   `write_crops` makes an image folder of labelled regions, `segvit classify train --model dpt_clip_vit_base`
          learns the words on it (its page says with which options), `write_words` makes vectors of any names with them,
          and zsseg takes those as its option `vectors`.
Differs   The share that a training crop keeps is that of `segvit classify`, 0.6 to 1 of the short side.

Shapes    Q masks, K classes, H W pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save
from scipy import ndimage
from torch import Tensor

from segvit.adapters.cavpt import TextPrompts
from segvit.contracts import UserError
from segvit.data.arrays import load_array
from segvit.data.dataset import open_dataset
from segvit.data.decode import read_image
from segvit.files import open_atomic, write_bytes
from segvit.inference.prediction import Prediction
from segvit.model_folder import load_model
from segvit.nn.readout import mix_masks
from segvit.nn.regions import tight_box
from segvit.systems.dpt_clip import DualPromptClip
from segvit.systems.zsseg import ZSSeg, cosine_logits, fuse
from segvit.tasks.sources import default_device, find_images
from segvit.text.architecture import MEAN, STD
from segvit.text.class_list import read_classes
from segvit.text.splits import unseen_ids
from segvit.zoo import builder_options

# The original fills with CLIP's mean behind the normalisation; this is the colour that becomes it.
FILL = np.array([round(255 * (mean + std * mean)) for mean, std in zip(MEAN, STD, strict=True)], np.uint8)


def write_crops(
    data: str, out: str, *, unseen: str | Sequence[int] = (), per_class: int | None = None, least: int = 1024
) -> dict[str, int]:  # fmt: skip
    """Write SPLIT/CLASS/NAME.png: the box of each seen class in each image, other pixels filled; returns the counts.

    At most `per_class` crops of a class in a split, the first ones; regions below `least` pixels are left out. Classes
    that train does not show are in no other split. Raises UserError for an `out` in use and where there is no region.
    """
    dataset, folder = open_dataset(data), Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose another --out")
    names = dataset.classes.names
    hidden = unseen_ids(unseen, num_classes=len(names), class_names=names)
    wanted, found = set(range(len(names))) - set(hidden), dict[str, int]()
    for split in sorted(dataset.splits, key=lambda split: split != "train"):
        counts: Counter[int] = Counter()
        for i in range(dataset.count(split)):
            sample = dataset.read(split, i)
            for number in sorted(wanted & {int(value) for value in np.unique(sample.mask)}):
                inside = sample.mask == number
                if inside.sum() < least or (per_class is not None and counts[number] == per_class):
                    continue
                left, top, right, bottom = tight_box(torch.from_numpy(inside))
                cut = slice(top, bottom), slice(left, right)
                crop = np.where(inside[cut][..., None], sample.image[cut], FILL)
                place = folder / split / names[number].replace("/", "_") / f"{i:06}.png"
                with open_atomic(place) as file:
                    Image.fromarray(crop).save(file, "PNG")
                counts[number] += 1
        if split == "train":
            wanted = set(counts)
        found[split] = counts.total()
    if not found.get("train"):
        raise UserError(f"{data} has no region of a seen class with {least} pixels in train; lower --least")
    return found


def write_words(run: str, classes: str, out: str) -> int:
    """Write the vectors of any names with the words that a classifier with prompts has learned; returns their number.

    `classes` as `read_classes` takes them, without synonyms. Raises UserError for other models and for prompts of each
    class, which say nothing of other names.
    """
    model = cast(torch.nn.Module, load_model(run, device="cpu"))
    if not isinstance(model, DualPromptClip):
        raise UserError(f"{run} has no learned words; give a run of segvit classify train --model dpt_clip_vit_base")
    context = model.text_prompts.context.detach()
    if context.dim() == 3:
        raise UserError(f"{run} learned words for each of its classes; train it without class_specific for other names")
    names = read_classes(classes)
    if any(len(synonyms) > 1 for synonyms in names):
        raise UserError("learned words take names without synonyms; leave them out")
    options = builder_options(cast(Any, model).config)
    prompts = TextPrompts(
        model.text, [name for (name,) in names], context=len(context), position=options["position"]
    )  # fmt: skip
    prompts.context.data.copy_(context)
    with torch.no_grad():
        vectors = F.normalize(prompts(model.text), dim=-1)
    write_bytes(out, save({"embeddings": vectors.contiguous()}))
    return len(vectors)


@torch.inference_mode()
def name_masks(model: ZSSeg, image: NDArray[np.uint8], masks: Tensor) -> Tensor:
    """Class scores (K, H, W) of masks (Q, H, W) in 0..1 from anywhere, which CLIP alone names; 0 outside of all.

    The image is (H, W, 3) of the masks' size. Raises UserError for a model whose CLIP was left out.
    """
    if model.regions is None:
        raise UserError("this model was built with regions=False, so it has no CLIP to name masks with")
    device = model.no_object.device
    pixels = torch.from_numpy(image).to(device).movedim(2, 0).float() / 255
    masks = masks.to(device, torch.float32)
    vectors, valid = model.regions(pixels, masks)
    opinion = cosine_logits(vectors, model.get_buffer("region_embeddings")).softmax(-1)
    none = masks.new_zeros(len(masks), opinion.shape[1])
    named = fuse(none, opinion, valid, seen=model.get_buffer("seen"), weight=0)
    return mix_masks(named[None], masks[None])[0]


def name_files(
    source: str, masks: str, model: str, out: str, *, components: bool, device: str | None,
    done: Callable[[int, int], None],
) -> list[dict[str, str]]:  # fmt: skip
    """Name the masks of images and write palette PNGs; pixels in no mask get the ignore id.

    `masks` is a folder with NAME.png, a map of numbers that stand for regions (255 and 65535 for none), or NAME.npy
    (Q, H, W). `components` parts each number into its connected pieces. Raises UserError for missing or unlike masks.
    """
    network: Any = load_model(model, device=device or default_device())
    if not isinstance(network, ZSSeg):
        raise UserError(f"{model} is no zsseg, whose CLIP names regions; give a run or model folder of one")
    classes, rows = cast(Any, network).classes, list[dict[str, str]]()
    images = find_images(source)
    for number, (path, name) in enumerate(images.items()):
        image = read_image(path)
        scores = name_masks(network, image, read_masks(Path(masks) / name, image.shape[:2], components=components))
        labels = scores.argmax(0).masked_fill(scores.amax(0) == 0, classes.ignore_index).cpu().numpy()
        target = Path(out) / name.with_suffix(".png")
        Prediction(labels=labels.astype(classes.dtype), classes=classes).save(target)
        rows.append({"image": str(path), "labels": str(target)})
        done(number + 1, len(images))
    return rows


def read_masks(place: Path, size: tuple[int, ...], *, components: bool) -> Tensor:
    """The masks (Q, H, W) beside `place`, whose suffix does not count: a stack .npy or a map of numbers .png."""
    stack, numbers = place.with_suffix(".npy"), place.with_suffix(".png")
    if stack.is_file():
        masks = load_array(stack, "masks")
    elif numbers.is_file():
        try:
            with Image.open(numbers) as picture:
                ids = np.asarray(picture)
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{numbers}: cannot be read as an image ({error}); save it again") from error
        masks = np.stack([ids == value for value in np.unique(ids) if value not in (255, 65535)] or [ids < 0])
    else:
        raise UserError(f"no masks {numbers} or {stack.name}; each image needs one of them by its name")
    if masks.ndim != 3 or masks.shape[1:] != tuple(size):
        raise UserError(f"{place}: masks are {masks.shape}, the image is {tuple(size)}; give (masks, height, width)")
    if components:
        labelled = [ndimage.label(mask > 0.5) for mask in masks]
        masks = np.concatenate([ids == np.arange(1, 1 + count)[:, None, None] for ids, count in labelled])
    return torch.from_numpy(np.ascontiguousarray(masks, dtype=np.float32))
