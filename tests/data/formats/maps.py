"""Random label maps with images, and what must come out of a conversion."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from segvit.contracts import UserError
from segvit.data.dataset import open_dataset
from segvit.data.formats.shapes import draw

SIZE = (40, 52)


class Labelled(NamedTuple):
    """One image of an example: where its file lies, and its class ids."""

    split: str
    image: Path
    ids: np.ndarray


def blobs(seed: int, ids, size=SIZE) -> np.ndarray:
    """A map (H, W) of blobs, all of `ids` possible, with holes and islands."""
    ids = np.asarray(list(ids))
    noise = np.random.default_rng(seed).random((len(ids), *size))
    smooth = np.stack([ndimage.gaussian_filter(layer, 2.0) for layer in noise])
    return ids[smooth.argmax(0)].astype(np.uint16)


def photo(path: Path, size=SIZE) -> Path:
    """An image file of noise; JPEG, so that a copy that was decoded and saved again would differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(map(ord, path.name))
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


def example(folders: dict[str, Path], ids, *, per_split: int = 2) -> list[Labelled]:
    """Images in the folder of each split, and their maps."""
    return [
        Labelled(split, photo(folder / f"{split}_{i}.jpg"), blobs(100 * place + i, ids))
        for place, (split, folder) in enumerate(folders.items())
        for i in range(per_split)
    ]


def assert_identical(out: Path, names, labelled: list[Labelled]) -> None:
    """The dataset in `out` has these class names and, for each image, its very bytes and its ids."""
    dataset = open_dataset(out)
    assert dataset.classes.names == tuple(names)
    found = {}
    for split in dataset.splits:
        for i in range(dataset.count(split)):
            sample = dataset.read(split, i)
            found[split, Path(sample.name).stem] = (dataset.root / sample.name, sample.mask)
    assert found.keys() == {(one.split, one.image.stem) for one in labelled}
    for split, image, ids in labelled:
        copy, mask = found[split, image.stem]
        assert copy.read_bytes() == image.read_bytes()
        assert mask.dtype == dataset.classes.dtype
        np.testing.assert_array_equal(mask, ids, err_msg=image.name)


def spoiled(data, values=(None, True, -1, 1e300, "x", [], [None], {})):
    """Copies of JSON data, in each of which one entry anywhere is replaced by a wrong value."""
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, child in children:
        for replacement in (*values, *spoiled(child, values)):
            copy = data.copy()
            copy[key] = replacement
            yield copy


def assert_only_user_errors(read, variants) -> None:
    """Reading and drawing each variant works or ends in a UserError of one line."""
    messages = [message_of(read, variant) for variant in variants]
    assert sum(map(bool, messages)) > 20
    assert not [message for message in messages if "\n" in message]


def message_of(read, variant) -> str:
    try:
        for picture in read(variant).pictures:
            draw(picture.shapes(), SIZE, ids=np.zeros(99, np.uint8), fill=0)
    except UserError as error:
        return str(error)
    return ""
