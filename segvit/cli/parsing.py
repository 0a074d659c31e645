"""From a function's signature to a command's options, and from a parser's complaint to one line."""

from __future__ import annotations

import difflib
import inspect
import io
import json
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

from segvit.contracts import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

WITH_RECIPE = {"train", "find_lr"}  # commands that take a recipe's keys instead of their own
WITHOUT_RUN = {"find_lr"}  # of these the ones that write nothing, so that they need no --out
SEVERAL_SOURCES = {"predict"}  # whose positional may be repeated: a shell expands patterns
OPTIONAL_SUBJECT = {"models info"}  # whose positional may be left out


def make_parser(name: str, function: Callable[..., None]) -> ArgumentParser:
    """The parser of a command, made from its signature and docstring."""
    from jsonargparse import ArgumentParser

    text = inspect.getdoc(function) or ""
    parser = ArgumentParser(prog=f"segvit {name}", description=text.split("\n\n")[0], exit_on_error=False)
    if name in WITH_RECIPE:
        from segvit.tasks.experiment import Experiment

        parser.add_argument("--config", action="config", help="Recipe (YAML); later options override it.")
        parser.add_class_arguments(Experiment)
        if name in WITHOUT_RUN:
            parser.add_argument("--json", type=bool, default=False, help="Print JSON.")
            parser.set_defaults(out="")
    else:
        parser.add_function_arguments(function, as_positional=True)
    return parser


def parse(parser: ArgumentParser, arguments: list[str]) -> dict[str, Any]:
    """The options of a command. Raises UserError, in one line, for what cannot be parsed."""
    from jsonargparse import ArgumentError

    printed, recipe = io.StringIO(), parser.prog.removeprefix("segvit ") in WITH_RECIPE
    try:
        with redirect_stderr(printed):
            parsed = parser.parse_args(_one_length(_resumed(arguments)) if recipe else arguments)
    except ArgumentError as error:
        raise UserError(_hint(str(error), parser, arguments)) from error
    except SystemExit as stop:
        if stop.code:
            raise UserError(_hint(printed.getvalue(), parser, arguments)) from None
        raise
    options: dict[str, Any] = parser.instantiate(parsed).as_dict()
    options.pop("config", None) if recipe else None
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


def with_values(arguments: list[str], name: str, function: Callable[..., None]) -> list[str]:
    """Bare flags (`--resume`) as `--resume=true`, lists without brackets (`--scales 1`), dashes as underscores."""
    hints = _hints(name, function)
    flags = {option for option, hint in hints.items() if hint is bool}
    lists = {option for option, hint in hints.items() if get_origin(hint) is tuple}
    result: list[str] = []
    if name in OPTIONAL_SUBJECT and arguments and not arguments[0].startswith("-"):
        arguments = ["--name", *arguments]
    leading = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    if name in SEVERAL_SOURCES and leading > 1:  # a shell has expanded a pattern
        arguments = ["\n".join(arguments[:leading]), *arguments[leading:]]
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option.startswith("--"):
            option = "--" + option[2:].replace("-", "_")
        following = arguments[place + 1].lower() if place + 1 < len(arguments) else ""
        bare = option[2:] in flags and not equals and following not in ("true", "false")
        if value and option[2:] in lists:
            value = _bracketed(value)
        if result and result[-1][2:] in lists and result[-1].startswith("--"):
            option, equals, value = _bracketed(argument), "", ""
        result.append(f"{option}=true" if bare else option + equals + value)
    if "--config" in result[:-1]:  # first, so that options override the recipe wherever they stand
        place = result.index("--config")
        result = [*result[place : place + 2], *result[:place], *result[place + 2 :]]
    return result


def _bracketed(value: str) -> str:
    return value if value.startswith(("[", "(")) else f"[{value}]"


def _hints(name: str, function: Callable[..., None]) -> dict[str, Any]:
    """The types of a command's options by name."""
    if name in WITH_RECIPE:
        from segvit.tasks.experiment import Experiment

        return get_type_hints(function) | get_type_hints(Experiment)
    return get_type_hints(function)


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


def show(data: Any, as_json: bool, text: str) -> None:
    """Print a result to stdout, for machines or for people."""
    print(json.dumps(data, indent=2) if as_json else text)


def sides(name: str, given: Sequence[int]) -> tuple[int, int] | None:
    """Height and width from one side or both; None where nothing is given. Raises UserError for more."""
    if len(given) > 2:
        raise UserError(f"{name} takes one side or height and width, got {list(given)}")
    return (given[0], given[-1]) if given else None
