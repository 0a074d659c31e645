"""Label maps of images too large to hold: windows at the image's own resolution, read and written strip by strip.

Scores of overlapping windows are averaged as everywhere (`WindowedScores`). One row of windows is in memory, and the
next is decoded while it is segmented. Labels go to a plain file of rows, and beside it stands how many of them are
safely on the disk: a run that was stopped goes on after these, and only a finished map takes its name.

Shapes    K classes, H W the image, C channels, R rows of a band.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segvit.contracts import Classes, InputSpec, Runtime, Size, UserError
from segvit.data.prepare import normalise
from segvit.data.tiff_regions import Regions
from segvit.files import open_atomic, write_json
from segvit.inference.prediction import color_table
from segvit.inference.readout import best_class
from segvit.inference.windows import WindowedScores

BAND = 8_000_000  # scores held at once: a band has to cross the whole width, so it is larger than in `predictor`
TILE = 512  # pixels of a side of the tiles that are written
SAFE = 20.0  # seconds after which rows are brought to the disk: what a power cut can cost


class StripInput:
    """The network's input (C, H, W) of a large image, of which only one strip of rows and the next are in memory."""

    def __init__(self, regions: Regions, spec: InputSpec, tops: list[int], height: int) -> None:
        self.regions, self.spec, self.tops, self.height = regions, spec, tops, height
        self.shape = (spec.channels, *regions.size)
        self.reader = ThreadPoolExecutor(1, "strips")
        self.strips: dict[int, Future[NDArray[np.uint8]]] = {}

    def __getitem__(self, window: tuple[slice, slice, slice]) -> Tensor:
        _, rows, columns = window
        return normalise(self.strip(rows.start)[:, columns], self.spec)

    def strip(self, top: int) -> NDArray[np.uint8]:
        """The rows of the windows that begin at `top`; those of the next begin to be read."""
        following = self.tops[self.tops.index(top) + 1 :][:1]
        self.strips = {start: strip for start, strip in self.strips.items() if start in (top, *following)}
        for start in (top, *following):
            if start not in self.strips:
                bottom = min(start + self.height, self.regions.size[0])
                self.strips[start] = self.reader.submit(self.regions.read, start, bottom, 0, self.regions.size[1])
        return self.strips[top].result()

    def close(self) -> None:
        """Let the reader go."""
        self.reader.shutdown(cancel_futures=True)


class Windowed:
    """A runtime whose input spec asks for windows at the image's own resolution, whatever the model's size rule was."""

    def __init__(self, run: Runtime, window: Size, stride: Size) -> None:
        self.run, self.classes, self.readout = run, run.classes, run.readout
        self.spec = replace(run.spec, scale=None, exact=None, min_side=None, window=window, stride=stride)

    def __call__(self, images: Tensor) -> Any:
        return self.run(images)


@torch.inference_mode()
def label_rows(run: Runtime, regions: Regions, *, first: int = 0, at_once: int = 1) -> Iterator[NDArray[Any]]:
    """Bands of the label map (R, W) from row `first` to the last, by the windows of `run.spec`."""
    assert run.spec.window is not None  # see Windowed
    height, width = regions.size
    blank = StripInput(regions, run.spec, [], min(run.spec.window[0], height))
    scores = WindowedScores(run, blank, at_once=at_once)
    blank.tops = [boxes[0].top for boxes in scores.boxes]
    step = max(1, BAND // (len(run.classes) * width))
    try:
        for start in range(first, height, step):
            rows = range(start, min(start + step, height))
            yield best_class(scores.rows(rows)).cpu().numpy().astype(run.classes.dtype, copy=False)
    finally:
        blank.close()


def segment_large(
    run: Runtime, regions: Regions, path: Path, *, identity: dict[str, Any], resume: bool = False, at_once: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.int64]:  # fmt: skip
    """Write the label map of a large image as a tiled TIFF, in the classes' colours; returns the pixels of each class.

    `identity` says what the map depends on; with `resume` an unfinished map of the same identity is continued.

    Raises UserError when `resume` finds one of another identity.
    """
    partial = path.with_name(f".{path.name}.rows")
    row = regions.size[1] * np.dtype(run.classes.dtype).itemsize
    done = _rows_done(partial, identity, row) if resume else 0
    if not done:
        partial.unlink(missing_ok=True)  # rows of another map must not stand beside this identity
    with _opened(partial, done * row) as file:
        try:
            _make_safe(file, partial, identity, done)
            safe = time.monotonic()
            for band in label_rows(run, regions, first=done, at_once=at_once):
                file.write(band.tobytes())
                done += len(band)
                if time.monotonic() - safe >= SAFE:
                    _make_safe(file, partial, identity, done)
                    safe = time.monotonic()
                progress(done, regions.size[0])
        finally:
            _make_safe(file, partial, identity, done)
    counts = write_tiles(partial, path, regions.size, run.classes)
    partial.unlink()
    partial.with_suffix(".json").unlink()
    return counts


def _make_safe(file: BinaryIO, partial: Path, identity: dict[str, Any], done: int) -> None:
    """Bring the rows to the disk, then say so: after a power cut a file may have its length, but zeros in it."""
    file.flush()
    os.fsync(file.fileno())
    write_json(partial.with_suffix(".json"), {"made_with": identity, "rows": done})


def _rows_done(partial: Path, identity: dict[str, Any], row: int) -> int:
    """The rows of an unfinished map that can be trusted; 0 where there is none."""
    said = partial.with_suffix(".json")
    if not (partial.is_file() and said.is_file()):
        return 0
    made = json.loads(said.read_text(encoding="utf-8"))
    if made.get("made_with") != identity:
        raise UserError(f"{partial} was begun with another model, image or window; delete it or leave out --resume")
    return min(int(made["rows"]), partial.stat().st_size // row)


def _opened(partial: Path, size: int) -> BinaryIO:
    """The file of rows, cut to what can be trusted, at its end."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    file = partial.open("r+b" if size else "wb")
    file.truncate(size)
    file.seek(size)
    return file


def write_tiles(rows: Path, path: Path, size: Size, classes: Classes) -> NDArray[np.int64]:
    """A file of label rows as a tiled, compressed TIFF, a row of tiles at a time; returns the pixels of each class."""
    import tifffile

    counts = np.zeros(len(classes), np.int64)
    height, width = size

    def tiles() -> Iterator[NDArray[Any]]:
        with rows.open("rb") as file:
            for top in range(0, height, TILE):
                many = min(TILE, height - top)
                band = np.fromfile(file, classes.dtype, many * width).reshape(many, width)
                np.add(counts, np.bincount(band.ravel(), minlength=len(classes))[: len(classes)], out=counts)
                for left in range(0, width, TILE):
                    tile = np.zeros((TILE, TILE), classes.dtype)
                    part = band[:, left : left + TILE]
                    tile[: part.shape[0], : part.shape[1]] = part
                    yield tile

    colored = classes.dtype is np.uint8
    # Palette entries have 16 bits: 255 becomes 65535.
    palette = {"photometric": "palette", "colormap": color_table(classes).T.astype(np.uint16) * 257}
    with open_atomic(path) as target:
        tifffile.imwrite(
            target, tiles(), shape=size, dtype=classes.dtype, tile=(TILE, TILE), compression="zlib", metadata=None,
            bigtiff=height * width * np.dtype(classes.dtype).itemsize > 3 << 30,
            **palette if colored else {"photometric": "minisblack"},
        )  # fmt: skip
    return counts
