"""Builders of our counterparts to the golden cases of SVF."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from segvit.adapters.svf import SingularValues, compose, decompose, kept, merged, svf
from tests.golden.run import Case


def official(layer: SingularValues, weights: dict[str, Tensor], name: str) -> None:
    """Give a layer the factors and the tuned values of an official one."""
    left, right = weights[f"{name}.conv_U.weight"], weights[f"{name}.conv_V.weight"]
    layer.left, layer.right = left.flatten(1)[None], right.flatten(1)[None]
    layer.singular_values.data = weights[f"{name}.vector_S"].reshape(1, -1)


def conv(case: Case) -> dict[str, Tensor]:
    config = case.config
    base = nn.Conv2d(
        config["in_channels"], config["out_channels"], config["kernel_size"], stride=config["stride"],
        padding=config["padding"], dilation=config["dilation"], bias=config["bias"],
    )  # fmt: skip
    base.weight.data = case.inputs["conv_weight"]
    if base.bias is not None:
        base.bias.data = case.inputs["conv_bias"]
    base.requires_grad_(False)
    x = case.inputs["x"]
    layer = SingularValues(base, rank=kept(base, config.get("rank_ratio", 1.0), official=True), lossy=True)
    named = {
        "full_singular_values": decompose(base)[1][0], "initial_S": layer.initial[0], "plain_output": base(x),
        "output_init": layer(x), "reconstructed_weight": layer.weight(),
    }  # fmt: skip
    official(layer, case.weights, "conv")
    layer.left.requires_grad_()
    layer.right.requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    count = layer.initial.shape[1]
    assert isinstance(layer.left.grad, Tensor)
    assert isinstance(layer.right.grad, Tensor)
    named |= {
        "output_tuned": out, "merged_weight": merged(layer).get_parameter("weight"),
        "grad.conv.conv_U.weight": layer.left.grad[0, ..., None, None],
        "grad.conv.conv_V.weight": layer.right.grad[0].view(count, *base.weight.shape[1:]),
        "grad.conv.vector_S": gradient(layer),
    }  # fmt: skip
    return {name: value.detach() for name, value in named.items()}


def gradient(layer: SingularValues) -> Tensor:
    assert layer.singular_values.grad is not None
    return layer.singular_values.grad.view(1, -1, 1, 1)


def resnet_stage(case: Case) -> dict[str, Tensor]:
    config = case.config
    stage = bottlenecks(config)
    state = {name: value for name, value in case.weights.items() if ".conv_" not in name and "vector_S" not in name}
    state |= {n.removeprefix("original."): v for n, v in case.inputs.items() if n.startswith("original.")}
    stage.load_state_dict(state)
    stage.requires_grad_(False).eval()
    x = case.inputs["x"]
    named: dict[str, Tensor] = {"plain_output_before_svf": stage(x)}
    handle = svf(stage, layers=".", official_rank=True)
    named["output_after_decomposition"] = stage(x)
    layers = {change.path: change.new for change in handle.changes}
    for name, layer in layers.items():
        assert isinstance(layer, SingularValues)
        official(layer, case.weights, name)
    named |= {"block0": stage[0](x), "output": stage(x)}
    named["output"].square().mean().backward()
    trained = [parameter.numel() for parameter in stage.parameters() if parameter.requires_grad]
    named["num_trainable"] = torch.tensor(sum(trained))
    for name, layer in layers.items():
        assert isinstance(layer, SingularValues)
        named |= {f"grad.{name}.vector_S": gradient(layer)}
        product = compose(layer.left, layer.singular_values, layer.right)
        named[f"merged.{name}.weight"] = product.view_as(layer.base_layer.weight)
    handle.merge()
    named["merged_output"] = stage(x)
    return {name: value.detach() for name, value in named.items()}


def bottlenecks(config: dict[str, Any]) -> nn.Sequential:
    inputs, planes, stride = config["in_channels"], config["planes"], config["stride"]
    blocks, outputs, dilation = [], planes * config["expansion"], config["dilation"]
    for index in range(config["blocks"]):
        step, shortcut = (stride if index == 0 else 1), None
        if step != 1 or inputs != outputs:
            shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, step, bias=False), nn.BatchNorm2d(outputs))
        blocks.append(Bottleneck(inputs, planes, stride=step, downsample=shortcut, dilation=dilation))
        inputs = outputs
    return nn.Sequential(*blocks)


SVF: dict[tuple[str, str], Callable[[Case], dict[str, Tensor]]] = {
    ("svf", "conv1x1"): conv,
    ("svf", "conv3x3"): conv,
    ("svf", "resnet_stage"): resnet_stage,
}
