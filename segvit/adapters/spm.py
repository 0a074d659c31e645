"""SPM: light matchers between frozen stages, which refine each stage's output by interim semantic maps.

Paper     L. Liu et al., "Prompt-Matched Semantic Segmentation", 2022, arXiv 2208.10159.
Found     in the abstracts of its versions; neither the full text nor code was at hand: a frozen CNN or transformer is
          cut into stages; a light semantic-aware prompt matcher between two stages learns prompts progressively, with
          a recurrent mechanism, guided by interim semantic maps; it maps the output of a stage to what the next wants.
Proposed  all else, which is ours: the stages (four groups of blocks in a plain ViT), the width, the convolutional GRU
          inside, its start at zero effect, and the auxiliary loss with its weight.
Checked   tests/adapters/test_spm.py by behaviour; there is no official code.

Shapes    B images, K classes, stage i with C channels on an h w grid, D width of the matcher.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from segvit.adapters.handle import Handle
from segvit.adapters.stages import gaps_behind_stages, stage_entropy
from segvit.contracts import Dense, UserError
from segvit.nn.tokens import Step, map_tokens, patch_map

HIDDEN = "spm_hidden"  # (B, D, h, w) what a matcher hands to the next; not in the backbone's output
MAP = "spm_map"  # and the number of the stage: (B, K, h, w), scores of its last step


class SemanticPromptMatcher(nn.Module):
    """A gap: adds a prompt to the patch tokens, made in `steps` recurrent steps with shared weights.

    In each, a semantic map is read off the state h and shown to a GRU of convolutions together with the stage's output.
    """

    def __init__(
        self, dim: int, *, number: int, width: int, num_classes: int, steps: int, hands_on: bool
    ) -> None:  # fmt: skip
        super().__init__()
        self.number, self.steps, self.hands_on = number, steps, hands_on
        self.reduce, self.norm = nn.Conv2d(dim, width, 1), LayerNorm2d(width)
        self.classify, self.embed = nn.Conv2d(width, num_classes, 1), nn.Conv2d(num_classes, width, 1)
        self.gates, self.candidate = nn.Conv2d(3 * width, 2 * width, 1), nn.Conv2d(3 * width, width, 1)
        self.spread = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.prompt = nn.Conv2d(width, dim, 1)
        nn.init.zeros_(self.prompt.weight)
        nn.init.zeros_(cast(Tensor, self.prompt.bias))

    def forward(self, step: Step) -> Step:
        extras = dict(step.extras)
        seen = self.norm(self.reduce(patch_map(step)))  # (B, D, h, w)
        hidden, earlier = seen, extras.pop(HIDDEN, None)
        if earlier is not None:
            hidden = F.interpolate(earlier, size=step.grid, mode="bilinear", align_corners=False)
        for _ in range(self.steps):
            scores = self.classify(hidden)
            hidden = self.refine(seen, self.embed(scores.softmax(1)), hidden)
        prompt = F.pad(map_tokens(self.prompt(hidden)), (0, 0, step.prefix, 0))
        extras[f"{MAP}{self.number}"] = scores
        if self.hands_on:
            extras[HIDDEN] = hidden
        return step._replace(tokens=step.tokens + prompt, extras=extras)

    def refine(self, seen: Tensor, classes: Tensor, hidden: Tensor) -> Tensor:
        """One step of the GRU, all (B, D, h, w)."""
        update, reset = self.gates(torch.cat([seen, classes, hidden], 1)).sigmoid().chunk(2, dim=1)
        fresh = self.spread(self.candidate(torch.cat([seen, classes, reset * hidden], 1))).tanh()
        return (1 - update) * hidden + update * fresh


def spm(
    backbone: nn.Module, *, num_classes: int, width: int = 64, steps: int = 2, after_last: bool = True,
    carry_hidden: bool = False,
) -> Handle:  # fmt: skip
    """A matcher behind every stage; the first output is the frozen network's.

    `width` is D. `after_last=False` leaves out the one behind the last stage, which only the head would see.
    `carry_hidden` starts the recurrence of a stage with the state of the one before. Between groups of a plain ViT's
    blocks, a map that ends a group is taken before its matcher acts. Raises UserError for a backbone without stages.
    """
    if min(num_classes, width, steps) < 1:
        raise UserError(f"num_classes, width and steps must be positive, got {num_classes}, {width} and {steps}")
    gaps = gaps_behind_stages(backbone)
    chosen = gaps if after_last else gaps[:-1]
    if not chosen:
        raise UserError("the backbone returns one stage only, so that nothing is left without after_last; leave it on")
    like = next(backbone.parameters())
    handle = Handle(backbone)
    for number, (path, dim) in enumerate(chosen, start=1):
        matcher = SemanticPromptMatcher(
            dim, number=number, width=width, num_classes=num_classes, steps=steps,
            hands_on=carry_hidden and number < len(chosen),
        )  # fmt: skip
        handle.add(path, matcher.to(like.device, like.dtype))
    return handle


def normalisers(masks: Tensor, *, ignore_index: int) -> dict[str, Tensor]:
    """The valid pixels, which the engine sums over the global batch."""
    return {"spm_valid": (masks != ignore_index).sum()}


def losses(
    out: Dense, masks: Tensor, totals: dict[str, Tensor], *, ignore_index: int, weight: float = 0.4
) -> dict[str, Tensor]:
    """The auxiliary loss on interim maps: the mean over stages of their cross entropy at the masks' size, weighted."""
    return {"loss_spm": weight * stage_entropy(out, masks, totals["spm_valid"], prefix=MAP, ignore_index=ignore_index)}
