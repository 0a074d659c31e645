"""Which layer of the backbone a parameter belongs to, by its name: for layer-wise decay of the learning rate.

Plain ViTs have the embeddings, then one layer a block; pyramids (PVT, HLG, timm's) have one layer a stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from segvit.contracts import UserError

EMBEDDING = re.compile(
    r"backbone\.(network\.)?(patch_embed|cls_token|reg_token|dist_token|pos_embed|norm_pre|rope|rel_pos_bias"
    r"|stem(_\d)?|conv1|bn1)(\.|$)"
)
NUMBERED = (
    re.compile(r"backbone\.blocks\.(\d+)\."),  # plain ViTs
    re.compile(r"backbone\.(?:block|patch_embed|pos_embed)(\d)(?:\.|$)"),  # PVT
    re.compile(r"backbone\.(?:stages|norms)\.(\d)\."),  # HLG
    re.compile(r"backbone\.network\.(?:stages_|layers_|layer)(\d)\."),  # timm's
)


def layer_factors(names: Iterable[str], decay: float) -> dict[str, float]:
    """The factor on the learning rate of each parameter: decay^d, d layers below the first part that is not numbered.

    The embeddings are layer 0, blocks or stages follow; heads, necks and the last norm keep the full rate (BEiT, Bao et
    al., 2022, whose numbers these are). Raises UserError where no name has a layer that is known.
    """
    names = list(names)
    numbers = {name: number for name in names if (number := layer_number(name)) is not None}
    if not numbers:
        raise UserError("this model has no backbone with layers that are known; set optim.layer_decay to null")
    ranks = {number: rank for rank, number in enumerate(sorted(set(numbers.values()) | {-1}))}
    return {name: decay ** (len(ranks) - ranks[numbers[name]]) if name in numbers else 1.0 for name in names}


def layer_number(name: str) -> int | None:
    """-1 for a parameter of the embeddings, the number in its name for one of a block or stage, None for all others."""
    if EMBEDDING.match(name):
        return -1
    matches = (pattern.match(name) for pattern in NUMBERED)
    return next((int(match[1]) for match in matches if match), None)
