"""Weights, gradients and optimiser state spread over the processes (FSDP2), and gathered again for files.

accelerate falls back to DDP on the CPU, so torch's own `fully_shard` is called here, on every device alike.

Shapes    a sharded parameter is a DTensor: each process holds its rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from segvit.contracts import UserError

EVERYWHERE = StateDictOptions(full_state_dict=True)
FIRST = StateDictOptions(full_state_dict=True, cpu_offload=True)  # only the first process gets it


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard a model in place over all processes: each entry of a ModuleList (a block) by itself, then the rest.

    Raises UserError in a single process, which has nobody to share with.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise UserError("shard needs several processes; start with torchrun --nproc_per_node N -m segvit train ...")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in reversed(list(model.modules())):  # from the inside out, as torch asks for
        if isinstance(module, nn.ModuleList):
            for block in module:
                if not isinstance(block, FSDPModule) and any(True for _ in block.parameters()):
                    fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole_model_state(model: nn.Module) -> dict[str, Tensor]:
    """The full weights, on the CPU, in every process; all must call it."""
    state = get_model_state_dict(model, options=EVERYWHERE)
    return {name: value.cpu() for name, value in state.items() if isinstance(value, Tensor)}


def whole_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The full optimiser state on the CPU, by parameter name, in the first process; all processes must call it."""
    return dict(get_optimizer_state_dict(model, optimizer, options=FIRST))


def load_whole(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """The inverse of the two: every process reads the full state and keeps its rows."""
    set_model_state_dict(model, dict(weights), options=EVERYWHERE)
    set_optimizer_state_dict(model, optimizer, state, options=EVERYWHERE)


def full(value: Tensor) -> Tensor:
    """A plain tensor of the full value; all processes must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value
