"""Builders of our counterparts to the golden cases of HLG."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from segvit.backbones import hlg
from segvit.nn.tokens import map_tokens
from tests.golden.run import Case


@torch.no_grad()
def backbone(case: Case) -> dict[str, Tensor]:
    """Image -> the tokens after every block and the four maps, thinned as the case stores them."""
    config = case.config
    network = hlg.HLG(
        dims=config["embed_dims"], heads=config["num_heads"], depths=config["depths"], mlp_ratio=config["mlp_ratio"],
        qkv_bias=config["qkv_bias"], local=[interval != 1 for interval in config["crs_interval"]],
        stage_eps=config["ln_eps_stages"], block_eps=config["ln_eps_blocks"],
    ).eval()  # fmt: skip
    network.load_state_dict(hlg.convert(case.weights))
    outputs: dict[str, Tensor] = {}
    for stage, blocks in enumerate(network.stages, start=1):
        for index, block in enumerate(blocks):
            name = f"block{stage}_{index}_tokens"
            block.register_forward_hook(lambda module, args, out, name=name: outputs.update({name: map_tokens(out)}))
    image = case.inputs["image"] if "image" in case.inputs else case.inputs["image_u8"] / 127.5 - 1
    for index, features in enumerate(network(image).maps):
        outputs |= {f"out{index}": features}
        outputs |= {f"out{index}_stride{step}": features[:, :, ::step, ::step] for step in (2, 4, 8)}
    for name in outputs.keys() & case.outputs.keys():  # long token lists are stored thinned: every 7th of stage 1
        step = -(-outputs[name].shape[1] // case.outputs[name].shape[1]) if name.endswith("_tokens") else 1
        outputs[name] = outputs[name][:, ::step] if name.endswith("_tokens") else outputs[name]
    return outputs


HLG: dict[tuple[str, str], Callable[[Case], dict[str, Tensor]]] = {("hlg", "backbone"): backbone}
