"""Tuning methods and their folders at the command line."""

from __future__ import annotations

from segvit.cli.parsing import show


def adapters_list(*, json: bool = False) -> None:
    """List the tuning methods for --adapter, with their --adapter_options.

    Args:
        json: Print JSON.
    """
    from segvit.tasks.adapters import list_adapters

    rows = list_adapters()
    lines = []
    for row in rows:
        lines.append(f"{row['name']}: {row['what']}")
        lines += [f"    --adapter_options.{key} {value}" for key, value in row["options"].items()]
    show(rows, json, "\n".join(lines))


def adapters_inspect(folder: str, *, json: bool = False) -> None:
    """What an adapter folder holds and which base weights it needs.

    Args:
        folder: Adapter or run folder.
        json: Print JSON.
    """
    from segvit.tasks.adapters import inspect_adapter

    report = inspect_adapter(folder)
    show(report, json, "\n".join(f"{key}: {value}" for key, value in report.items()))


def adapters_merge(folder: str, *, out: str, base: str | None = None) -> None:
    """Fold an adapter into its base weights and write a plain model folder.

    Args:
        folder: Run, model or adapter folder.
        out: Model folder to write.
        base: Where the base weights of an adapter folder are now; None = where it says itself.
    """
    from segvit.tasks.adapters import merge_adapter

    merge_adapter(folder, out, base=base)
    show(None, False, out)
