"""What tuning methods are worth: a small ViT learns scenes A as a whole, then scenes B by every method, the same steps.

A and B are generated (`synthetic:shapes`, `synthetic:night`): other classes, another look. Everything is made here: no
download, no pretrained weights. A run that was stopped goes on where it ended; about 20 minutes on one free core.

    OMP_NUM_THREADS=1 python examples/transfer_study.py --out runs/transfer --table benchmarks/results/transfer_study.md
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import segvit
from segvit.files import write_text
from segvit.tasks.compare import Budget
from segvit.tasks.compare_adapters import compare_adapters

SIZE = 64
SCENES_A = f"synthetic:shapes?train=1000&val=80&size={SIZE}"
SCENES_B = f"synthetic:night?train=200&val=100&size={SIZE}"
METHODS = (
    "head_only",
    "norm_only",
    "bitfit",
    "vpt_shallow",
    "vpt_deep",
    "ssf",
    "svf",
    "lora",
    "conv_adapter",
    "spm",
    "pro_tuning",
    "full",
)


def base_experiment(out: Path, steps: int) -> segvit.Experiment:
    """A plain ViT of four narrow blocks with 8-pixel patches and a linear head, trained from nothing on scenes A."""
    return segvit.Experiment(
        data=SCENES_A,
        out=str(out),
        resume=(out / "config.yaml").is_file(),
        model="segmenter_vit_tiny",
        options={
            "image_size": SIZE, "patch_size": 8, "depth": 4, "embed_dim": 128, "decoder": "linear", "drop_path": 0.0,
            "dropout": 0.0,
        },
        steps=steps,
        batch_size=8,
        augment=segvit.Augment(crop=(SIZE, SIZE), ratio_range=(0.9, 1.2), cat_max_ratio=1.0),
        optim=segvit.Optim(lr=1e-3, weight_decay=0.05, lr_mult={}, clip=5.0),
        schedule=segvit.Schedule(kind="cosine", warmup=min(100, steps // 10)),
        val_every=0,
        checkpoint_every=max(1, steps // 8),
        workers=0,
        device="cpu",
    )  # fmt: skip


def report(folder: Path, miou: float, steps: int) -> str:
    """The committed table: what was done, how well each method does, and how it was made."""
    table = (folder / "compare.md").read_text(encoding="utf-8").strip()
    command = "OMP_NUM_THREADS=1 python examples/transfer_study.py " + " ".join(sys.argv[1:])
    lines = [
        "# Transfer study", "",
        f"A ViT of four blocks learned `{SCENES_A}` from nothing ({steps} steps, mIoU {100 * miou:.2f} there).",
        f"From its weights each method learned `{SCENES_B}`:",
        "other classes, another look. The linear head trains always. LV-Adapter needs a text tower and is left out.",
        "", table, "", "One run of each, one seed; rates as in `segvit/tasks/compare_adapters.py`.", "",
        f"    {command.strip()}", "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--base_steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--table", type=Path, help="Where to write the report, a Markdown file.")
    arguments = parser.parse_args()

    base = arguments.out / "base"
    segvit.train(base_experiment(base, arguments.base_steps))
    compared = compare_adapters(
        SCENES_B, arguments.methods.split(","), str(arguments.out / "methods"), Budget(steps=arguments.steps),
        init=str(base), workers=0, device="cpu",
    )  # fmt: skip
    miou = json.loads((base / "val.json").read_text(encoding="utf-8"))["miou"]
    if arguments.table is not None:
        write_text(arguments.table, report(arguments.out / "methods", miou, arguments.base_steps))
    print(compared.text)


if __name__ == "__main__":
    main()
