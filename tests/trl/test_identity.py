"""Where the term is TRL's own, ours must be TRL: the same loss, gradients and parameters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import trl
from tiny_trl import LOSS_TYPES, loss_and_gradients, micro_batch, parameters

from kl_plugins import surrogate
from kl_plugins.core.estimators import k3
from kl_plugins.trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

UNCLIPPED = [0.0, float("inf")]


class K3TimesRatio(GRPOTrainer):
    """TRL's own KL, `k3` times the differentiated ratio, rebuilt from our surrogate: its gradient is rho * u."""

    def compute_kl_terms(self, *, logp, **more):
        terms = super().compute_kl_terms(logp=logp, **more)  # k2_as_loss, unclipped token weights: rho * u
        value = terms.weight * k3(terms.log_ratio)
        return replace(terms, loss=surrogate(logp=logp, value=value, score_coefficient=terms.score_coefficient))


class K3Detached(GRPOTrainer):
    """The wrong twin: the same value, but the ratio is not differentiated."""

    def compute_kl_terms(self, *, logp, **more):
        terms = super().compute_kl_terms(logp=logp, **more)
        u, rho = terms.log_ratio, terms.weight
        return replace(terms, loss=surrogate(logp=logp, value=rho * k3(u), score_coefficient=-rho * (-u).expm1()))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_k3_times_ratio_is_trls_loss_and_gradient(make_trainer, loss_type):
    stock = make_trainer(trl.GRPOTrainer, config=trl.GRPOConfig, loss_type=loss_type)
    batch = micro_batch(stock)
    loss, gradients = loss_and_gradients(stock, batch)

    ours = make_trainer(
        K3TimesRatio, config=GRPOConfig, kl="k2_as_loss", kl_weight_clip=UNCLIPPED, loss_type=loss_type
    )
    our_loss, our_gradients = loss_and_gradients(ours, batch)
    torch.testing.assert_close(our_loss, loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(our_gradients, gradients, rtol=1e-6, atol=1e-6 * gradients.abs().max().item())
    assert ours._metrics["train"]["kl"] == pytest.approx(stock._metrics["train"]["kl"])  # the host's key is untouched

    wrong = make_trainer(K3Detached, config=GRPOConfig, kl="k2_as_loss", kl_weight_clip=UNCLIPPED, loss_type=loss_type)
    _, wrong_gradients = loss_and_gradients(wrong, batch)
    assert (wrong_gradients - gradients).norm() > 1e-3 * gradients.norm()


def test_twenty_off_policy_steps_end_at_trls_parameters(make_trainer):
    schedule = {"max_steps": 20, "num_iterations": 4, "steps_per_generation": 2, "per_device_train_batch_size": 8}
    stock = make_trainer(trl.GRPOTrainer, config=trl.GRPOConfig, **schedule)
    start = parameters(stock)
    stock.train()
    ours = make_trainer(K3TimesRatio, config=GRPOConfig, kl="k2_as_loss", kl_weight_clip=UNCLIPPED, **schedule)
    ours.train()
    moved = (parameters(stock) - start).abs().max()
    assert moved > 5e-3
    assert (parameters(ours) - parameters(stock)).abs().max() < 1e-4 * moved


@pytest.mark.parametrize(
    ("ours", "config", "stock", "stock_config"),
    [
        (GRPOTrainer, GRPOConfig, trl.GRPOTrainer, trl.GRPOConfig),
        (RLOOTrainer, RLOOConfig, trl.RLOOTrainer, trl.RLOOConfig),
    ],
)
def test_without_kl_our_trainer_is_trls_bit_for_bit(make_trainer, ours, config, stock, stock_config):
    schedule = {"max_steps": 4, "num_iterations": 2}
    theirs = make_trainer(stock, config=stock_config, **schedule)
    theirs.train()
    mine = make_trainer(ours, config=config, **schedule)
    mine.train()
    assert torch.equal(parameters(mine), parameters(theirs))
    drop = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time"}
    for my_log, their_log in zip(mine.state.log_history, theirs.state.log_history, strict=True):
        assert {k: v for k, v in my_log.items() if k not in drop} == {
            k: v for k, v in their_log.items() if k not in drop
        }


def test_rloo_combined_is_trls_rloo_on_policy(make_trainer):
    """k1 in reward, credit sequence, leave-one-out, in the advantage: RLOO's own KL while the policy has not moved."""
    moved = {"max_steps": 3, "sync_ref_model": False}
    stock = make_trainer(trl.RLOOTrainer, config=trl.RLOOConfig, **moved)
    stock.train()
    ours = make_trainer(
        RLOOTrainer, kl="k1_in_reward", kl_credit="sequence", kl_clip="combined", kl_off_policy="token", **moved
    )
    assert ours.kl_spec.baseline == "leave_one_out"
    ours.train()
    assert stock.state.log_history[-2]["kl"] > 0.01
    torch.testing.assert_close(parameters(ours), parameters(stock), rtol=1e-4, atol=1e-6)
