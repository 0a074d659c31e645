"""`segvit watch`: one frame, when it ends, and how little it loads."""

import io
import json
import subprocess
import sys
import threading
import time

import pytest
import yaml
from rich.console import Console

from segvit.cli import main
from segvit.contracts import UserError
from segvit.engine.run import locked
from segvit.tasks import watch
from tests.tasks.tiny import environment


def write_run(folder, *, steps=4, done=4, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"steps": steps, "epochs": None, "batch_size": 4} | config))
    (folder / "data_report.json").write_text(json.dumps({"splits": {"train": 12}}))
    rows = [
        {"step": step, "loss": 3.0 / step, "loss_ce": 1.0, "loss_mask": 0.5, "loss_ce_0": 1.5, "lr": 1e-3,
         "grad_norm": 1.0, "seconds": 60.0} for step in range(1, done + 1)
    ]  # fmt: skip
    rows.insert(2, {"step": 2, "val": {"miou": 0.5}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_one_frame(tmp_path, capsys):
    main(["watch", str(write_run(tmp_path / "a")), "--once"])
    said = capsys.readouterr().out
    assert "a  step 4 of 4  finished  best mIoU 50.00 % at step 2" in said
    for title in ("loss  total 0.75  ce 1  mask 0.5", "validation mIoU  50.00 %", "learning rate", "gradient norm  1"):
        assert title[:40] in said
    assert "ce_0" not in said


def test_what_the_first_line_says(tmp_path):
    folder = write_run(tmp_path / "a", done=3)
    text = watch._headline(folder, watch.Tail(folder).read()[-1:], [], 4).plain
    assert text == "a  step 3 of 4  no process is writing it; go on with segvit train --resume"
    (tmp_path / "new").mkdir()
    text = watch._headline(write_run(tmp_path / "new", done=0), [], [], 4).plain
    assert text.startswith("new  step 0 of 4  no process")


def test_a_run_in_progress(tmp_path):
    folder = write_run(tmp_path / "a", steps=9, done=5)
    script = (
        "import fcntl, sys, time\nwith open(sys.argv[1] + '/.lock', 'w') as file:\n"
        "    fcntl.lockf(file, fcntl.LOCK_EX)\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        assert holder.stdout.readline() == "held\n"
        assert watch.is_written(folder)
        rows = [row for row in watch.Tail(folder).read() if "val" not in row]
        assert watch._headline(folder, rows, [], 9).plain == "a  step 5 of 9  60 s a step, 4 min left"
        assert not watch.ended(folder, [{"step": 9}], 9)
        (folder / "val.json").write_text("{}")
        assert watch.ended(folder, [{"step": 9}], 9)
        assert not watch.ended(folder, [{"step": 8}], 9)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert not watch.is_written(folder)


def test_watching_does_not_keep_a_run_from_starting(tmp_path):
    folder = write_run(tmp_path / "a")
    with locked(folder):
        pass
    assert not watch.is_written(folder)
    with locked(folder):
        pass


def test_it_ends_with_the_run(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "a", done=3)
    monkeypatch.setattr(watch, "SECONDS", 0.02)
    console = Console(width=100, file=io.StringIO())
    watching = threading.Thread(target=watch.watch_run, args=(str(folder),), kwargs={"once": False, "console": console})
    watching.start()
    time.sleep(0.2)
    assert watching.is_alive()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "loss": 0.125, "lr": 0.0, "grad_norm": 1.0, "seconds": 1.0}) + "\n")
    watching.join(20)
    assert not watching.is_alive()
    assert "step 4 of 4  finished" in console.file.getvalue()


def test_length_in_epochs(tmp_path):
    assert watch.planned_steps(write_run(tmp_path / "a", steps=None, epochs=10)) == 30


@pytest.mark.parametrize("make", [False, True])
def test_a_folder_without_a_run(tmp_path, make):
    folder = tmp_path / "a"
    if make:
        folder.mkdir()
    with pytest.raises(UserError, match="a holds no run"):
        watch.watch_run(str(folder), once=True)


def test_torch_is_not_loaded(tmp_path):
    folder = write_run(tmp_path / "a")
    script = (
        f"import sys\nfrom segvit.cli import main\nmain(['watch', {str(folder)!r}, '--once'])\n"
        "sys.exit(any(name.split('.')[0] in ('torch', 'timm', 'accelerate') for name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert "step 4 of 4" in done.stdout
