"""Every golden case passes, every folder has a builder, and the comparison itself catches what is wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden.run import Case, CaseError, check, compare, load_case, main
from tests.golden_cases import BUILDERS

GOLDEN = Path(__file__).parent / "golden"
PARTIAL = Path(__file__).parent / "golden_partial"  # cases of which not every output can be had
ROOT = GOLDEN.parent.parent
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/case.json"))
VICTIM = GOLDEN / "mmseg__metric"  # small, and its builder needs no network


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_case(folder):
    report = check(load_case(folder), BUILDERS)
    assert report.verdict == "ok", "\n".join([report.line, *report.problems])


def test_a_case_that_lacks_what_one_output_needs():
    """It stores the tuned singular values alone, so the logits before tuning cannot be computed; all others agree."""
    report = check(load_case(PARTIAL / "svf__few_shot_baseline"), BUILDERS)
    assert (report.passed, report.total) == (18, 19)
    assert [problem for problem in report.problems if "meta_logits_before_tuning" not in problem] == []


def test_every_folder_is_claimed_by_a_builder():
    folders = [path for path in GOLDEN.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert sorted(folders) == FOLDERS, "a folder without case.json"
    cases = [load_case(folder) for folder in folders]
    unclaimed = {case.name: (case.system, case.kind) for case in cases if (case.system, case.kind) not in BUILDERS}
    assert not unclaimed, f"no builder in tests/golden_cases.py for {unclaimed}"


def test_folder_names_match_their_cases():
    assert [load_case(folder).name for folder in FOLDERS] == [folder.name for folder in FOLDERS]


# The command, on goldens that are wrong on purpose


def copy_case(target: Path, **changes) -> Path:
    """A copy of the victim with some of its expected outputs exchanged."""
    folder = target / VICTIM.name
    folder.mkdir(parents=True)
    for name in ("case.json", "inputs.safetensors"):
        shutil.copyfile(VICTIM / name, folder / name)
    save_file(load_file(VICTIM / "outputs.safetensors") | changes, folder / "outputs.safetensors")
    return folder


def shifted_case(target: Path) -> Path:
    """The victim with one output off by a hundred times what is allowed."""
    official, tolerance = load_file(VICTIM / "outputs.safetensors")["IoU"], load_case(VICTIM).tolerance
    largest = official.nan_to_num().abs().max().item()
    return copy_case(target, IoU=official + 100 * (tolerance["atol"] + tolerance["rtol"] * largest))


def fields(line: str) -> tuple[int, int, str]:
    """(passed, total, verdict) of a line of the victim."""
    name, counts, error, verdict = line.replace(" tensors", "").split("  ")
    assert name == VICTIM.name
    assert error == "-" or float(error) >= 0
    passed, total = map(int, counts.split("/"))
    return passed, total, verdict


def test_command_rejects_wrong_goldens(tmp_path):
    right = copy_case(tmp_path / "right")
    shifted = shifted_case(tmp_path / "shifted")
    longer = copy_case(tmp_path / "longer", another=torch.zeros(2))
    command = [sys.executable, "-m", "tests.golden", right, shifted, longer]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    total = len(load_file(VICTIM / "outputs.safetensors"))
    expected = [(total, total, "ok"), (total - 1, total, "FAIL"), (total, total + 1, "FAIL")]
    assert [fields(line) for line in done.stdout.splitlines()] == expected, done.stdout + done.stderr
    assert "    IoU differs by " in done.stderr
    assert "    another is expected but not produced" in done.stderr


def test_exit_code_of_each(tmp_path, capsys):
    strange = copy_case(tmp_path / "strange")
    meta = json.loads((strange / "case.json").read_text())
    (strange / "case.json").write_text(json.dumps(meta | {"kind": "unheard_of"}))
    assert main([str(copy_case(tmp_path / "right"))]) == 0
    assert main([str(shifted_case(tmp_path / "shifted"))]) == 1
    assert main([str(copy_case(tmp_path / "longer", another=torch.zeros(2)))]) == 1
    assert main([str(strange)]) == 1
    assert [fields(line)[2] for line in capsys.readouterr().out.splitlines()] == ["ok", "FAIL", "FAIL", "unsupported"]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"system": "x"}'])
def test_main_names_what_is_no_case_folder(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "case.json").write_text(content)
    assert main([str(VICTIM), str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert f"{tmp_path} is no case folder" in captured.err
    with pytest.raises(CaseError):
        load_case(tmp_path)


def test_main_without_folders(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# The rules of the comparison, on fake cases


def fake(outputs, *, overrides=None, **options) -> Case:
    tensors = {name: torch.as_tensor(values) for name, values in outputs.items()}
    given = {"data": {}, "tolerance": {"atol": 0.01, "rtol": 0.1}, "min_label_agreement": None} | options
    return Case(
        system="fake", case="case", kind="kind", config={}, inputs={}, weights={}, outputs=tensors,
        tolerance_overrides=overrides or {}, folder=Path(), **given,
    )  # fmt: skip


def verdict(case: Case, produced) -> str:
    return compare(case, {name: torch.as_tensor(values) for name, values in produced.items()}).verdict


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ([10.0, 1.0], "ok"),
        ([10.0, 2.0], "ok"),  # the limit is 0.01 + 0.1 * 10 for every element
        ([10.0, 2.02], "FAIL"),
        ([8.98, 1.0], "FAIL"),
        ([10.0, float("nan")], "FAIL"),
        ([float("inf"), 1.0], "FAIL"),
        ([[10.0, 1.0]], "FAIL"),
        ([10.0], "FAIL"),
    ],
)
def test_tolerance_is_relative_to_the_largest_element(ours, expected):
    assert verdict(fake({"x": [10.0, 1.0]}), {"x": ours}) == expected


def test_nan_matches_only_nan():
    nan = float("nan")
    case = fake({"x": [nan, 1.0]})
    assert verdict(case, {"x": [nan, 1.0]}) == "ok"
    assert verdict(case, {"x": [1.0, 1.0]}) == "FAIL"
    assert verdict(case, {"x": [1.0, nan]}) == "FAIL"
    assert verdict(fake({"x": [float("inf"), 1.0]}), {"x": [float("inf"), 1.0]}) == "ok"
    assert verdict(fake({"x": [float("inf"), 1.0]}), {"x": [float("-inf"), 1.0]}) == "FAIL"


def test_integers_and_booleans_are_compared_as_numbers():
    exact = {"atol": 0, "rtol": 0}
    wrapped = fake({"x": torch.tensor([0], dtype=torch.uint8)}, tolerance=exact)
    assert verdict(wrapped, {"x": torch.tensor([256])}) == "FAIL"
    assert verdict(wrapped, {"x": torch.tensor([False])}) == "ok"
    assert verdict(fake({"x": [2**40 + 1]}, tolerance=exact), {"x": [2**40]}) == "FAIL"


def test_missing_tensors_and_other_types_fail():
    case = fake({"x": [1.0], "y": [1.0]})
    assert compare(case, {"x": torch.ones(1)}).problems == ["y is expected but not produced"]
    assert compare(case, {"x": torch.ones(1), "y": [1.0]}).problems == ["y is of type list, not a tensor"]
    assert compare(case, {"x": torch.ones(1), "y": torch.ones(1), "more": torch.zeros(3)}).verdict == "ok"


def test_an_output_listed_without_a_tensor_fails():
    assert verdict(fake({"x": [1.0]}, not_stored=("y",)), {"x": [1.0], "y": [1.0]}) == "FAIL"


def test_nothing_compared_fails():
    assert compare(fake({}), {}).verdict == "FAIL"


def test_the_longest_pattern_wins():
    loose = {"atol": 9, "rtol": 0}
    case = fake({"a.b": [1.0]}, overrides={"a.*": loose, "*": loose, "a.b": {"atol": 0}})
    assert case.rule("a.b") == ("a.b", {"atol": 0, "rtol": 0.1})
    assert case.rule("a.c")[0] == "a.*"
    assert verdict(case, {"a.b": [1.2]}) == "FAIL"


def test_quantile_counts_all_tensors_of_the_pattern_together():
    rule = {"atol": 1.0, "rtol": 0, "quantile": 0.9, "quantile_atol": 0.01}
    case = fake({"g.x": torch.zeros(8), "g.y": torch.zeros(2), "other": torch.zeros(1)}, overrides={"g.*": rule})
    ours = {"g.x": torch.zeros(8), "g.y": torch.tensor([0.0, 0.5]), "other": torch.zeros(1)}
    assert verdict(case, ours) == "ok"  # 9 of 10 are close
    assert verdict(case, ours | {"g.y": torch.tensor([0.0, 1.5])}) == "FAIL"
    report = compare(case, ours | {"g.x": torch.full((8,), 0.5)})
    assert (report.verdict, report.passed, report.total) == ("FAIL", 1, 3)


def test_label_agreement_counts_all_maps_of_the_pattern_together():
    options = {"overrides": {"*_pred": {"rule": "min_label_agreement"}}, "min_label_agreement": 0.9}
    case = fake({"a_pred": torch.zeros(15).long(), "b_pred": torch.zeros(5).long()}, **options)
    two, three = torch.tensor([4, 4, 0, 0, 0]), torch.tensor([4, 4, 4, 0, 0])
    report = compare(case, {"a_pred": torch.zeros(15).long(), "b_pred": two})
    assert (report.verdict, report.error) == ("ok", pytest.approx(0.4))
    assert verdict(case, {"a_pred": torch.zeros(15), "b_pred": three}) == "FAIL"


def test_noise_gradients_are_not_compared():
    case = fake({"final.w": torch.zeros(4), "other.w": torch.zeros(4)}, data={"noise_gradient": {"w": [1, 3]}})
    noisy, zeros = torch.tensor([0.0, 5.0, 5.0, 0.0]), torch.zeros(4)
    assert verdict(case, {"final.w": noisy, "other.w": zeros}) == "ok"
    assert verdict(case, {"final.w": zeros, "other.w": noisy}) == "FAIL"
    assert verdict(case, {"final.w": noisy.roll(1), "other.w": zeros}) == "FAIL"
    assert verdict(case, {"final.w": torch.tensor([0.0, float("nan"), 0.0, 0.0]), "other.w": zeros}) == "FAIL"


def test_checks_are_pairs_and_count():
    case = fake({"x": [1.0]}, overrides={"*": {"atol": 9, "rtol": 9}})
    x = torch.ones(1)
    report = compare(case, {"x": x, "check:size": (torch.tensor([2, 3]), torch.tensor([2, 3]))})
    assert (report.verdict, report.passed, report.total) == ("ok", 2, 2)
    assert compare(case, {"x": x, "check:size": (torch.tensor([2, 5]), torch.tensor([2, 3]))}).verdict == "FAIL"
    assert compare(case, {"x": x, "check:size": (torch.tensor([2]), torch.tensor([2, 3]))}).verdict == "FAIL"
    assert compare(case, {"x": x, "check:size": x}).verdict == "FAIL"


def test_an_exception_in_the_builder_is_a_fail():
    def build(case):
        raise RuntimeError("no such head")

    report = check(fake({"x": [1.0]}), {("fake", "kind"): build})
    assert (report.verdict, report.line) == ("FAIL", "fake__case  0/1 tensors  -  FAIL")
    assert report.problems[-1] == "RuntimeError: no such head"
