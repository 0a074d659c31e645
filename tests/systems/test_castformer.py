"""CASTformer beyond the goldens: counts, shapes, the sampler's gradient, what the critic sees, weights, bad options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from segvit.contracts import UserError
from segvit.losses.adversarial import class_aware, gradient_penalty, one_hot
from segvit.nn.flops import count_parameters
from segvit.systems.castformer import (
    Critic,
    ResNetV2,
    Sampler,
    castformer,
    convert,
    dice_of_images,
    load_npz,
    sample_points,
)

TINY: dict[str, Any] = {"width": 32, "units": [1, 1, 1], "dim": 32, "heads": 2, "depth": 1}


@pytest.mark.parametrize(("units", "count", "convolutions"), [((3, 4, 6), 8_543_296, 40), ((3, 4, 9), 11_894_848, 49)])
def test_the_encoder_has_the_published_numbers(units: tuple[int, ...], count: int, convolutions: int) -> None:
    with torch.device("meta"):
        encoder = ResNetV2(units=units)
        maps = encoder(torch.empty(1, 3, 224, 224)).maps
    assert count_parameters(encoder) == count
    main = [key for key, value in encoder.named_parameters() if value.ndim == 4 and "downsample" not in key]
    assert len(main) == convolutions
    assert [tuple(x.shape[1:]) for x in maps] == [(64, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14)]


def test_the_second_map_is_filled_with_zeros_and_the_third_reads_it_unfilled() -> None:
    torch.manual_seed(0)
    encoder = ResNetV2(width=32, units=(1, 1, 1))
    images = torch.randn(1, 3, 64, 48)
    raw, features = encoder.maps(images), encoder(images)
    assert raw[1].shape[-2:] == (15, 11)
    assert features.maps[1].shape[-2:] == (16, 12)
    assert features.maps[1][..., 15:, :].abs().max() == features.maps[1][..., 11:].abs().max() == 0
    assert torch.equal(features.maps[1][..., :15, :11], raw[1])
    assert torch.equal(features.maps[2], raw[2])


def test_samples_at_whole_places_are_the_cells_and_0_outside() -> None:
    features = torch.randn(1, 3, 4, 5)
    points = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [1.5, 2.0], [-1.0, 2.0], [4.0, 0.0], [2.0, 5.0]]])
    found = sample_points(features, points)[0]
    torch.testing.assert_close(found[0], features[0, :, 0, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], features[0, :, 3, 4], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[2], features[0, :, 1:3, 2].mean(1), atol=1e-5, rtol=1e-4)
    assert found[3:].abs().max() < 1e-5
    assert sample_points(features[..., :1, :1], torch.zeros(1, 1, 2)).allclose(features[..., 0, 0])


def test_points_start_row_by_row_and_offsets_learn_through_the_next_sampling_alone() -> None:
    torch.manual_seed(0)
    sampler = Sampler(16, grid=2, iterations=3, heads=2)
    steps = list(sampler.steps(torch.randn(1, 16, 4, 8)))
    expected = torch.tensor([[[1.0, 2.0], [1.0, 6.0], [3.0, 2.0], [3.0, 6.0]]])
    torch.testing.assert_close(steps[0].points, expected)
    assert torch.equal(steps[1].points.detach(), expected)  # the offset heads start at 0
    assert steps[2].offsets is None
    steps[1].tokens.sum().backward()
    assert sampler.offsets[0].weight.grad.abs().max() > 0
    assert sampler.offsets[1].weight.grad is None


def test_dice_by_hand() -> None:
    masks = torch.tensor([[[0, 1], [1, 255]]])
    logits = torch.zeros(1, 2, 2, 2, dtype=torch.double)
    # Three valid pixels with p = 1/2: class 0 has 1 - 2 * 0.5 / (0.75 + 1), class 1 has 1 - 2 * 1 / (0.75 + 2).
    expected = ((1 - 1 / 1.75) + (1 - 2 / 2.75)) / 2
    assert dice_of_images(logits, masks, ignore_index=255).item() == pytest.approx(expected, abs=1e-5)


def test_what_the_critic_sees() -> None:
    images, masks = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    masks[0, 0, 0] = 255
    truth, valid = one_hot(masks, 3, ignore_index=255).float(), masks != 255
    seen = class_aware(images, truth, valid)
    assert torch.equal(seen, images * ((masks > 0) & valid)[:, None])
    each = class_aware(images, truth, valid, mode="per_class")
    assert each.shape == (6, 3, 4, 4)
    assert torch.equal(each[4], images[1] * (masks[1] == 1))


def test_the_penalty_is_that_of_a_linear_critic() -> None:
    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((3, 2, 2), 0.5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.weight).sum((1, 2, 3))

    critic = Linear()
    found = gradient_penalty(critic, torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2))
    norm = 12**0.5 / 2
    assert found.item() == pytest.approx((norm - 1) ** 2)
    found.backward()
    torch.testing.assert_close(critic.weight.grad, torch.full((3, 2, 2), 2 * (norm - 1) * 0.5 / norm))


def test_the_penalty_reaches_every_layer_of_the_critic() -> None:
    torch.manual_seed(0)
    critic = Critic(image_size=(64, 48), **TINY)
    gradient_penalty(critic, torch.randn(2, 3, 64, 48), torch.randn(2, 3, 64, 48)).backward()
    without = [key for key, p in critic.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert without == ["head.2.bias"]  # a constant has no slope
    assert all(p.grad is None or p.grad.isfinite().all() for p in critic.parameters())
    empty = torch.zeros(1, 3, 64, 48)
    assert gradient_penalty(critic, empty, empty).isfinite()


def test_npz_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = ResNetV2(width=32, units=(1, 1, 1))
    arrays = {"Transformer/encoder_norm/scale": np.ones(3, np.float32)}
    for key, value in encoder.state_dict().items():
        name = key.removeprefix("body.").replace(".", "/").replace("downsample/weight", "conv_proj/kernel")
        name = name.replace("root/conv", "conv_root").replace("root/gn", "gn_root")
        name = name.replace("weight", "kernel" if value.ndim == 4 else "scale")
        arrays[name] = (value.permute(2, 3, 1, 0) if value.ndim == 4 else value.view(1, 1, 1, -1)).numpy()
    np.savez(tmp_path / "r50.npz", **arrays)
    other = ResNetV2(width=32, units=(1, 1, 1))
    load_npz(other, str(tmp_path / "r50.npz"))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in encoder.state_dict().items())
    with pytest.raises(UserError, match="does not fit the encoder"):
        load_npz(ResNetV2(width=32, units=(1, 1, 2)), str(tmp_path / "r50.npz"))
    with pytest.raises(UserError, match="cannot be read"):
        load_npz(other, str(tmp_path / "nothing.npz"))


def test_names_of_the_works_it_builds_on() -> None:
    state = {"transformer.embeddings.hybrid_model.root.gn.bias": torch.ones(1), "point_coord": torch.ones(1)}
    assert convert(state).keys() == {"backbone.root.gn.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 48}, "width is 48; its norms have 32 groups"),
        ({"units": [3, 4]}, "three numbers"),
        ({"dim": 30, "heads": 4}, "does not divide into 4 heads"),
        ({"grid": [16, 16]}, "must be four numbers"),
        ({"iterations": 0}, "iterations 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        castformer(num_classes=2, **TINY | options)
