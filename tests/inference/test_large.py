"""Large images in strips: the labels of the whole image, continued where a run stopped, in little memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from segvit.contracts import Classes, Dense, InputSpec, Readout, UserError
from segvit.data.tiff_regions import Regions, open_regions
from segvit.inference import large
from segvit.inference.large import Windowed, label_rows, segment_large
from segvit.inference.predictor import Predictor
from segvit.nn.readout import logit_rows
from segvit.palette import generate_palette

CLASSES = Classes(tuple(f"class {i}" for i in range(7)), generate_palette(7))


class Coarse:
    """A runtime without weights: scores are fixed mixtures of the colours of 8 x 8 cells, so labels vary."""

    def __init__(self) -> None:
        self.spec, self.classes, self.readout = InputSpec(scale=(64, 64)), CLASSES, Readout(logit_rows)
        self.mix = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
        self.calls = 0

    def __call__(self, images: torch.Tensor) -> Dense:
        self.calls += len(images)
        cells = torch.nn.functional.avg_pool2d(images, 8, ceil_mode=True)
        size = (images.shape[-2], images.shape[-1])
        return Dense(torch.einsum("kc,bchw->bkhw", self.mix, cells - cells.mean((2, 3), keepdim=True)), {}, size)


def regions_of(path: Path) -> Regions:
    """An image in memory: only the memory test reads its file in parts."""
    pixels = tifffile.imread(path)
    return Regions(pixels.shape[:2], lambda top, bottom, left, right: pixels[top:bottom, left:right])


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 255, (21, 30, 3), dtype=np.uint8)
    tifffile.imwrite(
        tmp_path / "a.tif", np.asarray(Image.fromarray(noise).resize((333, 217))), photometric="rgb", tile=(64, 80),
        compression="zlib",
    )  # fmt: skip
    return tmp_path / "a.tif"


@pytest.mark.parametrize("stride", [(48, 40), (64, 64)])
def test_labels_are_those_of_the_whole_image(picture: Path, stride: tuple[int, int], tmp_path: Path) -> None:
    run = Windowed(Coarse(), (64, 64), stride)
    expected, _ = Predictor(run).segment(tifffile.imread(picture))
    with open_regions(picture) as regions:
        counts = segment_large(run, regions, tmp_path / "out" / "a.tif", identity={})
    found = Image.open(tmp_path / "out" / "a.tif")
    assert found.mode == "P"
    np.testing.assert_array_equal(np.asarray(found), expected)
    np.testing.assert_array_equal(counts, np.bincount(expected.ravel(), minlength=7))
    assert (counts > 0).sum() > 3
    assert found.convert("RGB").getpixel((5, 9)) == CLASSES.palette[expected[9, 5]]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.tif"]


def test_the_size_rule_of_the_model_gives_way_to_the_window() -> None:
    spec = Windowed(Coarse(), (64, 64), (48, 48)).spec
    assert (spec.scale, spec.exact, spec.min_side, spec.window, spec.stride) == (None, None, None, (64, 64), (48, 48))


def test_an_image_smaller_than_the_window(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb")
    run = Windowed(Coarse(), (64, 64), (48, 48))
    segment_large(run, regions_of(tmp_path / "a.tif"), tmp_path / "b.tif", identity={})
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "b.tif"), Predictor(run).segment(pixels)[0])


def test_a_stopped_map_goes_on_at_the_first_missing_row(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large, "BAND", 7 * 333 * 10)  # ten rows at once
    run = Windowed(Coarse(), (64, 64), (48, 48))
    expected, _ = Predictor(run).segment(tifffile.imread(picture))
    target = tmp_path / "b.tif"

    def stop(done: int, total: int) -> None:
        if done >= 120:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment_large(run, regions_of(picture), target, identity={"model": 1}, progress=stop)
    assert not target.exists()
    with (tmp_path / ".b.tif.rows").open("ab") as file:
        file.write(b"half a row")
    with pytest.raises(UserError, match="another model, image or window"):
        segment_large(run, regions_of(picture), target, identity={"model": 2}, resume=True)
    seen: list[int] = []
    second = Coarse()
    segment_large(
        Windowed(second, (64, 64), (48, 48)), regions_of(picture), target, identity={"model": 1}, resume=True,
        progress=lambda done, total: seen.append(done),
    )  # fmt: skip
    assert seen[0] == 130
    assert second.calls < run.run.calls
    np.testing.assert_array_equal(tifffile.imread(target), expected)


def test_without_resume_a_map_begins_anew(picture: Path, tmp_path: Path) -> None:
    (tmp_path / ".b.tif.rows").write_bytes(bytes(333 * 100))
    run = Windowed(Coarse(), (64, 64), (48, 48))
    segment_large(run, regions_of(picture), tmp_path / "b.tif", identity={})
    np.testing.assert_array_equal(
        tifffile.imread(tmp_path / "b.tif"), Predictor(run).segment(tifffile.imread(picture))[0]
    )


def test_rows_can_begin_anywhere(picture: Path) -> None:
    run = Windowed(Coarse(), (64, 64), (48, 48))
    whole = np.concatenate(list(label_rows(run, regions_of(picture))))
    late = np.concatenate(list(label_rows(run, regions_of(picture), first=101)))
    np.testing.assert_array_equal(late, whole[101:])


def test_only_rows_that_are_said_to_be_safe_are_kept(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut the file may have its length, but zeros where the last rows should be."""
    monkeypatch.setattr(large, "BAND", 7 * 333 * 10)
    monkeypatch.setattr(large, "SAFE", 0.0)
    run, target, rows = Windowed(Coarse(), (64, 64), (48, 48)), tmp_path / "b.tif", tmp_path / ".b.tif.rows"
    said: list[int] = []

    def cut(done: int, total: int) -> None:
        said.append(json.loads(rows.with_suffix(".json").read_text())["rows"])
        assert rows.stat().st_size == done * 333  # what is said to be safe has left the buffer
        if done == 100:
            shutil.copytree(tmp_path, tmp_path / "cut")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment_large(run, regions_of(picture), target, identity={}, progress=cut)
    assert said == list(range(10, 101, 10))
    target, rows = tmp_path / "cut" / "b.tif", tmp_path / "cut" / ".b.tif.rows"
    rows.write_bytes(rows.read_bytes() + bytes(333 * 50))
    segment_large(run, regions_of(picture), target, identity={}, resume=True)
    expected = Predictor(run).segment(tifffile.imread(picture))[0]
    assert expected[100:150].any()
    np.testing.assert_array_equal(tifffile.imread(target), expected)


MEMORY = """
import sys
from pathlib import Path
import numpy as np, tifffile
from segvit.data.tiff_regions import open_regions
from segvit.inference.large import Windowed, segment_large
from tests.inference.test_large import Coarse

def resident(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024

row = np.random.default_rng(0).integers(0, 255, (256, 4096, 3), dtype=np.uint8)
folder = Path(sys.argv[1])
tifffile.imwrite(
    folder / "a.tif", (row[:, x : x + 256] for y in range(16) for x in range(0, 4096, 256)), shape=(4096, 4096, 3),
    dtype=np.uint8, photometric="rgb", tile=(256, 256), compression="zlib",
)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
with open_regions(folder / "a.tif") as regions:
    segment_large(Windowed(Coarse(), (256, 256), (256, 256)), regions, folder / "b.tif", identity={})
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_image(tmp_path: Path) -> None:
    """17 million pixels are 201 MB of input and 470 MB of scores; the labels come in much less."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert float(done.stdout) < 330  # MB; the tile cache alone may take 192
