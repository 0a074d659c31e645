"""Which systems of the catalogue do not become a graph for any image size, and why."""

from __future__ import annotations

from typing import Any

REGIONS = "the masks that CLIP names are chosen by their values, which a graph cannot; build it with regions=false"

GROUPS = "tracing its groups of tokens for any image size takes torch.export longer than is of use; no format has it"


def why_not(name: str, options: dict[str, Any]) -> str | None:
    """The reason why a model with these options of its builder is not exported; None where it is."""
    if name.startswith("zsseg") and options.get("regions", True):
        return REGIONS
    return GROUPS if name.startswith("ftn") else None
