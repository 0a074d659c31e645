"""What a run's log writes: rows, the table, pictures, and what it hands to other tools."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from segvit.data.transforms import Augment
from segvit.engine.run import RunLog, changes


class Tool:
    """A logger that notes what it is told."""

    def __init__(self):
        self.told = []

    def log(self, step, values):
        self.told.append((step, dict(values)))

    def picture(self, step, name, pixels):
        self.told.append((step, name, pixels.shape))

    def close(self):
        self.told.append("closed")


def open_log(folder, *, start=0, main=True, loggers=()):
    return RunLog(folder, steps=4, start=start, batch_size=2, main=main, loggers=loggers)


def row(step):
    return {"step": step, "loss": 1.0 / step, "seconds": 0.5}


def lines(folder):
    return (folder / "metrics.csv").read_text().splitlines()


def test_the_table_is_made_at_validations_and_at_the_end(tmp_path):
    log = open_log(tmp_path)
    log.row(row(1))
    assert not (tmp_path / "metrics.csv").exists()
    log.row({"step": 1, "val": {"miou": math.nan, "macc": 0.5}})
    assert lines(tmp_path) == ["step,loss,seconds,val_miou,val_macc", "1,1.0,0.5,,0.5"]
    log.row(row(2))
    assert len(lines(tmp_path)) == 2
    log.close()
    assert lines(tmp_path)[2:] == ["2,0.5,0.5,,"]


def test_a_resumed_run_forgets_later_steps_in_both_files(tmp_path):
    log = open_log(tmp_path)
    for step in (1, 2, 3):
        log.row(row(step))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    log = open_log(tmp_path, start=2)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert [line.split(",")[0] for line in lines(tmp_path)] == ["step", "1", "2"]
    log.row(row(3))
    log.close()
    assert [line.split(",")[0] for line in lines(tmp_path)] == ["step", "1", "2", "3"]


def test_tools_are_told_numbers_and_pictures(tmp_path):
    tool = Tool()
    log = open_log(tmp_path, loggers=[tool])
    log.row(row(1))
    log.row({"step": 1, "val": {"miou": 0.25, "macc": math.nan}})
    log.picture(1, "val", np.full((4, 6, 3), 7, np.uint8))
    log.close()
    assert tool.told == [
        (1, {"loss": 1.0, "seconds": 0.5}), (1, {"val_miou": 0.25}), (1, "val", (4, 6, 3)), "closed"
    ]  # fmt: skip
    with Image.open(tmp_path / "pictures" / "step_000001.png") as picture:
        assert np.asarray(picture).shape == (4, 6, 3)


@pytest.mark.parametrize("act", ["row", "picture", "message", "close"])
def test_other_processes_write_nothing(tmp_path, act):
    log = open_log(tmp_path, main=False)
    arguments = {"row": (row(1),), "picture": (1, "val", np.zeros((2, 2, 3), np.uint8)), "message": ("x",), "close": ()}
    getattr(log, act)(*arguments[act])
    assert list(tmp_path.iterdir()) == []


def test_a_setting_that_an_older_version_did_not_have_was_the_default():
    before = {"seed": 1, "augment": {"flip": 0.5}, "options": {}}
    default = Augment(crop=(1, 1)).resize
    assert list(changes(before, before | {"teacher": None, "augment": {"flip": 0.5, "resize": default}})) == []
    assert list(changes(before, before | {"augment": {"flip": 0.5, "resize": "x"}})) == [
        f"augment.resize: {default} -> x"
    ]
    assert list(changes(before, before | {"options": {"drop_path": 0.0}})) == ["options.drop_path: None -> 0.0"]
    assert list(changes(before | {"teacher": "a"}, before)) == ["teacher: a -> None"]
