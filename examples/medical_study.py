"""Two questions on generated medical images, each answered with equal budgets: DuAT's decoder, and CASTformer's critic.

polyps    DuAT against a plain FPN decoder on the same backbone (PVT v2 b0, from nothing), each with its paper's loss;
          and since that of DuAT weighs regions while cross entropy does not, the plain decoder also with dice added.
          All take the best of the same learning rates on the validation images; the figures are of test images that
          neither the training nor the choice has seen.
organs    CASTformer's generator against the same with its critic (WGAN-GP): the same slices, steps, rate and seeds.
          Volumes are NIfTI files; Dice and HD95 are those of whole volumes, in millimetres.

Everything is made here: no download, no pretrained weights. A run that was stopped goes on where it ended.

    OMP_NUM_THREADS=1 python examples/medical_study.py --out runs/medical --table benchmarks/results/medical_study.md
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

import segvit
from segvit.data.dataset import open_dataset
from segvit.data.synthetic_medical import write_organs
from segvit.data.volumes import cases
from segvit.engine.evaluate import evaluate
from segvit.files import write_json, write_text
from segvit.inference.predictor import Predictor
from segvit.model_folder import load_model
from segvit.tasks.adversarial import Adversarial, train_adversarial
from segvit.tasks.volumes import Convention, VolumeCollector, make_protocol

SIZE = 64
POLYPS = f"synthetic:polyps?train=400&val=60&size={SIZE}"
POLYPS_TEST = f"synthetic:polyps?seed=1&val=150&size={SIZE}"
RATES = (4e-4, 1e-3, 2.5e-3, 6e-3)
POLYP_COLUMNS = ("mdice", "miou", "weighted_f", "s", "mean_e", "max_e", "mae")


class Contender(NamedTuple):
    """A system of the polyp study; what is not said here is the same for all."""

    title: str
    model: str
    options: dict[str, Any]
    loss: dict[str, Any] = {}


FPN: dict[str, Any] = {"fpn_dim": 64, "head_dim": 32, "drop_path": 0.0, "dropout": 0.1}
CONTENDERS = (
    Contender("DuAT", "duat_pvt_v2_b2", {"backbone": "pvt_v2_b0", "drop_path": 0.0}),
    Contender("plain FPN", "semantic_fpn_pvt_v2_b0", FPN),
    Contender("plain FPN with dice", "semantic_fpn_pvt_v2_b0", FPN, {"dice": 1.0}),
)


def polyp_run(contender: Contender, out: Path, *, lr: float, steps: int, seed: int) -> segvit.Experiment:
    """A recipe of which only the system and the rate differ."""
    return segvit.Experiment(
        data=POLYPS, out=str(out), resume=(out / "config.yaml").is_file(), model=contender.model,
        options=contender.options, loss=contender.loss, steps=steps, batch_size=8, seed=seed,
        augment=segvit.Augment(
            crop=(SIZE, SIZE), ratio_range=(0.75, 1.25), cat_max_ratio=1.0, flip=0.5, photometric=False
        ),
        optim=segvit.Optim(lr=lr, weight_decay=1e-4, lr_mult={}, decay_mult={}, clip=5.0),
        schedule=segvit.Schedule(kind="cosine", warmup=min(30, steps // 5)), val_every=0, checkpoint_every=50,
        workers=0, device="cpu", precision="fp32",
    )  # fmt: skip


def polyp_scores(contender: Contender, out: Path, *, lr: float, steps: int, seed: int) -> dict[str, Any]:
    """Train unless that was done, and measure on the validation and on the test images."""
    folder = out / f"{contender.title.replace(' ', '_')}_lr{lr:g}_seed{seed}"
    scores = folder / "scores.json"
    if not scores.is_file():
        segvit.train(polyp_run(contender, folder, lr=lr, steps=steps, seed=seed))
        record: dict[str, Any] = {}
        model = load_model(folder)
        for name, data in (("val", POLYPS), ("test", POLYPS_TEST)):
            found = evaluate(Predictor(model), open_dataset(data), "val", polyp=True)
            assert found.polyp is not None
            record[name] = found.polyp.metrics().to_json()
        write_json(scores, record | {"parameters": sum(parameter.numel() for parameter in model.parameters())})
    result: dict[str, Any] = json.loads(scores.read_text(encoding="utf-8"))
    return result


def study_polyps(out: Path, *, steps: int, seeds: int) -> str:
    """The tables of the polyp study."""
    lines = [
        "## DuAT against a plain FPN decoder", "",
        f"Backbone PVT v2 b0 from nothing; `{POLYPS}`; {steps} steps of 8 images.", "",
        "mDice on the 60 validation images by learning rate, seed 0:", "",
        "| decoder | " + " | ".join(f"{rate:g}" for rate in RATES) + " |", "|---|" + "---:|" * len(RATES),
    ]  # fmt: skip
    best: dict[str, float] = {}
    for contender in CONTENDERS:
        found = {lr: polyp_scores(contender, out, lr=lr, steps=steps, seed=0)["val"]["mdice"] for lr in RATES}
        best[contender.title] = max(found, key=lambda lr: found[lr])
        lines.append(f"| {contender.title} | " + " | ".join(f"{100 * value:.2f}" for value in found.values()) + " |")
    lines += [
        "", f"The 150 images of `{POLYPS_TEST}`, which chose nothing, at the best rate of each:", "",
        "| decoder | seed | lr | " + " | ".join(POLYP_COLUMNS) + " | parameters |",
        "|---|---:|---:|" + "---:|" * (len(POLYP_COLUMNS) + 1),
    ]  # fmt: skip
    for seed in range(seeds):
        for contender in CONTENDERS:
            lr = best[contender.title]
            scores = polyp_scores(contender, out, lr=lr, steps=steps, seed=seed)
            cells = " | ".join(f"{100 * scores['test'][name]:.2f}" for name in POLYP_COLUMNS)
            lines.append(f"| {contender.title} | {seed} | {lr:g} | {cells} | {scores['parameters']:,} |")
    return "\n".join(lines)


CONVENTIONS: tuple[Convention, ...] = ("medpy", "transunet")
ORGAN_SIZE = (12, 48, 48)
GENERATOR: dict[str, Any] = {
    "width": 32, "units": [1, 1, 1], "dim": 64, "heads": 2, "depth": 1, "grid": [6] * 4, "iterations": 2,
    "decoder_dim": 64,
}  # fmt: skip
CRITIC: dict[str, Any] = {"width": 32, "units": [1, 1, 1], "dim": 64, "heads": 2, "depth": 1}


def organ_scores(out: Path, data: str, *, critic: bool, steps: int, seed: int) -> dict[str, Any]:
    """Train unless that was done, and measure the volumes of the val split, which chose nothing."""
    scores = out / "scores.json"
    if not scores.is_file():
        run = segvit.Experiment(
            data=data, out=str(out), resume=(out / "config.yaml").is_file(), model="castformer_r50",
            options=GENERATOR, steps=steps, batch_size=6, seed=seed,
            augment=segvit.Augment(
                crop=(48, 48), scale=(48, 48), ratio_range=(0.9, 1.1), cat_max_ratio=1.0, flip=0.0, photometric=False
            ),
            optim=segvit.Optim(lr=5e-4, weight_decay=0.05, lr_mult={}, decay_mult={"norm": 0.0}, clip=None),
            schedule=segvit.Schedule(kind="poly", power=0.9, warmup=0), loss={"cross_entropy": 0.5, "dice": 0.5},
            val_every=0, checkpoint_every=50, workers=0, device="cpu", precision="fp32",
        )  # fmt: skip
        started = time.process_time()
        if critic:
            train_adversarial(Adversarial(generator=run, weight=0.1, penalty=10.0, critic=CRITIC))
        else:
            segvit.train(run)
        seconds = time.process_time() - started
        dataset, record = open_dataset(data), {}
        for convention in CONVENTIONS:
            watch = VolumeCollector(
                cases(dataset, "val"), dataset.classes, make_protocol(convention, spacing=None, empty=None)
            )
            evaluate(Predictor(load_model(out)), dataset, "val", watch=watch)
            record[convention] = watch.record()
        write_json(scores, record | {"seconds": seconds})
    result: dict[str, Any] = json.loads(scores.read_text(encoding="utf-8"))
    return result


def study_organs(out: Path, *, steps: int, seeds: int) -> str:
    """The table of the organ study."""
    data = out / "data"
    if not (data / "dataset.yaml").is_file():
        write_organs(data, train=14, val=8, shape=ORGAN_SIZE)
    lines = [
        "## CASTformer with and without its critic", "",
        f"14 volumes of {ORGAN_SIZE} voxels to learn from, 8 others to measure; 5 organs; {steps} steps of 6 slices; "
        "rate 5e-4, and the paper's weights of the loss: 0.5, 0.5 and 0.1 for the critic.",
        "Distances are medpy's in millimetres, empty masks left out; the last column is the Synapse tables' rule.", "",
        "| training | seed | Dice | Jaccard | HD95 mm | ASD mm | Dice (transunet) | CPU time |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for seed in range(seeds):
        for critic in (False, True):
            name = "adversarial" if critic else "supervised alone"
            scores = organ_scores(
                out / f"{name.split()[0]}_seed{seed}", str(data), critic=critic, steps=steps, seed=seed
            )
            own, synapse = scores["medpy"], scores["transunet"]
            lines.append(
                f"| {name} | {seed} | {100 * own['dice']:.2f} | {100 * own['jaccard']:.2f} | {own['hd95']:.2f} | "
                f"{own['asd']:.2f} | {100 * synapse['dice']:.2f} | {scores['seconds']:.0f} s |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/medical"))
    parser.add_argument("--part", choices=("polyps", "organs", "all"), default="all")
    parser.add_argument("--steps", type=int, default=250, help="Steps of each run on the polyps.")
    parser.add_argument("--organ_steps", type=int, default=120, help="Steps of each run on the volumes.")
    parser.add_argument("--polyp_seeds", type=int, default=1)
    parser.add_argument("--organ_seeds", type=int, default=2)
    parser.add_argument("--table", type=Path, help="Where to write the report, a Markdown file.")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    parts = []
    if arguments.part in ("polyps", "all"):
        parts.append(study_polyps(arguments.out / "polyps", steps=arguments.steps, seeds=arguments.polyp_seeds))
    if arguments.part in ("organs", "all"):
        parts.append(study_organs(arguments.out / "organs", steps=arguments.organ_steps, seeds=arguments.organ_seeds))
    command = "OMP_NUM_THREADS=1 python examples/medical_study.py " + " ".join(sys.argv[1:])
    facts = (
        f"{date.today()}, one thread of a 2-core {platform.machine()} CPU, torch {torch.__version__}, "
        f"segvit {segvit.__version__}"
    )
    text = "\n\n".join(["# Medical study", f"    {command.strip()}", facts, *parts]) + "\n"
    if arguments.table is not None:
        write_text(arguments.table, text)
    print(text)


if __name__ == "__main__":
    main()
