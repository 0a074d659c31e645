"""What a user gets of a prediction: mask files, overlays, areas, scores."""

import json

import numpy as np
import pytest
from PIL import Image

from segvit.contracts import Classes, UserError
from segvit.inference.prediction import Prediction, as_picture, colorize

CLASSES = Classes(("sky", "road", "a rather long class name"), ((10, 20, 200), (128, 64, 128), (0, 200, 0)))


def prediction(size=(96, 96), **more):
    labels = np.zeros(size, np.uint8)
    labels[size[0] // 2 :] = 1
    labels[0, 0] = 255
    return Prediction(labels, CLASSES, **more)


def grey(size, value=100):
    return np.full((*size, 3), value, np.uint8)


def test_mask_holds_ids_and_colours(tmp_path):
    one = prediction()
    one.save(tmp_path / "deep" / "mask.png")
    with Image.open(tmp_path / "deep" / "mask.png") as mask:
        assert mask.mode == "P"
        np.testing.assert_array_equal(np.asarray(mask), one.labels)
        np.testing.assert_array_equal(np.asarray(mask.convert("RGB")), colorize(one.labels, CLASSES))
        assert mask.convert("RGB").getpixel((0, 0)) == (0, 0, 0)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["mask.png"]


def test_many_classes_are_16_bit(tmp_path):
    classes = Classes(tuple(map(str, range(300))), ((1, 2, 3),) * 300)
    labels = np.array([[0, 299], [256, 65535]], np.uint16)
    Prediction(labels, classes).save(tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as mask:
        assert mask.mode == "I;16"
        np.testing.assert_array_equal(np.asarray(mask), labels)
    assert Prediction(labels, classes).overlay().width >= 384


def test_only_lossless_names(tmp_path):
    with pytest.raises(UserError, match=r"\.png"):
        prediction().save(tmp_path / "mask.jpg")
    assert not list(tmp_path.iterdir())


def test_scores(tmp_path):
    scores = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float16)
    one = Prediction(np.zeros((4, 5), np.uint8), CLASSES, scores=scores)
    one.save_scores(tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as data:
        assert data["scores"].dtype == np.float16
        np.testing.assert_array_equal(data["scores"], scores)
    with pytest.raises(UserError, match="holds no scores"):
        prediction().save_scores(tmp_path / "s.npz")
    with pytest.raises(UserError, match=r"\.npz"):
        one.save_scores(tmp_path / "s.tif")


def test_areas():
    data = json.loads(json.dumps(prediction(name="a.jpg").areas()))
    assert (data["name"], data["height"], data["width"]) == ("a.jpg", 96, 96)
    assert data["classes"] == [
        {"id": 1, "name": "road", "pixels": 4608, "fraction": 0.5},
        {"id": 0, "name": "sky", "pixels": 4607, "fraction": 4607 / 9216},
    ]
    with pytest.raises(ValueError, match="id 3 but there are only 3 classes"):
        Prediction(np.full((2, 2), 3, np.uint8), CLASSES).areas()


def test_overlay_blends_outlines_and_keeps_ignored_pixels():
    size = (400, 500)
    picture = np.asarray(prediction(size, image=grey(size)).overlay(0.5, legend=False)).astype(int)
    assert picture.shape == (*size, 3)
    np.testing.assert_allclose(picture[50, 50], (55, 60, 150), atol=1)
    np.testing.assert_allclose(picture[300, 50], (114, 82, 114), atol=1)
    assert (picture[199, 50] < 0.5 * picture[198, 50]).all()
    hole = prediction(size, image=grey(size))
    hole.labels[100:200, 100:200] = 255
    np.testing.assert_array_equal(np.asarray(hole.overlay(legend=False))[150, 150], (100, 100, 100))


def test_small_overlays_grow_and_get_a_legend_below():
    one = prediction(image=grey((96, 96)))
    assert one.overlay(legend=False).size == (384, 384)
    full = one.overlay()
    assert full.width == 384
    assert 384 + 20 < full.height < 384 + 100
    strip = np.asarray(full)[384:].reshape(-1, 3)
    for index in (0, 1):
        assert (strip == CLASSES.palette[index]).all(1).sum() > 50, "no swatch"
    assert not (strip == CLASSES.palette[2]).all(1).any(), "an absent class is in the legend"


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (1200, 900)])
def test_any_size_without_image(size):
    picture = Prediction(np.zeros(size, np.uint8), CLASSES).overlay()
    assert max(picture.size) >= 384
    assert picture.getpixel((picture.width // 2, 0)) == CLASSES.palette[0]


def test_nothing_but_ignored_pixels():
    one = Prediction(np.full((8, 8), 255, np.uint8), CLASSES)
    assert one.overlay().size == (384, 384)
    assert one.areas()["classes"] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": np.zeros((2, 2), np.int64)}, "labels are int64"),
        ({"labels": np.zeros((2, 2, 1), np.uint8)}, "need uint8"),
        ({"image": np.zeros((3, 2, 3), np.uint8)}, "image is"),
        ({"scores": np.zeros((2, 2, 2), np.float16)}, "scores are"),
    ],
)
def test_what_does_not_fit_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Prediction(**{"labels": np.zeros((2, 2), np.uint8), "classes": CLASSES, **given})


def test_alpha_is_checked():
    with pytest.raises(ValueError, match="alpha is 2"):
        prediction().overlay(2)


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_images_that_are_not_rgb_are_shown_gray_or_by_their_first_channels(channels, shown):
    image = np.random.default_rng(0).integers(0, 256, (96, 96, channels), dtype=np.uint8)
    np.testing.assert_array_equal(as_picture(image), image[..., shown])
    of_channels, of_rgb = prediction(image=image).overlay(), prediction(image=image[..., shown]).overlay()
    np.testing.assert_array_equal(np.asarray(of_channels), np.asarray(of_rgb))
