"""Every program with wrong, damaged or hostile input: one clear line, in time, and nothing else changed.

The most telling cases are tried in every run; all of them (more than a thousand) are slow.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections import Counter

import pytest

from tests.hostile import images_and_classes, keys_and_configs, programs, runs, weights
from tests.hostile.driver import ROOT, Case, report

CASES = [case for part in (images_and_classes, keys_and_configs, weights, runs, programs) for case in part.cases()]
TELLING = [case for case in CASES if case.telling]
_numbers = itertools.count()


def name_of(case: Case) -> str:
    """What pytest calls a case."""
    return re.sub(r"[^\w.,=()\[\]+-]+", "_", case.name)


@pytest.fixture
def check(server, finished, tmp_path_factory):
    """Run a case; returns what is not as it must be."""

    def call(case):
        folder = tmp_path_factory.getbasetemp() / f"case{next(_numbers)}"
        ending = server.run(case, folder / "case", finished)
        problems = ending.problems(case)
        shutil.rmtree(folder, ignore_errors=True)
        assert not problems, report(case, ending, problems)

    return call


@pytest.mark.parametrize("case", TELLING, ids=name_of)
def test_telling_cases(check, case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if not case.telling], ids=name_of)
def test_cases(check, case):
    check(case)


def test_the_cases_are_many_and_of_every_program():
    assert len(CASES) >= 400 and 55 <= len(TELLING) <= 70
    assert max(Counter(case.name for case in CASES).values()) == 1
    of_reclip = {case.arguments[0] for case in CASES if case.program == "reclip" and case.arguments}
    assert {"segment", "predict", "export", "doctor", "app"} <= of_reclip
    named = {case.program for case in CASES}
    for folder in ("tools", "datasets", "demo"):
        for script in (ROOT / folder).glob("*.py"):
            is_program = "__main__" in script.read_text()
            assert not is_program or f"{folder}/{script.name}" in named, script
    assert "train_net.py" in named
