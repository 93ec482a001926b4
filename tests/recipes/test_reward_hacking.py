"""The recipe's claims, page and picture, on made-up results that it takes for those of an interrupted run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import reward_hacking
from evidence import hack_runs

# Right answers, hacks and KL of an arm; the others are as reverse_kl.
FOUND = {
    "no KL": (0.0, 1.0, 20.0), "k1_as_loss": (0.0, 1.0, 30.0), "k3_as_loss": (0.1, 0.6, 5.0),
    "k2_as_loss": (0.3, 0.1, 1.0),
}  # fmt: skip
PART_SECTIONS = ("front", "sequence", "reuse")


@pytest.fixture
def results(tmp_path):
    """A function that writes the results of a run, some arms' as those of others, and returns them."""

    def write(quick=True, **instead):
        rows = []
        for job in hack_runs.jobs(quick):
            right, hacks, kl = FOUND.get(instead.get(job["arm"], job["arm"]), (0.4, 0.01, 0.3))
            noise = 0.001 * (job["seed"] + len(job["arm"]))
            then = {"right": right, "kl": kl, "J": right}
            way = {"norms": [1.0, 2.0], "curve": [{"step": 20, "hacks": hacks, **then}]}
            norms = {"median_norm": 1.0, "largest_norm": 2.0}
            rows.append({**job, **then, "hacks": hacks + noise, "kl": kl + noise, **norms, **way})
        (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return rows

    return write


@pytest.fixture
def main(tmp_path, monkeypatch):
    """The recipe with `--resume` and these arguments, without a model: the optimum is made up, too."""
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "warmup.json").touch()
    (tmp_path / "math-0.08").mkdir()
    (tmp_path / "math-0.08" / "warmup.json").touch()
    best = {"right": 0.8, "hacks": 0.08, "proxy": 1.0, "kl": 1.1, "J": 0.65}
    monkeypatch.setenv("KL_PLUGINS_MATH_MODEL", str(tmp_path / "math"))
    for name in ("reference", "best"):
        monkeypatch.setattr(hack_runs, name, lambda part, beta: best)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["reward_hacking.py", "--resume", "--out", str(tmp_path), *arguments])
        reward_hacking.main()

    return run


def verdicts(rows):
    return [claim.verdict for claim in reward_hacking.claims(rows)]


def test_the_claims_hold_of_what_they_are_about(results, main, tmp_path):
    assert verdicts(results()) == ["holds"] * 6
    main("--quick")
    assert (tmp_path / "reward_hacking.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("instead", "fails"),
    [
        ({"k1_as_loss": "reverse_kl"}, {0, 1}),  # a k1 that regularizes
        ({"k3_as_loss": "k2_as_loss"}, {2, 3}),  # a k3 that doesn't drift
        ({"k2_as_loss": "k3_as_loss", "k3_as_loss": "k2_as_loss"}, {2, 3}),
        ({"k2_as_loss": "reverse_kl"}, {4, 5}),  # a token's credit that does as well
        ({"reverse_kl": "k2_as_loss"}, {4, 5}),
    ],
)
def test_a_claim_fails_where_the_arms_do_otherwise(results, instead, fails):
    assert {i for i, verdict in enumerate(verdicts(results(**instead))) if verdict != "holds"} == fails


def test_a_failed_claim_ends_the_recipe(results, main):
    results(k3_as_loss="k2_as_loss")
    with pytest.raises(SystemExit, match="2 of the claims above did not hold"):
        main("--quick")


def test_tables_and_picture_go_into_the_documents(results, main, tmp_path):
    page = tmp_path / "evidence.md"
    page.write_text(
        "".join(f"<!-- reward hacking: {n} -->\n<!-- end of reward hacking: {n} -->\n" for n in PART_SECTIONS)
    )
    results(quick=False)
    main("--docs", str(tmp_path))
    text = page.read_text()
    assert "| GRPO | k3_as_loss | 0.100 ± 0.000 |" in text
    assert "|  | optimum | 0.800 | 0.080 | 1.10 | 0.650 |  |" in text
    assert "| after 20 updates | +0.000 ± 0.000 (tie) |" in text
    assert (tmp_path / "images" / "reward_hacking.png").is_file()
