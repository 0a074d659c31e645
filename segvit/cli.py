"""The command line: functions whose signatures and docstrings are the options; heavy imports wait until they run.

Results go to stdout (`--json` for machines), progress to stderr. What a user can mend is one line and exit code 2;
`--debug` shows the traceback.
"""

from __future__ import annotations

import difflib
import inspect
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from segvit.contracts import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

Precision = Literal["fp32", "bf16", "fp16"]
Device = Literal["cpu", "cuda"]


def train(**options: Any) -> None:
    """Train a model; --data and --out are required, everything else may stand in a recipe (--config)."""
    from segvit.tasks.dense import train as run
    from segvit.tasks.experiment import Experiment

    run(Experiment(**options))


def val(
    run: str, *, data: str | None = None, split: str = "val", scales: tuple[float, ...] = (1.0,), flip: bool = False,
    precision: Precision = "fp32", device: Device | None = None, workers: int = 2, json: bool = False,
) -> None:  # fmt: skip
    """Evaluate a model at the original resolution.

    Args:
        run: Run folder, model folder or hub id.
        data: Dataset; None = the one that the run was trained on.
        split: Split to evaluate.
        scales: Scales whose softmax scores are averaged.
        flip: Whether each scale is also seen mirrored.
        precision: Of the network.
        device: cpu or cuda; None = cuda where there is one.
        workers: Processes that decode images.
        json: Print JSON instead of a table.
    """
    from segvit.inference.predictor import Views
    from segvit.tasks.commands import evaluate_run

    views = Views(scales=tuple(scales), flip=flip)
    result = evaluate_run(run, data, split, views=views, precision=precision, device=device, workers=workers)
    _print(result.report, json, result.text)


def predict(
    source: str, *, model: str, out: str | None = None, overlay: bool = False, scores: bool = False,
    areas: bool = False, scales: tuple[float, ...] = (1.0,), flip: bool = False, precision: Precision = "fp32",
    device: Device | None = None, json: bool = False,
) -> None:  # fmt: skip
    """Segment images, folders of images or a glob pattern; writes palette PNGs that hold class ids.

    Args:
        source: Image, folder or pattern; several may be given.
        model: Run folder, model folder or hub id.
        out: Folder to write; None = predictions/ in the run folder, or here.
        overlay: Also write NAME_overlay.png, the image under its labels with a legend.
        scores: Also write NAME_scores.npz, all class scores as float16.
        areas: Also write NAME.json, pixels and fraction by class.
        scales: Scales whose softmax scores are averaged.
        flip: Whether each scale is also seen mirrored.
        precision: Of the network.
        device: cpu or cuda; None = cuda where there is one.
        json: Print what was written as JSON.
    """
    from segvit.inference.predictor import Views
    from segvit.tasks.commands import predict_files

    extra = {"overlay": overlay, "scores": scores, "areas": areas}
    views = Views(scales=tuple(scales), flip=flip)
    result = predict_files(source, model, out, extra, views=views, precision=precision, device=device)
    if result.written:
        _print(result.written, json, "\n".join(item["labels"] for item in result.written))
    if result.failed:
        raise UserError(f"{len(result.failed)} images were left out: {'; '.join(result.failed[:3])}")


def models_list(*, json: bool = False) -> None:
    """List the models.

    Args:
        json: Print JSON.
    """
    from segvit.tasks.catalogue import list_models

    rows = list_models()
    width = max(len(row["name"]) for row in rows)
    _print(rows, json, "\n".join(f"{row['name']:{width}}  {row['backbone']}" for row in rows))


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
    from segvit.tasks.catalogue import model_info

    info = model_info(name, config, num_classes=num_classes, image_size=image_size)
    _print(info, json, "\n".join(f"{key}: {value}" for key, value in info.items()))


def models_convert(
    checkpoint: str, *, model: str, out: str, num_classes: int | None = None, classes: str | None = None,
    image_size: int | None = None,
) -> None:  # fmt: skip
    """Convert an official checkpoint into a model folder.

    Args:
        checkpoint: Official .pth or .safetensors file.
        model: Name of our model.
        out: Model folder to write.
        num_classes: Number of classes; None = as many as `classes` names.
        classes: Text file with one class name a line, optionally tab and R G B.
        image_size: Side of the crop it was trained with; None = read off the position embedding.
    """
    from segvit.tasks.catalogue import convert_checkpoint

    convert_checkpoint(checkpoint, model, out, num_classes=num_classes, classes=classes, image_size=image_size)
    _print(None, False, out)


def models_licences(*, json: bool = False) -> None:
    """Licences of the pretrained weights that recipes name.

    Args:
        json: Print JSON.
    """
    from segvit.tasks.catalogue import LICENCES

    rows = [{"weights": name, "licence": licence, "access": access} for name, (licence, access) in LICENCES.items()]
    _print(rows, json, "\n".join(f"{row['weights']}: {row['licence']}, {row['access']}" for row in rows))


def doctor(*, json: bool = False) -> None:
    """Versions, devices and settings, to paste into a bug report.

    Args:
        json: Print JSON.
    """
    from segvit.tasks.commands import environment

    report = environment()
    _print(report, json, "\n".join(f"{key}: {value}" for key, value in report.items()))


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "val": val,
    "predict": predict,
    "models list": models_list,
    "models info": models_info,
    "models convert": models_convert,
    "models licences": models_licences,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; exits with 0, or 2 and one line for what the user can mend."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        _run(arguments)
    except UserError as error:
        if debug:
            raise
        print(f"segvit: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `segvit ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a path that cannot be read or written; the message names it
        if debug:
            raise
        print(f"segvit: {error.strerror or error}: {error.filename or 'see --debug'}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return
    if arguments[0] == "--version":
        from segvit import __version__

        print(__version__)
        return
    words = 2 if any(name.startswith(f"{arguments[0]} ") for name in COMMANDS) else 1
    name = " ".join(arguments[:words])
    if name not in COMMANDS:
        group = [command for command in COMMANDS if command.startswith(f"{arguments[0]} ")]
        if group and (len(arguments) < 2 or arguments[1] in ("-h", "--help")):
            print(_overview(group))
            return
        near = group or difflib.get_close_matches(arguments[0], {command.split()[0] for command in COMMANDS}, n=3)
        raise UserError(f"unknown command {name!r}; did you mean {', '.join(near or COMMANDS)}?")
    function = COMMANDS[name]
    parser = _parser(name, function)
    options = _parse(parser, _with_values(arguments[words:], function))
    function(**options)


def _overview(names: Sequence[str] = tuple(COMMANDS)) -> str:
    width = max(map(len, names))
    lines = [f"  {name:{width}}  {(COMMANDS[name].__doc__ or '').splitlines()[0]}" for name in names]
    usage = "usage: segvit COMMAND [options]      segvit COMMAND --help\n\ncommands:"
    return "\n".join([usage, *lines, "", "  --version, --debug (tracebacks)"])


def _parser(name: str, function: Callable[..., None]) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    text = inspect.getdoc(function) or ""
    parser = ArgumentParser(prog=f"segvit {name}", description=text.split("\n\n")[0], exit_on_error=False)
    if function is train:
        from segvit.tasks.experiment import Experiment

        parser.add_argument("--config", action="config", help="Recipe (YAML); later options override it.")
        parser.add_class_arguments(Experiment)
    else:
        parser.add_function_arguments(function, as_positional=True)
    return parser


def _parse(parser: ArgumentParser, arguments: list[str]) -> dict[str, Any]:
    from jsonargparse import ArgumentError

    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            is_train = parser.prog == "segvit train"
            parsed = parser.parse_args(_one_length(_resumed(arguments)) if is_train else arguments)
    except ArgumentError as error:
        raise UserError(_hint(str(error), parser, arguments)) from error
    except SystemExit as stop:
        if stop.code:
            raise UserError(_hint(printed.getvalue(), parser, arguments)) from None
        raise
    options: dict[str, Any] = parser.instantiate(parsed).as_dict()
    options.pop("config", None) if parser.prog == "segvit train" else None
    return options


def _hint(message: str, parser: ArgumentParser, arguments: list[str]) -> str:
    """A parser's message in one line, with the nearest option for an unknown one."""
    line = " ".join(part.strip() for part in message.strip().splitlines() if part.strip())
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    for argument in arguments:
        option = argument.partition("=")[0]
        if option.startswith("--") and option not in known and option.replace("-", "_") not in line.replace(option, ""):
            near = difflib.get_close_matches(option, known, n=3, cutoff=0.5)
            if near:
                line = f"unknown option {option}; did you mean {', '.join(near)}?"
                break
    return f"{parser.prog.removeprefix('segvit ')}: {re.sub(r'^error: ', '', line)} (see {parser.prog} --help)"


def _with_values(arguments: list[str], function: Callable[..., None]) -> list[str]:
    """Bare flags (`--resume`) as `--resume=true`, and dashes inside option names as underscores."""
    flags = {name for name, hint in get_type_hints(_source(function)).items() if hint is bool}
    result = []
    if function is models_info and arguments and not arguments[0].startswith("-"):
        arguments = ["--name", *arguments]  # the one positional that may be left out
    leading = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    if function is predict and leading > 1:  # a shell has expanded a pattern
        arguments = ["\n".join(arguments[:leading]), *arguments[leading:]]
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option.startswith("--"):
            option = "--" + option[2:].replace("-", "_")
        following = arguments[place + 1].lower() if place + 1 < len(arguments) else ""
        bare = option[2:] in flags and not equals and following not in ("true", "false")
        result.append(f"{option}=true" if bare else option + equals + value)
    if "--config" in result[:-1]:  # first, so that options override the recipe wherever they stand
        place = result.index("--config")
        result = [*result[place : place + 2], *result[:place], *result[place + 2 :]]
    return result


def _source(function: Callable[..., None]) -> Any:
    if function is train:
        from segvit.tasks.experiment import Experiment

        return Experiment
    return function


def _resumed(arguments: list[str]) -> list[str]:
    """With --resume, the run's own configuration comes first, so that `--out RUN --resume` is enough."""
    if "--resume=true" not in arguments or "--config" in arguments:
        return arguments
    out = ""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = argument.partition("=")
        if option == "--out":
            out = value if equals else following
    stored = Path(out) / "config.yaml"
    return ["--config", str(stored), *arguments] if out and stored.is_file() else arguments


def _one_length(arguments: list[str]) -> list[str]:
    """`--steps` replaces a recipe's epochs and the reverse; both together stay for `Experiment` to refuse."""
    both = {"--steps", "--epochs"}
    given = {argument.partition("=")[0] for argument in arguments} & both
    return [*arguments, f"{(both - given).pop()}=null"] if len(given) == 1 else arguments


def _print(data: Any, as_json: bool, text: str) -> None:
    print(json.dumps(data, indent=2) if as_json else text)
