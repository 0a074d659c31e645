"""ZegCLIP: a frozen CLIP ViT with deep visual prompts, and class words whose match with the patches is the mask.

Paper     Z. Zhou et al., "ZegCLIP: Towards Adapting CLIP for Zero-shot Semantic Segmentation", CVPR 2023,
          arXiv 2212.03588.
Idea      Only prompts and a small decoder learn. A class is asked for by its relationship descriptor, its word's vector
          beside that vector times the image's, and its mask is what the last attention of the decoder scores before its
          softmax. Masks do not compete in the loss, so that words never seen in training can have one too.
Settings  Inductive: labels of unseen classes count as ignored, and at test `seen_bias` is taken off the seen classes.
          Transductive (self-training): pixels of unseen classes are labelled by the best of the unseen masks; which
          class the data has there is never looked at. The model is then built with `seen_bias=0`.
Differs   from the official code: any token grid (there: square), masks interpolated over the padded area and cropped;
          what it builds and never uses is left out: self attention in the decoder, the values and the MLP of its last
          layer. Its "reverse" prompts are not offered. Images are normalised with ImageNet's statistics, as there.
Checked   tests/golden/zegclip__* (ZiqinZhou66/ZegCLIP zegclip.py, decode_seg.py, img_encoder.py, atm_loss.py).

Shapes    B images, K classes, S classes that are trained, P prompts, h w token grid, N = h * w tokens, H W pixels,
          D channels of the ViT, E of CLIP's joint space.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.backbones.clip import VIT_RULES, build_backbone
from segvit.backbones.vit import PlainViT
from segvit.contracts import Dense, Features, MaskScores, Readout, Size, UserError
from segvit.losses.binary import focal_and_dice
from segvit.losses.masks import present_classes
from segvit.nn.attention import Attention
from segvit.nn.prompts import DeepPrompts, Prompts
from segvit.nn.readout import bilinear_rows
from segvit.nn.rename import Rules, rename
from segvit.nn.tokens import Step, map_tokens
from segvit.text.architecture import clip_config
from segvit.text.checkpoint import Checkpoint, find_clip
from segvit.text.embeddings import Name, class_vectors
from segvit.text.splits import unseen_ids

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, not CLIP's


class RemovePrompts(nn.Module):
    """The gap behind the last block with prompts: takes them off the end of the prefix."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, step: Step) -> Step:
        kept = step.prefix - self.count
        tokens = torch.cat([step.tokens[:, :kept], step.tokens[:, step.prefix :]], dim=1)
        return step._replace(tokens=tokens, prefix=kept)


def add_prompts(vit: PlainViT, *, num_prompts: int, deep: int, dropout: float) -> None:
    """Freeze a ViT of CLIP and give P prompts of their own to its first block and to the next `deep` ones, in place.

    Behind those they are taken out, and a LayerNorm of their own acts on all tokens before CLIP's last one. With
    `deep=0` (shallow) the first prompts stay to the end instead, without that norm.
    """
    depth = len(vit.blocks)
    if not 0 <= deep < depth or num_prompts < 1:
        raise UserError(f"prompt_layers {deep} must be in 0..{depth - 1} and prompts positive, got {num_prompts}")
    vit.requires_grad_(False)
    prompts = Prompts(
        num_prompts=num_prompts, layers=1 + deep, dim=vit.dim, patch=vit.patch, project_dim=vit.dim, dropout=dropout,
        like=vit.patch_embed.proj.weight,
    )  # fmt: skip
    vit.gaps["0"] = prompts
    for layer in range(1, 1 + deep):
        vit.gaps[str(layer)] = DeepPrompts(prompts, layer)
    if 0 < deep < depth - 1:
        vit.gaps[str(1 + deep)] = RemovePrompts(num_prompts)
    norm = nn.LayerNorm(vit.dim, eps=1e-6) if deep else nn.Identity()
    assert vit.embedding is not None
    vit.embedding = nn.Sequential(OrderedDict(prompt_norm=norm, joint=vit.embedding))


class DecoderLayer(nn.Module):
    """Post-norm: the queries read the patches, then an MLP; they do not see each other."""

    def __init__(self, dim: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.attn = Attention(dim, heads=heads, dropout=dropout)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        queries = self.norm1(queries + self.drop(self.attn(queries, patches)))
        return self.norm2(queries + self.drop(self.fc2(self.drop(F.relu(self.fc1(queries))))))


class MaskHead(nn.Module):
    """Relationship descriptor and decoder: the image's unit vector, the patches' and the classes' -> masks."""

    def __init__(self, dim: int, *, layers: int, heads: int, dropout: float, use_proj: bool = False) -> None:
        super().__init__()
        if dim % heads or layers < 1:
            raise UserError(f"heads {heads} must divide CLIP's joint channels {dim}, and layers be 1 or more: {layers}")
        self.relate = nn.Linear(2 * dim, dim)
        self.proj = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim)) if use_proj else nn.Identity()
        self.layers = nn.ModuleList(DecoderLayer(dim, heads=heads, dropout=dropout) for _ in range(layers - 1))
        self.q, self.k = nn.Linear(dim, dim), nn.Linear(dim, dim)
        # The mean over heads of their scaled scores is the product over all channels.
        self.scale = (dim // heads) ** -0.5 / heads

    def queries(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, E) and (K, E) -> (B, K, E)."""
        both = [image[:, None] * text, text.expand(image.shape[0], -1, -1)]
        return self.relate(torch.cat(both, dim=-1))

    def forward(self, image: Tensor, patches: Tensor, text: Tensor) -> Tensor:
        """(B, E), (B, E, h, w), (K, E) -> mask logits (B, K, h, w)."""
        queries, tokens = self.queries(image, text), self.proj(map_tokens(patches))
        for layer in self.layers:
            queries = layer(queries, tokens)
        scores = self.q(queries) @ self.k(tokens).mT
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # masks are never in half precision
        return (self.scale * scores).unflatten(2, patches.shape[-2:])


class ZegCLIP(nn.Module):
    """The prompted ViT and the head; the classes are unit vectors (K, E) in a buffer, see `set_classes`."""

    class_embeddings: Tensor
    seen: Tensor

    def __init__(
        self, backbone: PlainViT, head: MaskHead, embeddings: Tensor, *, unseen: Sequence[int], seen_bias: float
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone, self.head, self.seen_bias = backbone, head, seen_bias
        self.set_classes(embeddings, unseen=unseen)

    def set_classes(self, embeddings: Tensor, *, unseen: Sequence[int] = ()) -> None:
        """Other classes, by their vectors (K, E), without training; `unseen` are those that training hid."""
        seen = torch.ones(len(embeddings), dtype=torch.bool, device=embeddings.device)
        seen[list(unseen)] = False
        self.register_buffer("class_embeddings", embeddings)
        self.register_buffer("seen", seen, persistent=False)

    def forward(self, images: Tensor) -> Dense:
        features: Features = self.backbone(images)
        assert features.pooled is not None
        image, patches = F.normalize(features.pooled, dim=-1), F.normalize(features.extras["dense"], dim=1)
        masks = self.head(image, patches, self.class_embeddings)
        out = dense_output(masks, self.seen, seen_bias=self.seen_bias, covers=features.covers)
        return out._replace(extras=features.extras | out.extras)


def dense_output(masks: Tensor, seen: Tensor, *, seen_bias: float, covers: Size) -> Dense:
    """Mask logits (B, K, h, w) and which classes are seen (K,), with the bias that the scores of those lose."""
    known = seen.expand(masks.shape[0], -1)
    extras = {"masks": masks, "seen": known, "bias": seen_bias * known.to(masks.dtype)}
    return Dense(masks.sigmoid() - extras["bias"][:, :, None, None], extras, covers)


def scores(out: Dense, size: Size, rows: range) -> Tensor:
    """Class scores (B, K, len(rows), W): masks resized to the band, then sigmoid, then calibrated, as at full size."""
    masks = bilinear_rows(out.extras["masks"], out.covers, rows)[..., : size[1]]
    return masks.sigmoid() - out.extras["bias"][:, :, None, None]


def mask_scores(out: Dense) -> MaskScores:
    """What `scores` are made of."""
    return MaskScores(out.extras["masks"], offset=out.extras["bias"])


READOUT = Readout(scores, keeps=("masks", "bias"), confidence="score", masks=mask_scores)


def normalisers(masks: Tensor, *, num_classes: int, ignore_index: int) -> dict[str, Tensor]:
    """Counts over the global batch: `images`, and `present` (image, class) pairs, unseen classes among them."""
    present = present_classes(masks, num_classes=num_classes, ignore_index=ignore_index)
    return {"images": torch.tensor(len(masks), device=masks.device), "present": present.sum()}


def criterion(
    out: Dense, masks: Tensor, totals: dict[str, Tensor], *, ignore_index: int = 255,
    class_weights: Tensor | None = None, setting: Literal["inductive", "transductive"] = "inductive",
    focal_weight: float = 100.0, dice_weight: float = 1.0, alpha: float = 0.25, gamma: float = 2.0,
) -> dict[str, Tensor]:  # fmt: skip
    """The non-mutually-exclusive loss: focal loss of every trained class's mask, dice of those present in an image.

    Masks (B, H, W) integer, with the ids of unseen classes where the data has them: they count as ignored, or in the
    transductive setting get the model's own guess. Ignored pixels are outside every mask, as in the official code. Both
    sums are divided by the (image, class) pairs present in the labels so made, over the global batch; what guesses and
    hidden labels change about that number is taken from the own micro-batch. `class_weights` (K,) multiply both terms
    of a class's masks. Raises UserError for the transductive setting without unseen classes.
    """
    logits, seen, self_training = out.extras["masks"], out.extras["seen"][0], setting == "transductive"
    dtype = torch.promote_types(logits.dtype, torch.float32)  # losses never in half precision
    find = partial(present_classes, num_classes=len(seen), ignore_index=ignore_index)
    labelled = find(masks)
    labels = training_labels(out, masks, ignore_index=ignore_index, self_training=self_training)
    present = labelled if labels is masks else find(labels)
    shift = (present.sum() - labelled.sum()) * (totals["images"] / len(masks))
    count = (totals["present"] + shift).to(dtype).clamp(min=1)
    trained = (torch.ones_like(seen) if self_training else seen).nonzero()[:, 0]  # (S,)
    pairs = torch.cartesian_prod(torch.arange(len(masks), device=masks.device), trained)  # (B * S, 2)
    chosen = logits[pairs[:, 0], pairs[:, 1]].to(dtype)
    focal, dice = focal_and_dice(chosen, labels, pairs, covers=out.covers, alpha=alpha, gamma=gamma)
    if class_weights is not None:
        weights = class_weights.to(dtype)[pairs[:, 1]]
        focal, dice = weights * focal, weights * dice
    dice = dice * present[pairs[:, 0], pairs[:, 1]]
    return {"loss_focal": focal_weight * focal.sum() / count, "loss_dice": dice_weight * dice.sum() / count}


def training_labels(out: Dense, masks: Tensor, *, ignore_index: int, self_training: bool) -> Tensor:
    """Labels (B, H, W) without the unseen classes: ignored, or the unseen class of the best mask at each such pixel."""
    hidden = ~out.extras["seen"][0]
    if not hidden.any():
        if self_training:
            raise UserError("the transductive setting needs unseen classes to guess; build the model with unseen")
        return masks
    table = F.pad(hidden, (0, ignore_index + 1 - len(hidden)))
    unknown = table[masks.long()]
    if not self_training:
        return masks.masked_fill(unknown, ignore_index)
    height, width = masks.shape[-2:]
    full = bilinear_rows(out.extras["masks"].detach()[:, hidden], out.covers, range(height))[..., :width]
    guess = hidden.nonzero()[:, 0][full.sigmoid().argmax(1)]
    return torch.where(unknown, guess.to(masks.dtype), masks)


def zegclip(
    *,
    num_classes: int,
    class_names: Sequence[Name] | None = None,
    backbone: str = "ViT-B-16-quickgelu",
    weights: str | None = None,
    templates: str | Sequence[str] = "zegclip_voc",
    vectors: str | None = None,
    unseen: str | Sequence[int] = (),
    seen_bias: float = 0.1,
    image_size: int | Size = 512,
    prompts: int = 10,
    prompt_layers: int | None = None,
    layers: int = 3,
    heads: int = 8,
    dropout: float = 0.1,
    use_proj: bool = False,
    checkpointing: bool = False,
    patch_size: int | None = None,
    depth: int | None = None,
    embed_dim: int | None = None,
    joint_dim: int | None = None,
) -> ZegCLIP:
    """ZegCLIP on a ViT of CLIP, by a name of open_clip.

    `weights` of both towers are a tag such as `openai` or a file, see `segvit.text.checkpoint.find_clip`. From the text
    tower come the vectors of `class_names` (the model's own unless given; synonyms as a list) in `templates`, unless
    `vectors` is a file of them; without either they are random, to be loaded or trained against. `unseen` are the ids
    of classes that training hides, or a split of `segvit.text.splits`; `seen_bias` is the calibration, 0 for the
    transductive setting. The first block and `prompt_layers` more (by default all) have `prompts` of their own; 0 is
    the shallow form. `use_proj` puts a linear layer and a norm before the decoder. `patch_size`, `depth`, `embed_dim`
    and `joint_dim` change the architecture, for training from nothing.
    """
    changes = {"patch_size": patch_size, "layers": depth, "width": embed_dim, "embed_dim": joint_dim}
    found = _find(backbone, weights, {name: value for name, value in changes.items() if value is not None})
    vit = build_backbone(
        found, image_size=image_size, position_mode="bilinear", doubled_class=True, checkpointing=checkpointing
    )
    assert isinstance(vit, PlainViT)
    vit.mean, vit.std = MEAN, STD
    deep = len(vit.blocks) - 1 if prompt_layers is None else prompt_layers
    add_prompts(vit, num_prompts=prompts, deep=deep, dropout=dropout)
    dim = found.vision.embed_dim
    head = MaskHead(dim, layers=layers, heads=heads, dropout=dropout, use_proj=use_proj)
    # Its sentences have no underscores.
    plain = class_names and [name.replace("_", " ") if isinstance(name, str) else name for name in class_names]
    embeddings = class_vectors(found, plain, num_classes=num_classes, templates=templates, file=vectors)
    hidden = unseen_ids(unseen, num_classes=num_classes, class_names=class_names)
    return ZegCLIP(vit, head, embeddings, unseen=hidden, seen_bias=seen_bias)


def _find(name: str, weights: str | None, changes: dict[str, Any]) -> Checkpoint:
    """The ViT of CLIP of that name, with changes for training from nothing."""
    if changes and weights is not None:
        raise UserError("patch_size, depth, embed_dim and joint_dim change CLIP, so no weights fit; set either")
    found, named = find_clip(name, weights), clip_config(name).vision
    vision = found.vision
    if isinstance(vision.layers, tuple):
        raise UserError(f"{name} is a ResNet, which has no place for prompts; choose a ViT such as ViT-B-16-quickgelu")
    if named is not None and named.quick_gelu != vision.quick_gelu:  # or a saved model would be built with the other
        better = f"{name}-quickgelu" if vision.quick_gelu else name.removesuffix("-quickgelu")
        raise UserError(f"weights {weights!r} need {'quick ' * vision.quick_gelu}GELU; choose backbone {better}")
    if not changes:
        return found
    heads = max(1, changes.get("width", vision.width) // 64)
    return replace(found, config=replace(found.config, vision=replace(vision, heads=heads, **changes)))


zegclip_vit_base = partial(zegclip, backbone="ViT-B-16-quickgelu")

VISION: Rules = (
    *VIT_RULES,
    (r"^embedding\.", "embedding.joint."),
    (r"^prompt_norm\.", "embedding.prompt_norm."),
    (r"^(deep_)?prompt_(embeddings|proj)", r"gaps.0.\1prompt_\2"),
)
HEAD: Rules = (
    (r"^q_proj\.", "relate."),
    (r"^input_proj_1\.", "proj.0."),
    (r"^proj_norm_1\.", "proj.1."),
    (r"^decoder_1\.", ""),
    (r"\.linear([12])\.", r".fc\1."),
    (r"\.norm2\.", ".norm1."),
    (r"\.norm3\.", ".norm2."),
    (r"\.multihead_attn\.", ".attn."),
)
UNUSED = r"\.self_attn\.|\.norm1\.|empty_weight$|^conv_seg\."


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official checkpoints (ZiqinZhou66/ZegCLIP) into ours, without the class vectors, which they do not hold."""
    parts = {
        prefix: {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for prefix in ("backbone.", "decode_head.")
    }
    vision, head = _convert_vision(parts["backbone."]), _convert_head(parts["decode_head."])
    return {f"backbone.{key}": value for key, value in vision.items()} | {f"head.{key}": head[key] for key in head}


def _convert_vision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    shallow = "deep_prompt_embeddings" not in state  # then the norm of the prompts is there and does nothing
    vision = rename(state, VISION, unused=r"^prompt_norm\." if shallow else "$^")
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "cls_token": lambda token: token[None, None],
        "pos_embed": lambda table: table[None],
        "embedding.joint.proj.weight": lambda weight: weight.T.contiguous(),
    }
    return {key: changes[key](value) if key in changes else value for key, value in vision.items()}


def _convert_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    numbers = [int(match[1]) for key in state if (match := re.match(r"decoder_1\.layers\.(\d+)\.", key))]
    last = max(numbers, default=0)
    unused = rf"{UNUSED}|^decoder_1\.layers\.{last}\.(norm|linear|multihead_attn\.(v|proj)\.)"
    head = rename(state, [(rf"^decoder_1\.layers\.{last}\.multihead_attn\.", ""), *HEAD], unused=unused)
    for key in [key for key in head if ".attn.q." in key]:
        parts = [head.pop(key.replace(".q.", f".{name}.")) for name in "qkv"]
        head[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    return head
