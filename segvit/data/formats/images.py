"""Finding the images that annotations name, their size as training sees it, and what they are called afterwards."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from PIL import Image

from segvit.contracts import Size, UserError
from segvit.data.dataset import IMAGE_SUFFIXES
from segvit.data.decode import BOMB, BROKEN

ORIENTATION = 274  # the EXIF tag; its values 5 to 8 exchange height and width
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
WORD = rf"(?<![a-z])({'|'.join(sorted(SPLIT_WORDS, key=len, reverse=True))})(?![a-z])"


class ImageFinder:
    """Finds images by the names that annotations give them, which are often paths of another machine.

    An image is first looked for by its full name below the folder of the annotations and below `root`. Otherwise it
    is the file below `root`, searched recursively, that has the same name and as many of the same folders as possible;
    of several that agree equally, the one in a folder named after the split.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder of images; check the path or give the folder with images")
        self.root = root

    def find(self, name: str, *, near: Path, split: str, where: str) -> Path:
        """The image called `name` by annotations in the folder `near`."""
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if not parts or not name.strip() or "\0" in name:
            raise UserError(f"{where}: the name of the image is {name!r}; mend that entry")
        for folder in (near, self.root):
            path = Path(os.path.normpath(folder.joinpath(*parts)))
            if path.is_file():
                return _supported(path, where)
        found = self._by_name.get(parts[-1], [])
        agreeing = [_same_end(path.parts, parts) for path in found]
        best = [path for path, same in zip(found, agreeing, strict=True) if same == max(agreeing)]
        if len(best) > 1:
            best = [path for path in best if split_of(path.relative_to(self.root).parent / "_") == split] or best
        if not best:
            raise UserError(f"{where}: no image {name} below {self.root}; give the folder that holds the images")
        if len(best) > 1:
            raise UserError(
                f"{where}: {name} may be {best[0]} or {best[1]}; give the one folder that holds the images meant"
            )
        return best[0]

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        found = defaultdict(list)
        for path in image_files(self.root):
            found[path.name].append(path)
        return dict(found)


def image_root(source: Path) -> Path:
    """Where images are looked for: below the source folder, or the folder that a file or its `annotations/` is in."""
    folder = source.parent if source.is_file() else source
    return folder.parent if source.is_file() and folder.name.lower() == "annotations" else folder


def image_files(folder: Path) -> list[Path]:
    """All images below a folder, hidden ones left out, in the order of their paths."""
    return sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
    )


def split_of(path: Path, otherwise: str = "train") -> str:
    """The split that a path names: by one word in the file's name (train, val, test ...), or by a folder called so."""
    found = {SPLIT_WORDS[word] for word in re.findall(WORD, path.name.lower())}
    for folder in reversed(path.parts[:-1]):
        if not found and (match := re.fullmatch(rf"{WORD}\d*", folder.lower())):
            found = {SPLIT_WORDS[match[1]]}
    return found.pop() if len(found) == 1 else otherwise


def upright_size(path: Path) -> Size:
    """The (height, width) of an image after the turn that its EXIF tag asks for, from the header alone."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            turned = picture.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    except (*BROKEN, *BOMB) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: cannot be read as an image ({reason}); replace the file") from None
    return (width, height) if turned else (height, width)


def stems(images: Sequence[Path]) -> list[str]:
    """What each image is called without its suffix: its path below the folder that all of them share."""
    if not images:
        return []
    paths = [Path(os.path.abspath(path)) for path in images]
    shared = os.path.commonpath([path.parent for path in paths])
    names = [path.relative_to(shared).with_suffix("").as_posix() for path in paths]
    for name, count in Counter(names).items():
        if count > 1:
            same = [path for path, other in zip(images, names, strict=True) if other == name]
            raise UserError(f"{same[0]} and {same[1]} would get the same mask {name}.png; rename or leave out one")
    return names


def _supported(path: Path, where: str) -> Path:
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"{where}: {path} is none of {', '.join(IMAGE_SUFFIXES)}; save the image as one of these")
    return path


def _same_end(path: Sequence[str], other: Sequence[str]) -> int:
    count = 0
    while count < min(len(path), len(other)) and path[-1 - count] == other[-1 - count]:
        count += 1
    return count
