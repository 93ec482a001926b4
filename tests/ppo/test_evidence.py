"""The part of recipes/known_optimum.py that trains through TRL's PPOTrainer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

from evidence import ppo_trainer


def test_ours_through_the_critic_is_trls_own():
    """The same k1 in the reward, on-policy: the same policy. k2 in the loss comes to another."""
    shares = {
        arm: ppo_trainer.work({"arm": arm, "regime": "terminal reward", "seed": 0, "steps": 5})["share"]
        for arm in ("TRL's PPO", "k1_in_reward", "k2_as_loss")
    }
    assert shares["k1_in_reward"] == pytest.approx(shares["TRL's PPO"], rel=1e-4)
    assert shares["k2_as_loss"] != pytest.approx(shares["TRL's PPO"], rel=1e-2)
