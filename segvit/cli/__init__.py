"""The command line: functions whose signatures and docstrings are the options; heavy imports wait until they run.

Results go to stdout (`--json` for machines), progress to stderr. What a user can mend is one line and exit code 2;
`--debug` shows the traceback.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence

from segvit.cli import (
    adapters,
    adversarial,
    bench,
    classify,
    clip,
    compare,
    data,
    detect,
    export,
    few_shot,
    models,
    multi,
    retrieve,
    run,
)
from segvit.cli.parsing import make_parser, parse, with_values
from segvit.contracts import UserError
from segvit.engine.interrupt import Stopped

COMMANDS: dict[str, Callable[..., None]] = {
    "train": run.train,
    "find_lr": run.find_lr,
    "val": run.val,
    "predict": run.predict,
    "watch": run.watch,
    "compare": compare.compare,
    "data check": data.check,
    "data init": data.init,
    "data convert": data.convert,
    "data stats": data.stats,
    "data preview": data.preview,
    "data bench": data.bench,
    "bench": bench.bench,
    "models list": models.models_list,
    "models info": models.models_info,
    "models convert": models.models_convert,
    "models freeze": models.models_freeze,
    "models licences": models.models_licences,
    "multi train": multi.train,
    "multi predict": multi.predict,
    "adversarial train": adversarial.train,
    "classify train": classify.train,
    "classify val": classify.val,
    "classify predict": classify.predict,
    "clip crops": clip.crops,
    "clip words": clip.words,
    "clip name": clip.name,
    "clip pseudo_labels": clip.pseudo_labels,
    "detect train": detect.train,
    "detect val": detect.val,
    "detect predict": detect.predict,
    "few_shot train": few_shot.train,
    "few_shot train_base": few_shot.train_base,
    "few_shot val": few_shot.val,
    "retrieve train": retrieve.train,
    "retrieve val": retrieve.val,
    "retrieve embed": retrieve.embed,
    "retrieve search": retrieve.search,
    "few_shot predict": few_shot.predict,
    "adapters list": adapters.adapters_list,
    "adapters inspect": adapters.adapters_inspect,
    "adapters merge": adapters.adapters_merge,
    "export": export.export,
    "doctor": run.doctor,
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
    except Stopped as stopped:
        sys.exit(stopped.code)


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
    parser = make_parser(name, function)
    options = parse(parser, with_values(arguments[words:], name, function))
    function(**options)


def _overview(names: Sequence[str] = tuple(COMMANDS)) -> str:
    width = max(map(len, names))
    lines = [f"  {name:{width}}  {(COMMANDS[name].__doc__ or '').splitlines()[0]}" for name in names]
    usage = "usage: segvit COMMAND [options]      segvit COMMAND --help\n\ncommands:"
    return "\n".join([usage, *lines, "", "  --version, --debug (tracebacks)"])
