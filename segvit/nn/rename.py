"""Foreign checkpoints into ours: rules of renaming, applied to a state dict. Nothing is dropped silently."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

Rules = Sequence[tuple[str, str]]  # (regular expression, replacement), applied in order, each where it matches


def rename(state: dict[str, Tensor], rules: Rules, *, unused: str) -> dict[str, Tensor]:
    """New names for the keys of a state dict; keys that match `unused` are left out.

    Raises ValueError when two keys get one name.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if re.search(unused, key):
            continue
        new = key
        for pattern, target in rules:
            new = re.sub(pattern, target, new)
        if new in renamed:
            raise ValueError(f"two keys map to {new!r}; the second is {key!r}")
        renamed[new] = value
    return renamed


# mmsegmentation 0.x and timm name the parts of a plain ViT differently; both become ours (timm's).
VIT_RULES: Rules = (
    (r"^backbone\.layers\.", "backbone.blocks."),
    (r"^backbone\.patch_embed\.projection\.", "backbone.patch_embed.proj."),
    (r"^(backbone\.blocks\.\d+\.)ln([12])\.", r"\1norm\2."),
    (r"^(backbone\.blocks\.\d+\.)attn\.attn\.in_proj_", r"\1attn.qkv."),
    (r"^(backbone\.blocks\.\d+\.)attn\.attn\.out_proj\.", r"\1attn.proj."),
    (r"^(backbone\.blocks\.\d+\.)ffn\.layers\.0\.0\.", r"\1mlp.fc1."),
    (r"^(backbone\.blocks\.\d+\.)ffn\.layers\.1\.", r"\1mlp.fc2."),
    (r"^backbone\.ln1\.", "backbone.norm."),
)

# The official PVT v2 and mmsegmentation's into timm's feature pyramid.
PVT_V2_RULES: Rules = (
    (r"^backbone\.patch_embed1\.", "backbone.network.patch_embed."),
    *((rf"^backbone\.patch_embed{i}\.", f"backbone.network.stages_{i - 1}.downsample.") for i in (2, 3, 4)),
    *((rf"^backbone\.block{i}\.", f"backbone.network.stages_{i - 1}.blocks.") for i in (1, 2, 3, 4)),
    *((rf"^backbone\.norm{i}\.", f"backbone.network.stages_{i - 1}.norm.") for i in (1, 2, 3, 4)),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
)
