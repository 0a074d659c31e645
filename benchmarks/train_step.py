"""Time and memory of a training step, part by part, beside the original's way of computing it.

    python benchmarks/train_step.py                                   # ViT-B/16, 512 x 512, batch 2, 150 classes
    python benchmarks/train_step.py --only loss --runs 9
    python benchmarks/train_step.py --clock processor --threads 1     # on a machine that others use too

Three variants of one network with the same weights, dropout and drop path on:

    ours    as `segvit train` runs it in fp32
    bf16    the same under autocast; where the processor has instructions for it, or with --bf16
    plain   the official step (zbwxp/SegVit): attention matrices in memory, the last masks and all class scores at full
            size in the forward pass, all classes' masks of the earlier stages resized in the loss, autograd throughout

Times are medians over rounds in which every part runs once, so that a machine whose speed drifts drifts for all of
them. Peaks are resident memory, each in a process of its own: of a step beyond the level after the imports, so with
weights, gradients and the optimiser's moments; of the loss beyond the level before it. `loop` is what `fit` adds to a
step: the normalisers, the checks and the log. The exit code is 1 if an aim is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from segvit.contracts import Batch, Dense
from segvit.engine.fit import Procedure, Progress, fit
from segvit.engine.optim import clip_gradients, make_optimizer, parameter_rates
from segvit.engine.run import RunLog
from segvit.engine.settings import Optim, Schedule
from segvit.systems.segvit import criterion, normalisers
from segvit.zoo import create_model

IGNORE = 255
AIMS = {  # largest share of the plain way's figure; the loop's is of our own step
    ("loss alone, s", "ours"): 0.40, ("loss alone, MB", "ours"): 0.12, ("step, s", "ours"): 0.65,
    ("step, s", "bf16"): 0.45, ("step, MB", "ours"): 0.55, ("loop, s", "ours"): 0.02,
}  # fmt: skip


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **rest: Any
) -> Tensor:
    """Attention through its matrices. Without dropout, in the encoder, also their mean over heads.

    mmcv's encoder layer asks torch's module for that mean and drops it.
    """
    weights = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1)
    if not dropout_p:
        weights.mean(dim=1)
    return F.dropout(weights, dropout_p) @ v


def plain_forward(model: nn.Module, images: Tensor) -> Dense:
    """The network, its last masks at full size and the scores of all classes there."""
    with mock.patch.object(F, "scaled_dot_product_attention", plain_attention):
        out: Dense = model(images)
    masks = F.interpolate(out.extras["masks"], size=images.shape[-2:], mode="bilinear", align_corners=False)
    shares = out.extras["class_logits"].softmax(-1)[..., :-1]
    return out._replace(
        logits=torch.einsum("bqc,bqhw->bchw", shares, masks.sigmoid()), extras=out.extras | {"masks": masks}
    )


def plain_losses(out: Dense, masks: Tensor, totals: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same terms as `criterion`: all masks resized, the present ones picked, the rest left to autograd."""
    images, queries = out.extras["class_logits"].shape[:2]
    found = [[int(i) for i in mask.unique() if i != IGNORE] for mask in masks]
    where = (
        torch.tensor([image for image in range(images) for _ in found[image]]),
        torch.tensor([label for labels in found for label in labels]),
    )
    targets = torch.stack([masks[i] == k for i, k in zip(*where, strict=True)]).flatten(1).float()
    wanted = torch.full((images, queries), queries)
    wanted[where] = where[1]
    weight = torch.ones(queries + 1)
    weight[-1] = 0.1
    losses = {}
    for source, suffix in (("", ""), ("aux0_", "_0"), ("aux1_", "_1")):
        losses[f"loss_ce{suffix}"] = F.cross_entropy(out.extras[f"{source}class_logits"].mT, wanted, weight)
        resized = F.interpolate(
            out.extras[f"{source}masks"], size=masks.shape[-2:], mode="bilinear", align_corners=False
        )
        logits = resized[where].flatten(1)
        p = logits.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        right = p * targets + (1 - p) * (1 - targets)
        focal = (0.25 * targets + 0.75 * (1 - targets)) * entropy * (1 - right) ** 2
        dice = 1 - (2 * (p * targets).sum(1) + 1) / (p.sum(1) + targets.sum(1) + 1)
        losses[f"loss_mask{suffix}"] = 20 * focal.mean(1).sum() / len(targets)
        losses[f"loss_dice{suffix}"] = dice.sum() / len(targets)
    return losses


def make_batch(arguments: argparse.Namespace) -> Batch:
    """Noise, and masks of blocks of as many classes as asked for, each with a strip to ignore."""
    batch, side, classes, present = arguments.batch, arguments.size, arguments.classes, arguments.present
    generator = torch.Generator().manual_seed(0)
    masks = torch.empty(batch, side, side, dtype=torch.uint8)
    for mask in masks:
        ids = torch.randperm(classes, generator=generator)[:present].to(torch.uint8)
        blocks = ids[torch.randint(0, present, (16, 16), generator=generator)]
        mask.copy_(F.interpolate(blocks[None, None].float(), size=(side, side)).to(torch.uint8)[0, 0])
        mask[: side // 32] = IGNORE
    return Batch(torch.randn(batch, 3, side, side, generator=generator), masks, [])


def loss_run(arguments: argparse.Namespace, variant: str) -> Callable[[], None]:
    """The loss alone with its gradient, from outputs of the network's shapes."""
    batch, side, classes = make_batch(arguments), arguments.size, arguments.classes
    totals = normalisers(batch.masks, num_classes=classes, ignore_index=IGNORE)
    generator, grid = torch.Generator().manual_seed(0), side // 16
    shapes = {"class_logits": (classes, classes + 1), "masks": (classes, grid, grid)}
    extras = {
        f"{source}{name}": torch.randn(arguments.batch, *shape, generator=generator).requires_grad_()
        for source in ("", "aux0_", "aux1_")
        for name, shape in shapes.items()
    }
    out, function = Dense(extras["masks"].detach(), extras, (side, side)), LOSSES[variant]

    def run() -> None:
        torch.stack(list(function(out, batch.masks, totals).values())).sum().backward()
        for leaf in extras.values():
            leaf.grad = None

    return run


class Trainee:
    """A network, its optimiser and a batch."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.model = create_model(arguments.model, num_classes=arguments.classes, image_size=arguments.size).train()
        settings = Optim()
        self.optimizer = make_optimizer(parameter_rates(self.model.named_parameters(), settings), settings)
        self.batch = make_batch(arguments)
        self.totals = normalisers(self.batch.masks, num_classes=arguments.classes, ignore_index=IGNORE)
        self.now = CLOCKS[arguments.clock]

    def step(self, variant: str) -> dict[str, float]:
        """Train once; seconds of the parts."""
        clock = [self.now()]
        with torch.autocast("cpu", torch.bfloat16, enabled=variant == "bf16"):
            out = plain_forward(self.model, self.batch.images) if variant == "plain" else self.model(self.batch.images)
        clock.append(self.now())
        loss = torch.stack(list(LOSSES[variant](out, self.batch.masks, self.totals).values())).sum()
        clock.append(self.now())
        loss.backward()
        clock.append(self.now())
        update(self.model, self.optimizer)
        clock.append(self.now())
        parts = [late - early for early, late in pairwise(clock)]
        return dict(zip(("forward", "loss", "backward", "update"), parts, strict=True)) | {"step": sum(parts)}


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    clip_gradients(model.parameters(), 35.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
LOSSES = {"ours": criterion, "bf16": criterion, "plain": plain_losses}


class OneWeight(nn.Module):
    """A network that costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Dense:
        return Dense(self.weight * images[:1, :1, :1, :1], {}, (1, 1))


def loop_seconds(arguments: argparse.Namespace, steps: int = 100) -> float:
    """What `fit` adds to a step: its time with a network that costs nothing, less that of the bare statements."""
    now = CLOCKS[arguments.clock]
    model, batch, settings = OneWeight(), make_batch(arguments), Optim()
    optimizer = make_optimizer(parameter_rates(model.named_parameters(), settings), settings)
    procedure = Procedure(
        criterion=lambda out, masks, totals: {"loss_ce": out.logits.sum()},
        normalisers=lambda masks: normalisers(masks, num_classes=arguments.classes, ignore_index=IGNORE),
        schedule=Schedule(), steps=steps, clip=35.0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, Path(folder, "said").open("w") as said, redirect_stderr(said):
        log = RunLog(Path(folder), steps=steps, start=0, batch_size=arguments.batch, main=True)
        started = now()
        fit(
            model, optimizer, ([batch] for _ in range(steps)), procedure=procedure, accelerator=Accelerator(cpu=True),
            progress=Progress(), average=None, report=log.row, after=lambda step: None,
        )  # fmt: skip
        whole = now() - started
        log.close()
    started = now()
    for _ in range(steps):
        model(batch.images).logits.sum().backward()
        update(model, optimizer)
    return (whole - (now() - started)) / steps


def medians(parts: dict[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of each part's figures over rounds, after one round that is not counted."""
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in parts}
    for number in range(rounds + 1):
        for name, function in parts.items():
            row = function()
            if number:
                seen[name].append(row)
    return {name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in seen.items()}


def clocked(function: Callable[[], None], now: Callable[[], float]) -> dict[str, float]:
    """Seconds of a call."""
    started = now()
    function()
    return {"loss": now() - started}


def resident(key: str) -> float:
    """MB of VmRSS (now) or VmHWM (the most since it was cleared) of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def peak(arguments: argparse.Namespace) -> float:
    """MB by which this process grows at most in `arguments.peak`, such as "loss plain"."""
    part, variant = arguments.peak.split()
    if part == "loss":
        loss_run(argparse.Namespace(size=64, batch=1, classes=3, present=2), variant)()  # sets libraries up
        run = loss_run(arguments, variant)
    Path("/proc/self/clear_refs").write_text("5")  # forget the old peak
    before = resident("VmRSS")
    if part == "loss":
        run()
    else:
        trainee = Trainee(arguments)
        for _ in range(2):  # the optimiser's moments come with the first step
            trainee.step(variant)
    return resident("VmHWM") - before


def measure(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """Rows of the table, each when it is known: a part and its figure for each variant."""
    steps = ["ours", "bf16", "plain"] if arguments.bf16 else ["ours", "plain"]
    if arguments.only != "step":
        now = CLOCKS[arguments.clock]
        losses = {name: partial(clocked, loss_run(arguments, name), now) for name in ("ours", "plain")}
        yield "loss alone, s", {name: row["loss"] for name, row in medians(losses, 3 * arguments.runs).items()}
        yield "loss alone, MB", {name: own_process(f"loss {name}") for name in losses}
    if arguments.only != "loss":
        yield "step, MB", {name: own_process(f"step {name}") for name in steps}
        trainee = Trainee(arguments)
        found = medians({name: partial(trainee.step, name) for name in steps}, arguments.runs)
        yield from ((f"{part}, s", {name: found[name][part] for name in steps}) for part in found["ours"])
        loop = statistics.median(loop_seconds(arguments) for _ in range(3))
        yield "loop, s", {"ours": loop, "plain": found["ours"]["step"]}


def own_process(what: str) -> float:
    """`peak` in a process of its own."""
    return float(subprocess.check_output([sys.executable, *sys.argv, "--peak", what], text=True))


def has_bf16() -> bool:
    """Whether the processor multiplies bf16 numbers; without, a step in bf16 is slower than in fp32 (Linux)."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return any(flag in flags for flag in ("amx_bf16", "avx512_bf16", "bf16"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="segvit_vit_base")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--present", type=int, default=10, help="classes in each image")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--only", choices=["loss", "step"])
    parser.add_argument("--bf16", action="store_true", default=has_bf16(), help="also where the processor lacks it")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(peak(arguments))
        return
    found, missed = {}, []
    if not arguments.json:
        print(f"{'':16}{'ours':>10}{'bf16':>10}{'plain':>10}{'ratio':>9}{'bf16':>9}")
    for part, row in measure(arguments):
        ratios = {name: row[name] / row["plain"] for name in row if name != "plain"}
        found[part] = {"figures": row, "ratios": ratios}
        aims = {name: AIMS[part, name] for name in ratios if (part, name) in AIMS}
        missed += [f"{part} {name}: {ratios[name]:.3f}, aim {aim}" for name, aim in aims.items() if ratios[name] > aim]
        if not arguments.json:
            cells = [f"{row[name]:10.4g}" if name in row else " " * 10 for name in ("ours", "bf16", "plain")]
            shares = [f"{ratios[name]:9.3f}" for name in ("ours", "bf16") if name in row]
            print(f"{part:16}{''.join(cells)}{''.join(shares)}", flush=True)
    print(json.dumps(found | {"missed": missed}, indent=2) if arguments.json else "\n".join(["", *missed]))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
