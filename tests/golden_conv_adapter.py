"""Builders of our counterparts to the golden cases of Conv-Adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from segvit.adapters.conv_adapter import ConvAdapter, conv_adapter
from segvit.nn.rename import rename
from tests.golden.run import Case

ADAPTER = (  # official -> ours
    (r"^block\.", ""),
    (r"tuning_module\.conv1\.", "adapter.down."),
    (r"tuning_module\.conv2\.", "adapter.up."),
    (r"tuning_module\.se$", "adapter.scale"),
)
BLOCK = ((r"dwconv\.", "conv_dw."), (r"pwconv1\.", "mlp.fc1."), (r"pwconv2\.", "mlp.fc2."))
NETWORK = (
    (r"^tuning_module_downsample\.0\.", "stages.1.downsample.1.tuning_module."),
    (r"^tuning_module_downsample\.1\.", "stages.2.downsample.1.tuning_module."),
    (r"^tuning_module_downsample\.2\.", "stages.3.downsample.1.tuning_module."),
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.1\.", r"stages.\1.downsample.1.base_layer."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^norm\.", "head.norm."),
)


def block_outputs(case: Case, block: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the block and its adapter make of the input, and the gradients of the adapter."""
    network = nn.Sequential(block).requires_grad_(False)
    conv_adapter(network, form=case.config.get("variant", "conv_parallel"), reduction=case.config["gamma"])
    adapted = network[0].eval()
    adapted.load_state_dict(state)
    adapter = cast(ConvAdapter, adapted.get_submodule("adapter"))
    seen: dict[str, Tensor] = {}

    def watch(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen.update(adapter_input=inputs[0], adapter_output=output)

    adapter.register_forward_hook(watch)
    out = adapted(case.inputs["x"])
    out.square().mean().backward()
    names = {"down": "conv1", "up": "conv2", "scale": "se"}
    gradients = {}
    for name, parameter in adapter.named_parameters():
        part, _, leaf = name.partition(".")
        assert parameter.grad is not None
        gradients["grad.tuning_module." + ".".join(filter(None, (names[part], leaf)))] = parameter.grad
    return {name: value.detach() for name, value in ({"output": out} | seen | gradients).items()}


def resnet_block(case: Case) -> dict[str, Tensor]:
    config = case.config
    inputs, outputs, stride = config["in_channels"], config["planes"] * config["expansion"], config["stride"]
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    block = Bottleneck(inputs, config["planes"], stride=stride, downsample=shortcut, dilation=config.get("dilation", 1))
    return block_outputs(case, block, rename(case.weights, ADAPTER, unused=r"(?!)"))


def convnext_block(case: Case) -> dict[str, Tensor]:
    config = case.config
    scale = 1.0 if config["layer_scale"] else None
    block = ConvNeXtBlock(config["dim"], kernel_size=config["dwconv_kernel"], ls_init_value=scale)
    cast(nn.LayerNorm, block.norm).eps = config["norm_eps"]
    return block_outputs(case, block, rename(case.weights, ADAPTER + BLOCK, unused=r"(?!)"))


@torch.no_grad()
def convnext(case: Case) -> dict[str, Tensor]:
    config: dict[str, Any] = case.config
    network = ConvNeXt(
        depths=config["depths"], dims=config["dims"], num_classes=0, norm_eps=config["norm_eps"],
        ls_init_value=1.0 if config["layer_scale"] else None,
    )  # fmt: skip
    network.requires_grad_(False).eval()
    conv_adapter(network, reduction=config["gamma"])
    network.load_state_dict(rename(case.weights, NETWORK + ADAPTER + BLOCK, unused=r"(?!)"))
    x, named = network.stem(case.inputs["image"]), {}
    for index, stage in enumerate(network.stages):
        x = stage(x)
        named[f"stage{index}_output"] = x
    return named | {"pooled_features": network.forward_head(x)}


CONV_ADAPTER: dict[tuple[str, str], Callable[[Case], dict[str, Tensor]]] = {
    ("conv_adapter", "resnet_conv_parallel"): resnet_block,
    ("conv_adapter", "resnet_conv_sequential"): resnet_block,
    ("conv_adapter", "resnet_residual_parallel"): resnet_block,
    ("conv_adapter", "resnet_residual_sequential"): resnet_block,
    ("conv_adapter", "convnext_block"): convnext_block,
    ("conv_adapter", "convnext"): convnext,
}
