"""From an image to the network's input."""

import json

import numpy as np
import pytest
import torch

from segvit.contracts import InputSpec, UserError
from segvit.data.prepare import normalise, pad, prepare, resize_for, target_size

IMAGE = np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("spec", "ratio", "size"),
    [
        (InputSpec(), 1.0, (45, 61)),
        (InputSpec(), 0.5, (22, 30)),
        (InputSpec(scale=(128, 40)), 1.0, (40, 54)),
        (InputSpec(scale=(40, 128)), 1.0, (40, 54)),
        (InputSpec(scale=(128, 40)), 1.5, (60, 81)),
        (InputSpec(scale=(128, 40), min_side=32), 0.5, (32, 43)),
        (InputSpec(exact=(32, 64)), 1.0, (32, 64)),
        (InputSpec(exact=(32, 64)), 0.75, (24, 48)),
    ],
)
def test_sizes(spec, ratio, size):
    assert target_size((45, 61), spec, ratio) == size
    assert resize_for(IMAGE, spec, ratio).shape[:2] == size
    assert prepare(IMAGE, spec, ratio=ratio).shape == (3, *size)


def test_normalised_levels():
    half = normalise(np.array([[[0, 51, 255]]], np.uint8), InputSpec())
    assert half.dtype == torch.float32
    assert torch.equal(half.ravel(), torch.tensor([-1.0, (51 - 127.5) / 127.5, 1.0]))
    spec = InputSpec(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    expected = (torch.from_numpy(IMAGE).permute(2, 0, 1) - torch.tensor([123.675, 116.28, 103.53])[:, None, None]) / (
        torch.tensor([58.395, 57.12, 57.375])[:, None, None]
    )
    assert torch.allclose(normalise(IMAGE, spec), expected, atol=1e-6)


def test_flip_mirrors_the_resized_image():
    spec = InputSpec(scale=(128, 40))
    assert torch.equal(prepare(IMAGE, spec, flip=True), prepare(IMAGE, spec).flip(-1))


def test_read_only_images_are_welcome():
    image = IMAGE.copy()
    image.flags.writeable = False
    assert prepare(image, InputSpec()).shape == (3, 45, 61)


def test_padding_comes_at_the_right_and_bottom():
    image, mask = pad(torch.ones(3, 2, 5), np.ones((2, 5), np.uint8), (4, 4), 255)
    assert image.shape == (3, 4, 5)
    assert image[:, 2:].abs().sum() == 0
    assert image[:, :2].min() == 1
    assert mask.tolist() == [[1] * 5] * 2 + [[255] * 5] * 2
    again = pad(image, mask, (4, 5), 255)
    assert again[0] is image
    assert again[1] is mask


@pytest.mark.parametrize("channels", [1, 5])
def test_any_number_of_channels(channels):
    image = np.random.default_rng(1).integers(0, 256, (45, 61, channels), dtype=np.uint8)
    mean, std = tuple(0.1 * i for i in range(channels)), tuple(0.5 + 0.1 * i for i in range(channels))
    spec = InputSpec(mean=mean, std=std, scale=(128, 40))
    assert spec.channels == channels
    prepared = prepare(image, spec)
    assert prepared.shape == (channels, 40, 54)
    resized = resize_for(image, spec).astype(np.float32) / 255
    for i in range(channels):
        single = prepare(image[..., [i]], InputSpec(mean=mean[i : i + 1], std=std[i : i + 1], scale=(128, 40)))
        assert torch.equal(prepared[[i]], single)
        np.testing.assert_allclose(prepared[i], (resized[..., i] - mean[i]) / std[i], atol=1e-5)


def test_channels_must_be_those_of_the_spec():
    with pytest.raises(UserError, match="the image has 3 channels but the model reads 5"):
        normalise(IMAGE, InputSpec(mean=(0.5,) * 5, std=(0.5,) * 5))
    with pytest.raises(UserError, match="mean has 1 values and std 3; give both one for each channel"):
        InputSpec(mean=(0.5,))


def test_channels_and_levels_travel():
    spec = InputSpec(mean=(0.1, 0.2), std=(0.3, 0.4), levels=(0.0, 10000.0), window=(8, 8), stride=(4, 4))
    assert InputSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    older = InputSpec().to_json()
    del older["levels"]  # folders saved before there were levels
    assert InputSpec.from_json(older) == InputSpec()
