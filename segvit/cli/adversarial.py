"""Training against a critic at the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from segvit.cli.parsing import make_parser, parse, show
from segvit.cli.run import train as dense


def train(
    *, config: str, data: str | None = None, out: str | None = None, steps: int | None = None,
    batch_size: int | None = None, weight: float = 0.1, penalty: float = 10.0, critic_steps: int = 1,
    see: Literal["foreground", "per_class"] = "foreground", critic: dict[str, Any] | None = None,
    critic_lr: float | None = None, device: Literal["auto", "cpu", "cuda"] | None = None, workers: int | None = None,
    resume: bool = False, overwrite: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Train a dense model against a critic of its masks (WGAN-GP), as CASTformer is.

    Args:
        config: Recipe of the generator, as for segvit train.
        data: Dataset YAML, folder with images/ and masks/, or synthetic:shapes; None = the recipe's.
        out: Run folder to write; None = the recipe's.
        steps: Steps of the generator; None = the recipe's.
        batch_size: Images in a step of each player; None = the recipe's.
        weight: Weight of the critic's verdict in the generator's loss.
        penalty: Weight of the gradient penalty in the critic's loss; 0 = none.
        critic_steps: Steps of the critic for each of the generator.
        see: What the critic sees: the image under all but class 0, or under each class in turn.
        critic: Keywords of the critic's builder: dim, depth, heads, width, units; None = those of R50+ViT-B/16.
        critic_lr: The critic's learning rate; None = the generator's.
        device: Where to train; None = the recipe's, else auto.
        workers: Processes that load data; None = the recipe's, else 2.
        resume: Go on with the run in out from its last checkpoint; give the same options.
        overwrite: Replace the run in out.
        json: Print the figures as JSON.
    """
    from segvit.tasks.adversarial import Adversarial, train_adversarial
    from segvit.tasks.experiment import Experiment

    given = {"data": data, "out": out, "steps": steps, "batch_size": batch_size, "device": device, "workers": workers}
    arguments = [f"--{name}={value}" for name, value in given.items() if value is not None]
    arguments += ["--epochs=null"] if steps is not None else []
    recipe = parse(make_parser("train", dense), ["--config", config, *arguments])
    run = Adversarial(
        generator=Experiment(**recipe | {"resume": resume, "overwrite": overwrite}), weight=weight, penalty=penalty,
        critic_steps=critic_steps, see=see, critic=critic or {}, critic_lr=critic_lr,
    )  # fmt: skip
    metrics = train_adversarial(run)
    figures = {} if metrics is None else {"miou": metrics.miou, "macc": metrics.macc, "aacc": metrics.aacc}
    text = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
    show(figures, json, text or str(Path(run.generator.out) / "model"))
