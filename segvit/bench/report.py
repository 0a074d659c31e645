"""The files of a measurement: for machines, for a README, and a page."""

from __future__ import annotations

from html import escape
from pathlib import Path

from segvit.bench.bench import Bench, markdown, parts_table, table
from segvit.engine import page
from segvit.engine.scatter import Point, scatter
from segvit.files import write_json, write_text


def write_bench(folder: Path, found: Bench) -> None:
    """bench.json, bench.md and index.html."""
    write_json(folder / "bench.json", found.to_json())
    write_text(folder / "bench.md", markdown(found))
    (head, rows), (part_head, parts) = table(found), parts_table(found)
    chart = scatter(
        "Images a second over parameters, in million",
        [Point(row.name, row.parameters / 1e6, row.rate / max(one.rate for one in found.rows))
         for row in found.rows if row.parameters is not None],
        unit="million parameters",
    ) if len(found.rows) > 1 else ""  # fmt: skip
    sections = [
        page.table(head, [[escape(cell) for cell in row] for row in rows]),
        f'<div class="grid">{chart}</div><p>Speed as a share of the fastest.</p>' if chart else "",
        "<h2>Where the time goes</h2>", page.table(part_head, [[escape(cell) for cell in row] for row in parts]),
        page.facts(list(found.facts.items())),
    ]  # fmt: skip
    page.write_page(folder / "index.html", f"Speed and memory of {found.rows[0].name}", sections)
