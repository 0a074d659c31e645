"""SVF: only the singular values of a backbone's weights train; they fold back into plain weights.

Paper     Y. Sun et al., "Singular Value Fine-tuning: Few-shot Segmentation requires Few-parameters Fine-tuning",
          NeurIPS 2022, arXiv 2206.06122.
Idea      A weight as a matrix is W = U diag(s) V; U and V stay, s trains.
Differs   from the official code: the weight is put together in every step and used in one convolution instead of
          two, which is the same map; as W + U diag(s - s0) V, so that the start is W itself to the last bit. Grouped
          convolutions have factors a group (the code mixes groups and skips depthwise ones, whose factors are one scale
          a channel), linear layers keep their weights (the code replaces them by random ones), padding modes stay. All
          singular values are kept; `official_rank` is the code's rule, which loses some.
          Training stages 2 to 4 is the code's recipe; all blocks of a plain ViT is ours, the paper has none.
Checked   tests/golden/svf__* (zechao-li/SVF-pytorch svf.py).

Shapes    Co output channels, G groups, O = Co / G outputs and I = inputs * kernel of a group, R singular values.
"""

from __future__ import annotations

import copy
import re
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.adapters.handle import Handle
from segvit.adapters.places import used_layers
from segvit.contracts import UserError

NUMBERED = re.compile(r"(?:network\.)?(?:stages[_.]|layers?_?|block|patch_embed)(\d+)\.")  # the stages of pyramids
PROBES, TOLERANCE = 8, 0.01


class SingularValues(nn.Module):
    """A frozen linear layer or convolution whose singular values (G, R) train.

    `lossy` leaves out what the R largest do not span, as the official layer does; otherwise it stays in the weight.
    `store_factors` puts U and V into the state dict.
    """

    left: Tensor  # (G, O, R)
    right: Tensor  # (G, R, I)
    initial: Tensor  # (G, R), descending
    fingerprint: Tensor  # (PROBES,)

    def __init__(
        self, base_layer: nn.Linear | nn.Conv2d, *, rank: int | None = None, lossy: bool = False,
        store_factors: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.base_layer, self.lossy = base_layer, lossy
        for name, value in zip(("left", "initial", "right"), decompose(base_layer, rank), strict=True):
            self.register_buffer(name, value, persistent=store_factors)
        self.singular_values = nn.Parameter(self.initial.clone())
        self.register_buffer("fingerprint", self.initial.new_zeros(PROBES))
        hooks: Any = self  # torch has no types for these
        hooks.register_state_dict_pre_hook(_before_saving)
        hooks.register_load_state_dict_pre_hook(_before_loading)

    def weight(self) -> Tensor:
        """The tuned weight, in the base layer's shape and precision."""
        base = self.base_layer.weight
        if self.lossy:
            return compose(self.left, self.singular_values, self.right).view_as(base).to(base.dtype)
        change = compose(self.left, self.singular_values - self.initial, self.right)
        return (base + change.view_as(base)).to(base.dtype)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.base_layer
        if isinstance(layer, nn.Linear):
            return F.linear(x, self.weight(), layer.bias)
        return layer._conv_forward(x, self.weight(), layer.bias)  # pads as the layer's padding mode says


def decompose(layer: nn.Linear | nn.Conv2d, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U (G, O, R), s (G, R) and V (G, R, I) of a layer's weight, in float32 or finer; the `rank` largest values."""
    weight = layer.weight.detach()
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    # Neighbouring singular values of trained weights lie so close that in float32 rounding would decide on their
    # vectors; in float64 they recur on other machines, and the adapter's file needs to hold no factors.
    matrices = weight.unflatten(0, (groups, -1)).flatten(2).double().cpu()
    tall = matrices.shape[1] > matrices.shape[2]
    left, values, right = wide_svd(matrices.mT if tall else matrices)
    if tall:
        left, right = right.mT, left.mT
    dtype = torch.promote_types(weight.dtype, torch.float32)
    chosen = (left[..., :rank], values[:, :rank], right[:, :rank])
    left, values, right = (factor.to(weight.device, dtype).contiguous() for factor in chosen)
    return left, values, right


def wide_svd(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of (G, O, I), O <= I, float64, from eigenvectors of M M': several times faster than LAPACK's SVD.

    The product of the factors is M in any case; V is orthonormal as far as s is above 1e-8 of its largest value, and
    zero where s is.
    """
    left = torch.linalg.eigh(matrices @ matrices.mT).eigenvectors.flip(-1)
    scaled = left.mT @ matrices
    values = scaled.norm(dim=2)
    return left, values, scaled / values.clamp(min=torch.finfo(values.dtype).tiny)[..., None]


def compose(left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """U diag(s) V, (G, O, I)."""
    return (left * values[:, None]) @ right


def svf(
    backbone: nn.Module, *, layers: str | None = None, rank_ratio: float = 1.0, official_rank: bool = False,
    store_factors: bool = False,
) -> Handle:  # fmt: skip
    """Tune the singular values of linear layers and convolutions.

    `layers` is a regular expression that is searched in their names; by default all stages of a pyramid but the first,
    and all blocks of a plain ViT. `rank_ratio` is the share of singular values that train, the largest ones.
    `official_rank` rounds their number down to a multiple of 4 and drops the others from the weight. `store_factors`
    puts U and V into the adapter's file, for machines on which they do not recur.

    Raises UserError for a ratio outside (0, 1], and when no layer is found.
    """
    if not 0 < rank_ratio <= 1:
        raise UserError(f"rank_ratio must lie in (0, 1], got {rank_ratio}")
    found = [(name, cast(nn.Linear | nn.Conv2d, layer)) for name, layer in used_layers(backbone)
             if type(layer) in (nn.Linear, nn.Conv2d)]  # fmt: skip
    chosen = default_layers([name for name, _ in found]) if layers is None else matching([n for n, _ in found], layers)
    handle = Handle(backbone, merged=merged)
    for name, layer in found:
        if name in chosen:
            rank = kept(layer, rank_ratio, official=official_rank)
            new = SingularValues(layer, rank=rank, lossy=official_rank, store_factors=store_factors)
            handle.replace(name, new)
    return handle


def default_layers(names: list[str]) -> set[str]:
    """All blocks of a plain ViT; all stages of a pyramid but the first, which stays frozen like the stem."""
    blocks = {name for name in names if name.startswith("blocks.")}
    numbers = {name: int(match[1]) for name in names if (match := NUMBERED.match(name))}
    chosen = blocks or {name for name, number in numbers.items() if number > min(numbers.values())}
    if not chosen:
        raise UserError(
            f"svf does not know the stages of this backbone; set layers to an expression for names like {names[:3]}"
        )
    return chosen


def matching(names: list[str], pattern: str) -> set[str]:
    """The names in which a regular expression is found. Raises UserError for none, and for what is no expression."""
    try:
        chosen = {name for name in names if re.search(pattern, name)}
    except re.error as error:
        raise UserError(f"layers: {pattern!r} is not a regular expression ({error})") from None
    if not chosen:
        raise UserError(f"layers: {pattern!r} is in no layer's name; there are {', '.join(names[:4])} and others")
    return chosen


def kept(layer: nn.Linear | nn.Conv2d, ratio: float, *, official: bool) -> int:
    """How many singular values of a group train: the ratio's share; officially a multiple of 4, but 1 below 4."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    full = min(layer.weight.shape[0] // groups, layer.weight[0].numel())
    count = int(full * ratio)
    return max(1, count // 4 * 4 if official else count)


def merged(tuned: nn.Module) -> nn.Module:
    """The plain layer with the tuned weight."""
    assert isinstance(tuned, SingularValues)
    layer = copy.deepcopy(tuned.base_layer)
    layer.weight = nn.Parameter(tuned.weight().detach())
    return layer


def fingerprint(left: Tensor, change: Tensor, right: Tensor) -> Tensor:
    """a' U diag(change) V b for fixed random signs a and b, (PROBES,): what the factors make of a change of s.

    Free of what the factors leave open without effect, the signs of pairs. Each entry is of the size of |change|.
    """
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(2, (len(left), PROBES, left.shape[1]), generator=generator).mul(2).sub(1).to(left)
    b = torch.randint(2, (len(left), right.shape[2], PROBES), generator=generator).mul(2).sub(1).to(left)
    return torch.einsum("gpr,gr,grp->p", a @ left, change, right @ b)


def verify_factors(model: nn.Module) -> None:
    """Check that the loaded singular values mean here what they meant where they were trained.

    For values that were copied into place with their fingerprints. Raises UserError where the singular vectors found
    here are others, which is so for values that coincide, or on other weights.
    """
    for name, module in model.named_modules():
        if isinstance(module, SingularValues):
            _compare(name, module, module.singular_values.detach(), module.fingerprint)


def _compare(name: str, layer: SingularValues, values: Tensor, expected: Tensor) -> None:
    change = values.to(layer.initial) - layer.initial
    error = (fingerprint(layer.left, change, layer.right) - expected.to(change)).norm()
    rounding = torch.finfo(torch.float32).eps * layer.initial.norm()  # of the values themselves
    if not error <= PROBES**0.5 * (TOLERANCE * change.norm() + 10 * rounding):
        raise UserError(
            f"{name} was tuned along other singular vectors than this machine finds for its weights; "
            "train with store_factors, so that the adapter brings its vectors, or check the base weights"
        )


@torch.no_grad()
def _before_saving(module: nn.Module, *_: Any) -> None:
    """The fingerprint becomes that of the values as they are now."""
    layer = cast(SingularValues, module)
    change = layer.singular_values - layer.initial
    layer.fingerprint.copy_(fingerprint(layer.left, change, layer.right))


@torch.no_grad()
def _before_loading(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """The factors become those of the weights that are loaded; values are checked against them."""
    layer, given = cast(SingularValues, module), {key: f"{prefix}{key}" for key in ("left", "fingerprint")}
    if given["left"] in state:
        return
    weight = state.get(f"{prefix}base_layer.weight")
    if weight is not None and not torch.equal(weight.to(layer.base_layer.weight), layer.base_layer.weight):
        base = copy.deepcopy(layer.base_layer)
        base.weight.copy_(weight)
        for factor, value in zip(
            (layer.left, layer.initial, layer.right), decompose(base, layer.initial.shape[1]), strict=True
        ):
            factor.copy_(value)
    if given["fingerprint"] in state:
        _compare(prefix[:-1], layer, state[f"{prefix}singular_values"], state[given["fingerprint"]])
