"""The two-minute tour: train a small SegViT on generated images, evaluate it, segment new images, write a report.

Everything is made here: no download, no pretrained weights. A colour-only baseline is measured in the same run, so that
the mIoU means something: it gives every pixel the class whose mean training colour is nearest.

    python examples/demo.py --out runs/demo
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

import segvit
from segvit.data.dataset import Dataset
from segvit.data.loading import samples
from segvit.files import open_atomic
from segvit.metrics.confusion import ConfusionMatrix

SIZE = 96
DATA = f"synthetic:shapes?train=1000&val=80&size={SIZE}"


def experiment(out: Path, steps: int) -> segvit.Experiment:
    """A plain ViT of three narrow blocks with 8-pixel patches, trained from nothing."""
    return segvit.Experiment(
        data=DATA,
        out=str(out),
        overwrite=True,
        model="segvit_vit_tiny",
        options={
            "image_size": SIZE, "patch_size": 8, "depth": 3, "embed_dim": 128, "out_indices": [0, 2], "layers": 2,
            "drop_path": 0.0, "dropout": 0.0,
        },
        steps=steps,
        batch_size=8,
        augment=segvit.Augment(crop=(SIZE, SIZE), ratio_range=(0.9, 1.2), cat_max_ratio=1.0, photometric=False),
        optim=segvit.Optim(lr=1.5e-3, weight_decay=0.05, lr_mult={}, clip=5.0),
        schedule=segvit.Schedule(kind="cosine", warmup=50),
        loss={"dice_weight": 5.0, "alpha": 0.5},  # what is left of small masks counts more than in the paper
        val_every=max(1, steps // 4),
        checkpoint_every=max(1, steps // 4),
        workers=0,
        device="auto",
    )  # fmt: skip


def color_baseline(data: Dataset) -> float:
    """mIoU on the val split of the nearest mean training colour, pixel by pixel."""
    count = len(data.classes)
    sums, pixels = np.zeros((count, 3)), np.zeros(count)
    for sample in samples(data, "train"):
        for index in range(count):
            inside = sample.mask == index
            sums[index] += sample.image[inside].sum(0)
            pixels[index] += inside.sum()
    means = sums / pixels[:, None]
    confusion = ConfusionMatrix(count, data.classes.ignore_index)
    for sample in samples(data, "val"):
        distance = ((sample.image[:, :, None] - means) ** 2).sum(-1)
        confusion.update(distance.argmin(-1).astype(np.uint8), sample.mask)
    return float(confusion.metrics().miou)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=1600)
    arguments = parser.parse_args()
    started = time.perf_counter()

    result = segvit.train(experiment(arguments.out, arguments.steps))
    data = segvit.open_dataset(DATA)
    baseline = color_baseline(data)

    folder = arguments.out / "predictions"
    predictor = segvit.Predictor(segvit.load(arguments.out))
    for index in range(8):
        sample = data.read("val", index)
        prediction = predictor(sample.image)
        prediction.save(folder / f"{sample.name}.png")
        with open_atomic(folder / f"{sample.name}_overlay.png") as file:
            prediction.overlay().save(file, "PNG")

    assert result.metrics is not None  # the generated data has a val split
    print(f"model        {arguments.out / 'model'}")
    print(f"predictions  {folder}  (label maps and *_overlay.png)")
    print(f"report       {arguments.out / 'report' / 'index.html'}")
    print(f"time         {time.perf_counter() - started:.0f} s")
    print(f"colour-only baseline mIoU {baseline:.4f}")
    print(f"mIoU {result.metrics.miou:.4f}")


if __name__ == "__main__":
    main()
