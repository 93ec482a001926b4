"""Where the KL is TRL's own, ours must be TRL: the same parameters and logs, bit for bit."""

from __future__ import annotations

import inspect

import pytest
import torch
from trl.experimental import ppo as stock

from kl_plugins.trl.ppo import PPOTrainer, train_with_kl

SKIPPED = {"eps", "val/ratio_var"}  # episodes per second, and a NaN for a single mini-batch


def trained(make_trainer, *args, **options):
    trainer = make_trainer(*args, **options)
    trainer.train()
    return trainer


def logs(trainer):
    return [{key: value for key, value in row.items() if key not in SKIPPED} for row in trainer.state.log_history]


@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4},
        {"gamma": 1.0, "lam": 0.8, "temperature": 0.7},
    ],
)
def test_k1_in_reward_is_trls_own_while_the_policy_has_not_moved(make_trainer, parameters, schedule):
    theirs = trained(make_trainer, stock.PPOTrainer, config=stock.PPOConfig, **schedule)
    ours = trained(make_trainer, kl="k1_in_reward", **schedule)
    assert torch.equal(parameters(ours), parameters(theirs))
    # The twins: the parameters moved, the KL has a part in it, and another estimator is told apart.
    assert not torch.equal(parameters(ours), parameters(make_trainer()))
    other = trained(make_trainer, stock.PPOTrainer, config=stock.PPOConfig, kl_estimator="k3", **schedule)
    assert not torch.equal(parameters(ours), parameters(other))
    for mine, their in zip(logs(ours), logs(theirs), strict=True):
        assert {key: value for key, value in mine.items() if not key.startswith("kl/")} == their


def test_a_policy_that_moved_within_a_rollout_has_another_kl(make_trainer, parameters):
    schedule = {"num_ppo_epochs": 2}
    theirs = trained(make_trainer, stock.PPOTrainer, config=stock.PPOConfig, **schedule)
    ours = trained(make_trainer, kl="k1_in_reward", **schedule)
    moved = (parameters(ours) - parameters(make_trainer())).norm()
    assert 1e-4 < (parameters(ours) - parameters(theirs)).norm() / moved < 0.5


def test_without_kl_our_trainer_is_trls(make_trainer, parameters):
    schedule = {"num_ppo_epochs": 2, "num_mini_batches": 2, "whiten_rewards": True, "kl_estimator": "k3"}
    before = stock.PPOTrainer.train, dict(vars(stock.ppo_trainer))
    trained(make_trainer, kl="k2_as_loss")  # which must not leave anything behind
    theirs = trained(make_trainer, stock.PPOTrainer, config=stock.PPOConfig, **schedule)
    ours = trained(make_trainer, **schedule)
    assert torch.equal(parameters(ours), parameters(theirs))
    assert logs(ours) == logs(theirs)
    assert before == (stock.PPOTrainer.train, dict(vars(stock.ppo_trainer)))


def test_the_edited_train_is_nobody_elses():
    assert "train" in vars(stock.PPOTrainer)
    assert train_with_kl() is not stock.PPOTrainer.train
    assert train_with_kl().__code__.co_filename == stock.PPOTrainer.train.__code__.co_filename
    assert train_with_kl().__code__.co_firstlineno == stock.PPOTrainer.train.__code__.co_firstlineno
    assert "_kl_reward" in train_with_kl().__code__.co_names
    assert "_kl_reward" not in stock.PPOTrainer.train.__code__.co_names
    assert inspect.signature(PPOTrainer.train).parameters.keys() == {"self"}
