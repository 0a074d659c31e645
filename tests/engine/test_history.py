"""Reading a run's measurements while they grow, and the table made of them."""

import csv
import json

from segvit.engine.history import Tail, flat, read_history, write_csv

ROWS = [
    {"step": 1, "loss": 2.5, "lr": 1e-9},
    {"step": 2, "loss": None, "lr": 2e-9},
    {"step": 2, "val": {"miou": 0.25, "macc": None}},
    {"step": 3, "loss": 0.1, "lr": 3e-9},
]


def write(folder, rows, *, end=""):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)


def test_the_table_has_one_line_a_step_and_one_column_a_key(tmp_path):
    write(tmp_path, ROWS, end='{"step": 4, "lo')
    write_csv(tmp_path)
    text = (tmp_path / "metrics.csv").read_text()
    assert text == "step,loss,lr,val_miou,val_macc\n1,2.5,1e-09,,\n2,,2e-09,0.25,\n3,0.1,3e-09,,\n"
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [row["val_miou"] for row in csv.DictReader(file)] == ["", "0.25", ""]


def test_a_run_without_a_step_has_an_empty_table(tmp_path):
    write_csv(tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == "\n"


def test_flat_names_what_is_nested(tmp_path):
    assert flat(ROWS[2]) == {"step": 2, "val_miou": 0.25, "val_macc": None}
    assert flat(ROWS[0]) == ROWS[0]


def test_history_leaves_out_what_is_not_whole(tmp_path):
    assert read_history(tmp_path) == []
    write(tmp_path, ROWS, end='{"loss": 1}\n[]\nnonsense\n{"step": 4')
    assert read_history(tmp_path) == ROWS


def test_the_tail_follows_a_growing_file(tmp_path):
    tail = Tail(tmp_path)
    assert tail.read() == []
    write(tmp_path, ROWS[:2], end='{"step": 2, "val"')
    assert tail.read() == ROWS[:2]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(': {"miou": 0.25, "macc": null}}\n')
    assert tail.read() == ROWS[:3]
    assert tail.read() == ROWS[:3]


def test_the_tail_starts_again_when_a_resumed_run_replaces_the_file(tmp_path):
    tail = Tail(tmp_path)
    write(tmp_path, ROWS)
    assert tail.read() == ROWS
    other = [{"step": 1, "loss": 9.0}] * 9  # longer than before: only the file's identity tells
    (tmp_path / "new").mkdir()
    write(tmp_path / "new", other)
    (tmp_path / "new" / "metrics.jsonl").replace(tmp_path / "metrics.jsonl")
    assert tail.read() == other
    write(tmp_path, ROWS[:1])  # in place, shorter
    assert tail.read() == ROWS[:1]
