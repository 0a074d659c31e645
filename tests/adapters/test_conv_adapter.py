"""Conv-Adapter: the official parameter counts, its places in each family, and what it leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from segvit.adapters.catalogue import attach
from segvit.adapters.conv_adapter import AdaptedSwinBlock, ConvAdapter, conv_adapter
from segvit.adapters.handle import Handle
from segvit.backbones.pvt import pvt
from segvit.backbones.pyramid import pyramid
from segvit.backbones.vit import plain_vit
from segvit.contracts import UserError
from segvit.nn.tokens import patch_map
from segvit.zoo import create_model

FORMS = ("conv_parallel", "conv_sequential", "residual_parallel", "residual_sequential")
CONV_NETS = ("resnet10t", "resnet26", "convnext_atto", "convnextv2_atto", "seresnext26d_32x4d")
BACKBONES: dict[str, Any] = {
    **{name: lambda name=name: pyramid(name) for name in (*CONV_NETS, "pvt_v2_b0")},
    "swin": lambda: pyramid("swin_tiny_patch4_window7_224", image_size=64),
    "pvt": lambda: pvt("pvt_tiny", dims=(16, 32, 80, 64), depths=(1, 1, 1, 1)),
    "vit": lambda: plain_vit("vit_tiny_patch16_224", image_size=64, depth=3, out_indices=[1, 2]),
    "dinov2": lambda: plain_vit("vit_small_patch14_reg4_dinov2", image_size=56, depth=2, out_indices=[1]),
    "eva": lambda: plain_vit("eva02_tiny_patch14_224", image_size=56, depth=2, out_indices=[1]),
    "beit": lambda: plain_vit("beit_base_patch16_224", image_size=64, depth=2, embed_dim=64, out_indices=[1]),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    network = BACKBONES[name]().requires_grad_(False).eval()
    for key, parameter in network.named_parameters():
        if key.endswith((".gamma", "bn3.weight", "bn2.weight")):  # else residual branches are zero at first
            parameter.data.fill_(0.5)
    return network


def images() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def added(handle: Handle) -> int:
    return sum(handle.root.get_parameter(name).numel() for name in handle.names)


@pytest.mark.parametrize(("reduction", "count"), [
    (1, 1_302_784), (2, 672_160), (4, 356_848), (8, 199_192), (16, 120_364), (32, 80_950),
])  # fmt: skip
def test_the_official_counts_of_resnet50(reduction: int, count: int) -> None:
    with torch.device("meta"):
        assert added(conv_adapter(pyramid("resnet50"), reduction=reduction)) == count


@pytest.mark.parametrize(("reduction", "count"), [
    (4, 3_721_728), (8, 2_324_672), (16, 1_626_144), (32, 1_276_880),
])  # fmt: skip
def test_the_official_counts_of_convnext_base(reduction: int, count: int) -> None:
    with torch.device("meta"):
        assert added(conv_adapter(pyramid("convnext_base"), reduction=reduction)) == count


def test_trained_norms_are_those_of_the_official_code() -> None:
    """Scale and shift of each block's norm, not those between stages; the last norm is not part of a pyramid."""
    network = build("convnext_atto")
    handle = conv_adapter(network, train_norms=True)
    tuned = [name for name in handle.trained if name not in handle.names]
    assert sum(network.get_parameter(name).numel() for name in tuned) == 2 * (2 * 40 + 2 * 80 + 6 * 160 + 2 * 320)
    assert all("blocks." in name for name in tuned)


@pytest.mark.parametrize("name", BACKBONES)
def test_only_adapters_train_and_detach_puts_the_modules_back(name: str) -> None:
    network, x = build(name), images()
    modules, before = dict(network.named_modules()), network(x).maps
    keys = list(network.state_dict())
    handle = conv_adapter(network)
    out = network(x).maps
    assert [m.shape for m in out] == [m.shape for m in before]
    assert not torch.allclose(out[-1], before[-1], atol=1e-3)
    torch.stack([m.square().mean() for m in out]).sum().backward()
    assert set(handle.names) == {key for key, p in network.named_parameters() if p.requires_grad}
    assert all(network.get_parameter(key).grad.abs().max() > 0 for key in handle.names)
    assert all(".adapter." in key for key in handle.names)
    replaced = {key.replace(".base_layer", "") for key in network.state_dict() if ".adapter." not in key}
    assert replaced == set(keys)
    handle.detach()
    assert {key: id(module) for key, module in network.named_modules()} == {k: id(m) for k, m in modules.items()}
    assert all(torch.equal(a, b) for a, b in zip(network(x).maps, before, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONV_NETS)
@torch.no_grad()
def test_four_forms_add_nothing_at_zero_and_something_else(name: str, form: Any) -> None:
    network, x = build(name), images()
    before, keys = network(x).maps, set(network.state_dict())
    handle = conv_adapter(network, form=form, zero_init=True)
    # The blocks' own forward, in our words: exact up to the order of a multiplication.
    for ours, expected in zip(network(x).maps, before, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for key in handle.names:
        if key.endswith("up.weight"):
            nn.init.normal_(network.get_parameter(key))
    assert not torch.allclose(network(x).maps[-1], before[-1], atol=1e-3)
    assert form == "conv_parallel" or keys <= set(network.state_dict())  # only convolutions between stages are wrapped


@pytest.mark.parametrize("name", ["swin", "pvt_v2_b0", "pvt", "vit", "dinov2", "eva", "beit"])
@torch.no_grad()
def test_transformers_at_zero(name: str) -> None:
    network, x = build(name), images()
    before = network(x).maps
    conv_adapter(network, zero_init=True)
    for ours, expected in zip(network(x).maps, before, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="conv_parallel only"):
        conv_adapter(build(name), form="conv_sequential")


@torch.no_grad()
def test_swin_adds_behind_the_attention_what_is_made_of_its_normalised_input() -> None:
    network = build("swin")
    block = network.network["layers_1"].blocks[1]
    handle = conv_adapter(network)
    adapted = network.network["layers_1"].blocks[1]
    assert isinstance(adapted, AdaptedSwinBlock)
    assert adapted.adapter.down.kernel_size == (7, 7)
    x = torch.randn(1, 8, 8, 192)
    normed = block.norm1(x)
    middle = x + block._attn(normed) + adapted.adapter(normed.movedim(3, 1)).movedim(1, 3)
    torch.testing.assert_close(adapted(x), middle + block.mlp(block.norm2(middle)))
    handle.detach()


@torch.no_grad()
def test_a_plain_vit_s_prefix_passes_by() -> None:
    network = build("dinov2")
    step = network.embed(images())
    handle = conv_adapter(network)
    out = network.gap(0, step)
    assert torch.equal(out.tokens[:, : step.prefix], step.tokens[:, : step.prefix])
    assert step.prefix == 5
    patches = step.tokens[:, step.prefix :]
    normed = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    local = network.gaps["0"].adapter(normed.mT.unflatten(2, step.grid))
    torch.testing.assert_close(patch_map(out), patch_map(step) + local, rtol=1e-4, atol=1e-5)
    assert [change.path for change in handle.changes] == ["gaps.0", "gaps.1"]


def test_dilation_and_stride_are_those_of_the_convolution() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(*ResNet(layers=(1, 1, 1, 1), output_stride=8, block=Bottleneck).layer4)
    conv_adapter(network.requires_grad_(False))
    assert network[0].adapter.down.dilation == network[0].conv2.dilation == (2, 2)
    assert network(torch.randn(1, 1024, 8, 8)).shape[-2:] == (8, 8)


@torch.no_grad()
def test_the_start_is_the_host_network_s() -> None:
    torch.manual_seed(0)
    conv_net, next_net = build("resnet26"), build("convnext_atto")
    conv_adapter(conv_net)
    conv_adapter(next_net)
    found = [[m for m in network.modules() if isinstance(m, ConvAdapter)] for network in (conv_net, next_net)]
    deep = found[0][-1].up  # Kaiming, fan out
    assert deep.weight.std().item() == pytest.approx((2 / deep.out_channels) ** 0.5, rel=0.05)
    assert max(adapter.down.weight.std().item() for adapter in found[1]) < 0.03
    for adapter in found[0] + found[1]:
        assert torch.equal(adapter.scale, torch.ones_like(adapter.scale))
        assert adapter.up.bias is not None
        assert adapter.up.bias.abs().max() == 0


def test_copies_are_independent() -> None:
    """As the moving average of the engine makes them."""
    network, x = build("swin"), images()
    conv_adapter(network)
    other = copy.deepcopy(network)
    with torch.no_grad():
        before = network(x).maps[-1]
        for parameter in other.parameters():
            parameter.mul_(0)
        assert torch.equal(network(x).maps[-1], before)
        assert other(x).maps[-1].abs().max() == 0


def test_a_system(seeded: torch.Generator) -> None:
    model = create_model("semantic_fpn_pvt_v2_b0", num_classes=3)
    handle = attach(model, "conv_adapter", reduction=16)
    model(torch.randn(1, 3, 64, 64)).logits.square().mean().backward()
    assert all(model.backbone.get_parameter(name).grad is not None for name in handle.names)
    with pytest.raises(UserError, match="no plain weights"):
        handle.merge()


@pytest.mark.parametrize(("name", "options", "message"), [
    ("resnet10t", {"reduction": 0}, "reduction must be"), ("resnet10t", {"kernel": 4}, "kernel odd"),
    ("resnet10t", {"reduction": 7}, "another reduction"), ("resnet10t", {"train_norms": True}, "leave it out"),
])  # fmt: skip
def test_mistakes(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        conv_adapter(build(name), **options)


def test_unknown_networks() -> None:
    with pytest.raises(UserError, match="none of which"):
        conv_adapter(nn.Sequential(nn.Conv2d(3, 8, 3)))
