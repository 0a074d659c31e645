"""What each tuning method costs in training: parameters, memory and time of a step, beside full tuning.

    python benchmarks/adapters.py                                     # ViT-B/16 with a linear head, 512 x 512
    python benchmarks/adapters.py --model segvit_vit_small --size 256 --methods lora ssf full

`trained` counts parameters inside the backbone (the head trains in all of them). `state` is gradients and moments of
AdamW, `image` the activations that one image adds, both measured as `segvit train` does before its first step. `step`
is the processor time of forward, loss and backward for one image, the median over rounds in which every method takes
its turn, as a share of that of full tuning.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from typing import Any

import torch

from segvit.adapters.catalogue import ADAPTERS, LOSSES
from segvit.contracts import Batch, UserError
from segvit.engine.memory import footprint, training_pass
from segvit.engine.settings import Optim
from segvit.tasks.procedure import with_adapter_loss
from segvit.zoo import create_model, find_system

IGNORE = 255


class Tuned:
    """A model with a method attached, and what a step of it needs."""

    def __init__(self, arguments: argparse.Namespace, method: str) -> None:
        torch.manual_seed(0)
        side, classes = arguments.size, arguments.classes
        self.model = create_model(arguments.model, num_classes=classes, image_size=side, adapter=method).train()
        system = find_system(arguments.model)
        criterion = partial(system.criterion, ignore_index=IGNORE)
        normalisers = partial(system.normalisers, num_classes=classes, ignore_index=IGNORE)
        losses: dict[str, Any] = {"criterion": criterion, "normalisers": normalisers}
        if method in LOSSES:
            both = with_adapter_loss(criterion, normalisers, LOSSES[method], ignore_index=IGNORE)
            losses = dict(zip(losses, both, strict=True))
        self.losses = losses
        masks = torch.randint(0, classes, (1, 16, 16)).repeat_interleave(side // 16, 1).repeat_interleave(side // 16, 2)
        self.batch = Batch(torch.randn(1, 3, side, side), masks.to(torch.uint8), [])

    def costs(self) -> dict[str, float]:
        """Parameters, and MB of a step."""
        need = footprint(self.model, self.batch, precision="fp32", optim=Optim(), average=False, **self.losses)
        backbone = sum(p.numel() for n, p in self.model.named_parameters() if p.requires_grad and "backbone." in n)
        return {"trained": backbone, "state": need.state / 1e6, "image": need.image / 1e6}

    def seconds(self) -> float:
        """Of one step without the update."""
        started = time.process_time()
        training_pass(self.model, self.batch, precision="fp32", **self.losses)
        taken = time.process_time() - started
        self.model.zero_grad(set_to_none=True)
        return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="segmenter_linear_vit_base")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--methods", nargs="+", default=list(ADAPTERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    for method in dict.fromkeys([*arguments.methods, "full"]):
        try:
            rows[method] = Tuned(arguments, method).costs()
        except UserError as error:
            print(f"{method} left out: {error}")
    taken: dict[str, list[float]] = {method: [] for method in rows}
    for _ in range(arguments.rounds):
        for method in rows:  # built anew: all of them at once would not fit
            tuned = Tuned(arguments, method)
            tuned.seconds()
            taken[method].append(tuned.seconds())
    middle = {method: statistics.median(values) for method, values in taken.items()}
    for method in rows:
        rows[method]["step"] = middle[method] / middle["full"]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'':14}{'trained':>12}{'state MB':>11}{'image MB':>11}{'step':>8}")
    for method, row in rows.items():
        print(f"{method:14}{row['trained']:12,}{row['state']:11.1f}{row['image']:11.1f}{row['step']:8.2f}")


if __name__ == "__main__":
    main()
