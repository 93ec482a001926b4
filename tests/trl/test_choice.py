"""`kl="reverse_kl"` through TRL's own trainers: the KL gets what the reward gets, in proportion and in scale."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_trl import BETA, digit_share, loss_and_gradients

from kl_plugins import ConfigError
from kl_plugins.core.reward_scale import reward_scale
from kl_plugins.trl import GMPOConfig, GMPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer


def rollout(trainer, prompts):
    """A rollout as TRL makes it, before it is shuffled, its rewards, and (N,) log-ratios of whole completions."""
    trainer.model.train()
    rewards = []

    def seen(completions, **kwargs):
        rewards.extend(digit_share(completions))
        return rewards[-len(completions) :]

    trainer.reward_funcs = [seen]
    rows = [dict(row) for row in prompts.select(range(4)) for _ in range(4)]
    batch = trainer._generate_and_score_completions(rows)
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logp, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, attention, batch["completion_ids"].size(1)
        )
    total = ((logp - batch["ref_per_token_logps"]) * batch["completion_mask"]).sum(-1)
    return batch, torch.tensor(rewards), total


def move(trainer):
    """Away from the reference, so that there is a KL."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


def of_rewards(trainer, batch, advantages):
    """The gradient without any KL, for (N,) advantages."""
    spec, trainer.beta, trainer.kl_spec = trainer.kl_spec, 0.0, None
    _, gradient = loss_and_gradients(trainer, batch | {"advantages": advantages})
    trainer.beta, trainer.kl_spec = BETA, spec
    return gradient


def centred(rewards, cls):
    groups = rewards.view(-1, 4)
    if cls is RLOOTrainer:
        return (groups - (groups.sum(1, keepdim=True) - groups) / 3).flatten()
    return (groups - groups.mean(1, keepdim=True)).flatten()


def distance(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(
    ("cls", "baseline", "wrong"),
    [(GRPOTrainer, "group_mean", "leave_one_out"), (RLOOTrainer, "leave_one_out", "group_mean")],
)
def test_it_trains_like_a_reward_less_beta_times_the_log_ratio(make_trainer, prompts, cls, baseline, wrong):
    """R - beta U put into the reward, before TRL subtracts a mean: the same whole gradient, on-policy.

    Twins: the other host's baseline, none, and the credit that the reward hasn't.
    """
    unscaled = {"scale_rewards": "none"} if cls is GRPOTrainer else {}

    def gradients(**options):
        trainer = make_trainer(cls, kl="reverse_kl", **unscaled, **options)
        move(trainer)
        torch.manual_seed(0)
        batch, rewards, total = rollout(trainer, prompts)
        _, found = loss_and_gradients(trainer, batch)
        return trainer, found, of_rewards(trainer, batch, centred(rewards - BETA * total, cls))

    trainer, found, wanted = gradients()
    assert (trainer.kl_spec.credit, trainer.kl_spec.baseline) == ("sequence", baseline)
    assert distance(found, wanted) < 1e-4
    for twin in ({"kl_baseline": wrong}, {"kl_baseline": None}, {"kl_credit": "to_go"}, {"kl_credit": "token"}):
        _, found, wanted = gradients(**twin)
        assert distance(found, wanted) > 1e-3


@pytest.mark.parametrize("kl_clip", [None, "combined"])
@pytest.mark.parametrize(
    ("cls", "scaled"),
    [
        (GRPOTrainer, {"scale_rewards": "group"}),
        (GRPOTrainer, {"scale_rewards": "batch"}),
        (RLOOTrainer, {"normalize_advantages": True}),
    ],
)
def test_a_scaled_kl_is_divided_by_what_the_rewards_are_divided_by(make_trainer, prompts, cls, scaled, kl_clip):
    """The whole gradient is that of (R - beta U) - its mean, divided by the deviation of R alone."""

    def gradients(kl_scale):
        options = {"kl": "reverse_kl", "kl_clip": kl_clip, "kl_scale": kl_scale, **scaled}
        trainer = make_trainer(cls, **options)
        move(trainer)
        torch.manual_seed(0)
        batch, rewards, total = rollout(trainer, prompts)
        _, found = loss_and_gradients(trainer, batch)
        if scaled.get("scale_rewards") == "group":
            deviation = rewards.view(-1, 4).std(1).repeat_interleave(4)
            assert deviation.min() > 0
        else:
            deviation = (centred(rewards, cls) if cls is RLOOTrainer else rewards).std()
        advantages = centred(rewards - BETA * total, cls) / (deviation + 1e-4)
        return found, of_rewards(trainer, batch, advantages)

    assert distance(*gradients("reward")) < 1e-4
    assert distance(*gradients("none")) > 1e-2  # the twin


def test_gmpo_has_its_own_reduction_of_the_scaled_kl(make_trainer, prompts):
    found = {}
    for kl_scale in ("reward", "none"):
        trainer = make_trainer(GMPOTrainer, kl="reverse_kl", kl_scale=kl_scale, scale_rewards="batch")
        move(trainer)
        torch.manual_seed(0)
        batch, rewards, _ = rollout(trainer, prompts)
        _, whole = loss_and_gradients(trainer, batch)
        found[kl_scale] = whole - of_rewards(trainer, batch, batch["advantages"])
    torch.testing.assert_close(found["reward"], found["none"] / (rewards.std() + 1e-4), rtol=1e-3, atol=1e-6)


def test_the_scale_is_shuffled_and_split_with_its_rows(make_trainer):
    """Each micro-batch has its own rows' scale, told apart before TRL shuffles; where all are equal the batch's."""
    seen = []

    def by_prompt(completions, prompts, **kwargs):
        spread = [float("0123".find(prompt[0]) + 1) for prompt in prompts]
        return [each * (index % 4) for index, each in enumerate(spread)]

    class Watched(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            prompts = [self.processing_class.decode(ids).replace("<pad>", "") for ids in inputs["prompt_ids"]]
            for prompt, scale in zip(prompts, inputs["kl_scale"].tolist(), strict=True):
                spread = "0123".find(prompt[0]) + 1
                if spread:
                    own = spread * torch.arange(4.0).std().item()
                    assert scale == pytest.approx(1 / (own + 1e-4))
                seen.append(spread)
            return super()._compute_loss(model, inputs)

    trainer = make_trainer(
        Watched,
        config=GRPOConfig,
        kl="reverse_kl",
        kl_scale="reward",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        max_steps=2,
    )
    trainer.reward_funcs = [by_prompt]
    trainer.train()
    assert len(set(seen)) > 2


def test_groups_without_a_scale():
    nan = torch.nan
    rewards = torch.tensor([0.0, 2.0, 0.1 + 0.2, 0.3, nan, 1.0, nan, nan])
    found = reward_scale(rewards, 2, per="group")
    of_batch = 1 / (rewards[~rewards.isnan()].double().std() + 1e-4)
    torch.testing.assert_close(found[:2], torch.full((2,), 1 / (2**0.5 + 1e-4)))
    torch.testing.assert_close(found[2:], of_batch.float().expand(6))
    torch.testing.assert_close(reward_scale(rewards, 2, per="batch"), of_batch.float().expand(8))
    assert torch.equal(reward_scale(torch.full((4,), 0.1), 2, per="group"), torch.ones(4))
    assert torch.equal(reward_scale(torch.full((2,), nan), 1, per="group"), torch.ones(2))


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        (GRPOConfig, {"kl_scale": "batch"}, "choose from 'none', 'reward'"),
        (GRPOConfig, {"kl_scale": "reward", "scale_rewards": "none"}, "scale_rewards='none': nothing divides"),
        (GRPOConfig, {"kl_scale": "reward", "scale_rewards": False}, "scale_rewards='none': nothing divides"),
        (GMPOConfig, {"kl_scale": "reward", "multi_objective_aggregation": "normalize_then_sum"}, "another standard"),
        (RLOOConfig, {"kl_scale": "reward"}, "normalize_advantages=False: nothing divides"),
        (GRPOConfig, {"kl": None, "kl_scale": "reward"}, "kl_scale set, but kl is None"),
    ],
)
def test_a_scale_that_is_none_is_refused(tmp_path, config, options, says):
    options = {"kl": "reverse_kl", **options}
    with pytest.raises(ConfigError, match=says):
        config(output_dir=str(tmp_path), beta=0.1, use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer, GMPOTrainer])
def test_what_was_picked_is_said_where_trl_shows_it(make_trainer, cls, caplog):
    """At the default verbosity; and what beta counts, where rewards are scaled."""
    with caplog.at_level(logging.WARNING, logger="kl_plugins"):
        make_trainer(cls, kl="reverse_kl")
    said = [record.message for record in caplog.records if record.name.startswith("kl_plugins")]
    baseline = "leave_one_out" if cls is RLOOTrainer else "group_mean"
    picked = f"kl='reverse_kl' picked kl='k1_in_reward', kl_credit='sequence', kl_baseline={baseline!r}: "
    assert any(line.startswith(picked) for line in said)
    assert any("units of that deviation" in line for line in said) == (cls is not RLOOTrainer)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="kl_plugins"):
        make_trainer(cls, kl="k1_in_reward")
    assert not [record for record in caplog.records if "picked" in record.message]
