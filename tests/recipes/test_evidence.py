"""What the evidence recipes share: runs in worker processes, intervals, claims, and sections of a page."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest
from evidence_job import pid
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from evidence.intervals import Claim, Interval, interval, judge, of, paired
from evidence.runs import run_all
from evidence.tables import markdown, write_section

ROWS = [
    {"arm": arm, "seed": seed, "share": share + seed / 10}
    for arm, share in (("a", 1.0), ("b", 0.5))
    for seed in range(5)
]


@pytest.fixture
def run(tmp_path):
    def run(*jobs, **options):
        return run_all(jobs, pid, out=tmp_path / "x.jsonl", title="jobs", console=Console(quiet=True), **options)

    return run


def test_results_are_in_order_and_in_the_file(run, tmp_path):
    rows = run(*({"seed": seed, "fails": False} for seed in range(4)))
    assert [row["seed"] for row in rows] == [0, 1, 2, 3]
    written = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert sorted(written, key=lambda row: row["seed"]) == rows
    assert os.getpid() not in {row["pid"] for row in rows}
    assert (tmp_path / "x.log").read_text().splitlines() == ["what a host prints"] * 4


def test_a_run_is_taken_up_again_only_if_asked(run):
    (first,) = run({"seed": 0, "fails": False})
    resumed = run({"seed": 0, "fails": False}, {"seed": 1, "fails": False}, resume=True)
    assert resumed[0] == first
    assert resumed[1]["pid"] != first["pid"]
    assert run({"seed": 0, "fails": False})[0]["pid"] not in {row["pid"] for row in resumed}


def test_a_job_that_fails_ends_all_and_is_named(run):
    with pytest.raises(SystemExit, match=r"'seed': 7, 'fails': True(.|\n)*what a host says"):
        run({"seed": 7, "fails": True})


def test_intervals():
    found = of(ROWS, "share", arm="a")
    half = 2.776 * math.sqrt(0.025) / math.sqrt(5)  # Student's t with 4 degrees of freedom
    assert (found.mean, found.half) == (pytest.approx(1.2), pytest.approx(half, rel=1e-3))
    assert f"{found:.2f}" == "1.20 ± 0.20"
    assert paired(ROWS, "share", "a", "b") == Interval(pytest.approx(0.5), pytest.approx(0.0, abs=1e-12))
    assert interval([1.0]).half == math.inf
    with pytest.raises(ValueError, match="are no pairs"):
        paired(ROWS[:-1], "share", "a", "b")


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [(Interval(1.0, 0.5), "holds"), (Interval(-1.0, 0.5), "contradicted"), (Interval(1.0, 1.0), "not separated")],
)
def test_a_claim_holds_only_outside_of_its_interval(difference, verdict):
    claim = Claim("a is above b", difference)
    assert claim.verdict == verdict
    assert judge([claim], Console(quiet=True)) == ([] if verdict == "holds" else [claim])


def test_a_section_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x -->\nold\n<!-- end of x -->\nafter\n")
    write_section(page, "x", markdown(["arm", "share"], [["a", "1"]]))
    assert (
        page.read_text()
        == "before\n<!-- x -->\n| arm | share |\n| --- | ---: |\n| a | 1 |\n<!-- end of x -->\nafter\n"
    )
    with pytest.raises(ValueError, match="<!-- y -->"):
        write_section(page, "y", "")
