"""Visual Prompt Tuning: learned tokens beside the patches of a frozen transformer.

Paper     M. Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119.
Idea      Shallow: P prompts enter before the first block and go through the network. Deep: every block gets P prompts
          of its own in the place of what came out of the block before.
Differs   In Swin, an image's prompts are averaged over its own windows; the released code mixes images of a batch.
Checked   tests/golden/vpt__* (official: KMnP/vpt src/models/vit_prompt/{vit,swin_transformer}.py).

Shapes    B images, P prompts, L blocks, D channels, D' channels of a prompt before projection, W windows of A tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock, SwinTransformerStage, window_partition, window_reverse
from torch import Tensor, nn

from segvit.adapters.handle import Handle
from segvit.adapters.tuning import biases
from segvit.backbones.pyramid import Pyramid
from segvit.backbones.vit import PlainViT
from segvit.contracts import UserError
from segvit.nn.attention import join_heads, split_heads
from segvit.nn.prompts import DeepPrompts, Prompts, fresh_prompts
from segvit.nn.rename import Rules, rename


class PromptedSwin(nn.Module):
    """timm's Swin as stages (B, h, w, C), with prompts that every window of an image sees."""

    def __init__(self, network: nn.Module, *, num_prompts: int, deep: bool, dropout: float) -> None:
        super().__init__()
        for name, child in network.named_children():  # under their own names, so that the keys stay
            self.add_module(name, child)
        self.returned = tuple(cast(Any, network).return_layers)
        first = cast(Any, network).patch_embed
        like, patch = first.proj.weight, tuple(first.patch_size)
        dims = [stage.blocks[0].dim for _, stage in self.stages()]
        self.prompt_embeddings = fresh_prompts(1, num_prompts, dims[0], patch=patch, like=like)
        self.deep_prompt_embeddings = nn.ParameterList()
        for index, (_, stage) in enumerate(self.stages() if deep else []):
            count = len(stage.blocks) - (index == 0)  # the very first block has the prompts of the input
            self.deep_prompt_embeddings.append(
                fresh_prompts(count, num_prompts, dims[index], patch=patch, like=like)
            )  # fmt: skip
        self.prompt_dropout = nn.Dropout(dropout)

    def stages(self) -> list[tuple[str, Any]]:
        """The stages by name; any type, because timm's are untyped."""
        return [(name, child) for name, child in self.named_children() if isinstance(child, SwinTransformerStage)]

    def run(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Prompts (B, P, C) and map (B, h, w, C) after the blocks of each stage."""
        maps = cast(Any, self).patch_embed(images)
        prompts = self._expand(self.prompt_embeddings[0], len(maps))
        outputs = []
        for index, (_, stage) in enumerate(self.stages()):
            if index:
                prompts, maps = merge_prompts(stage.downsample, prompts), stage.downsample(maps)
            fresh = list(self.deep_prompt_embeddings[index]) if len(self.deep_prompt_embeddings) else []
            skipped = len(stage.blocks) - len(fresh)
            for number, block in enumerate(stage.blocks):
                if fresh and number >= skipped:
                    prompts = self._expand(fresh[number - skipped], len(maps))
                prompts, maps = prompted_block(block, prompts, maps)
            outputs.append((prompts, maps))
        return outputs

    def forward(self, images: Tensor) -> list[Tensor]:
        outputs = dict(zip([name for name, _ in self.stages()], self.run(images), strict=True))
        return [outputs[name][1] for name in self.returned]

    def _expand(self, prompts: Tensor, batch: int) -> Tensor:
        return cast(Tensor, self.prompt_dropout(prompts.expand(batch, -1, -1)))


def merge_prompts(merging: Any, prompts: Tensor) -> Tensor:
    """Prompts through a patch merging: four copies of each in the place of four patches."""
    return cast(Tensor, merging.reduction(merging.norm(prompts.repeat(1, 1, 4))))


def prompted_block(block: Any, prompts: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """A Swin block on prompts (B, P, C) and a map (B, h, w, C)."""
    mixed, update = _prompted_windows(block, block.norm1(prompts), block.norm1(maps))
    outputs = []
    for x, change in ((prompts, mixed), (maps, update)):
        x = x + block.drop_path1(change)
        outputs.append(x + block.drop_path2(block.mlp(block.norm2(x))))
    return outputs[0], outputs[1]


def _prompted_windows(block: Any, prompts: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Window attention that every window shares with its image's prompts; their result is the mean over windows."""
    attention, (rows, columns), count = block.attn, block.window_size, prompts.shape[1]
    shift, (height, width) = tuple(block.shift_size), maps.shape[1:3]
    if any(shift):
        maps = maps.roll((-shift[0], -shift[1]), (1, 2))
    maps = F.pad(maps, (0, 0, 0, -width % columns, 0, -height % rows))
    windows = window_partition(maps, (rows, columns)).flatten(1, 2)  # (B*W, A, C), image by image
    number = len(windows) // len(prompts)
    tokens = torch.cat([prompts.repeat_interleave(number, 0), windows], dim=1)  # (B*W, P + A, C)
    query, key, value = (split_heads(part, attention.num_heads) for part in attention.qkv(tokens).chunk(3, dim=-1))
    bias = F.pad(attention._get_rel_pos_bias(), (count, 0, count, 0))  # (1, M, P + A, P + A); none for prompts
    mask = block.get_attn_mask(maps) if block.dynamic_mask else block.attn_mask
    if mask is not None:
        bias = bias + F.pad(mask, (count, 0, count, 0)).repeat(len(prompts), 1, 1)[:, None]
    drop = attention.attn_drop.p if block.training else 0.0
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=drop)
    tokens = attention.proj_drop(attention.proj(join_heads(mixed)))
    windows = tokens[:, count:].unflatten(1, (rows, columns))
    maps = window_reverse(windows, (rows, columns), *maps.shape[1:3])[:, :height, :width]
    if any(shift):
        maps = maps.roll(shift, (1, 2))
    return tokens[:, :count].unflatten(0, (-1, number)).mean(1), maps


def vpt_deep(
    backbone: nn.Module, *, num_prompts: int = 10, project_dim: int | None = None, dropout: float = 0.1,
    train_bias: bool = False,
) -> Handle:  # fmt: skip
    """Prompts of their own for every block: P * D * L parameters.

    `project_dim` is D', from which one Linear shared by all blocks makes prompts (plain ViTs only). `train_bias` trains
    the biases too ("VPT + Bias" of the paper's Table 3). Raises UserError unless it is a plain ViT or a Swin.
    """
    return _attach(backbone, num_prompts, project_dim, dropout, deep=True, train_bias=train_bias)


def vpt_shallow(
    backbone: nn.Module, *, num_prompts: int = 10, project_dim: int | None = None, dropout: float = 0.0,
    train_bias: bool = False,
) -> Handle:  # fmt: skip
    """Prompts before the first block only: P * D parameters. Options and errors as for `vpt_deep`."""
    return _attach(backbone, num_prompts, project_dim, dropout, deep=False, train_bias=train_bias)


def _attach(
    backbone: nn.Module, num_prompts: int, project_dim: int | None, dropout: float, *, deep: bool, train_bias: bool
) -> Handle:
    if num_prompts < 1 or (project_dim is not None and project_dim < 1):
        raise UserError(f"num_prompts and project_dim must be positive, got {num_prompts} and {project_dim}")
    handle = Handle(backbone)
    for path in biases(backbone) if train_bias else ():
        handle.tune(path)
    if isinstance(backbone, PlainViT):
        last = backbone.out_indices[-1] + 1  # later blocks do not run
        prompts = Prompts(
            num_prompts=num_prompts, layers=last if deep else 1, dim=backbone.dim, patch=backbone.patch,
            project_dim=project_dim, dropout=dropout, like=backbone.patch_embed.proj.weight,
        )  # fmt: skip
        handle.add("gaps.0", prompts)
        for layer in range(1, last if deep else 1):
            handle.add(f"gaps.{layer}", DeepPrompts(prompts, layer))
    elif isinstance(backbone, Pyramid) and any(isinstance(m, SwinTransformerBlock) for m in backbone.modules()):
        if project_dim is not None:
            raise UserError("project_dim is for plain ViTs: the stages of a Swin have different widths; leave it out")
        handle.replace(
            "network", PromptedSwin(backbone.network, num_prompts=num_prompts, deep=deep, dropout=dropout)
        )  # fmt: skip
    else:
        raise UserError(f"vpt needs a plain ViT or a Swin, not {type(backbone).__name__}; use ssf or lora instead")
    return handle


# The released checkpoints: a ViT in the layout of its first port from JAX, and Swin in Microsoft's.
OFFICIAL: Rules = (
    (r"^enc\.", ""),
    (r"^transformer\.embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^transformer\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^transformer\.embeddings\.", ""),
    (r"^transformer\.(deep_)?prompt_", r"gaps.0.\1prompt_"),
    (r"^transformer\.encoder\.layer\.", "blocks."),
    (r"^transformer\.encoder\.encoder_norm\.", "norm."),
    (r"^(blocks\.\d+\.)attention_norm\.", r"\1norm1."),
    (r"^(blocks\.\d+\.)ffn_norm\.", r"\1norm2."),
    (r"^(blocks\.\d+\.)ffn\.", r"\1mlp."),
    (r"^(blocks\.\d+\.attn\.)out\.", r"\1proj."),
)
UNUSED = r"^head\."  # the image classifier
OFFICIAL_SWIN: Rules = (
    (r"^", "network."),
    (r"deep_prompt_embeddings_(\d)$", r"deep_prompt_embeddings.\1"),
    (r"\.layers\.0\.downsample", ".layers_1.downsample"),  # timm merges patches at the start of the next stage
    (r"\.layers\.1\.downsample", ".layers_2.downsample"),
    (r"\.layers\.2\.downsample", ".layers_3.downsample"),
    (r"\.layers\.(\d)\.", r".layers_\1."),
)
UNUSED_SWIN = r"^(head|norm)\.|\.relative_position_index$|\.attn_mask$"  # and tables that timm computes


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official checkpoints (KMnP/vpt) into a backbone of ours with prompts: a plain ViT, or a Swin of timm."""
    if any(key.startswith("layers.") for key in state):
        return rename(state, OFFICIAL_SWIN, unused=UNUSED_SWIN)
    renamed = rename(state, OFFICIAL, unused=UNUSED)
    for key in [key for key in renamed if ".attn.query." in key]:
        parts = [renamed.pop(key.replace("query", name)) for name in ("query", "key", "value")]
        renamed[key.replace("query", "qkv")] = torch.cat(parts)
    return renamed
