"""Tokens and groups left out of the KL by OpenRLHF's real actor, and what the driver refuses."""

from __future__ import annotations

import pytest
import torch
from tiny_openrlhf import experience, experience_maker, gradients, made_up, step

from kl_plugins import ConfigError, PatchError, kl_terms
from kl_plugins.core.metrics import SUMS
from kl_plugins.integration.leave_out import LeaveOut
from kl_plugins.openrlhf.actor import _metrics, recorder_of


@pytest.fixture
def leaving_out(planned, model_folder):
    def make(*flags, kl="k2_as_loss", **options):
        return planned("--actor.model_name_or_path", model_folder, *flags, kl=kl, **options)

    return make


@pytest.mark.parametrize(
    "options",
    [
        {"kl": "k2_as_loss"},
        {"kl": "k1_in_reward", "kl_placement": "loss", "kl_off_policy": "prefix", "kl_baseline": "none"},
    ],
    ids=lambda options: options["kl"],
)
def test_the_step_leaves_tokens_out(make_actor, leaving_out, hooked, options):
    args = leaving_out(kl_leave_out=["eos", "id:7", "first"], **options)
    assert args.kl_plugins.left_out == LeaveOut(token_ids=(1, 7), first=True)
    trainer = make_actor(args)
    batch, _ = made_up(args, trainer)
    found = step(trainer, batch)[1] - step(trainer, batch, beta=0.0)[1]
    mask, ids = batch.action_mask, batch.sequences[:, 1:]
    masks = {
        "left_out_tokens": (ids == 7) | (ids == 1),
        "left_out_positions": (torch.arange(mask.size(1)) == 3).expand(mask.shape),  # prompts have 4 tokens
    }

    def wanted(**masks):
        trainer.actor.zero_grad()
        terms = kl_terms(
            args.kl_plugins.spec,
            logp=trainer.actor(batch.sequences, mask, attention_mask=batch.attention_mask),
            ref_logp=batch.base_action_log_probs,
            mask=mask,
            behavior_logp=batch.action_log_probs,
            **masks,
        )
        (0.1 * terms.loss.sum() / mask.sum()).backward()
        return gradients(trainer)

    right = wanted(**masks)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5 * right.abs().max().item())
    for name in masks:  # twins
        assert (found - wanted(**{name: masks[name]})).norm() > 0.01 * found.norm()
    sums = dict(zip(SUMS, trainer.kl_plugins_recorder.since_update().tolist(), strict=True))
    left = (masks["left_out_tokens"] | masks["left_out_positions"]) & mask.bool()
    assert sums["left_out"] == left.sum() > 0  # of the last step


def groups(args, rewards):
    """Experiences of two prompts with 4 completions each, whose rows lie across two micro-batches."""
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(2, 12, (8, 9), generator=generator)
    mask = torch.ones(8, 8, dtype=torch.long)
    logp, ref_logp = (torch.randn(8, 8, generator=generator) - 3 for _ in range(2))
    order = torch.tensor([0, 5, 2, 7, 4, 1, 6, 3])
    samples, parts = [], order.split(4)
    for rows in parts:
        one = experience(args, sequences[rows], mask[rows], rewards=rewards[rows], index=rows.tolist())
        one.action_log_probs = one.base_action_log_probs = one.advantages = None
        one.info = {"reward": rewards[rows]}
        samples.append(one)
    scored = {"logp": [logp[rows] for rows in parts], "ref_logp": [ref_logp[rows] for rows in parts]}
    with experience_maker(args, **scored) as maker:
        return maker.compute_advantages_and_returns(maker.make_experience(samples)), (logp, ref_logp)


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
def test_groups_of_equal_rewards(leaving_out, hooked, baseline):
    flags = ("--algo.advantage.estimator", "group_norm")
    args = leaving_out(*flags, kl_leave_out_equal_rewards=True, kl_baseline=baseline)
    experiences, (logp, ref_logp) = groups(args, torch.tensor([0.1] * 4 + [0.0, 1.0, 0.0, 0.0]))
    for batch in experiences:
        equal = batch.info["kl/equal_rewards"]
        assert equal.tolist() == [float(index < 4) for index in batch.index]
        if baseline == "leave_one_out":
            u = logp - ref_logp
            for row, index in enumerate(batch.index):
                others = [i for i in range(4, 8) if i != index]
                expected = u[others].mean(0) if index >= 4 else torch.zeros(8)
                torch.testing.assert_close(batch.kl[row], expected)


def test_the_step_leaves_those_groups_out(make_actor, leaving_out, hooked):
    args = leaving_out("--algo.advantage.estimator", "rloo", kl_leave_out_equal_rewards=True)
    trainer = make_actor(args)
    batch, _ = made_up(args, trainer)
    batch.advantages = torch.zeros_like(batch.advantages)
    batch.info = {"kl/equal_rewards": list(torch.ones(8))}
    assert step(trainer, batch)[1].abs().max() == 0
    trainer.kl_plugins_recorder = recorder_of(trainer)
    batch.info = {"kl/equal_rewards": list(torch.zeros(8))}
    assert step(trainer, batch)[1].abs().max() > 0
    assert _metrics(trainer, args.kl_plugins, 0.1)["kl/left_out"] == 0
    batch.info = {}
    with pytest.raises(PatchError, match="came without kl/equal_rewards"):
        step(trainer, batch)


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        ((), {"kl": "k1_in_reward", "kl_leave_out": ["eos"]}, "use kl_placement='loss'"),
        ((), {"kl": "k1_in_reward", "kl_leave_out_equal_rewards": True}, "use kl_placement='loss'"),
        (("--rollout.n_samples_per_prompt", "1"), {"kl_leave_out_equal_rewards": True}, "n_samples_per_prompt of 2"),
        ((), {"kl_leave_out_equal_rewards": True}, "estimator gae, where groups of equal rewards have advantages"),
        ((), {"kl_leave_out": ["<nothing>"]}, "name a single token"),
        (("--actor.model_name_or_path", "nowhere/at-all"), {"kl_leave_out": ["eos"]}, "can't be loaded"),
    ],
)
def test_refused(leaving_out, flags, options, message):
    with pytest.raises(ConfigError, match=message):
        leaving_out(*flags, **options)
