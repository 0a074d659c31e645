"""The pruned readout: the labels of the dense one, always; few classes computed, where that pays; little memory."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from segvit.contracts import Dense, InputSpec
from segvit.inference import predictor as predictor_module
from segvit.inference import readout
from segvit.inference.predictor import Predictor, Views
from segvit.systems import segvit, zegclip, zsseg
from tests.inference.fake import FakeRuntime, numbered

CELL = 8


class Masks:
    """A runtime of mask classification whose outputs are drawn by `draw(generator, classes, grid)`."""

    def __init__(self, draw, *, classes=7, read=segvit.READOUT, cell=CELL, **spec):
        self.spec, self.classes, self.readout = InputSpec(**spec), numbered(classes), read
        self.draw, self.cell, self.calls = draw, cell, 0

    def __call__(self, images):
        height, width = images.shape[-2:]
        grid = (-(-height // self.cell), -(-width // self.cell))
        generator = torch.Generator().manual_seed(self.calls)
        self.calls += 1
        parts = [self.draw(generator, len(self.classes), grid) for _ in images]
        extras = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        return Dense(extras["masks"], extras, (grid[0] * self.cell, grid[1] * self.cell))


def smooth(generator, classes, grid):
    """Regions as a trained network gives them: steep masks, sure classes, faint others."""
    regions = min(classes, 4)
    field = torch.randn(1, regions, 3, 3, generator=generator)
    field = F.interpolate(field, size=grid, mode="bilinear", align_corners=True)[0]
    masks = torch.randn(classes, *grid, generator=generator) - 9
    masks[:regions] = (6 * field).clamp(-11, 9) if regions == 1 else 8 * (field - field.topk(2, 0).values.mean(0))
    logits = torch.randn(classes, classes + 1, generator=generator)
    logits[:, -1] += 8
    logits[:regions, -1] -= 14
    logits[range(regions), range(regions)] += 8
    return {"masks": masks, "class_logits": logits}


def noise(generator, classes, grid):
    """What an untrained network gives."""
    return {
        "masks": torch.randn(classes, *grid, generator=generator),
        "class_logits": torch.randn(classes, classes + 1, generator=generator),
    }


def coarse(generator, classes, grid):
    """Few values, so that ties abound."""
    return {
        "masks": torch.randint(-1, 2, (classes, *grid), generator=generator).float() * 4,
        "class_logits": torch.randint(0, 2, (classes, classes + 1), generator=generator).float() * 5,
    }


def constant(generator, classes, grid):
    return {"masks": torch.zeros(classes, *grid), "class_logits": torch.zeros(classes, classes + 1)}


def twins(generator, classes, grid):
    """Every class has an equal: the first of them must win everywhere."""
    out = smooth(generator, classes, grid)
    half = classes // 2
    out["masks"][half : 2 * half] = out["masks"][:half]
    logits = torch.full((classes, classes + 1), -20.0)
    logits.fill_diagonal_(5.0)
    return out | {"class_logits": logits}


def neighbours(generator, classes, grid):
    """Two equal classes but for the last bit of one mask."""
    out = twins(generator, classes, grid)
    if classes > 1:
        out["masks"][1] = torch.nextafter(out["masks"][0], torch.tensor(torch.inf))
    return out


def faint(generator, classes, grid):
    """All masks underflow."""
    return noise(generator, classes, grid) | {"masks": torch.full((classes, *grid), -105.0)}


def huge(generator, classes, grid):
    return noise(generator, classes, grid) | {"masks": 1e3 * torch.randn(classes, *grid, generator=generator)}


def enormous(generator, classes, grid):
    return noise(generator, classes, grid) | {"masks": 1e30 * torch.randn(classes, *grid, generator=generator)}


def nothing(generator, classes, grid):
    """ "No object" everywhere: class weights of 0."""
    logits = torch.full((classes, classes + 1), -torch.inf)
    logits[:, -1] = 0
    return smooth(generator, classes, grid) | {"class_logits": logits}


def broken(generator, classes, grid):
    out = smooth(generator, classes, grid)
    out["masks"][0, grid[0] // 2, grid[1] // 2] = torch.nan
    return out


KINDS = (smooth, noise, coarse, constant, twins, neighbours, faint, huge, enormous, nothing, broken)


def assert_same(make, size, **options):
    """Labels with and without pruning, of runtimes that give the same outputs in the same order."""
    image = np.zeros((*size, 3), np.uint8)
    dense = Predictor(make(), prune=False, **options).segment(image)[0]
    pruned = Predictor(make(), **options).segment(image)[0]
    np.testing.assert_array_equal(pruned, dense)
    assert pruned.dtype == dense.dtype
    return dense


@pytest.fixture
def eager(monkeypatch):
    """Pruning goes on where it would not pay, so that its labels are tested and not the dense readout's."""
    monkeypatch.setattr(readout, "MOST_OPEN", 2.0)
    monkeypatch.setattr(readout, "MOST_CLOSE", 2.0)
    monkeypatch.setattr(readout, "LEAST_BLOCK", 0.0)


SPECS = [
    {}, {"exact": (48, 40)}, {"exact": (24, 96)}, {"scale": (90, 44)},
    {"window": (32, 32), "stride": (20, 24)}, {"window": (24, 40), "stride": (8, 16)},
    {"scale": (80, 50), "window": (32, 32), "stride": (32, 32)},
    {"exact": (40, 40), "window": (25, 27), "stride": (15, 13)},
]  # fmt: skip


def zeg(generator, classes, grid):
    """ZegCLIP: a mask for each class, and a bias that only some lose; sometimes two classes differ by it alone."""
    masks = smooth(generator, classes, grid)["masks"]
    bias = 0.1 * torch.randint(0, 2, (classes,), generator=generator)
    return {"masks": masks, "bias": bias}


def proposals(generator, classes, grid):
    """zsseg: more queries than classes, fused scores that need not add up to 1."""
    masks = smooth(generator, classes + 5, grid)["masks"]
    weights = torch.rand(classes + 5, classes, generator=generator) ** 4
    return {"masks": masks, "scores": weights}


SYSTEMS = {zeg: zegclip.READOUT, proposals: zsseg.READOUT}


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    draw=st.sampled_from((*KINDS, *KINDS[:1] * 5, *SYSTEMS)), spec=st.sampled_from(SPECS), classes=st.integers(1, 12),
    size=st.tuples(st.integers(1, 64), st.integers(1, 64)), cell=st.sampled_from([4, 8, 16]),
    band=st.sampled_from([1, 2000, 10**6]), held=st.sampled_from([1, 100, 10**6]), chunk=st.sampled_from([500, 10**6]),
)  # fmt: skip
def test_labels_are_those_of_the_dense_readout(draw, spec, classes, size, cell, band, held, chunk):
    def make():
        return Masks(draw, classes=classes, read=SYSTEMS.get(draw, segvit.READOUT), cell=cell, **spec)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("MOST_OPEN", "MOST_CLOSE"):
            patch.setattr(readout, name, 2.0)
        patch.setattr(readout, "LEAST_BLOCK", 0.0)
        patch.setattr(readout, "HELD", held)
        patch.setattr(readout, "CHUNK", chunk)
        patch.setattr(predictor_module, "BAND", band)
        assert_same(make, size)


@pytest.mark.parametrize("draw", KINDS)
def test_labels_are_the_same_as_it_is(draw):
    assert_same(lambda: Masks(draw, classes=20, cell=16), (150, 170))


def test_many_classes_keep_their_type():
    labels = assert_same(lambda: Masks(smooth, classes=300, cell=16), (120, 100))
    assert labels.dtype == np.uint16


@pytest.mark.parametrize(("draw", "classes"), [(twins, 8), (constant, 5)])
def test_the_first_of_equal_classes_wins(draw, classes, eager):
    labels = assert_same(lambda: Masks(draw, classes=classes), (64, 72))
    assert labels.max() < max(1, classes // 2)


def counted(monkeypatch):
    """The pixels whose scores of all classes are computed, of every call of the dense readout."""
    rows = []
    original = readout.PrunedLabels.dense
    monkeypatch.setattr(
        readout.PrunedLabels, "dense", lambda self, band: (rows.append(len(band)), original(self, band))[1]
    )
    return rows


def test_smooth_masks_need_hardly_any_dense_band(monkeypatch):
    rows = counted(monkeypatch)
    monkeypatch.setattr(predictor_module, "BAND", 40 * 320 * 4)
    labels, _ = Predictor(Masks(smooth, classes=40, cell=16)).segment(np.zeros((320, 320, 3), np.uint8))
    assert len(np.unique(labels)) > 2
    assert sum(rows) <= 0.1 * 320


@pytest.mark.parametrize("draw", [noise, constant, broken, enormous])
def test_where_it_cannot_pay_all_bands_are_dense(draw, monkeypatch):
    rows = counted(monkeypatch)
    Predictor(Masks(draw, classes=40, cell=16)).segment(np.zeros((320, 160, 3), np.uint8))
    assert sum(rows) == 320


def test_other_readouts_and_small_cells_are_left_alone(monkeypatch):
    asked = []
    original = readout.PrunedLabels.__iter__
    monkeypatch.setattr(readout.PrunedLabels, "__iter__", lambda self: (asked.append(1), original(self))[1])
    image = np.zeros((64, 64, 3), np.uint8)
    Predictor(FakeRuntime()).segment(image)
    Predictor(Masks(smooth, cell=2)).segment(image)
    Predictor(Masks(smooth), views=Views(flip=True)).segment(image)
    Predictor(Masks(smooth), prune=False).segment(image)
    Predictor(Masks(smooth)).segment(image, scores=True)
    torch.set_float32_matmul_precision("high")
    try:
        Predictor(Masks(smooth)).segment(image)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not asked
    Predictor(Masks(smooth)).segment(image)
    assert asked == [1]


def test_the_official_canvas_is_read_densely():
    run = Masks(lambda g, k, grid: smooth(g, k, grid) | {"canvas": torch.rand(k, 32, 32, generator=g)})
    assert segvit.READOUT.masks(run(torch.zeros(1, 3, 64, 64))) is None
    assert_same(lambda: Masks(run.draw), (64, 64))


def test_bounds_hold_at_every_pixel():
    """Scores of the dense readout lie in the block's interval; in most blocks the interval is no wider than needed."""
    from segvit.data.prepare import prepare
    from segvit.inference.blocks import plan_axis
    from segvit.inference.windows import WindowedScores

    for spec in SPECS:
        run, image = Masks(smooth, classes=6, **spec), np.zeros((61, 75, 3), np.uint8)
        view = WindowedScores(run, prepare(image, run.spec))
        pruned = readout.prunable(view, (61, 75), 61)
        columns = plan_axis(
            range(75), 75, [(box.left, box.right) for box in view.boxes[0]], pruned.grid[1], pruned.covers[1]
        )
        strip = pruned.bounds(range(61), columns)
        scores = view.rows_at((61, 75), range(61))
        low, high = strip.low, strip.high
        for axis, groups in ((1, strip.rows), (2, columns)):
            count = torch.from_numpy(groups.lengths)
            low, high = low.repeat_interleave(count, axis), high.repeat_interleave(count, axis)
        assert (scores >= low - 1e-5).all(), spec
        assert (scores <= high + 1e-5).all(), spec
        assert (high - low).mean() < 0.5, spec


@pytest.mark.parametrize("name", ["segvit_vit_tiny", "segvit_shrunk_vit_tiny"])
def test_real_networks(name):
    from segvit.zoo import create_model

    shrunk = {"shrink_at": 2} if "shrunk" in name else {}
    model = create_model(
        name, num_classes=6, image_size=64, depth=4, embed_dim=64, out_indices=[1, 3], layers=1, **shrunk
    )
    image = np.random.default_rng(0).integers(0, 256, (70, 91, 3), dtype=np.uint8)
    np.testing.assert_array_equal(Predictor(model).segment(image)[0], Predictor(model, prune=False).segment(image)[0])


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from segvit.inference.predictor import Predictor
from tests.inference.test_readout import Masks, smooth

def resident(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024

predictor = Predictor(Masks(smooth, classes=60, cell=16))
image = np.zeros((1024, 1024, 3), np.uint8)
predictor.segment(image[:128])
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
predictor.segment(image)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_far_below_all_scores():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=300)
    assert float(done.stdout) < 100 < 60 * 1024 * 1024 * 4 / 2**20 / 2  # MB
