"""Pyramids of timm: maps of any image, timm's own features, weights in several layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from segvit.backbones.pyramid import Pyramid, pyramid
from segvit.contracts import UserError
from segvit.nn.flops import count_parameters
from tests.counting import gmacs

# One family for each way that timm collects stages: flattened lists, own classes, channels last, a whole model.
FAMILIES = [
    "pvt_v2_b0", "resnet18", "convnext_atto", "efficientnet_b0", "swin_tiny_patch4_window7_224", "mambaout_femto",
    "twins_pcpvt_small",
]  # fmt: skip


def randomised(name: str, **options: Any) -> Any:
    """timm's classifier away from its initialisation, where norms and statistics are trivial."""
    torch.manual_seed(0)
    whole = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for tensor in whole.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.02 * torch.rand_like(tensor))
    return whole


def saved(whole: Any, path: Path) -> str:
    save_file({key: value.contiguous() for key, value in whole.state_dict().items()}, path)
    return str(path)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_equals_timm_at_odd_sizes(name: str, tmp_path: Path) -> None:
    whole = randomised(name, **({"strict_img_size": False} if name.startswith("swin") else {}))
    network = pyramid(name, weights=saved(whole, tmp_path / "timm.safetensors")).eval()
    images = torch.randn(2, 3, 70, 100)
    features = network(images)
    assert (features.covers, features.grid, features.strides) == ((96, 128), (24, 32), [4, 8, 16, 32])
    padded = F.pad(images, (0, 28, 0, 26))
    expected = whole.forward_intermediates(padded, indices=4, intermediates_only=True, output_fmt="NCHW")
    for mine, theirs, dim, stride in zip(features.maps, expected, network.dims, network.strides, strict=True):
        assert mine.shape == (2, dim, 96 // stride, 128 // stride)
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


# Parameters and multiply-adds at 224 of the official dense PVT v2, measured.
PVT_V2 = {
    "b0": (3.410, 0.566), "b1": (13.496, 2.108), "b2": (24.850, 4.026), "b2_li": (22.041, 3.888),
    "b3": (44.726, 6.897), "b4": (62.043, 10.101), "b5": (81.443, 11.717),
}  # fmt: skip
HEAVY = ("b3", "b4", "b5")


@pytest.mark.parametrize("size", [pytest.param(n, marks=pytest.mark.slow if n in HEAVY else []) for n in PVT_V2])
def test_published_counts_of_pvt_v2(size: str) -> None:
    with torch.device("meta"):
        network = pyramid(f"pvt_v2_{size}")
    parameters, multiply_adds = PVT_V2[size]
    assert count_parameters(network) / 1e6 == pytest.approx(parameters, abs=5e-4)
    assert gmacs(network, (224, 224)) == pytest.approx(multiply_adds, abs=1e-3)


def official_pvt_v2(whole: Any) -> dict[str, Tensor]:
    """timm's keys back into the authors', whose stages are numbered from one."""
    theirs = {}
    for key, value in whole.state_dict().items():
        parts = key.split(".")
        if parts[0] == "stages":
            number, kind, *rest = int(parts[1]) + 1, *parts[2:]
            kind = {"downsample": "patch_embed", "blocks": "block", "norm": "norm"}[kind]
            parts = [f"{kind}{number}", *rest]
        elif parts[0] == "patch_embed":
            parts[0] = "patch_embed1"
        theirs[".".join(parts).replace(".dwconv.", ".dwconv.dwconv.")] = value
    return theirs


def test_official_checkpoints_of_pvt_v2(tmp_path: Path) -> None:
    whole = randomised("pvt_v2_b0")
    theirs = official_pvt_v2(whole)
    assert {"patch_embed2.proj.weight", "block4.1.mlp.dwconv.dwconv.bias", "norm1.weight"} <= theirs.keys()
    torch.save({"state_dict": theirs}, tmp_path / "official.pth")
    own = pyramid("pvt_v2_b0", weights=saved(whole, tmp_path / "timm.safetensors")).state_dict()
    loaded = pyramid("pvt_v2_b0", weights=str(tmp_path / "official.pth")).state_dict()
    assert all(torch.equal(value, own[key]) for key, value in loaded.items())


@pytest.mark.parametrize(("name", "kernel"), [("resnet18", "conv1.weight"), ("pvt_v2_b0", "patch_embed.proj.weight")])
def test_images_that_are_not_rgb(name: str, kernel: str, tmp_path: Path) -> None:
    whole = randomised(name)
    gray = pyramid(name, weights=saved(whole, tmp_path / "timm.safetensors"), in_channels=1)
    torch.testing.assert_close(gray.network.state_dict()[kernel], whole.state_dict()[kernel].sum(1, keepdim=True))
    assert (gray.mean, gray.std) == ((0.5,), (0.5,))
    assert gray(torch.randn(2, 1, 64, 64)).maps[0].shape[-2:] == (16, 16)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    state = dict(randomised("resnet18").state_dict())
    wrong = {
        "missing": {key: value for key, value in state.items() if key != "layer1.0.conv1.weight"},
        "unknown": state | {"layer5.weight": torch.zeros(1)},
        "of another shape": state | {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)},
    }
    for what, tensors in wrong.items():
        path = tmp_path / f"{what}.safetensors"
        save_file(tensors, path)
        with pytest.raises(UserError, match=rf"does not fit: .*1 (keys )?{what}.*choose the matching backbone"):
            pyramid("resnet18", weights=str(path))
    with pytest.raises(UserError, match="does not fit"):
        pyramid("pvt_v2_b0", weights=str(path))
    with pytest.raises(UserError, match="no such weights file"):
        pyramid("resnet18", weights=str(tmp_path / "nothing.pth"))
    with pytest.raises(UserError, match="neither a local file nor to be had from the hub"):
        pyramid("resnet18", weights="resnet18.a1_in1k")


def test_mean_and_deviation_are_those_of_the_weights() -> None:
    assert pyramid("resnet18").mean == (0.485, 0.456, 0.406)
    assert pyramid("tf_efficientnet_b0.ns_jft_in1k").mean == (0.485, 0.456, 0.406)
    assert pyramid("mobilevitv2_050").mean == (0.0, 0.0, 0.0)


def test_stages_and_stochastic_depth() -> None:
    network = pyramid("convnext_atto", out_indices=(1, 3), drop_path=0.3)
    assert (network.dims, network.strides) == ((80, 320), [8, 32])
    rates = [m.drop_prob for m in network.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet17"}, "timm has no model 'resnet17'"),
        ({"name": "vgg11", "drop_path": 0.1}, "gives no feature pyramid with these options .*drop_path_rate"),
        ({"name": "resnet18", "image_size": 64}, "gives no feature pyramid with these options .*img_size"),
        ({"name": "resnet18", "out_indices": (7,)}, "gives no feature pyramid with these options"),
        ({"name": "resnet18", "in_channels": 0}, "1 channel or more"),
    ],
)
def test_what_timm_cannot_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pyramid(**options)


def test_a_window_of_its_own() -> None:
    network = pyramid("swin_tiny_patch4_window7_224", image_size=96)
    assert isinstance(network, Pyramid)
    assert network(torch.randn(1, 3, 64, 96)).maps[-1].shape == (1, 768, 2, 3)
