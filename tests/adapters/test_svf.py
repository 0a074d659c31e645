"""SVF against its definition: the start, one singular value at a time, merging, and factors that do not recur."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from segvit.adapters.catalogue import attach
from segvit.adapters.places import used_layers
from segvit.adapters.svf import (
    SingularValues,
    compose,
    decompose,
    default_layers,
    kept,
    merged,
    svf,
    verify_factors,
    wide_svd,
)
from segvit.backbones.pyramid import pyramid
from segvit.contracts import UserError
from segvit.zoo import create_model

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(6, 10),
    "wide linear without bias": lambda: nn.Linear(12, 4, bias=False),
    "conv": lambda: nn.Conv2d(6, 8, 3, stride=2, padding=2, dilation=2),
    "reflecting conv": lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    "grouped conv": lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2),
    "depthwise conv": lambda: nn.Conv2d(6, 12, 5, padding=2, groups=6),
    "one output": lambda: nn.Conv2d(6, 1, 1),
    "same padding": lambda: nn.Conv2d(6, 8, 3, padding="same"),
}


def layer(name: str) -> Any:
    torch.manual_seed(0)
    return LAYERS[name]().requires_grad_(False)


def example(base: Any) -> Tensor:
    if isinstance(base, nn.Linear):
        return torch.randn(2, 5, base.in_features)
    return torch.randn(2, base.in_channels, 9, 11)


def move(tuned: SingularValues) -> SingularValues:
    """As if trained."""
    torch.manual_seed(1)
    tuned.singular_values.data += torch.randn_like(tuned.singular_values)
    return tuned


@pytest.mark.parametrize("name", LAYERS)
def test_the_start_is_the_layer_to_the_last_bit(name: str) -> None:
    base = layer(name)
    x = example(base)
    assert torch.equal(SingularValues(base)(x), base(x))


@pytest.mark.parametrize("name", LAYERS)
def test_factors_are_the_singular_value_decomposition_of_each_group(name: str) -> None:
    base = layer(name)
    left, values, right = decompose(base)
    groups = base.weight.view(len(values), -1, right.shape[2])
    torch.testing.assert_close(compose(left, values, right), groups)
    torch.testing.assert_close(values, torch.linalg.svdvals(groups))
    unit = torch.eye(values.shape[1]).expand(len(values), -1, -1)
    torch.testing.assert_close(left.mT @ left, unit)
    torch.testing.assert_close(right @ right.mT, unit)


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_is_the_paper_s(name: str) -> None:
    """dL/ds_r = u_r' (dL/dW) v_r for each group."""
    base = layer(name)
    x, tuned = example(base), SingularValues(base)
    tuned(x).sin().sum().backward()
    base.weight.requires_grad_(True)
    base(x).sin().sum().backward()
    slope = base.weight.grad.view(len(tuned.left), tuned.left.shape[1], -1)
    expected = torch.einsum("gor,goi,gri->gr", tuned.left, slope, tuned.right)
    assert tuned.singular_values.grad is not None
    torch.testing.assert_close(tuned.singular_values.grad, expected, rtol=1e-4, atol=1e-4)


def test_a_group_s_singular_values_change_its_channels_only() -> None:
    base = layer("grouped conv")
    x, tuned = example(base), SingularValues(base)
    with torch.no_grad():
        tuned.singular_values[1] *= 3
        bias = base.bias[:, None, None]
        out, before = tuned(x) - bias, base(x) - bias
    assert torch.equal(out[:, :4], before[:, :4])
    torch.testing.assert_close(out[:, 4:], 3 * before[:, 4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_merged_is_a_plain_layer_with_the_same_output(name: str, dtype: torch.dtype) -> None:
    base = layer(name).to(dtype)
    before = base.weight.clone()
    tuned = move(SingularValues(base))
    assert tuned.singular_values.dtype == torch.float32  # a small step would be lost in the layer's own precision
    plain, x = merged(tuned), example(base).to(dtype)
    assert type(plain) is type(base)
    assert plain.get_parameter("weight").dtype == dtype
    assert torch.equal(plain(x), tuned(x))
    assert not torch.allclose(plain(x), base(x), atol=1e-2)
    assert torch.equal(base.weight, before)


@torch.no_grad()
def test_lower_ranks_keep_the_weight_and_tune_the_largest_values() -> None:
    base = layer("conv")
    x, tuned = example(base), SingularValues(base, rank=3)
    assert torch.equal(tuned(x), base(x))
    tuned.singular_values.zero_()
    rest = torch.linalg.svdvals(tuned.weight().flatten(1))
    torch.testing.assert_close(rest[:5], torch.linalg.svdvals(base.weight.flatten(1))[3:])
    lossy = SingularValues(base, rank=3, lossy=True)
    assert torch.linalg.matrix_rank(lossy.weight().flatten(1)) == 3


@pytest.mark.parametrize(("outputs", "inputs", "ratio", "count"), [
    (64, 3, 1.0, 24), (21, 64, 1.0, 20), (3, 64, 1.0, 1), (64, 64, 0.5, 32), (30, 64, 0.5, 12),
])  # fmt: skip
def test_the_official_rank_is_a_multiple_of_four(outputs: int, inputs: int, ratio: float, count: int) -> None:
    conv = nn.Conv2d(inputs, outputs, 3 if inputs == 3 else 1)
    assert kept(conv, ratio, official=True) == count
    assert kept(conv, ratio, official=False) == int(min(outputs, conv.weight[0].numel()) * ratio)


@pytest.mark.parametrize(("name", "count"), [("resnet50", 12_544), ("resnet101", 25_600)])
def test_the_card_s_numbers_of_singular_values(name: str, count: int) -> None:
    """Stages 2 to 4 of a ResNet, all convolutions."""
    with torch.device("meta"):
        backbone = timm.create_model(name, features_only=True)
    layers = dict(used_layers(nn.ModuleDict({"network": backbone})))
    chosen = default_layers([name for name, module in layers.items() if isinstance(module, nn.Conv2d)])
    assert sum(kept(layers[name], 1.0, official=True) for name in chosen) == count


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "pvt_v2_b0"])
def test_pyramids(name: str, seeded: torch.Generator) -> None:
    """All stages but the first are tuned; the merged network is plain and gives the tuned output."""
    network = pyramid(name).requires_grad_(False).eval()
    keys, images = list(network.state_dict()), torch.randn(1, 3, 64, 64)
    before = network(images).maps
    handle = svf(network, official_rank=False)
    assert all(torch.equal(a, b) for a, b in zip(network(images).maps, before, strict=True))
    assert {parameter.requires_grad for parameter in network.parameters()} == {True, False}
    assert all(name.endswith("singular_values") for name in handle.trained)
    assert len(handle.trained) == len(handle.changes)
    with torch.no_grad():
        for name in handle.trained:
            network.get_parameter(name).mul_(1.1)
    tuned = [x.detach() for x in network(images).maps]
    assert torch.equal(tuned[0], before[0])
    assert not torch.allclose(tuned[-1], before[-1], atol=1e-3)
    handle.merge()
    assert list(network.state_dict()) == keys
    for ours, expected in zip(network(images).maps, tuned, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_system_with_a_plain_vit(seeded: torch.Generator) -> None:
    model = create_model(
        "segmenter_vit_tiny", num_classes=3, image_size=32, patch_size=8, depth=2, embed_dim=64, layers=1
    )
    model.eval()
    images = torch.randn(2, 3, 40, 24)
    before = model(images).logits
    handle = attach(model, "svf", layers=r"blocks\.\d\.attn")
    assert handle.names == [f"blocks.{i}.attn.{part}.singular_values" for i in range(2) for part in ("qkv", "proj")]
    assert torch.equal(model(images).logits, before)
    model(images).logits.square().mean().backward()
    for name in handle.names:
        assert model.backbone.get_parameter(name).grad.abs().max() > 0
    assert all(p.grad is None for n, p in model.backbone.named_parameters() if n not in handle.names)


def degenerate(*, store_factors: bool = False) -> SingularValues:
    """A layer whose singular values all coincide, so that its factors are free up to a rotation."""
    base = nn.Linear(4, 4)
    nn.init.eye_(base.weight)
    return SingularValues(base.requires_grad_(False), store_factors=store_factors)


def rotated(tuned: SingularValues) -> SingularValues:
    """The same layer on another machine: equally good factors."""
    other = copy.deepcopy(tuned)
    torch.manual_seed(2)
    rotation = torch.linalg.qr(torch.randn(4, 4)).Q
    other.left, other.right = other.left @ rotation, rotation.T @ other.right
    other.singular_values.data = other.initial.clone()
    return other


def test_factors_that_do_not_recur_are_refused() -> None:
    here = degenerate()
    there = rotated(here)
    there.load_state_dict(here.state_dict())  # nothing was tuned, so nothing depends on the factors
    move(here)
    with pytest.raises(UserError, match="store_factors"):
        there.load_state_dict(here.state_dict())
    there = rotated(here)
    with torch.no_grad():
        there.singular_values.copy_(here.singular_values)
        there.fingerprint.copy_(here.state_dict()["fingerprint"])
    network = nn.Sequential(nn.Identity(), there)
    with pytest.raises(UserError, match=r"^1 was tuned"):
        verify_factors(network)


def test_stored_factors_need_not_recur() -> None:
    here = move(degenerate(store_factors=True))
    there = rotated(here)
    there.load_state_dict(here.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(there(x), here(x))


def test_signs_do_not_matter() -> None:
    here = move(SingularValues(layer("conv")))
    there = SingularValues(layer("conv"))
    signs = torch.tensor([1.0, -1.0]).repeat(4)
    there.left, there.right = there.left * signs, there.right * signs[:, None]
    there.load_state_dict(here.state_dict())
    verify_factors(there)
    torch.testing.assert_close(there.weight(), here.weight())


def test_a_checkpoint_brings_its_base_weights_and_their_factors() -> None:
    here = move(SingularValues(layer("grouped conv")))
    torch.manual_seed(5)
    there = SingularValues(LAYERS["grouped conv"]().requires_grad_(False))
    there.load_state_dict(here.state_dict())
    x = example(here.base_layer)
    torch.testing.assert_close(there(x), here(x), rtol=0, atol=0)


def test_values_for_other_base_weights_are_refused() -> None:
    values = {k: v for k, v in move(SingularValues(layer("conv"))).state_dict().items() if "base_layer" not in k}
    other = layer("conv")
    other.weight.mul_(2)
    with pytest.raises(UserError, match="check the base weights"):
        SingularValues(other).load_state_dict(values, strict=False)


@pytest.mark.parametrize("rank", [0, 2])
def test_weights_of_low_rank(rank: int) -> None:
    weight = torch.randn(6, rank) @ torch.randn(rank, 9)
    left, values, right = wide_svd(weight[None].double())
    assert right.isfinite().all()
    torch.testing.assert_close(compose(left, values, right)[0], weight.double())
    torch.testing.assert_close(values[0, rank:], torch.zeros(6 - rank).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("options", "message"), [
    ({"rank_ratio": 0}, "rank_ratio"), ({"layers": "("}, "not a regular"), ({"layers": "head"}, "no layer"),
    ({}, "set layers"),
])  # fmt: skip
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        svf(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), **options)
