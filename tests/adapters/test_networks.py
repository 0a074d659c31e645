"""Every tuning method on every kind of backbone: start, what trains, files, wrong base, merging, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from segvit.adapters.catalogue import ADAPTERS
from segvit.adapters.files import save_adapter
from segvit.contracts import UserError
from segvit.model_folder import load_model, save_model
from segvit.tasks.adapters import merge
from segvit.zoo import adapt, create_model
from tests.adapters.test_contract import IDENTITY, MERGEABLE, needed, shake

K = 3
PYRAMID: dict[str, Any] = {"fpn_dim": 16, "head_dim": 16}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("segmenter_vit_tiny", {"image_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 64, "layers": 1}),
    # Rotary positions, a class token and four registers.
    "dinov3": (
        "segvit_vit_tiny",
        {
            "backbone": "vit_small_patch16_dinov3", "image_size": 32, "patch_size": 8, "depth": 2,
            "out_indices": [0, 1], "layers": 1, "prefix_tokens": "keep",
        },
    ),
    "resnet": ("semantic_fpn", PYRAMID | {"backbone": "resnet10t"}),
    "convnext": ("semantic_fpn", PYRAMID | {"backbone": "convnext_atto"}),
    "swin": ("semantic_fpn", PYRAMID | {"backbone": "swin_tiny_patch4_window7_224"}),
    "pvt": ("semantic_fpn_pvt_tiny", PYRAMID | {"depths": [1] * 4, "dims": [16, 32, 40, 64], "position_size": 64}),
    "pvt_v2": ("semantic_fpn", PYRAMID | {"backbone": "pvt_v2_b0"}),
}  # fmt: skip
IN_DEFAULT = ("vit", "dinov3", "resnet")
OPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("lora", "resnet"): {"target_modules": ["conv1", "conv2"]},
    ("lora", "convnext"): {"target_modules": ["fc1", "fc2"]},
    ("lora", "pvt"): {"target_modules": ["q", "kv"]},
    ("lora", "pvt_v2"): {"target_modules": ["q", "kv"]},
}
PROMPTED = {"vit", "dinov3", "swin"}  # prompts are tokens, which only these backbones have
SUPPORTED = {(m, n) for m in ADAPTERS for n in NETWORKS if not m.startswith("vpt") or n in PROMPTED} - {
    ("cavpt", n)
    for n in NETWORKS
    if n not in ("vit", "dinov3")  # plain ViTs only
}
PAIRS = [
    pytest.param(m, n, id=f"{m}-{n}", marks=() if n in IN_DEFAULT else pytest.mark.slow) for m, n in sorted(SUPPORTED)
]


def build(network: str) -> Any:
    torch.manual_seed(0)
    name, options = NETWORKS[network]
    return create_model(name, num_classes=K, **options).eval()


def tuned(method: str, network: str) -> Any:
    """As if it had been trained."""
    model = build(network)
    torch.manual_seed(1)
    adapt(model, method, **OPTIONS.get((method, network), needed(method)))
    shake(model)
    return model.eval()


def images(network: str) -> Tensor:
    side = (40, 48) if network in PROMPTED else (64, 96)
    return torch.randn(2, 3, *side, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("method", "network"), PAIRS)
def test_start_and_what_trains(method: str, network: str) -> None:
    model, x = build(network), images(network)
    base = model(x).logits
    head = {key for key, _ in model.named_parameters() if not key.startswith("backbone.")}
    adapt(model, method, **OPTIONS.get((method, network), needed(method)))
    model.eval()
    if method in IDENTITY:
        torch.testing.assert_close(model(x).logits, base, rtol=1e-4, atol=1e-5)
    elif network == "vit":  # the others are built with branches that start near zero
        assert not torch.allclose(model(x).logits, base, rtol=1e-4, atol=1e-5)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == head | {f"backbone.{key}" for key in model.adapter.trained}
    model.train()
    model(x).logits.square().mean().backward()
    reached = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached <= trained
    assert any(key.startswith("backbone.") for key in reached) == (method != "head_only")


@pytest.mark.parametrize(("method", "network"), [pair for pair in PAIRS if pair.values[0] != "full"])
def test_files(method: str, network: str, tmp_path: Path) -> None:
    save_model(build(network), tmp_path / "base")
    model = load_model(tmp_path / "base")
    adapt(model, method, **OPTIONS.get((method, network), needed(method)))
    shake(model)
    save_adapter(model, tmp_path / "adapter", base="../base")
    expected = model.eval()(images(network)).logits
    torch.testing.assert_close(load_model(tmp_path / "adapter")(images(network)).logits, expected, rtol=1e-5, atol=1e-5)
    other = build(network)
    with torch.no_grad():
        weight = next(p for name, p in other.backbone.named_parameters() if p.ndim > 1 and "pos_embed" not in name)
        weight.view(-1)[0] += 1e-4
    save_model(other, tmp_path / "other")
    with pytest.raises(UserError, match="other base weights"):
        load_model(tmp_path / "adapter", base=tmp_path / "other")


@pytest.mark.parametrize(("method", "network"), [pair for pair in PAIRS if pair.values[0] in MERGEABLE])
def test_merged_equals_unmerged(method: str, network: str) -> None:
    model = tuned(method, network).double()
    x = images(network).double()
    expected = model(x).logits
    merge(model)
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "network"), PAIRS)
def test_export(method: str, network: str) -> None:
    model, x = tuned(method, network), images(network)[:1]
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x).logits, model(x).logits, rtol=1e-4, atol=1e-4)
