"""REINFORCE with `k1_in_reward`, asynchronous, by the environment alone: OpenRLHF's own unchanged command line."""

from __future__ import annotations

import pytest
from openrlhf_run import run_stock

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def reinforce(tmp_path_factory, model_folder):
    return run_stock(
        tmp_path_factory.mktemp("reinforce"),
        model_folder,
        "reinforce++",
        flags=("--train.async_enable",),
        KL_PLUGINS_OPENRLHF="--kl k1_in_reward",
        RAY_RUNTIME_ENV_HOOK="kl_plugins.openrlhf.driver.runtime_env_hook",
    )


def test_it_ends_well(reinforce):
    assert reinforce.returncode == 0, reinforce.output[-3000:]
    assert "k1_in_reward in the reward: credit=to_go" in reinforce.output
    assert len(reinforce.steps) == 2


def test_the_reward_is_computed_where_it_should_be(reinforce):
    rows = {(row["process"], row["target"]): row for row in reinforce.proof()}
    assert int(rows["TrainingActor", "compute_approx_kl"]["calls"]) == 4  # micro-batches of the first rollout
    assert rows["TrainingActor", "compute_approx_kl"]["role"] == "reward"
    assert ("PolicyModelActor", "compute_approx_kl") not in rows
    assert ("PolicyModelActor", "ActorPPOTrainer.training_step") in rows
    assert ("GenerateSamplesActor", "SamplesGenerator._dispatch_prompts_to_vllm") in rows


def test_the_logs_have_the_kl_but_not_weights_that_are_the_hosts(reinforce):
    for step in reinforce.steps:
        assert {"kl/k1", "kl/k2", "kl/k3", "kl/beta", "kl/advantage_scale"} <= step.keys()
        assert not {"kl/ess", "kl/loss"} & step.keys()
        assert step["kl/advantage_scale"] > 0
        assert step["kl/k2"] >= 0
