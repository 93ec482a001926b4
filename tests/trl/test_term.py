"""The term that reaches TRL's loss: for every `loss_type` the gradient is written out here and compared."""

from __future__ import annotations

import pytest
import torch
from tiny_trl import BETA, LOSS_TYPES, kl_part, loss_and_gradients, micro_batch, reduced

from kl_plugins.trl import GRPOTrainer, RLOOTrainer


def expected(trainer, batch, mask, coefficient_of, value_of, loss_type):
    trainer.model.zero_grad()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logp, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, mask.size(1))
    u = (logp - batch["ref_per_token_logps"]).detach()
    behavior = batch.get("sampling_per_token_logps", batch["old_per_token_logps"])
    rho = (logp.detach() - behavior).exp().clamp(max=10)
    per_token = BETA * (value_of(u) + (rho * coefficient_of(u)).detach() * (logp - logp.detach()))
    loss = reduced(per_token, mask, loss_type, trainer.args.max_completion_length, mask.sum())
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def assert_close(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-6)
    scale = wanted[1].abs().max().item()
    assert scale > 1e-3
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_normalizes_the_term_as_its_own(make_trainer, loss_type, level):
    trainer = make_trainer(
        GRPOTrainer, kl="k2_as_loss", loss_type=loss_type, importance_sampling_level=level, delta=None
    )
    batch = micro_batch(trainer)
    found = kl_part(trainer, batch)
    mask = batch["completion_mask"]
    assert_close(found, expected(trainer, batch, mask, lambda u: u, lambda u: u.square() / 2, loss_type))
    _, forward_kl = expected(trainer, batch, mask, lambda u: -(-u).expm1(), lambda u: u, loss_type)
    assert (forward_kl - found[1]).norm() > 1e-2 * found[1].norm()  # the twin: k3's coefficient is told apart


def test_tool_tokens_are_left_out(make_trainer):
    trainer = make_trainer(GRPOTrainer, kl="k2_as_loss", loss_type="grpo")
    batch = micro_batch(trainer, ragged=False)
    batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
    batch["tool_mask"][:, 2:4] = 0
    mask = batch["completion_mask"] * batch["tool_mask"]
    found = kl_part(trainer, batch)
    assert_close(found, expected(trainer, batch, mask, lambda u: u, lambda u: u.square() / 2, "grpo"))
    _, unmasked = expected(trainer, batch, batch["completion_mask"], lambda u: u, lambda u: u, "grpo")
    assert (unmasked - found[1]).norm() > 1e-2 * found[1].norm()


def test_the_engines_log_probs_are_the_behavior_policy(make_trainer):
    trainer = make_trainer(GRPOTrainer, kl="k2_as_loss", loss_type="grpo")
    batch = micro_batch(trainer)
    stale = kl_part(trainer, batch)
    batch["sampling_per_token_logps"] = batch["old_per_token_logps"] - 0.7 * torch.rand(8, 6)
    found = kl_part(trainer, batch)
    assert_close(
        found, expected(trainer, batch, batch["completion_mask"], lambda u: u, lambda u: u.square() / 2, "grpo")
    )
    assert (found[1] - stale[1]).norm() > 1e-2 * found[1].norm()


def test_an_unscored_token_of_the_engine_has_weight_one_and_is_counted(make_trainer):
    trainer = make_trainer(GRPOTrainer, kl="k2_as_loss", loss_type="grpo")
    batch = micro_batch(trainer, ragged=False)
    batch["sampling_per_token_logps"] = batch["old_per_token_logps"].clone()
    batch["sampling_per_token_logps"][0, 0] = torch.nan
    loss, gradients = loss_and_gradients(trainer, batch)
    assert loss.isfinite()
    assert gradients.isfinite().all()
    assert trainer.kl_metrics()["kl/unscored"] == 1


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_combined_goes_into_the_advantage(make_trainer, loss_type):
    trainer = make_trainer(
        GRPOTrainer, kl="k1_in_reward", kl_credit="to_go", kl_baseline=None, kl_clip="combined", loss_type=loss_type
    )
    batch = micro_batch(trainer)
    _, found = loss_and_gradients(trainer, batch)

    mask = batch["completion_mask"]
    with torch.no_grad():
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], mask], dim=1)
        logp, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, 6)
    u = (logp - batch["ref_per_token_logps"]) * mask
    to_go = u.flip(-1).cumsum(-1).flip(-1) * mask
    by_hand = dict(batch, advantages=batch["advantages"][:, None] - BETA * to_go)
    trainer.beta, trainer.kl_spec = 0.0, None
    _, wanted = loss_and_gradients(trainer, by_hand)
    _, without = loss_and_gradients(trainer, batch)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert (without - found).norm() > 1e-3 * found.norm()


@pytest.mark.parametrize("kl", ["k1_in_reward", "k2_as_loss", "k3_as_loss"])
def test_rloo_sums_over_tokens_and_averages_over_sequences(make_trainer, kl):
    trainer = make_trainer(RLOOTrainer, kl=kl, kl_credit="token", kl_baseline=None)
    batch = micro_batch(trainer)
    found = kl_part(trainer, batch)
    k3 = kl == "k3_as_loss"
    values = {"k1_in_reward": lambda u: u, "k2_as_loss": lambda u: u.square() / 2}

    def value(u):
        return (-u).expm1() + u if k3 else values[kl](u)

    def coefficient(u):
        return -(-u).expm1() if k3 else u

    assert_close(found, expected(trainer, batch, batch["completion_mask"], coefficient, value, "luspo"))


def test_a_fully_masked_completion_adds_nothing(make_trainer):
    trainer = make_trainer(GRPOTrainer, kl="k2_as_loss", loss_type="grpo")
    batch = micro_batch(trainer)
    batch["completion_mask"][3] = 0
    batch["ref_per_token_logps"][3] = torch.nan
    found = kl_part(trainer, batch)
    assert found[1].isfinite().all()
    batch["ref_per_token_logps"][3] = 0.0
    assert torch.equal(kl_part(trainer, batch)[1], found[1])
