"""The pruned readout beside dense bands and beside the official way, on outputs of a trained SegViT-Tiny.

    python benchmarks/readout.py                                  # trains for 4 minutes, then 512 and 2048 pixels
    python benchmarks/readout.py --weights tiny.pt                # trains only if the file is not there
    python benchmarks/readout.py --outputs drawn --sides 512      # no training: smooth regions drawn at random

`synthetic:shapes` with a head of 150 classes, of which 142 never occur: a trained network says so. Official way: all
masks at full size, sigmoid, einsum, resize, softmax, argmax. The three take turns in one process and the medians are
printed; memory is what the resident set grows by at its peak. `trained` are the network's outputs for a scene of that
size, `untrained` those of its first weights, `drawn` twelve smooth regions with logits as trained networks give them,
noise and faint other classes. What an untrained network gives is noise, where pruning may not pay: it shows what the
search costs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.bench.bench import Ready
from segvit.bench.measure import in_turns, medians, peak_memory
from segvit.contracts import Classes, Dense, InputSpec
from segvit.data.prepare import normalise
from segvit.data.synthetic import DAY, draw_shapes
from segvit.inference.predictor import Predictor, TorchRuntime
from segvit.palette import generate_palette
from segvit.zoo import create_model, find_system

NAME, CROP, BATCH, RATE = "segvit_vit_tiny", 128, 8, 1.5e-3
NAMES = (*DAY.classes.names, *(f"never seen {number}" for number in range(len(DAY.classes), 150)))
CLASSES = Classes(NAMES, generate_palette(150))
# Of four blocks, so that minutes suffice from nothing.
OPTIONS = {
    "image_size": CROP, "depth": 4, "out_indices": [1, 3], "layers": 2, "drop_path": 0.0, "dropout": 0.0,
}  # fmt: skip


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return create_model(NAME, classes=CLASSES, spec=InputSpec(), **OPTIONS)


def train(model: nn.Module, minutes: float) -> None:
    """Crops of scenes of three sizes, so that the network sees regions small and large."""
    system, rng = find_system(NAME), np.random.default_rng(0)
    scenes = [draw_shapes(size, (0, i, 1)) for size, count in ((128, 600), (256, 150), (512, 40)) for i in range(count)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    start, step = time.perf_counter(), 0
    while (done := (time.perf_counter() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50, (1 - done) / 0.7)
        crops = [crop(scenes[rng.integers(len(scenes))], rng) for _ in range(BATCH)]
        images = torch.stack([normalise(image, model.spec) for image, _ in crops])
        masks = torch.stack([torch.from_numpy(mask.copy()) for _, mask in crops])
        totals = system.normalisers(masks, num_classes=len(CLASSES), ignore_index=255)
        # From nothing the masks need more weight than in the paper, as in the recipes of that kind.
        losses = system.criterion(model(images), masks, totals, dice_weight=5.0, alpha=0.5)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
    print(f"trained {step} steps of {BATCH} crops of {CROP} pixels in {minutes:g} minutes, loss "
          + ", ".join(f"{name} {value.item():.3f}" for name, value in losses.items() if name[-1] not in "0123456789"),
          flush=True)  # fmt: skip


def crop(scene: tuple[np.ndarray, np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    top, left = rng.integers(scene[1].shape[0] - CROP + 1, size=2)
    return tuple(part[top : top + CROP, left : left + CROP] for part in scene)


def drawn(side: int) -> Dense:
    """Twelve smooth regions, each with a mask of its own; the other classes are faint."""
    generator, cells, classes = torch.Generator().manual_seed(0), side // 16, len(CLASSES)
    field = F.interpolate(torch.randn(1, 12, 5, 5, generator=generator), size=(cells, cells), mode="bicubic")[0]
    there = torch.randperm(classes, generator=generator)[:12]
    masks = torch.randn(1, classes, cells, cells, generator=generator) * 0.7 - 9
    steep = (field - field.topk(2, 0).values.mean(0)) * cells * 0.3
    masks[0, there] = steep.clamp(-11, 9) + 0.4 * torch.randn(12, cells, cells, generator=generator)
    logits = torch.randn(1, classes, classes + 1, generator=generator)
    logits[..., -1] += 11
    logits[0, there, -1] -= 11
    logits[0, there, there] += 9
    return Dense(masks, {"masks": masks, "class_logits": logits}, (side, side))


def official(out: Dense, side: int) -> Tensor:
    """Labels as the official code makes them."""
    masks = F.interpolate(out.extras["masks"], size=(side, side), mode="bilinear", align_corners=False).sigmoid()
    scores = torch.einsum("bqc,bqhw->bchw", out.extras["class_logits"].softmax(-1)[..., :-1], masks)
    scores = F.interpolate(scores, size=(side, side), mode="bilinear", align_corners=False)
    return scores.softmax(1).argmax(1)[0]


def measure(kind: str, model: nn.Module, out: Dense, side: int, runs: int) -> str:
    """One row of the table."""
    out = model.readout.trim(out)
    image = np.zeros((side, side, 3), np.uint8)
    ready, labels = Ready(TorchRuntime(model), out), {}
    bands, pruned = Predictor(ready, prune=False), Predictor(ready)
    ways: dict[str, Callable[[], object]] = {
        "official": lambda: labels.update(official=official(out, side).numpy()),
        "bands": lambda: labels.update(bands=bands.segment(image)[0]),
        "pruned": lambda: labels.update(pruned=pruned.segment(image)[0]),
    }
    median = medians(in_turns(ways, runs))
    memory = {name: peak_memory(way) for name, way in ways.items()}
    return (
        f"| {kind} {side} | {' | '.join(f'{median[n]:.3f} s, {memory[n]:.0f} MB' for n in ways)} "
        f"| {median['official'] / median['pruned']:.1f} | {median['bands'] / median['pruned']:.1f} "
        f"| {(labels['pruned'] != labels['bands']).sum()} | {(labels['pruned'] != labels['official']).sum()} "
        f"| {len(np.unique(labels['bands']))} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="where the trained weights are, or go to")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--outputs", nargs="+", default=["trained", "drawn", "untrained"])
    parser.add_argument("--sides", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.runs} runs", flush=True)
    model, fresh = new_model(), new_model()
    if "trained" in arguments.outputs:
        if arguments.weights and arguments.weights.exists():
            model.load_state_dict(torch.load(arguments.weights))
        else:
            train(model.train(), arguments.minutes)
            if arguments.weights:
                torch.save(model.state_dict(), arguments.weights)
    head = ["outputs", "official", "bands", "pruned", "official / pruned", "bands / pruned", "pixels unlike bands",
            "pixels unlike official", "classes"]  # fmt: skip
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for side in arguments.sides:
        scene = draw_shapes(side, (0, 1, 2)) if set(arguments.outputs) - {"drawn"} else None
        for kind in arguments.outputs:
            with torch.inference_mode():
                network = (model if kind == "trained" else fresh).eval()
                out = network(normalise(scene[0], model.spec)[None]) if kind != "drawn" else drawn(side)
                print(measure(kind, network, out, side, arguments.runs), flush=True)
            if kind == "trained" and side <= 512:
                right = (Predictor(model).segment(scene[0])[0] == scene[1]).mean()
                print(f"(the trained network is right at {right:.1%} of the pixels)", flush=True)


if __name__ == "__main__":
    main()
