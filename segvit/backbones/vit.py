"""Plain vision transformers of timm as token maps at chosen depths, for images of any size.

Covers    VisionTransformer (AugReg, DeiT, DeiT-III, MAE, DINOv2 with registers, CLIP, SigLIP), Eva (EVA-02, DINOv3 and
          other rotary ViTs) and Beit (BEiT, BEiT v2) of timm, by name. State-dict keys are timm's.
Steps     `embed(images)` gives the first Step; `run(i, step)` applies gap i, then block i. Gap i acts on the step
          before block i, one more on that after the last block that runs; adapters put modules Step -> Step there.
Checked   tests/backbones/test_vit.py against timm's own forward; tests/golden/segvit__whole, segvit__shrunk.

Shapes    B images, H W pixels, h w token grid, N = h * w patch tokens, P prefix tokens, D channels, M heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segvit.backbones.weights import load_weights
from segvit.contracts import Features, Size, UserError
from segvit.nn.attention import join_heads, split_heads
from segvit.nn.tokens import Step, pad_to_patches, patch_map, resize_positions


class PlainViT(nn.Module):
    """A timm ViT without its classifier: image -> Features with one map for each of `out_indices`.

    `prefix_tokens="drop"` removes class and register tokens after the position embedding, before the first block, as
    mmseg does for SegViT: they keep their (zero) gradient. `final_norm` applies the last LayerNorm to the last map
    (which should then be that of the last block). `embedding` takes the last tokens (B, P + N, D) to another space,
    such as CLIP's (B, P + N, E): `pooled` is then the class token there, and `extras["dense"]` the patches' map there.
    `doubled_class` adds the class token once more with its position, as ZegCLIP's and DenseCLIP's code does. `mean` and
    `std` are those of the pretraining, or 0.5 for each channel where the images are not RGB.
    """

    def __init__(
        self,
        trunk: VisionTransformer | Eva | Beit,
        *,
        out_indices: Sequence[int],
        prefix_tokens: Literal["keep", "drop"] = "keep",
        final_norm: bool = False,
        position_mode: Literal["bicubic", "bilinear"] = "bicubic",
        checkpointing: bool = False,
        embedding: nn.Module | None = None,
        doubled_class: bool = False,
    ) -> None:
        super().__init__()
        depth = len(trunk.blocks)
        self.out_indices = tuple(index % depth if -depth <= index < depth else depth for index in out_indices)
        if not self.out_indices or depth in self.out_indices or list(self.out_indices) != sorted(set(self.out_indices)):
            raise UserError(f"out_indices {list(out_indices)} must rise and lie below the depth, {depth}")
        self.dim: int = trunk.embed_dim
        self.patch: Size = tuple(trunk.patch_embed.patch_size)
        self.pretrained_grid: Size = tuple(trunk.patch_embed.grid_size)
        channels: int = trunk.patch_embed.proj.in_channels
        known = trunk.pretrained_cfg if channels == 3 else {}
        self.mean: tuple[float, ...] = tuple(known.get("mean", (0.5,) * channels))
        self.std: tuple[float, ...] = tuple(known.get("std", (0.5,) * channels))
        self.prefix_tokens, self.position_mode, self.checkpointing = prefix_tokens, position_mode, checkpointing

        self.patch_embed = trunk.patch_embed
        self.cls_token: nn.Parameter | None = trunk.cls_token
        self.reg_token: nn.Parameter | None = None if isinstance(trunk, Beit) else trunk.reg_token
        self.dist_token = trunk.dist_token if isinstance(trunk, VisionTransformerDistilled) else None
        self.pos_embed: nn.Parameter | None = trunk.pos_embed
        self.classed = self.cls_token is not None and prefix_tokens == "keep"  # then the class token is the first
        self.prefix_has_position = isinstance(trunk, Beit) or not trunk.no_embed_class
        self.norm_pre = nn.Identity() if isinstance(trunk, Beit) else trunk.norm_pre
        self.rope = trunk.rope if isinstance(trunk, Eva) else None
        self.rope_per_block = isinstance(trunk, Eva) and trunk.rope_mixed
        self.rel_pos_bias = trunk.rel_pos_bias if isinstance(trunk, Beit) else None
        self.blocks: nn.ModuleList = trunk.blocks
        self.gaps = nn.ModuleDict()
        self.past: Sequence[Step] = ()  # embedded, behind block 0, ...: what is known and not to be computed again
        pooled_norm = isinstance(trunk.norm, nn.Identity)  # models pooled by averaging keep their last norm there
        self.norm = (trunk.fc_norm if pooled_norm else trunk.norm) if final_norm else nn.Identity()
        self.embedding, self.doubled_class = embedding, doubled_class
        if isinstance(trunk, Eva):
            for block in self.blocks:
                block.attn.num_prefix_tokens = 0  # `rotation` covers the prefix, however many tokens it has
                block.attn.qkv_bias_separate = True  # calls `qkv`, so that an adapter in its place acts

    def embed(self, images: Tensor) -> Step:
        """(B, C, H, W) -> the tokens before the first block; sides are padded to whole patches with zeros."""
        if self.past:
            return self.past[0]
        maps = self.patch_embed.proj(pad_to_patches(images, self.patch))  # (B, D, h, w)
        grid: Size = (maps.shape[-2], maps.shape[-1])
        tokens = self.patch_embed.norm(maps.flatten(2).mT)
        singles = [token for token in (self.cls_token, self.dist_token, self.reg_token) if token is not None]
        prefix = sum(token.shape[1] for token in singles)
        positions: Tensor | None = self.pos_embed
        if positions is not None:
            head = prefix if self.prefix_has_position else 0
            patches = resize_positions(positions[:, head:], old=self.pretrained_grid, new=grid, mode=self.position_mode)
            first = positions[:, :head]
            if self.doubled_class and self.cls_token is not None:
                first = torch.cat([first[:, :1] + self.cls_token, first[:, 1:]], dim=1)
            positions = torch.cat([first, patches], dim=1)
            if not self.prefix_has_position:
                tokens = tokens + positions
        if singles:
            tokens = torch.cat([token.expand(tokens.shape[0], -1, -1) for token in singles] + [tokens], dim=1)
        if positions is not None and self.prefix_has_position:
            tokens = tokens + positions
        if self.prefix_tokens == "drop":
            tokens, prefix = tokens[:, prefix:], 0
        rope = self.rope.get_embed(shape=list(grid)) if self.rope is not None else None
        return Step(self.norm_pre(tokens), prefix, grid, grid, rope=rope)

    def run(
        self, index: int, step: Step, *, keep: Tensor | None = None, grid: Size | None = None, bare: bool = False
    ) -> Step:  # fmt: skip
        """Gap `index`, unless `bare`, then block `index`.

        With `keep` (patch token numbers) and their new `grid`, only those tokens and the prefix act as queries and go
        on; all tokens are still attended to.
        """
        if index + 1 < len(self.past):
            return self.past[index + 1]
        step = step if bare else self.gap(index, step)
        block, training = self.blocks[index], self.checkpointing and self.training
        rows = None
        if keep is not None:
            rows = torch.cat([torch.arange(step.prefix, device=keep.device), keep + step.prefix])
        arguments = (block, step, self.rotation(index, step), self.bias(index, step), rows)
        run = _run_block
        tokens = checkpoint(run, *arguments, use_reentrant=False) if training else run(*arguments)
        if keep is None:
            return step._replace(tokens=tokens)
        kept = keep if step.kept is None else step.kept[keep]
        rope = step.rope[..., keep, :] if step.rope is not None else None
        return step._replace(tokens=tokens, grid=grid or step.grid, kept=kept, rope=rope)

    def gap(self, index: int, step: Step) -> Step:
        """What adapters put before block `index` (or after the last one that runs)."""
        name = str(index)
        return self.gaps[name](step) if name in self.gaps else step

    def rotation(self, index: int, step: Step) -> Tensor | None:
        """Rotary embedding of all tokens of the step; prefix tokens are not rotated (sine 0, cosine 1)."""
        if step.rope is None:
            return None
        rope = step.rope[index] if self.rope_per_block else step.rope
        still = torch.cat(
            [torch.zeros_like(rope[..., :1, :].chunk(2, -1)[0]), torch.ones_like(rope[..., :1, :].chunk(2, -1)[0])], -1
        )
        return torch.cat([still.expand(*rope.shape[:-2], step.prefix, -1), rope], dim=-2)

    def bias(self, index: int, step: Step) -> Tensor | None:
        """BEiT's relative position bias (1, M, P + N, P + N) of a block, its own plus the shared one."""
        block = self.blocks[index]
        tables = [] if self.rel_pos_bias is None else [self.rel_pos_bias]
        if isinstance(block, BeitBlock) and block.attn.relative_position_bias_table is not None:
            tables.append(block.attn)
        biases = [
            _relative_bias(table.relative_position_bias_table, tuple(table.window_size), step, classed=self.classed)
            for table in tables
        ]
        return torch.stack(biases).sum(0) if biases else None

    def forward(self, images: Tensor) -> Features:
        step, maps = self.embed(images), []
        last = self.out_indices[-1]
        for index in range(last + 1):
            step = self.run(index, step)
            if index == last:
                step = self.gap(index + 1, step)
                step = step._replace(tokens=self.norm(step.tokens))
            if index in self.out_indices:
                maps.append(patch_map(step))
        return self.features(maps, step)

    def features(self, maps: list[Tensor], step: Step) -> Features:
        """Bundle maps and the last step; strides follow from each map's grid."""
        covers = (step.base[0] * self.patch[0], step.base[1] * self.patch[1])
        strides = [round(covers[0] / m.shape[-2]) for m in maps]
        tokens, extras = step.tokens, step.extras
        if self.embedding is not None:
            tokens = self.embedding(tokens)
            extras = {**extras, "dense": patch_map(step._replace(tokens=tokens))}
        return Features(maps, strides, step.base, covers, tokens[:, 0] if self.classed else None, extras)


def _run_block(block: Any, step: Step, rope: Tensor | None, bias: Tensor | None, rows: Tensor | None) -> Tensor:
    """One timm block on (B, P + N, D); with `rows`, the output of those tokens only."""
    tokens = step.tokens
    if isinstance(block, BeitBlock):
        tokens = _beit_block(block, tokens, bias)
    elif rope is not None:
        tokens = block(tokens, rope=rope)
    elif rows is not None and type(block) is Block and type(block.attn) is TimmAttention:
        if type(block.attn.qkv) is nn.Linear and block.attn.gate is None:  # adapters may have replaced it
            return _fewer_queries(block, tokens, rows)
        tokens = block(tokens)
    else:
        tokens = block(tokens)
    # Every token's output depends on the others through keys and values only, so dropping it afterwards is exact.
    return tokens if rows is None else tokens[:, rows]


def _fewer_queries(block: Block, tokens: Tensor, rows: Tensor) -> Tensor:
    """A timm block whose queries are only the given tokens: no query is computed that would be thrown away."""
    attention, dim = block.attn, block.attn.attn_dim
    weight, bias = attention.qkv.weight, attention.qkv.bias
    split = (None, None) if bias is None else (bias[:dim], bias[dim:])
    normed = block.norm1(tokens)
    query = split_heads(F.linear(normed[:, rows], weight[:dim], split[0]), attention.num_heads)
    key, value = F.linear(normed, weight[dim:], split[1]).chunk(2, dim=-1)
    key, value = split_heads(key, attention.num_heads), split_heads(value, attention.num_heads)
    drop = attention.attn_drop.p if block.training else 0.0
    mixed = F.scaled_dot_product_attention(attention.q_norm(query), attention.k_norm(key), value, dropout_p=drop)
    update = attention.proj_drop(attention.proj(attention.norm(join_heads(mixed))))
    tokens = tokens[:, rows] + block.drop_path1(block.ls1(update))
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


def _beit_block(block: BeitBlock, tokens: Tensor, bias: Tensor | None) -> Tensor:
    """timm's BEiT block with the bias given, because its own is tied to one window size."""
    attention = block.attn
    qkv_bias = None if attention.q_bias is None else torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    normed = block.norm1(tokens)
    packed = attention.qkv(normed) if qkv_bias is None else attention.qkv(normed) + qkv_bias
    query, key, value = (split_heads(part, attention.num_heads) for part in packed.chunk(3, dim=-1))
    drop = attention.attn_drop.p if block.training else 0.0
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=drop)
    update = attention.proj_drop(attention.proj(join_heads(mixed)))
    scale = (1.0, 1.0) if block.gamma_1 is None else (block.gamma_1, block.gamma_2)
    tokens = tokens + block.drop_path1(scale[0] * update)
    return tokens + block.drop_path2(scale[1] * block.mlp(block.norm2(tokens)))


def _relative_bias(table: Tensor, window: Size, step: Step, *, classed: bool) -> Tensor:
    """Bias (1, M, P + N, P + N) from BEiT's table ((2h-1)(2w-1) + 3, M), resized when the step's base grid differs.

    The table's last three rows are class to patch, patch to class and class to class; further prefix tokens get 0.
    """
    (rows, columns), heads = step.base, table.shape[1]
    spatial = table[:-3].mT.unflatten(1, (2 * window[0] - 1, 2 * window[1] - 1))[None]
    if step.base != window:
        size = (2 * rows - 1, 2 * columns - 1)
        spatial = F.interpolate(spatial.float(), size=size, mode="bicubic", align_corners=False).to(table.dtype)
    y = torch.arange(rows, device=table.device).repeat_interleave(columns)
    x = torch.arange(columns, device=table.device).repeat(rows)
    if step.kept is not None:
        y, x = y[step.kept], x[step.kept]
    among = spatial[:, :, y[:, None] - y + rows - 1, x[:, None] - x + columns - 1]  # (1, M, N, N)
    prefix, tokens = step.prefix, len(y)
    if prefix == 0:
        return among
    bias = among.new_zeros(1, heads, prefix + tokens, prefix + tokens)
    bias[:, :, prefix:, prefix:] = among
    if not classed:  # the prefix holds inserted tokens only
        return bias
    bias[:, :, 0, prefix:] = table[-3][:, None]
    bias[:, :, prefix:, 0] = table[-2][:, None]
    bias[:, :, 0, 0] = table[-1]
    return bias


def plain_vit(
    name: str,
    *,
    image_size: int | Size = 512,
    out_indices: Sequence[int],
    weights: str | None = None,
    prefix_tokens: Literal["keep", "drop"] = "keep",
    final_norm: bool = False,
    position_mode: Literal["bicubic", "bilinear"] = "bicubic",
    drop_path: float = 0.0,
    attention_drop_path: bool = True,
    norm_eps: float | None = None,
    checkpointing: bool = False,
    patch_size: int | None = None,
    depth: int | None = None,
    embed_dim: int | None = None,
    in_channels: int = 3,
) -> PlainViT:
    """Any plain ViT of timm by name, e.g. `vit_base_patch16_384` or `vit_base_patch14_reg4_dinov2`.

    `image_size` sets the grid of the position embedding (whole patches in it); other sizes work at any time. `weights`
    is a hub name (`timm` tag such as `vit_base_patch16_384.augreg_in21k_ft_in1k`, or `org/repo`), a local .safetensors,
    .pth or .npz file, or None. `attention_drop_path=False` applies stochastic depth to the MLP branch only.
    `patch_size`, `depth` and `embed_dim` (64 a head) change the named architecture, for training from nothing.
    `in_channels` other than 3 is for images that are not RGB; see `load_weights` for what weights become then.

    Raises UserError for a name that timm lacks or that is not a plain ViT, and for weights that cannot be had.
    """
    if in_channels < 1:
        raise UserError(f"in_channels is {in_channels}; images have 1 channel or more")
    changes: dict[str, int] = {} if patch_size is None else {"patch_size": patch_size}
    changes |= {} if depth is None else {"depth": depth}
    changes |= {} if embed_dim is None else {"embed_dim": embed_dim, "num_heads": max(1, embed_dim // 64)}
    if changes and weights is not None:
        raise UserError(
            f"{', '.join(changes)} change the architecture, so weights {weights!r} cannot fit; set one or the other"
        )
    trunk = _timm_trunk(name, image_size, drop_path, changes | {"in_chans": in_channels})
    for block in trunk.blocks if not attention_drop_path else ():
        block.drop_path1 = nn.Identity()
    if norm_eps is not None:
        for module in trunk.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = norm_eps
    vit = PlainViT(
        trunk, out_indices=out_indices, prefix_tokens=prefix_tokens, final_norm=final_norm,
        position_mode=position_mode, checkpointing=checkpointing,
    )  # fmt: skip
    if weights is not None:
        load_weights(trunk, weights, needed=list(vit.parameters()), position_mode=position_mode)
    return vit


def _timm_trunk(
    name: str, image_size: int | Size, drop_path: float, changes: dict[str, int]
) -> VisionTransformer | Eva | Beit:
    bare = name.partition(".")[0]
    if not timm.is_model(bare):
        near = timm.list_models(f"*{'_'.join(bare.split('_')[:2])}*", module="vision_transformer")[:3]
        raise UserError(f"timm has no model {bare!r}; near names: {', '.join(near) or 'see timm.list_models'}")
    module = timm.model_entrypoint(bare).__module__
    dynamic = {"dynamic_img_size": True} if module.endswith(".eva") else {}  # rotary tables for any grid
    try:
        trunk = timm.create_model(
            name, num_classes=0, img_size=image_size, drop_path_rate=drop_path, **dynamic, **changes
        )
    except TypeError as error:  # convolutional families do not know img_size
        raise UserError(f"{name} is not a plain ViT of timm ({error}); use a vit_, deit, eva or beit name") from error
    plain = isinstance(trunk, VisionTransformer | Eva | Beit) and isinstance(trunk.patch_embed, PatchEmbed)
    if not plain:
        raise UserError(f"{name} is a {type(trunk).__name__}, not a plain ViT; use a vit_, deit, eva or beit name")
    return trunk
