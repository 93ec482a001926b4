"""Each configuration through each of TRL's trainers: refused, or its term under TRL's own reduction, and trained."""

from __future__ import annotations

import math

import pytest
import torch
from drift import change
from matrix import CONFIGURATIONS, REFUSED, TRAINED
from tiny_trl import BETA, kl_part, loss_and_gradients, micro_batch

from kl_plugins import ConfigError, PatchError, kl_terms
from kl_plugins.patching import load_patches
from kl_plugins.trl import GMPOConfig, GMPOTrainer, GRPOConfig, GRPOTrainer, RLOOTrainer

TRAINERS = {
    # GRPO's loss_type is dapo by default: the batch's tokens
    GRPOTrainer: lambda loss, mask: (loss * mask).sum() / mask.sum(),
    RLOOTrainer: lambda loss, mask: (loss * mask).sum(-1).mean(),
    GMPOTrainer: lambda loss, mask: ((loss * mask).sum(-1) / mask.sum(-1)).mean(),
}


def wanted(trainer, batch, reduce, spec):
    trainer.model.zero_grad()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    mask = batch["completion_mask"]
    logp, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, mask.size(1))
    terms = kl_terms(
        spec,
        logp=logp,
        ref_logp=batch["ref_per_token_logps"],
        mask=mask,
        behavior_logp=batch["old_per_token_logps"],
    )
    (BETA * reduce(terms.loss, mask)).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("cls", TRAINERS)
def test_refused_or_in_the_loss_and_trained(make_trainer, covers, cls, name):
    covers("trl", cls.__name__, name)
    alone = {"kl_baseline": None}  # `wanted` takes a batch without its groups
    options = CONFIGURATIONS[name] | alone | {"num_iterations": 2, "max_steps": 4, "steps_per_generation": 1}
    if name in REFUSED:
        with pytest.raises(ConfigError, match=r"expected gradient is (zero|biased)"):
            make_trainer(cls, **options)
        return
    trainer = make_trainer(cls, **options)
    batch = micro_batch(trainer)
    _, found = kl_part(trainer, batch)
    specs = {each: make_trainer(cls, **CONFIGURATIONS[each], **alone).kl_spec for each in TRAINED}
    for other, spec in specs.items():
        gradient = wanted(trainer, batch, TRAINERS[cls], spec)
        distance = (found - gradient).norm() / gradient.norm()
        assert distance < 1e-4 if other == name else distance > 1e-2 or same(name, other)

    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "kl/loss" in entry]
    assert len(logs) == 4
    assert all(math.isfinite(value) for entry in logs for key, value in entry.items() if key.startswith("kl/"))
    assert logs[-1]["kl/k1"] != 0  # the policy has left its reference


def same(*names):
    """The gradient of k2_as_loss is that of k1_in_reward with the same credit."""
    return len({name.split()[1] for name in names}) == 1 and not any("k3" in name for name in names)


def test_gmpo_is_trls_own_with_plain_k3(make_trainer):
    """GMPO adds k3 without any weight: k3_as_loss with kl_off_policy="none" has the same loss and gradient."""
    from trl.experimental import gmpo as stock

    theirs = make_trainer(stock.GMPOTrainer, config=stock.GMPOConfig)
    batch = micro_batch(theirs)
    loss, gradients = loss_and_gradients(theirs, batch)
    ours = make_trainer(GMPOTrainer, kl="k3_as_loss", kl_off_policy="none")
    our_loss, our_gradients = loss_and_gradients(ours, batch)
    torch.testing.assert_close(our_loss, loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(our_gradients, gradients, rtol=1e-5, atol=1e-6 * gradients.abs().max().item())
    assert ours._metrics["train"]["kl"] == pytest.approx(theirs._metrics["train"]["kl"])
    wrong = make_trainer(GMPOTrainer, kl="k3_as_loss")
    assert (loss_and_gradients(wrong, batch)[1] - gradients).norm() > 1e-3 * gradients.norm()


def test_gmpo_leaves_tool_tokens_out(make_trainer):
    trainer = make_trainer(GMPOTrainer, kl="k2_as_loss")
    batch = micro_batch(trainer, ragged=False)
    batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
    batch["tool_mask"][:, 2:4] = 0
    _, found = kl_part(trainer, batch)
    counted = batch | {"completion_mask": batch["completion_mask"] * batch["tool_mask"]}
    # The attention mask stays that of all tokens.
    trainer.model.zero_grad()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    logp, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 6)
    mask = counted["completion_mask"]
    names = {"ref_logp": "ref_per_token_logps", "behavior_logp": "old_per_token_logps"}
    loss = kl_terms(trainer.kl_spec, logp=logp, mask=mask, **{k: batch[name] for k, name in names.items()}).loss
    (BETA * ((loss * mask).sum(-1) / mask.sum(-1)).mean()).backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("config", [GMPOConfig, GRPOConfig])
def test_gmpo_refuses_a_kl_in_its_advantage(make_trainer, config):
    with pytest.raises(ConfigError, match="GMPO's advantage is one number a sequence"):
        make_trainer(GMPOTrainer, config=config, kl="k1_in_reward", kl_clip="combined")


def test_gmpo_checks_its_own_loss_whatever_its_config(make_trainer, monkeypatch, tmp_path):
    (target,) = load_patches("trl", "gmpo").targets
    change(target, "body", tmp_path, monkeypatch)
    with pytest.raises(PatchError, match=r"GMPOTrainer._compute_loss: its source has digest"):
        make_trainer(GMPOTrainer, config=GRPOConfig, kl="k2_as_loss")


def test_a_trainer_that_reduces_its_kl_in_another_way_is_noticed(make_trainer):
    """GMPO's loss under GRPO's methods: a (B, T) term where a (B,) one belongs would be broadcast."""
    from trl.experimental import gmpo as stock

    from kl_plugins.trl.grpo import KLInGRPO

    class Mixed(KLInGRPO, stock.GMPOTrainer):
        pass

    trainer = make_trainer(Mixed, config=type(make_trainer(GMPOTrainer, kl="k2_as_loss").args), kl="k2_as_loss")
    with pytest.raises(PatchError, match=r"shape \(8, 6\) was to take the place of the host's of \(8,\)"):
        loss_and_gradients(trainer, micro_batch(trainer))
