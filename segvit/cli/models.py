"""The catalogue of models at the command line."""

from __future__ import annotations

from typing import Any, Literal

from segvit.cli.parsing import show


def models_list(*, json: bool = False) -> None:
    """List the models.

    Args:
        json: Print JSON.
    """
    from segvit.tasks.catalogue import list_models

    rows = list_models()
    width = max(len(row["name"]) for row in rows)
    show(rows, json, "\n".join(f"{row['name']:{width}}  {row['backbone']}" for row in rows))


def models_info(
    name: str | None = None, *, config: str | None = None, num_classes: int | None = None,
    image_size: int | None = None, json: bool = False,
) -> None:  # fmt: skip
    """Parameters and GFLOPs of a model at the recipe's crop, counted without weights or data.

    Args:
        name: Model name; or give --config.
        config: Recipe.
        num_classes: Number of classes; None = that of the recipe's data set, else 150.
        image_size: Side of the input; None = the recipe's crop, else the builder's.
        json: Print JSON.
    """
    from segvit.export.exportable import why_not
    from segvit.tasks.catalogue import model_info

    info = model_info(name, config, num_classes=num_classes, image_size=image_size)
    info["export"] = why_not(info["model"], {}) or "pt2, onnx, openvino"
    show(info, json, "\n".join(f"{key}: {value}" for key, value in info.items()))


def models_convert(
    checkpoint: str, *, model: str, out: str, num_classes: int | None = None, classes: str | None = None,
    image_size: int | None = None, options: dict[str, Any] | None = None, vectors: str | None = None,
    text_weights: str | None = None,
) -> None:  # fmt: skip
    """Convert an official checkpoint into a model folder.

    Args:
        checkpoint: Official .pth or .safetensors file.
        model: Name of our model.
        out: Model folder to write.
        num_classes: Number of classes; None = as many as `classes` names.
        classes: Text file with one class name a line, optionally tab and R G B.
        image_size: Side of the crop it was trained with; None = read off the position embedding.
        options: Keywords of the model's builder, where it was not the published one; None = none.
        vectors: ZegCLIP and zsseg: file of class vectors (.npy, .npz, .safetensors); None = made of the names.
        text_weights: ZegCLIP and zsseg: CLIP that makes them, a file or openai; None = the checkpoint's own.
    """
    from segvit.tasks.convert import Words, convert_checkpoint

    convert_checkpoint(
        checkpoint, model, out, num_classes=num_classes, classes=classes, image_size=image_size, options=options,
        words=Words(vectors=vectors, text_weights=text_weights),
    )  # fmt: skip
    show(None, False, out)


def models_freeze(
    run: str, *, out: str, classes: str | None = None, background: Literal["none", "words"] = "none",
    text_weights: str | None = None,
) -> None:  # fmt: skip
    """Make a closed-vocabulary model of one that knows words: class vectors become weights, the text tower goes.

    Args:
        run: Run folder, model folder or hub id.
        out: Model folder to write.
        classes: Other classes, as for predict; None = the model's own.
        background: As for predict.
        text_weights: As for predict.
    """
    from segvit.tasks.open_vocabulary import Vocabulary, freeze_run

    freeze_run(run, out, Vocabulary(classes=classes, background=background, text_weights=text_weights))
    show(None, False, out)


def models_licences(*, json: bool = False) -> None:
    """Licences of the pretrained weights that recipes name.

    Args:
        json: Print JSON.
    """
    from segvit.tasks.catalogue import LICENCES

    rows = [{"weights": name, "licence": licence, "access": access} for name, (licence, access) in LICENCES.items()]
    show(rows, json, "\n".join(f"{row['weights']}: {row['licence']}, {row['access']}" for row in rows))
