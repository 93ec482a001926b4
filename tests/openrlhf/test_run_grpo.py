"""GRPO with `k2_as_loss` and a controlled beta: the launcher, two ranks, packed dynamic batches, real Ray and vLLM."""

from __future__ import annotations

import pytest
from openrlhf_run import run
from tiny_trl import make_model

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A policy of which each of the monitor's bins gets several of the 32 completions, whatever OpenRLHF draws.

    Neither its shuffling nor vLLM has a seed. After any prompt, two of three completions reach a fifth token, and one
    of six ends; a standard error takes two.
    """
    return make_model(tmp_path_factory.mktemp("model"), seed=8, spread=20.0)


@pytest.fixture(scope="module")
def grpo(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("grpo")
    two_ranks = ("--actor.num_gpus_per_node", "2", "--ref.num_gpus_per_node", "2")
    dynamic = ("--train.dynamic_batch_enable", "--ds.packing_samples", "--train.max_tokens_per_gpu", "64")
    kl = ("--kl", "k2_as_loss", "--kl-off-policy", "token", "--kl-controller", "proportional", "--kl-target", "1e-6")
    kl = (*kl, "--kl-monitor")
    return run(folder, model_folder, "grpo", *kl, flags=(*two_ranks, *dynamic))


def test_it_ends_well_and_says_what_it_does(grpo):
    assert grpo.returncode == 0, grpo.output[-3000:]
    assert "k2_as_loss in the loss: credit=token, off_policy=token" in grpo.output
    assert "expected gradient: local_reverse_kl" in grpo.output
    assert "watched: the KL in the loss" in grpo.output


def test_every_process_proves_itself(grpo):
    rows = grpo.proof()
    losses = [row for row in rows if row["target"] == "compute_approx_kl"]
    assert [row["process"] for row in losses] == ["PolicyModelActor"] * 2
    assert len({row["pid"] for row in losses}) == 2
    assert all(int(row["calls"]) >= 2 and row["host"] == "openrlhf 0.11.2" and row["role"] == "loss" for row in losses)
    assert any(row["target"].endswith("_dispatch_prompts_to_vllm") for row in rows)


def test_the_log_line_and_tensorboard_have_the_same_right_numbers(grpo):
    assert len(grpo.steps) == 2
    beta = 0.05
    for index, step in enumerate(grpo.steps):
        assert step["kl/loss"] == pytest.approx(beta * step["kl/k2"], rel=1e-5)
        error = step["kl/k1"] / 1e-6 - 1
        beta *= 1 + max(min(error, 0.2), -0.2) / 20  # as `kl_plugins.core.controllers` says
        assert step["kl/beta"] == pytest.approx(beta, rel=1e-9)
        assert 0 < step["kl/ess"] <= 1
        assert step["kl/weight_max"] > 1
        assert step["kl/k2"] > 0
        for name in ("kl/k1", "kl/k2", "kl/k3", "kl/ess", "kl/loss"):
            assert grpo.tensorboard[f"train/{name}"][index] == pytest.approx(step[name], rel=1e-5)


def test_the_monitor_has_seen_every_token_of_both_ranks(grpo):
    assert len(grpo.steps) == 2
    for index, step in enumerate(grpo.steps):
        assert step["kl/nonfinite"] == step["kl/ratio_unscored"] == step["kl/engine_unscored"] == 0
        assert step["kl/k1_se"] > 0
        assert 0 < step["kl/ratio_ess"] <= 1 < step["kl/ratio_max"]
        assert 0 < step["kl/engine_gap"] <= step["kl/engine_gap_max"]
        assert step["kl/dead"] == 0
        assert 0 <= step["kl/dead_at_10/k2"] <= index  # the first update moves some tokens far
        for name in ("sequence", "position/0", "position/1-3", "position/4-15", "class/text", "class/eos"):
            assert step[f"kl/{name}_se"] >= 0
            assert grpo.tensorboard[f"train/kl/{name}"][index] == pytest.approx(step[f"kl/{name}"], rel=1e-5)
        # Every completion has a first token, and a sequence is its tokens.
        assert abs(step["kl/sequence"]) > abs(step["kl/k1"])
