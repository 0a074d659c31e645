"""DenseCLIP: class names as CLIP's text tower sees them, compared to every cell of the image, guide an FPN.

Paper     Y. Rao et al., "DenseCLIP: Language-Guided Dense Prediction with Context-Aware Prompting", CVPR 2022,
          arXiv 2112.01518. Names are fixed at training: this is no zero-shot method.
Idea      Cosines of cells and names make a score map, which joins one level of the pyramid and has a loss of its own.
Prompts   The names stand behind learned context vectors in the frozen text tower. Post-model prompting, the paper's
          choice, refines the names' vectors by what the image shows; so the tower reads them once. Pre-model prompting
          makes the context from the image, and the tower reads all names for each image.
Differs   Position tables hold all of CLIP's lengths unless `text_length` is given. The score map may have any size.
Proposed  (described by the paper without code, so checked only as a composition) pre-model prompting, with a linear
          layer where the towers' widths differ. On other backbones than CLIP's, a new attention pool on the last map
          stands in for CLIP's projection.
Checked   tests/golden/denseclip__* (raoyongming/DenseCLIP segmentation/denseclip/{denseclip,models,heads}.py).

Shapes    B images, K classes, E joint channels, D channels of the text tower, n context vectors, N = 1 + h * w cells.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.backbones.clip import AttentionPool, ClipResNet, build_backbone, rename_vit
from segvit.backbones.pyramid import Pyramid, pyramid
from segvit.backbones.vit import PlainViT
from segvit.contracts import Dense, Features, Readout, Size, UserError
from segvit.losses.cross_entropy import logits_at, pixel_counts, pixel_cross_entropy
from segvit.losses.pixel import pixel_losses
from segvit.nn.attention import join_heads, split_heads
from segvit.nn.fpn import FPN, FPN_RULES, HEAD_RULES, FPNHead, Levels
from segvit.nn.readout import logit_rows
from segvit.nn.rename import Rules, rename
from segvit.nn.tokens import map_tokens
from segvit.text.checkpoint import Checkpoint, named_clip
from segvit.text.embeddings import Name, class_sentences
from segvit.text.tokenize import tokenize, word_pieces
from segvit.text.tower import TextTower, build_text, end_positions, insert_context

STRIDES = (4, 8, 16, 32)
Prompting = Literal["post", "pre", "fixed"]  # fixed: post, and vectors in the place of the text tower


class Attention(nn.Module):
    """Attention whose query, key and value have no bias."""

    def __init__(self, dim: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.proj, self.drop = nn.Linear(dim, dim), nn.Dropout(dropout)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        parts = self.q_proj(queries), self.k_proj(memory), self.v_proj(memory)
        q, k, v = (split_heads(part, self.heads) for part in parts)
        return cast(Tensor, self.drop(self.proj(join_heads(F.scaled_dot_product_attention(q, k, v)))))


class DecoderBlock(nn.Module):
    """Pre-norm: attention among the texts, attention to the image, MLP."""

    def __init__(self, dim: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.self_attn = Attention(dim, heads=heads, dropout=dropout)
        self.cross_attn = Attention(dim, heads=heads, dropout=dropout)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.self_attn(normed, normed)
        x = x + self.cross_attn(self.norm2(x), memory)
        return cast(Tensor, x + self.mlp(self.norm3(x)))


class ContextDecoder(nn.Module):
    """Vectors of the joint space (B, Q, E) look at an image (B, N, E), its own vector first: (B, Q, E)."""

    def __init__(
        self, embed_dim: int, dim: int = 256, *, heads: int = 4, layers: int = 3, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.memory_proj = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, dim), nn.LayerNorm(dim))
        self.text_proj = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, dim))
        self.blocks = nn.ModuleList(DecoderBlock(dim, heads=heads, dropout=dropout) for _ in range(layers))
        self.out_proj = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, embed_dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, texts: Tensor, visual: Tensor) -> Tensor:
        memory, x = self.memory_proj(visual), self.text_proj(texts)
        for block in self.blocks:
            x = block(x, memory)
        return cast(Tensor, self.out_proj(x))


class Words(nn.Module):
    """Class names behind context vectors (B, n, D), through the frozen text tower: (B, K, E)."""

    def __init__(self, tower: TextTower, tokens: Tensor) -> None:
        super().__init__()
        self.tower = tower.requires_grad_(False)
        self.register_buffer("tokens", tokens, persistent=False)  # the class table has the names

    def forward(self, contexts: Tensor) -> Tensor:
        tokens = self.get_buffer("tokens")
        words = insert_context(self.tower.embed(tokens), contexts[:, None])  # (B, K, n + L, D)
        return self.tower.encode(words, end_positions(tokens) + contexts.shape[1])


class PostModel(nn.Module):
    """The names' vectors, equal for all images, plus a small correction by what each shows (paper, eq. 5)."""

    def __init__(self, words: Words, decoder: ContextDecoder, *, num_contexts: int = 8) -> None:
        super().__init__()
        self.words: nn.Module = words
        self.decoder = decoder
        self.register_buffer("fixed", None)
        self.contexts = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_contexts, words.tower.width)))
        self.gamma = nn.Parameter(torch.full((words.tower.embed_dim,), 1e-4))
        self.read: tuple[object, Tensor] | None = None

    def plain(self) -> Tensor:
        """The names' vectors before an image is seen, (1, K, E); read once as long as nothing learns."""
        if (fixed := self._buffers["fixed"]) is not None:
            return fixed
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return cast(Tensor, self.words(self.contexts))
        # Whatever changes a parameter in place, be it a step or a checkpoint, counts its version up.
        state = [(id(p), p._version, p.device, p.dtype) for p in self.parameters()], torch.is_autocast_enabled()
        if self.read is None or self.read[0] != state:
            self.read = state, self.words(self.contexts)
        return self.read[1]

    def fix(self, vectors: Tensor) -> None:
        """Put the names' vectors (1, K, E) in the place of the text tower."""
        self.fixed, self.words, self.read = vectors, nn.Identity(), None

    def forward(self, visual: Tensor) -> Tensor:
        texts = self.plain().expand(visual.shape[0], -1, -1)
        return cast(Tensor, texts + self.gamma * self.decoder(texts, visual))


class PreModel(nn.Module):
    """Learned queries look at the image and become its own context vectors (paper, eq. 4)."""

    def __init__(self, words: Words, decoder: ContextDecoder, *, num_contexts: int = 8) -> None:
        super().__init__()
        self.words, self.decoder = words, decoder
        width, embed_dim = words.tower.width, words.tower.embed_dim
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_contexts, embed_dim)))
        self.project = nn.Identity() if width == embed_dim else nn.Linear(embed_dim, width)

    def contexts(self, visual: Tensor) -> Tensor:
        """(B, N, E) -> (B, n, D)."""
        return cast(Tensor, self.project(self.decoder(self.queries.expand(visual.shape[0], -1, -1), visual)))

    def forward(self, visual: Tensor) -> Tensor:
        return cast(Tensor, self.words(self.contexts(visual)))


class DenseCLIP(nn.Module):
    """A pyramid, words and Semantic FPN. `scored` is the level that the score map joins.

    `levels` makes a pyramid of a ViT's maps; `pool` gives the joint space to a backbone that has none.
    """

    def __init__(
        self, backbone: ClipResNet | PlainViT | Pyramid, prompting: PostModel | PreModel, fpn: FPN, head: FPNHead, *,
        scored: int = -1, levels: Levels | None = None, pool: AttentionPool | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone, self.levels, self.pool, self.scored = backbone, levels, pool, scored
        self.prompting, self.fpn, self.head = prompting, fpn, head

    def pyramid(self, features: Features) -> tuple[list[Tensor], Tensor, Tensor]:
        """What the FPN takes, without scores; the image's vector (B, E) and each cell's (B, E, h, w)."""
        maps = list(features.maps) if self.levels is None else self.levels(features.maps)
        if self.pool is None:
            return maps, cast(Tensor, features.pooled), features.extras["dense"]
        pooled, dense = self.pool(maps[-1])
        return maps, pooled, dense

    def forward(self, images: Tensor) -> Dense:
        features: Features = self.backbone(images)
        maps, pooled, dense = self.pyramid(features)
        texts = self.prompting(torch.cat([pooled[:, None], map_tokens(dense)], dim=1))  # (B, K, E)
        scores = torch.einsum("bkc,bchw->bkhw", F.normalize(texts, dim=-1), F.normalize(dense, dim=1))
        maps[self.scored] = torch.cat([maps[self.scored], scores], dim=1)
        extras = {**features.extras, "score_map": scores, "texts": texts}
        return Dense(self.head(self.fpn(maps)), extras, features.covers)


def fix_words(model: DenseCLIP) -> None:
    """Put the names' vectors in the place of the text tower, so that an exported model has none, in place.

    Raises UserError for pre-model prompting, where they depend on the image.
    """
    if not isinstance(model.prompting, PostModel):
        raise UserError("with pre-model prompting the words depend on the image; fix them with prompting post only")
    with torch.no_grad():
        model.prompting.fix(model.prompting.plain().clone())


READOUT = Readout(logit_rows)
normalisers = pixel_counts


def criterion(
    out: Dense, masks: Tensor, totals: dict[str, Tensor], *, ignore_index: int = 255,
    class_weights: Tensor | None = None, score_map: float = 0.4, temperature: float = 0.07, cross_entropy: float = 1.0,
    focal: float = 0.0, dice: float = 0.0, lovasz: float = 0.0, ohem: float = 0.0, gamma: float = 2.0,
    ohem_threshold: float = 0.7, ohem_min_kept: int = 100_000,
) -> dict[str, Tensor]:  # fmt: skip
    """Losses of the logits, and `score_map` times the cross entropy of the score map over `temperature` (paper, eq. 6).

    As mmsegmentation takes it, cross entropy is a mean over all pixels with 0 for ignored ones.
    """
    if score_map < 0 or temperature <= 0:
        raise UserError(f"loss: score_map {score_map} must not be negative and temperature {temperature} be above 0")
    totals = totals | {"valid": totals["pixels"]}
    losses = pixel_losses(
        logits_at(out, masks), masks, totals, ignore_index=ignore_index, class_weights=class_weights,
        cross_entropy=cross_entropy, focal=focal, dice=dice, lovasz=lovasz, ohem=ohem, gamma=gamma,
        ohem_threshold=ohem_threshold, ohem_min_kept=ohem_min_kept,
    )  # fmt: skip
    if score_map:
        scores = logits_at(out._replace(logits=out.extras["score_map"]), masks) / temperature
        losses["loss_score_map"] = score_map * pixel_cross_entropy(
            scores, masks, total=totals["pixels"], ignore_index=ignore_index, class_weights=class_weights
        )
    return losses


def build_prompting(
    found: Checkpoint, names: Sequence[Name] | None, *, num_classes: int, how: Prompting, text_length: int | None,
    num_contexts: int, decoder: Callable[[int], ContextDecoder],
) -> PostModel | PreModel:  # fmt: skip
    """The text side for the names, or for numbers where there are none; fixed ones come with the weights.

    Raises UserError for another number of names than classes, for synonyms, and for repeated, empty or long names.
    """
    if how == "fixed":
        with torch.device("meta"):  # where a tower costs nothing
            absent = Words(TextTower(found.text_config()), torch.zeros(num_classes, 2))
        fixed = PostModel(absent, decoder(absent.tower.embed_dim), num_contexts=num_contexts)
        fixed.fix(torch.zeros(1, num_classes, absent.tower.embed_dim))
        return fixed
    chosen = [f"class {number}" for number in range(num_classes)] if names is None else names
    sentences = class_sentences(chosen, templates="name")
    if len(sentences) != num_classes or max(map(len, sentences)) > 1:
        raise UserError(f"{num_classes} classes need one name each, without synonyms, got {len(sentences)}; name all")
    words = [group[0] for group in sentences]
    length = text_length or max(len(word_pieces(word)) for word in words) + 2
    tower = build_text(found, context_length=None if text_length is None else text_length + num_contexts)
    if length + num_contexts > tower.context_length:
        raise UserError(f"{num_contexts} context vectors and {length} tokens of a name do not fit into "
                        f"{tower.context_length}; use fewer or shorter ones")  # fmt: skip
    kind = PostModel if how == "post" else PreModel
    read = Words(tower, tokenize(words, context_length=length))
    return kind(read, decoder(tower.embed_dim), num_contexts=num_contexts)


def clip_tower(
    found: Checkpoint, *, image_size: int | Size, out_indices: Sequence[int] | None, drop_path: float,
    checkpointing: bool,
) -> tuple[ClipResNet | PlainViT, Levels | None]:  # fmt: skip
    """CLIP's image tower, and for a ViT what makes a pyramid of four of its blocks."""
    build = partial(build_backbone, found, image_size=image_size, position_mode="bilinear", drop_path=drop_path)
    depth = found.vision.layers
    if not isinstance(depth, int):
        return build(out_indices=out_indices, checkpointing=checkpointing), None
    thirds = [max(depth * part // 12, 1) - 1 for part in (4, 6, 8, 12)]
    wanted = thirds if out_indices is None else [index % depth for index in out_indices if -depth <= index < depth]
    if len(wanted) != 4 or (out_indices is not None and len(out_indices) != 4):
        raise UserError(f"out_indices is {out_indices}; give four of the {depth} blocks")
    blocks = sorted({*wanted, depth - 1})  # the joint space comes behind the last one
    vit = build(out_indices=blocks, checkpointing=checkpointing, doubled_class=True)
    places = [blocks.index(index) for index in wanted]
    return vit, Levels(found.vision.width, places, fine=found.vision.patch_size == 8)


def assemble(
    backbone: ClipResNet | PlainViT | Pyramid, prompting: PostModel | PreModel, *, dims: Sequence[int],
    strides: Sequence[int], scored: int, num_classes: int, fpn_dim: int, head_dim: int, dropout: float,
    levels: Levels | None = None, pool: AttentionPool | None = None,
) -> DenseCLIP:  # fmt: skip
    """A neck that expects the score map at level `scored`, and the head."""
    widths = [dim + num_classes * (level == scored) for level, dim in enumerate(dims)]
    head = FPNHead(fpn_dim, head_dim, strides=strides, num_classes=num_classes, dropout=dropout)
    return DenseCLIP(backbone, prompting, FPN(widths, fpn_dim), head, scored=scored, levels=levels, pool=pool)


def denseclip_clip(
    *, num_classes: int, class_names: Sequence[Name] | None = None, clip: str = "RN50-quickgelu",
    weights: str | None = None, image_size: int | Size = 512, prompting: Prompting = "post",
    text_length: int | None = None, num_contexts: int = 8, decoder_dim: int = 256, decoder_heads: int = 4,
    decoder_layers: int = 3, fpn_dim: int = 256, head_dim: int = 256, dropout: float = 0.1,
    out_indices: Sequence[int] | None = None, drop_path: float = 0.0, checkpointing: bool = False,
    embed_dim: int | None = None, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None,
) -> DenseCLIP:  # fmt: skip
    """DenseCLIP on both towers of a CLIP: `clip` is a name of open_clip, `weights` a tag such as `openai` or a file.

    `image_size` is the one that positions are stored for. `text_length` is the longest name in tokens, start and end
    included, 5 in official checkpoints; None keeps CLIP's whole table. `out_indices` (four blocks), `drop_path` and
    `checkpointing` are for a ViT. `embed_dim`, `vision` and `text` change the towers' sizes for training from nothing.
    """
    found = named_clip(clip, weights, embed_dim=embed_dim, vision=vision, text=text)
    backbone, levels = clip_tower(
        found, image_size=image_size, out_indices=out_indices, drop_path=drop_path, checkpointing=checkpointing
    )
    words = build_prompting(
        found, class_names, num_classes=num_classes, how=prompting, text_length=text_length, num_contexts=num_contexts,
        decoder=partial(ContextDecoder, dim=decoder_dim, heads=decoder_heads, layers=decoder_layers, dropout=dropout),
    )  # fmt: skip
    dims = backbone.dims if isinstance(backbone, ClipResNet) else (backbone.dim,) * 4
    return assemble(
        backbone, words, dims=dims, strides=STRIDES, scored=3 if levels is None else levels.same,
        num_classes=num_classes, fpn_dim=fpn_dim, head_dim=head_dim, dropout=dropout, levels=levels,
    )  # fmt: skip


def denseclip(
    *, num_classes: int, class_names: Sequence[Name] | None = None, backbone: str = "resnet50",
    weights: str | None = None, clip: str = "RN50-quickgelu", text_weights: str | None = None,
    image_size: int | Size = 512, position_size: int | None = None, prompting: Prompting = "post",
    text_length: int | None = None, num_contexts: int = 8, decoder_dim: int = 256, decoder_heads: int = 4,
    decoder_layers: int = 3, fpn_dim: int = 256, head_dim: int = 256, dropout: float = 0.1, drop_path: float = 0.0,
    embed_dim: int | None = None, text: dict[str, Any] | None = None,
) -> DenseCLIP:  # fmt: skip
    """DenseCLIP on any pyramid of timm with doubling strides; its `weights` are a hub name or a file.

    The words are those of `clip` with `text_weights`; options as for `denseclip_clip`. `image_size` is the one that the
    attention pool stores positions for, `position_size` the one for backbones that need one, such as Swin.
    """
    trunk = pyramid(backbone, weights=weights, drop_path=drop_path, image_size=position_size)
    if any(second != 2 * first for first, second in itertools.pairwise(trunk.strides)):
        raise UserError(f"{backbone} has strides {trunk.strides}; DenseCLIP needs each to be twice the one before")
    found = named_clip(clip, text_weights, embed_dim=embed_dim, text=text)
    words = build_prompting(
        found, class_names, num_classes=num_classes, how=prompting, text_length=text_length, num_contexts=num_contexts,
        decoder=partial(ContextDecoder, dim=decoder_dim, heads=decoder_heads, layers=decoder_layers, dropout=dropout),
    )  # fmt: skip
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    cell, last = trunk.strides[-1], trunk.dims[-1]
    pool = AttentionPool(
        last, found.text_config().embed_dim, heads=math.gcd(last, 32), grid=(-(-height // cell), -(-width // cell)),
        position_mode="bilinear",
    )  # fmt: skip
    return assemble(
        trunk, words, dims=trunk.dims, strides=trunk.strides, scored=len(trunk.dims) - 1, num_classes=num_classes,
        fpn_dim=fpn_dim, head_dim=head_dim, dropout=dropout, pool=pool,
    )  # fmt: skip


denseclip_resnet50 = partial(denseclip_clip, clip="RN50-quickgelu")
denseclip_resnet101 = partial(denseclip_clip, clip="RN101-quickgelu")
denseclip_vit_base = partial(denseclip_clip, clip="ViT-B-16-quickgelu", image_size=640, drop_path=0.1)

OFFICIAL: Rules = (
    *FPN_RULES,
    *HEAD_RULES,
    *((rf"^backbone\.fpn{i}\.(0\.)?(?=weight|bias)", f"levels.layers.{i - 1}.0.") for i in (1, 2, 3, 4)),
    *((rf"^backbone\.fpn{i}\.(?=[1-4]\.)", f"levels.layers.{i - 1}.") for i in (1, 2)),
    (r"^text_encoder\.", "prompting.words.tower."),
    (r"^context_decoder\.decoder\.", "prompting.decoder.blocks."),
    (r"^context_decoder\.", "prompting.decoder."),
    (r"^(contexts|gamma|queries)$", r"prompting.\1"),
)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official checkpoints (raoyongming/DenseCLIP) into ours; build the model with `text_length=5` for them."""
    renamed = rename(state, OFFICIAL, unused=r"(?!)")
    tower = {key.removeprefix("backbone."): value for key, value in renamed.items() if key.startswith("backbone.")}
    rest = {key: value for key, value in renamed.items() if not key.startswith("backbone.")}
    if "class_embedding" in tower:
        tower = rename_vit(tower)
    return rest | {f"backbone.{key}": value for key, value in tower.items()}
