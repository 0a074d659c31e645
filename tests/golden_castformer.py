"""Builders of our counterparts to CASTformer's golden cases: the sampler and the encoder's first layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from segvit.systems import castformer
from tests.golden.run import Case


@torch.no_grad()
def cat_sampling(case: Case) -> dict[str, Tensor]:
    config, n = case.config, case.config["n"]
    module = castformer.Sampler(
        config["dim"], grid=n, iterations=config["iters"], heads=config["heads"],
        mlp_ratio=config.get("mlp_ratio", 3.0), qkv_bias=config.get("qkv_bias", False),
    )  # fmt: skip
    state = castformer.convert(case.weights)
    module.load_state_dict({key.removeprefix("sampler."): value for key, value in state.items()})
    found = {}
    for number, step in enumerate(module.eval().steps(case.inputs["feature"]), start=1):
        parts = {"points": step.points, "tokens": step.tokens, "offset": step.offsets}
        # The original goes through its points column by column.
        found |= {
            f"{name}_{number}": x.unflatten(1, (n, n)).transpose(1, 2).flatten(1, 2)
            for name, x in parts.items() if x is not None
        }  # fmt: skip
    return found


@torch.no_grad()
def resnetv2_stem(case: Case) -> dict[str, Tensor]:
    images, units = (
        case.inputs["image"],
        [case.config[f"block{i}_units"] for i in (1, 2, 3) if f"block{i}_units" in case.config],
    )
    module = castformer.ResNetV2(width=case.config["width"], units=units, in_channels=images.shape[1])
    state = castformer.convert(case.weights)
    module.load_state_dict({key.removeprefix("backbone."): value for key, value in state.items()})
    maps = module.eval().maps(images)
    size = (images.shape[-2] // 4, images.shape[-1] // 4)
    found = {"root": maps[0], "skip_block1": castformer.fill(maps[1], size)}
    return found | {f"block{i}_raw": x for i, x in enumerate(maps[1:], start=1)}


CASTFORMER: dict[tuple[str, str], Callable[[Case], dict[str, Tensor]]] = {
    ("castformer", "cat_sampling"): cat_sampling,
    ("castformer", "resnetv2_stem"): resnetv2_stem,
}
