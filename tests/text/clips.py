"""Tiny CLIPs of open_clip's own making, and their files."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file
from torch import Tensor


def tiny_clip(kind: str = "vit", *, quick_gelu: bool = True) -> Any:
    """Random towers whose heads have 64 channels, as `config_of` assumes."""
    torch.manual_seed(0)
    vision = (
        CLIPVisionCfg(layers=2, width=128, patch_size=8, image_size=32) if kind == "vit"
        else CLIPVisionCfg(layers=(1, 2, 1, 1), width=8, image_size=64)
    )  # fmt: skip
    model = CLIP(16, vision, CLIPTextCfg(width=64, heads=1, layers=2), quick_gelu=quick_gelu)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(0.2 * torch.rand_like(buffer))
    return model.eval()


def clip_file(path: Path, kind: str = "vit") -> Path:
    """The weights of `tiny_clip` in a safetensors file."""
    save_file({key: value.contiguous() for key, value in tiny_clip(kind).state_dict().items()}, path)
    return path


def openai_state(model: Any) -> dict[str, Tensor]:
    """As OpenAI stores it: half precision, with three numbers among the tensors."""
    numbers = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    half = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    return half | {key: torch.tensor(value) for key, value in numbers.items()}


@cache
def text_file() -> str:
    """The path of a tiny text tower's weights, written once in a run of the tests."""
    state = {key: value for key, value in tiny_clip().state_dict().items() if not key.startswith("visual.")}
    path = Path(os.environ["SEGVIT_CACHE"]) / "text.safetensors"
    save_file(state, path)
    return str(path)
