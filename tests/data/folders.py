"""Small datasets on disk for the tests of this folder."""

from pathlib import Path

import numpy as np
from PIL import Image


def save(path: Path, values) -> Path:
    """Write an array as an image and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path)
    return path


def two_folders(root: Path, *, counts: dict[str, int], size: tuple[int, int] = (20, 24), classes: int = 3) -> Path:
    """The layout without YAML, filled with noise."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for i in range(count):
            save(root / "images" / split / f"{i}.png", rng.integers(0, 256, (*size, 3), dtype=np.uint8))
            save(root / "masks" / split / f"{i}.png", rng.integers(0, classes, size, dtype=np.uint8))
    (root / "classes.txt").write_text("".join(f"class {i}\n" for i in range(classes)))
    return root
