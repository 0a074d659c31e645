"""Surveys built by hand from label maps, without files: what a mask file would hold, and whole splits of them."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from segvit.data.description import parse_description
from segvit.data.doctor.tables import ImageFile, MaskFile, Pair, SplitSurvey, Survey

SIZE = (32, 32)


def label_maps(count, *, classes=3, size=SIZE, seed=0):
    """Label maps in which every class fills a block."""
    rng = np.random.default_rng(seed)
    cells = [np.resize(rng.permutation(classes), (4, 4)) for _ in range(count)]
    return [cell.repeat(size[0] // 4, 0).repeat(size[1] // 4, 1) for cell in cells]


def mask_file(raw, path="m.png", *, mode="L", format="PNG", palette=None):
    """What the survey would say of an array (H, W) of numbers or (H, W, 3) of colours."""
    raw = np.asarray(raw).astype(np.int64)
    coloured = raw.ndim == 3
    if coloured:
        raw = raw[..., 0] << 16 | raw[..., 1] << 8 | raw[..., 2]
    found = dict(zip(*(part.tolist() for part in np.unique(raw, return_counts=True)), strict=True))
    colors = {value: palette[value] for value in found} if palette else {}
    mode = "RGB" if coloured else ("P" if palette else mode)
    return MaskFile(path, raw.shape, mode, format, coloured, found, len(found), colors)


def split(name, raws, *, images="images", masks="masks", palettes=None, hashes=None, **kind):
    """A split of masks holding these arrays; stems are 0, 1, 2 ..."""
    pairs = []
    for i, raw in enumerate(raws):
        palette = palettes[i % len(palettes)] if palettes else None
        mask = mask_file(raw, f"{masks}/{name}/{i}.png", palette=palette, **kind)
        image = ImageFile(f"{images}/{name}/{i}.png", mask.size, "RGB", "PNG", 3, hash=hashes[i] if hashes else None)
        pairs.append(Pair(str(i), image, mask))
    return SplitSurvey(name, f"{images}/{name}", f"{masks}/{name}", tuple(pairs))


def survey(*splits, yaml=None, names=None):
    """A survey of these splits with the class part of a YAML, or with class names, or with nothing."""
    root = Path("my_data")
    if names:
        yaml = "classes: [" + ", ".join(names) + "]\n"
    if yaml is None:
        return Survey(root, root, tuple(splits))
    text = "".join(f"{part.name}: {{images: {part.images}, masks: {part.masks}}}\n" for part in splits)
    description = parse_description(text + yaml, "dataset.yaml", root)
    return Survey(root, root, tuple(splits), description.classes, description.rule, description=description)


def train_and_val(raws, *, yaml=None, names=None, **kind):
    """A survey whose last two masks are val."""
    return survey(split("train", raws[:-2], **kind), split("val", raws[-2:], **kind), yaml=yaml, names=names)


def blob_maps(count, *, classes, size=128, seed=0):
    """Label maps of disks, as areas with round borders."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    maps = []
    for _ in range(count):
        labels = np.zeros((size, size), int)
        for value in [*range(1, classes)] * 2:
            (cy, cx), radius = rng.integers(0, size, 2), rng.integers(size // 8, size // 4)
            labels[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = value
        maps.append(labels)
    return maps


def jpeg(raw, quality=75):
    """What a JPEG makes of an array."""
    data = BytesIO()
    Image.fromarray(raw.astype(np.uint8)).save(data, "JPEG", quality=quality)
    return np.array(Image.open(data))


def blended(raw, factor, how):
    """An array scaled with interpolation."""
    size = [round(side * factor) for side in reversed(raw.shape[:2])]
    return np.array(Image.fromarray(raw.astype(np.uint8)).resize(size, Image.Resampling[how]))
