"""Builders of our counterparts to the golden cases of FRPT."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.systems import frpt
from tests.golden.run import Case


def load(module: nn.Module, case: Case, *, official: str, ours: str) -> nn.Module:
    """Load weights whose keys may lack the prefix that the part has in the official network."""
    named = {key if key.startswith(official) else official + key: value for key, value in case.weights.items()}
    module.load_state_dict({key.removeprefix(ours): value for key, value in frpt.convert(named).items()})
    return module.eval()


@torch.no_grad()
def mam(case: Case) -> dict[str, Tensor]:
    gate = frpt.StyleGate(case.config["dim"], case.config.get("reduction_r", 1))
    load(gate, case, official="retrieval_head.mam.", ours="head.0.")
    x = case.inputs["x"]
    mask = gate.attention(x.mean((2, 3), keepdim=True))
    return {"instance_norm": F.instance_norm(x), "mask": mask, "y": gate(x)}


@torch.no_grad()
def retrieval_head(case: Case) -> dict[str, Tensor]:
    config = case.config
    head = frpt.released_head(config["dim"], reduction=config.get("mam_r", 1), stride=config.get("stride_s", 1))
    load(head, case, official="retrieval_head.", ours="head.")
    pool = frpt.GeM(config.get("gem_p", 3.0), config.get("gem_eps", 1e-6))
    y = head(case.inputs["x"])
    return {"after_mam": head[0](case.inputs["x"]), "y": y, "gem": pool(y)}


@torch.no_grad()
def sampler(case: Case) -> dict[str, Tensor]:
    config = case.config
    cells = config.get("grid_size", frpt.KERNEL)
    module = frpt.SaliencySampler(
        config["cha"], size=config["task_input_size"], cells=cells, reach=config.get("padding_size", cells - 1),
        width=config.get("gaussian_fwhm", 13),
    )  # fmt: skip
    load(module, case, official="sample.", ours="prompt.")
    sampled, grid, saliency = module(case.inputs["image"], case.inputs["feature"])
    return {"sampled": sampled, "grid": grid, "saliency": saliency}


FRPT: dict[tuple[str, str], Callable[[Case], dict[str, Tensor]]] = {
    ("frpt", "mam"): mam,
    ("frpt", "retrieval_head"): retrieval_head,
    ("frpt", "sampler"): sampler,
}
