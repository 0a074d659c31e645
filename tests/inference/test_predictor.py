"""The predictor: bands, views, label types, input kinds, scores, and how much it holds at once."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from segvit.contracts import Dense, UserError
from segvit.data.prepare import prepare
from segvit.inference import predictor as module
from segvit.inference.predictor import Predictor, Views, as_image
from tests.inference.fake import FakeRuntime


def picture(height, width, seed=0):
    """Smooth noise, so that labels form regions."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8))
    return np.array(small.resize((width, height), Image.Resampling.BICUBIC))


def by_hand(run, image, views):
    """Scores (K, H, W) from full tensors: softmax only where several views are averaged."""
    seen = []
    for scale, flip in views:
        scores = run.whole(prepare(image, run.spec, ratio=scale, flip=flip)[None])
        scores = F.interpolate(scores, size=image.shape[:2], mode="bilinear", align_corners=False)[0]
        seen.append(scores.flip(-1) if flip else scores)
    return seen[0] if len(seen) == 1 else torch.stack([scores.softmax(0) for scores in seen]).mean(0)


SPECS = {
    "own size": {},
    "enlarged": {"scale": (200, 90)},
    "reduced": {"scale": (60, 31)},
    "exact": {"exact": (48, 64)},
    "windows": {"window": (24, 24), "stride": (16, 16)},
}
VIEWS = [Views(), Views(flip=True), Views(scales=(0.5, 1.0, 1.5)), Views(scales=(1.0, 1.25), flip=True)]


@pytest.mark.parametrize("size", [(37, 53), (1, 40), (64, 1)])
@pytest.mark.parametrize("spec", SPECS)
def test_bands_give_the_labels_of_the_whole(spec, size, monkeypatch):
    run, image = FakeRuntime(**SPECS[spec]), picture(*size)
    whole, none = Predictor(run).segment(image)
    assert none is None
    monkeypatch.setattr(module, "BAND", 5 * size[1] * 3)  # three rows at a time, or fewer
    assert len(list(Predictor(run).bands(image))) > size[0] // 4
    np.testing.assert_array_equal(Predictor(run).segment(image)[0], whole)


@pytest.mark.parametrize("views", VIEWS, ids=str)
@pytest.mark.parametrize("spec", ["own size", "enlarged", "exact"])
def test_views_equal_full_tensors(spec, views):
    run, image = FakeRuntime(**SPECS[spec]), picture(37, 53)
    expected = by_hand(run, image, views)
    bands = torch.cat([band for _, band in Predictor(run, views=views).bands(image)], dim=1)
    torch.testing.assert_close(bands, expected, rtol=1e-4, atol=1e-4)
    labels, scores = Predictor(run, views=views).segment(image, scores=True)
    np.testing.assert_array_equal(labels, expected.argmax(0).numpy())
    assert scores.dtype == np.float16
    np.testing.assert_allclose(scores, expected.numpy(), rtol=2e-3, atol=2e-3)
    single = len(list(views)) == 1
    assert single == (not np.allclose(scores.sum(0, dtype=np.float32), 1, atol=0.01))


def test_views_refuse_nothing_and_negative_scales():
    for scales in ((), (0.0,), (1.0, -1.0)):
        with pytest.raises(UserError, match="scales must be positive"):
            Views(scales=scales)


@pytest.mark.parametrize(("classes", "dtype"), [(2, np.uint8), (255, np.uint8), (300, np.uint16)])
def test_label_types(classes, dtype):
    run, image = FakeRuntime(classes), picture(32, 40)
    labels = Predictor(run)(image).labels
    assert labels.dtype == dtype
    expected = by_hand(run, image, Views()).argmax(0).numpy()
    np.testing.assert_array_equal(labels, expected)
    assert classes < 256 or labels.max() > 255


def test_the_first_class_wins_a_tie():
    assert module.best_class(torch.tensor([[[1.0]], [[2.0]], [[2.0]]])).item() == 1


def test_all_kinds_of_input_agree(tmp_path):
    image, predict = picture(30, 41), Predictor(FakeRuntime())
    Image.fromarray(image).save(tmp_path / "a.png")
    sources = {
        "path": tmp_path / "a.png", "text": str(tmp_path / "a.png"), "pil": Image.fromarray(image), "array": image,
        "tensor": torch.from_numpy(image).permute(2, 0, 1), "strided": image[::-1][::-1],
    }  # fmt: skip
    results = {name: predict(source) for name, source in sources.items()}
    for name, result in results.items():
        np.testing.assert_array_equal(result.labels, results["array"].labels, err_msg=name)
        np.testing.assert_array_equal(result.image, image, err_msg=name)
        assert result.scores is None
    assert results["path"].name == results["text"].name == str(tmp_path / "a.png")
    assert results["array"].name == ""


def test_other_pil_modes_are_read_as_colours():
    gray = Image.fromarray(picture(10, 12)).convert("L")
    assert as_image(gray)[0].shape == (10, 12, 3)


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8), torch.zeros(3, 4, 4), torch.zeros(4, 4, 3, dtype=torch.uint8),
        torch.zeros(4, 4, dtype=torch.uint8), None, 3, [[1, 2, 3]], np.zeros((0, 4, 3), np.uint8),
    ],
    ids=lambda source: f"{type(source).__name__} {getattr(source, 'dtype', '')} {tuple(getattr(source, 'shape', ()))}",
)  # fmt: skip
def test_other_input_is_refused(source):
    with pytest.raises(UserError, match="must be uint8"):
        Predictor(FakeRuntime())(source)


@pytest.mark.parametrize("channels", [1, 5])
def test_images_of_other_channel_counts(channels, tmp_path):
    predict = Predictor(FakeRuntime(mean=(0.5,) * channels, std=(0.5,) * channels))
    image = np.random.default_rng(0).integers(0, 256, (30, 41, channels), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", image=image)
    expected = predict(image)
    assert expected.image.shape == image.shape
    for source in (tmp_path / "a.npz", torch.from_numpy(image).permute(2, 0, 1)):
        np.testing.assert_array_equal(predict(source).labels, expected.labels)
    with pytest.raises(UserError, match=rf"array \(H, W, {channels}\) must be uint8 with {channels} channels"):
        predict(np.zeros((30, 41, 3), np.uint8))
    with pytest.raises(UserError, match=rf"has 3 channels but the model reads {channels}"):
        predict.segment(np.zeros((30, 41, 3), np.uint8))


def test_one_channel_takes_gray_pictures_and_planes():
    image = np.random.default_rng(0).integers(0, 256, (10, 12), dtype=np.uint8)
    for source in (image, torch.from_numpy(image), Image.fromarray(image), image[..., None]):
        np.testing.assert_array_equal(as_image(source, channels=1)[0], image[..., None])
    assert as_image(Image.fromarray(picture(10, 12)), channels=1)[0].shape == (10, 12, 1)


def test_raw_levels_become_what_they_were_in_training(tmp_path):
    raw = np.random.default_rng(0).integers(0, 12000, (10, 12, 4), dtype=np.uint16)
    np.savez(tmp_path / "a.npz", image=raw)
    from_file = as_image(tmp_path / "a.npz", channels=4, levels=(0, 10000))[0]
    np.testing.assert_array_equal(as_image(raw, channels=4, levels=(0, 10000))[0], from_file)
    np.testing.assert_array_equal(from_file, np.floor(raw.clip(0, 10000).astype(float) * 255 / 10000 + 0.5))
    np.testing.assert_array_equal(as_image(from_file, channels=4, levels=(0, 10000))[0], from_file)
    with pytest.raises(UserError, match="must be uint8"):
        as_image(raw, channels=4)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.jpg: no such file"):
        Predictor(FakeRuntime())(tmp_path / "nothing.jpg")


def test_scores_on_request():
    result = Predictor(FakeRuntime(7))(picture(20, 30), scores=True)
    assert (result.scores.dtype, result.scores.shape) == (np.float16, (7, 20, 30))
    np.testing.assert_array_equal(result.scores.argmax(0), result.labels)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, tuple | list) else [result]
        self.elements = max([self.elements, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return result


class Masks:
    """150 classes, random masks at an eighth of the size."""

    def __init__(self, **spec):
        other = FakeRuntime(150, **spec)
        self.spec, self.classes, self.readout = other.spec, other.classes, other.readout

    def __call__(self, images):
        height, width = images.shape[-2:]
        masks = np.random.default_rng(0).normal(size=(len(images), 150, height // 8, width // 8)).astype(np.float32)
        return Dense(torch.from_numpy(masks), {}, (height, width))


@pytest.mark.parametrize(
    ("side", "spec", "views"),
    [
        (512, {}, Views()),
        (512, {}, Views(flip=True)),
        (512, {"window": (256, 256), "stride": (200, 200)}, Views()),
        (128, {"scale": (2048, 512)}, Views()),  # the network's input is much larger than the image
    ],
    ids=["whole", "flip", "windows", "enlarged"],
)
def test_all_scores_never_exist_at_once(side, spec, views):
    predict, image = Predictor(Masks(**spec), views=views), picture(side, side)
    with Largest() as largest:
        labels, _ = predict.segment(image)
    assert labels.shape == (side, side)
    assert module.BAND / 2 < largest.elements < 1.5 * module.BAND < 150 * 512 * 512 / 6


def test_a_torch_model_runs_in_half_precision():
    from segvit.zoo import create_model

    model = create_model(
        "segvit_vit_tiny", num_classes=4, image_size=32, patch_size=8, depth=2, embed_dim=64, out_indices=[0, 1],
        layers=1, dropout=0.5,
    )  # fmt: skip
    model.train()
    image = picture(30, 36)
    exact, half = Predictor(model), Predictor(model, precision="bf16")
    labels, scores = exact.segment(image, scores=True)
    np.testing.assert_array_equal(labels, exact.segment(image)[0])  # dropout is off
    np.testing.assert_allclose(half.segment(image, scores=True)[1], scores, atol=0.1)
    assert next(half.bands(image))[1].dtype == torch.float32


@pytest.mark.parametrize("spec", ["enlarged", "windows"])
def test_the_best_classes_of_each_pixel(spec):
    run, image = FakeRuntime(**SPECS[spec]), picture(37, 53)
    scores = by_hand(run, image, Views()) if spec == "enlarged" else None
    labels, values = Predictor(run).top(image, 2)
    assert labels.shape == values.shape == (2, 37, 53)
    np.testing.assert_array_equal(labels[0], Predictor(run).segment(image)[0])
    assert (values[0] >= values[1]).all()
    assert (labels[0] != labels[1]).all()
    if scores is not None:
        np.testing.assert_allclose(values, scores.topk(2, 0).values.numpy(), atol=1e-5)
    with pytest.raises(UserError, match="the model has"):
        Predictor(run).top(image, 99)


@pytest.mark.parametrize("kind", ["softmax", "share", "score"])
def test_confidence_is_what_the_readout_says(kind):
    run, image = FakeRuntime(), picture(9, 11)
    run.readout = run.readout._replace(confidence=kind)
    scores = torch.cat([band for _, band in Predictor(run).bands(image)], dim=1)
    best = scores.max(0).values
    expected = {
        "softmax": scores.softmax(0).max(0).values,
        "share": best / scores.sum(0).clamp(min=1e-12),
        "score": best,
    }
    labels, sure = Predictor(run).read(image)
    np.testing.assert_array_equal(labels, Predictor(run).segment(image)[0])
    np.testing.assert_allclose(sure, expected[kind].clamp(0, 1).numpy(), atol=1e-6)
