"""Two gloo processes against one, on the same batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_trl import ARGUMENTS

SCRIPT = Path(__file__).parents[1] / "support" / "two_ranks.py"


@pytest.fixture(scope="module")
def results(model, tmp_path_factory):
    """{ranks: [what each rank saved]}"""
    out = tmp_path_factory.mktemp("ranks")
    env = dict(
        os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(SCRIPT.parent), *filter(None, sys.path)])
    )
    found = {}
    for ranks in (1, 2):
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), str(SCRIPT)]
        run = subprocess.run(
            [sys.executable, *command, model, str(out / str(ranks))], env=env, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr[-3000:]
        found[ranks] = [torch.load(out / f"{ranks}.{rank}") for rank in range(ranks)]
    return found


@pytest.mark.parametrize("case", ["grpo", "dapo", "rloo"])
def test_two_processes_have_the_gradient_of_one(results, case):
    one, two = results[1][0][case], results[2][0][case]
    if case == "rloo":  # a group of 8 over both ranks
        found = torch.cat([results[2][rank][case]["baseline"] for rank in (0, 1)])
        counted = torch.ones(8, 6).bool()
        counted[4:, 5] = False
        torch.testing.assert_close(found[counted], one["baseline"][counted], rtol=1e-5, atol=1e-6)
        assert one["baseline"].abs().max() > 0.05
    torch.testing.assert_close(two["gradients"], one["gradients"], rtol=1e-4, atol=1e-6)
    assert one["gradients"].abs().max() > 1e-3
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5)
    assert results[2][1][case]["metrics"] == pytest.approx(two["metrics"])


def test_each_rank_leaves_out_its_own_groups(results):
    assert results[1][0]["equal rewards"].tolist() == [False] * 4 + [True] * 4
    assert [results[2][rank]["equal rewards"].tolist() for rank in (0, 1)] == [[False] * 4, [True] * 4]


def test_training_in_two_processes(results):
    """A whole run under DDP: both ranks took part in it, and it moved."""
    first, second = (results[2][rank]["trained"] for rank in (0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, results[2][0]["start"])
    one, two = (results[2][rank]["controller"] for rank in (0, 1))
    assert one == two  # bit for bit
    assert one["beta"] != ARGUMENTS["beta"]


@pytest.mark.parametrize("name", ["exact", "left_out", "moving"])
def test_ranks_agree(results, name):
    """Also on the reference that moves. Its gradient flows past DDP's own forward pass, into the LM head, if exact."""
    first, second = (results[2][rank][f"trained {name}"] for rank in (0, 1))
    assert torch.equal(first, second)
    assert first.isfinite().all()
    start = results[2][0]["start"]
    assert (first[: len(start)] - start).abs().max() > 1e-4
