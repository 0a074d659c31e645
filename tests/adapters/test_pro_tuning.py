"""Pro-tuning by its behaviour: the block, its places in each family, no effect at first, the card's budgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from segvit.adapters.catalogue import attach
from segvit.adapters.pro_tuning import PromptBlock, pro_tuning
from segvit.backbones.pvt import pvt
from segvit.backbones.pyramid import pyramid
from segvit.backbones.vit import plain_vit
from segvit.contracts import UserError
from segvit.nn.tokens import patch_map
from segvit.zoo import create_model

BACKBONES: dict[str, Any] = {
    "resnet": lambda: pyramid("resnet10t"),
    "convnext": lambda: pyramid("convnext_atto"),
    "swin": lambda: pyramid("swin_tiny_patch4_window7_224", image_size=64),
    "pvt_v2": lambda: pyramid("pvt_v2_b0"),
    "pvt": lambda: pvt("pvt_tiny", dims=(16, 32, 80, 64), depths=(1, 1, 1, 1)),
    "vit": lambda: plain_vit("vit_tiny_patch16_224", image_size=64, depth=8, embed_dim=64, out_indices=[1, 7]),
    "dinov2": lambda: plain_vit("vit_small_patch14_reg4_dinov2", image_size=56, depth=2, out_indices=[1]),
}
POSITIONS: Any = ("input", "output")


def build(name: str) -> Any:
    torch.manual_seed(0)
    network = BACKBONES[name]().requires_grad_(False).eval()
    for key, parameter in network.named_parameters():
        if key.endswith((".gamma", "bn2.weight")):  # else residual branches are next to nothing at first
            parameter.data.fill_(0.5)
    return network


def images() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "position", "budgets"), [
    ("resnet50", "input", (2.30, 2.81, 0.71)), ("resnet101", "output", (9.17, 11.25, 2.82)),
    ("swin_tiny_patch4_window7_224", "input", (1.32, 1.61, 0.40)),
    ("swin_base_patch4_window7_224", "input", (2.32, 2.84, 0.71)),
    ("swin_large_patch4_window7_224", "input", (5.18, 6.35, 1.59)),
    ("vit_base_patch16_224", "input", (3.93, 4.81, 1.20)), ("vit_large_patch16_224", "input", (6.94, 8.50, 2.13)),
])  # fmt: skip
def test_the_card_s_budgets(name: str, position: Any, budgets: tuple[float, float, float]) -> None:
    with torch.device("meta"):
        network: Any = plain_vit(name, out_indices=[-1]) if name.startswith("vit") else pyramid(name)
        for block, millions in zip(("grouped", "plain", "bottleneck"), budgets, strict=True):
            handle = pro_tuning(network, block=block, position=position)
            count = sum(network.get_parameter(key).numel() for key in handle.names)
            handle.detach()
            assert count - len(handle.names) == pytest.approx(millions * 1e6, abs=1.5e4)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", BACKBONES)
def test_the_start_is_the_frozen_network_and_only_prompts_train(name: str, position: Any) -> None:
    network, x = build(name), images()
    modules, before = dict(network.named_modules()), network(x).maps
    keys = set(network.state_dict())
    handle = pro_tuning(network, position=position)
    assert all(torch.equal(a, b) for a, b in zip(network(x).maps, before, strict=True))
    assert {key for key, p in network.named_parameters() if p.requires_grad} == set(handle.names)
    assert len(handle.changes) == (2 if name == "dinov2" else 4)
    assert keys <= {key.replace(".base_layer", "") for key in network.state_dict()}
    torch.stack([m.square().mean() for m in network(x).maps]).sum().backward()
    betas = [key for key in handle.names if key.endswith("beta")]
    assert len(betas) == len(handle.changes)
    assert all(network.get_parameter(key).grad.abs() > 0 for key in betas)
    with torch.no_grad():
        for key in betas:
            network.get_parameter(key).fill_(0.5)
    prompted = network(x).maps
    assert not torch.allclose(prompted[-1], before[-1], atol=1e-3)
    handle.detach()
    assert {key: id(module) for key, module in network.named_modules()} == {k: id(m) for k, m in modules.items()}
    assert all(torch.equal(a, b) for a, b in zip(network(x).maps, before, strict=True))


@pytest.mark.parametrize("kind", ["grouped", "plain", "bottleneck"])
@torch.no_grad()
def test_the_block(kind: Any) -> None:
    torch.manual_seed(0)
    block, x = PromptBlock(32, kind=kind, gelu=False), torch.randn(2, 32, 9, 7)
    assert torch.equal(block(x), x)
    block.beta.fill_(2)
    first, depthwise, second = (part for part in list(block.prompt)[:3])
    prompt = second(depthwise(first(x)))
    if kind == "grouped":
        gate = block.prompt[3]
        weights = torch.sigmoid(gate.fc2(torch.relu(gate.fc1(prompt.mean((2, 3), keepdim=True)))))
        prompt = block.prompt[4](prompt * weights)
    torch.testing.assert_close(block(x), x + 2 * prompt)
    assert (prompt - prompt.mean((2, 3), keepdim=True)).abs().max() > 0.1  # not one value for the whole map
    assert depthwise.kernel_size == (5, 5)
    assert depthwise.groups == depthwise.in_channels == (8 if kind == "bottleneck" else 32)
    torch.manual_seed(0)
    curved = PromptBlock(32, kind=kind, gelu=True)
    curved.beta.fill_(2)
    assert not torch.allclose(curved(x), block(x), atol=1e-3)


@pytest.mark.parametrize(("name", "position", "number", "same"), [
    ("resnet", "input", 2, 1), ("resnet", "output", 2, 1), ("swin", "input", 1, 0), ("swin", "output", 3, 2),
    ("pvt", "input", 1, 0), ("pvt", "output", 4, 3), ("pvt_v2", "input", 1, 0), ("convnext", "input", 2, 1),
    ("vit", "input", 2, 1), ("vit", "output", 1, 1),  # maps behind blocks 2 and 8, groups of two blocks
])  # fmt: skip
@torch.no_grad()
def test_a_prompt_acts_from_its_place_on(name: str, position: Any, number: int, same: int) -> None:
    """With the block of one stage alone, `same` maps before it stay."""
    network, x = build(name), images()
    before = network(x).maps
    handle = pro_tuning(network, position=position)
    betas = [key for key in handle.names if key.endswith("beta")]
    network.get_parameter(betas[number - 1]).fill_(1)
    equal = [torch.equal(a, b) for a, b in zip(network(x).maps, before, strict=True)]
    assert equal == [True] * same + [False] * (len(equal) - same)


@torch.no_grad()
def test_tokens_before_the_patches_pass_by() -> None:
    network = build("dinov2")
    pro_tuning(network)
    network.gaps["0"].block.beta.fill_(1)
    step = network.embed(images())
    out = network.gap(0, step)
    assert step.prefix == 5
    assert torch.equal(out.tokens[:, :5], step.tokens[:, :5])
    torch.testing.assert_close(patch_map(out), network.gaps["0"].block(patch_map(step)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("semantic_fpn_pvt_v2_b0", {}),
        ("segvit_vit_tiny", {"image_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 64, "out_indices": [1, 3]}),
    ],
)
def test_systems(name: str, options: dict[str, Any], seeded: torch.Generator) -> None:
    model = create_model(name, num_classes=3, **options)
    model.eval()
    x = torch.randn(1, 3, 64, 64)
    before = model(x).logits
    handle = attach(model, "pro_tuning", block="bottleneck")
    torch.testing.assert_close(model(x).logits, before, rtol=0, atol=0)
    model(x).logits.square().mean().backward()
    assert all(model.backbone.get_parameter(key).grad is not None for key in handle.names)
    with pytest.raises(UserError, match="no plain weights"):
        handle.merge()


def test_mistakes() -> None:
    with pytest.raises(UserError, match="choose plain"):
        PromptBlock(30, kind="grouped", gelu=False)
    with pytest.raises(UserError, match="no gaps between its stages"):
        pro_tuning(nn.Sequential(nn.Conv2d(3, 8, 3)))
