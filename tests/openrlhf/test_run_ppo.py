"""PPO with a critic (GAE): `k1_in_reward` reaches the policy through the critic's returns."""

from __future__ import annotations

import pytest
from openrlhf_run import run

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def ppo(tmp_path_factory, model_folder):
    return run(tmp_path_factory.mktemp("ppo"), model_folder, "ppo", flags=("--algo.advantage.lambd", "0.95"))


def test_it_ends_well_with_the_kl_in_the_reward(ppo):
    assert ppo.returncode == 0, ppo.output[-3000:]
    assert "k1_in_reward in the reward" in ppo.output
    rows = {(row["process"], row["target"]) for row in ppo.proof()}
    assert ("PPOTrainer", "compute_approx_kl") in rows
    assert ("PolicyModelActor", "ActorPPOTrainer.training_step") in rows


def test_the_critic_is_trained_and_the_kl_logged(ppo):
    assert len(ppo.steps) == 2
    for step in ppo.steps:
        assert step["critic_loss"] > 0
        assert {"kl/k1", "kl/k2", "kl/k3", "kl/beta"} <= step.keys()
