"""The doctor's word on a survey: everything worth saying about a dataset, worst first, and the YAML that mends it.

One rule decides how bad a finding is. Error: `segvit train` would stop, or learn something else than the user means.
Warning: training runs, but its result is worse or worth less than it looks. Note: good to know. Each finding's exact
condition is documented where it is made: `encoding` and `meaning` (values), `defects` (files), `balance` (classes),
`leaks` (the same picture in two splits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from segvit.data.doctor.balance import empty_masks, judge_balance
from segvit.data.doctor.defects import Excluded, Judged, judge_files
from segvit.data.doctor.encoding import judge_encoding
from segvit.data.doctor.leaks import Leak, find_leaks, judge_leaks
from segvit.data.doctor.propose import Plan, propose
from segvit.data.doctor.reading import Reading
from segvit.data.doctor.tables import Diagnosis, Finding, Severity, Survey

ORDER: tuple[Severity, ...] = ("error", "warning", "note")
FIRST = ("no_pairs",)  # without pairs nothing else matters
VAL_PART = 0.2


def diagnose(survey: Survey) -> Diagnosis:
    """Every finding and, where one can help, the YAML to use instead."""
    files = judge_files(survey)
    reading, encoding = judge_encoding(survey)
    leaks = find_leaks(survey)
    findings = [*encoding, *files.findings, *judge_leaks(survey, leaks)]
    read = survey if reading is None else replace(survey, classes=reading.classes, rule=reading.rule)
    if reading is not None:
        findings += judge_balance(read)
    findings.sort(key=lambda finding: (ORDER.index(finding.severity), finding.kind not in FIRST))
    findings = [_named(finding, survey) for finding in findings]
    plan = None if reading is None else make_plan(read, reading, files, leaks)
    return Diagnosis(tuple(findings), None if plan is None else propose(survey, plan))


def make_plan(survey: Survey, reading: Reading, files: Judged, leaks: Sequence[Leak]) -> Plan:
    """What the description should say; `survey` has the classes and the rule of the reading."""
    excluded: Excluded = {"train": {}} | {name: dict(reasons) for name, reasons in files.excluded.items()}
    for name, stems in empty_masks(survey).items():
        good = [pair.stem for split in survey.splits if split.name == name for pair in split.pairs]
        if len(stems) < len(good):
            excluded[name] |= {stem: "no pixel is labelled" for stem in stems if stem not in excluded[name]}
    train = _left(survey, excluded, "train")
    leaked = [leak for leak in leaks if leak.train.stem in train]
    why = ""
    if len({leak.train.stem for leak in leaked}) <= len(train) / 2:
        excluded["train"] |= {leak.train.stem: f"looks like {leak.other.image.path} of {leak.split}" for leak in leaked}
    elif all(leak.split == "val" for leak in leaked):
        why = "val held the images of train; now a part of train is kept for it"
    train = _left(survey, excluded, "train")
    if not why and not _left(survey, excluded, "val"):
        why = "a part of train, since there is no val"
    part = VAL_PART if why and len(train) > 1 else None
    return Plan(reading, excluded, val_part=part, val_why=why if part else "", channels=files.channels)


def _left(survey: Survey, excluded: Excluded, name: str) -> set[str]:
    """The stems of a split that are not left out."""
    pairs = [pair for split in survey.splits if split.name == name for pair in split.pairs]
    return {pair.stem for pair in pairs} - excluded.get(name, {}).keys()


def _named(finding: Finding, survey: Survey) -> Finding:
    """Errors name the dataset: `segvit train` refuses with such a sentence alone."""
    if finding.severity != "error":
        return finding
    return replace(finding, sentence=f"{survey.source}: {finding.sentence}")
