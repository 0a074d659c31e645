"""Run golden cases: load a folder, build our counterpart, compare every stored tensor.

A case folder holds `case.json` and, where the case has them, `weights.safetensors`, `inputs.safetensors` and
`outputs.safetensors`. The builder of its (system, kind) in `tests.golden_cases` gets the `Case` and returns our tensors
by the names of the stored outputs. An entry `check:<name>` is a pair (ours, expected) for expectations that are written
in `case.data` instead of stored as tensors.

A tensor passes if |ours - official| <= atol + rtol * max|official| everywhere. The longest pattern of
`tolerance_overrides` that matches its name replaces the case's tolerance; patterns with `quantile` or `rule` judge all
tensors they win together.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

GRADIENT_PREFIXES = ("final.", "grad0.")  # outputs named after parameters, which `data.noise_gradient` applies to
CHECK = "check:"

Produced = Mapping[str, "Tensor | tuple[Tensor, Tensor]"]
Builder = Callable[["Case"], Produced]


class CaseError(ValueError):
    """The folder is no case folder; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One golden case, as stored."""

    system: str
    case: str
    kind: str
    config: dict[str, Any]
    inputs: dict[str, Tensor]
    weights: dict[str, Tensor]
    outputs: dict[str, Tensor]
    data: dict[str, Any]
    tolerance: dict[str, float]  # atol, rtol
    tolerance_overrides: dict[str, dict[str, Any]]  # by glob pattern on output names
    min_label_agreement: float | None
    folder: Path
    not_stored: tuple[str, ...] = ()  # outputs that case.json lists without a tensor in outputs.safetensors

    @property
    def name(self) -> str:
        """As printed: system__case."""
        return f"{self.system}__{self.case}"

    def rule(self, output: str) -> tuple[str, dict[str, Any]]:
        """The pattern that decides about an output ("" for the case's own tolerance) and what it asks for."""
        matching = [pattern for pattern in self.tolerance_overrides if fnmatchcase(output, pattern)]
        if not matching:
            return "", dict(self.tolerance)
        pattern = max(matching, key=lambda pattern: (len(pattern), pattern == output))
        return pattern, {**self.tolerance, **self.tolerance_overrides[pattern]}


class Report(NamedTuple):
    """The verdict on one case."""

    name: str
    verdict: str  # ok, FAIL or unsupported
    passed: int
    total: int
    error: float | None  # largest absolute difference; for label maps the fraction of pixels that differ
    problems: list[str]  # one message a failing tensor, or the builder's exception

    @property
    def line(self) -> str:
        """The line that the command prints."""
        error = "-" if self.error is None else f"{self.error:.1e}"
        return f"{self.name}  {self.passed}/{self.total} tensors  {error}  {self.verdict}"


def load_case(folder: Path) -> Case:
    """Read a case folder."""
    path = folder / "case.json"
    if not path.is_file():
        raise CaseError(f"{folder} is no case folder: it has no case.json")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        outputs = load_tensors(folder / "outputs.safetensors")
        return Case(
            system=meta["system"], case=meta["case"], kind=meta["kind"], config=meta["config"],
            inputs=load_tensors(folder / "inputs.safetensors"), weights=load_tensors(folder / "weights.safetensors"),
            outputs=outputs, data=meta.get("data", {}),
            tolerance={"atol": meta["tolerance"]["atol"], "rtol": meta["tolerance"]["rtol"]},
            tolerance_overrides=meta.get("tolerance_overrides", {}),
            min_label_agreement=meta.get("min_label_agreement"), folder=folder,
            not_stored=tuple(sorted(set(meta.get("outputs", {})) - set(outputs))),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CaseError(f"{folder} is no case folder: {type(error).__name__}: {error}".replace("\n", " ")) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, none if there is no such file."""
    return dict(load_file(path)) if path.is_file() else {}


@dataclass
class Comparison:
    """What is found out about the tensors of one case, name by name."""

    case: Case
    problems: dict[str, str] = field(default_factory=dict)
    differences: dict[str, Tensor] = field(default_factory=dict)  # flat, float64, of the comparable tensors

    def add(self, name: str, ours: object, official: Tensor) -> None:
        """Take in one tensor, if it can be compared at all."""
        if not isinstance(ours, Tensor):
            self.problems[name] = f"is of type {type(ours).__name__}, not a tensor"
        elif ours.shape != official.shape:
            self.problems[name] = f"has shape {list(ours.shape)}, expected {list(official.shape)}"
        else:
            self.differences[name] = self.drop_noise(name, absolute_difference(ours, official))

    def drop_noise(self, name: str, difference: Tensor) -> Tensor:
        """Leave out the entries whose true gradient is zero; NaN and infinity of ours stay in."""
        prefix = next((prefix for prefix in GRADIENT_PREFIXES if name.startswith(prefix)), None)
        noise = self.case.data.get("noise_gradient", {})
        if prefix is None or name.removeprefix(prefix) not in noise:
            return difference
        start, end = noise[name.removeprefix(prefix)]
        keep = ~difference.isfinite()
        keep[:start] = True
        keep[end:] = True
        return difference[keep]

    def judge_tensor(self, name: str, official: Tensor, rule: Mapping[str, Any]) -> None:
        """Every element within the tolerance."""
        limit = rule["atol"] + rule["rtol"] * largest_finite(official)
        worst = largest(self.differences[name])
        if not worst <= limit:  # written so that NaN fails
            self.problems[name] = f"differs by {worst:.3e}, allowed {limit:.3e}"

    def judge_quantile(self, pattern: str, names: Sequence[str], rule: Mapping[str, Any]) -> None:
        """Enough of all elements under one pattern within the tighter tolerance."""
        inside = {name: self.differences[name] <= rule["quantile_atol"] for name in names}
        share = true_share(inside.values())
        if share < rule["quantile"]:
            message = f"{share:.6f} of the elements of {pattern} within {rule['quantile_atol']}, not {rule['quantile']}"
            self.fail_together([name for name in names if not inside[name].all()], message)

    def judge_labels(self, pattern: str, names: Sequence[str]) -> None:
        """Enough equal pixels in all label maps under one pattern."""
        least = self.case.min_label_agreement
        if least is None:
            raise CaseError(f"{self.case.name}: {pattern} asks for min_label_agreement, which the case does not give")
        equal = {name: self.differences[name] == 0 for name in names}
        share = true_share(equal.values())
        if share < least:
            message = f"{share:.6f} of the pixels of {pattern} agree, not {least}"
            self.fail_together([name for name in names if not equal[name].all()], message)
        for name in names:  # a distance between class ids means nothing: report the fraction that differs
            self.differences[name] = (~equal[name]).double().mean().reshape(1)

    def fail_together(self, names: Sequence[str], message: str) -> None:
        for name in names:
            self.problems.setdefault(name, message)


def compare(case: Case, produced: Produced) -> Report:
    """Compare a builder's tensors with the stored ones."""
    comparison = Comparison(case)
    groups: dict[str, list[str]] = {}
    for name, official in case.outputs.items():
        if name not in produced:
            comparison.problems[name] = "is expected but not produced"
            continue
        comparison.add(name, produced[name], official)
        if name in comparison.differences:
            groups.setdefault(case.rule(name)[0], []).append(name)
    for name in case.not_stored:
        comparison.problems[name] = "is listed in case.json but not stored in outputs.safetensors"
    for names in groups.values():
        judge_group(comparison, names)
    checks = [name for name in produced if name.startswith(CHECK)]
    for name in checks:
        judge_check(comparison, name, produced[name])
    return summarise(comparison, [*case.outputs, *case.not_stored, *checks])


def judge_group(comparison: Comparison, names: Sequence[str]) -> None:
    """Judge the tensors that one pattern wins."""
    case = comparison.case
    pattern, rule = case.rule(names[0])
    if "rule" in rule:
        if rule["rule"] != "min_label_agreement":
            raise CaseError(f"{case.name}: {pattern} asks for the unknown rule {rule['rule']!r}")
        comparison.judge_labels(pattern, names)
        return
    for name in names:
        comparison.judge_tensor(name, case.outputs[name], rule)
    if "quantile" in rule:
        comparison.judge_quantile(pattern, names, rule)


def judge_check(comparison: Comparison, name: str, pair: object) -> None:
    """Judge a pair (ours, expected) with the case's own tolerance."""
    match pair:
        case (ours, Tensor() as expected):
            comparison.add(name, ours, expected)
            if name in comparison.differences:
                comparison.judge_tensor(name, expected, comparison.case.tolerance)
        case _:
            comparison.problems[name] = "is not a pair of tensors (ours, expected)"


def summarise(comparison: Comparison, names: Sequence[str]) -> Report:
    """The verdict: ok only if something was compared and everything passed."""
    problems = [f"{name} {message}" for name, message in comparison.problems.items()]
    if not names:
        problems.append("nothing was compared: the case stores no outputs and the builder returned no check")
    error = None
    if comparison.differences:
        error = largest(torch.cat([difference.flatten() for difference in comparison.differences.values()]))
    passed = len(names) - len(comparison.problems)
    return Report(comparison.case.name, "FAIL" if problems else "ok", passed, len(names), error, problems)


def absolute_difference(ours: Tensor, official: Tensor) -> Tensor:
    """|ours - official| in float64, flat. NaN in both is no difference, in one it stays NaN."""
    ours, official = (tensor.detach().cpu().to(torch.float64).flatten() for tensor in (ours, official))
    same = (ours == official) | (ours.isnan() & official.isnan())
    return torch.where(same, torch.zeros_like(ours), (ours - official).abs())


def largest(values: Tensor) -> float:
    """The maximum, NaN if there is one, 0 of nothing."""
    return values.max().item() if values.numel() else 0.0


def largest_finite(values: Tensor) -> float:
    """The largest finite magnitude, 0 if there is none."""
    values = values.to(torch.float64).abs()
    return largest(values[values.isfinite()])


def true_share(parts: Sequence[Tensor] | Any) -> float:
    """The fraction of true elements in all parts together, 1 of nothing."""
    together = torch.cat([part.flatten() for part in parts])
    return together.double().mean().item() if together.numel() else 1.0


def check(case: Case, builders: Mapping[tuple[str, str], Builder]) -> Report:
    """Run one case; the generator is seeded, so that the order of cases does not matter."""
    build = builders.get((case.system, case.kind))
    total = len(case.outputs) + len(case.not_stored)
    if build is None:
        return Report(case.name, "unsupported", 0, total, None, [f"no builder for {(case.system, case.kind)}"])
    torch.manual_seed(0)
    try:
        return compare(case, build(case))
    except Exception:  # whatever a builder raises is the verdict on its case, not the end of the run
        return Report(case.name, "FAIL", 0, total, None, traceback.format_exc().rstrip().split("\n"))


def main(folders: Sequence[str]) -> int:
    """Run the cases in `folders`, a line each on stdout; returns the exit code."""
    if not folders:
        print("no case folder given; usage: python -m tests.golden DIR...", file=sys.stderr)
        return 2
    try:
        cases = [load_case(Path(folder)) for folder in folders]
    except CaseError as error:
        print(error, file=sys.stderr)
        return 2
    from tests.golden_cases import BUILDERS  # here, because the builders import `Case` from this file

    reports = []
    for case in cases:
        report = check(case, BUILDERS)
        print(report.line, flush=True)
        for problem in report.problems:
            print(f"    {problem}", file=sys.stderr, flush=True)
        reports.append(report)
    return int(any(report.verdict != "ok" for report in reports))
