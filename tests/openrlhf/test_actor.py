"""The KL in the loss of OpenRLHF's real `ActorPPOTrainer`: its gradient, weights, reduction, log and dead zone."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from tiny_openrlhf import (
    FLAGS,
    ROWS,
    expected_kl_gradient,
    gradients,
    made_up,
    parse,
    step,
    train,
)

from kl_plugins import KLSpec, PatchError
from kl_plugins.core.metrics import SUMS
from kl_plugins.openrlhf.actor import KL_SUMS, ppo_train
from kl_plugins.patching import Patching, check, load_patches

IN_LOSS = [
    {"kl": "k2_as_loss"},
    {"kl": "k2_as_loss", "kl_credit": "sequence", "kl_off_policy": "sequence"},
    {"kl": "k2_as_loss", "kl_clip": "separate", "kl_clip_epsilon": 0.1},
    {"kl": "k2_as_loss", "kl_weight_clip": [0.9, 1.1], "kl_weight_clip_mode": "mask"},
    {"kl": "k3_as_loss", "kl_coefficient_bound": 0.5},
    {"kl": "k1_in_reward", "kl_placement": "loss", "kl_off_policy": "prefix", "kl_baseline": None},
    {"kl": "k1_as_loss", "kl_allow_biased": True},
    {"kl": "k2_as_loss", "kl_baseline": "leave_one_out"},
]


@pytest.mark.parametrize("engine", [False, True], ids=["old_policy", "vllm"])
@pytest.mark.parametrize("options", IN_LOSS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_step_adds_the_term_under_openrlhfs_own_reduction(make_actor, planned, hooked, options, engine):
    args = planned("--algo.kl.init_coef", "0.1", **options)
    trainer = make_actor(args)
    batch, logp = made_up(args, trainer)
    if engine:
        batch.rollout_log_probs = logp + 0.4 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(9))
    if args.kl_plugins.spec.baseline is not None:  # as `compute_advantages_and_returns` leaves it
        batch.kl = torch.randn(logp.shape, generator=torch.Generator().manual_seed(8)) * batch.action_mask
    without = step(trainer, batch, beta=0.0)[1]
    found = step(trainer, batch)[1] - without
    wanted = expected_kl_gradient(trainer, batch, args.kl_plugins.spec)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_twin_a_term_without_the_mask_or_with_the_wrong_behavior_policy_is_seen(make_actor, planned, hooked):
    args = planned(kl="k2_as_loss")
    trainer = make_actor(args)
    batch, _ = made_up(args, trainer)
    found = step(trainer, batch)[1] - step(trainer, batch, beta=0.0)[1]
    spec = KLSpec.from_name("k2_as_loss", off_policy="none")
    assert (found - expected_kl_gradient(trainer, batch, spec)).norm() > 0.05 * found.norm()


def test_identity_with_openrlhfs_own_unbiased_k2(make_actor, planned):
    """Where its weight is below its bound of 10, and no log-ratio is in its dead zone."""
    theirs = parse(*FLAGS, "--algo.kl.use_loss", "--algo.kl.estimator", "k2", "--algo.kl.unbiased_gradient")
    trainer = make_actor(theirs)
    batch, _ = made_up(theirs, trainer)
    stock = step(trainer, batch)
    ours = planned(kl="k2_as_loss")
    trainer.args = ours
    with Patching(load_patches("openrlhf")):
        found = step(trainer, batch)
    torch.testing.assert_close(found[1], stock[1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found[0]["metrics"]["kl"], stock[0]["metrics"]["kl"])


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_dead_zone_the_hooked_gradient_is_right_where_the_hosts_is_zero(make_actor, planned, estimator):
    host = parse(*FLAGS, "--algo.kl.use_loss", "--algo.kl.estimator", estimator)
    trainer = make_actor(host)
    batch, logp = made_up(host, trainer)
    batch.action_log_probs = logp.clone()
    batch.advantages = torch.zeros_like(logp)
    dead = torch.linspace(-20, -5, int(batch.action_mask.sum()))
    if estimator == "k2":
        dead = torch.cat([dead[::2], -dead[1::2]])
    log_ratio = torch.zeros_like(logp)
    log_ratio[batch.action_mask.bool()] = dead
    batch.base_action_log_probs = logp - log_ratio
    assert step(trainer, batch)[1].abs().max() == 0
    trainer.args = planned(kl="k2_as_loss")
    with Patching(load_patches("openrlhf")):
        found = step(trainer, batch)[1]
    trainer.actor.zero_grad()
    live = trainer.actor(batch.sequences, batch.action_mask, attention_mask=batch.attention_mask)
    (0.1 * (log_ratio * live).sum() / batch.action_mask.sum()).backward()  # u times the score, at every u
    wanted = gradients(trainer)
    assert wanted.norm() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("flags", [(), ("--train.dynamic_batch_enable", "--train.max_tokens_per_gpu", "40")], ids=str)
def test_what_is_logged_are_means_over_tokens_whatever_the_batches(make_actor, planned, hooked, flags):
    """A constant KL of 7 is logged as 7, with lengths from 1 to 6, in micro-batches of 4 rows or of dynamic size."""
    args = planned("--train.batch_size", str(ROWS), *flags, kl="k2_as_loss", kl_off_policy="none")
    trainer = make_actor(args)
    for constant in (7.0, 3.0):  # the second time nothing of the first is left
        batch, logp = made_up(args, trainer)
        batch.base_action_log_probs = (logp - constant) * batch.action_mask
        status = train(trainer, args, batch)
        assert status["kl/k1"] == pytest.approx(constant, rel=1e-5)
        assert status["kl/k2"] == pytest.approx(constant**2 / 2, rel=1e-5)
        assert status["kl/loss"] == pytest.approx(0.1 * constant**2 / 2, rel=1e-5)
        assert status["kl/beta"] == pytest.approx(0.1)
        assert (status["kl/ess"], status["kl/weight_max"]) == (pytest.approx(1), 1)
        assert {"kl/clipped", "kl/k3", "kl/unscored", "kl/dropped"} <= status.keys()


def test_the_largest_weight_is_that_of_all_micro_batches(make_actor, planned, hooked):
    args = planned("--train.batch_size", str(ROWS), kl="k2_as_loss", kl_weight_clip=[0.0, 50.0])
    trainer = make_actor(args)
    batch, logp = made_up(args, trainer)
    batch.action_log_probs = logp.clone()
    row, column = batch.action_mask.nonzero()[0].tolist()
    batch.action_log_probs[row, column] -= 3.0
    status = train(trainer, args, batch)
    assert status["kl/weight_max"] == pytest.approx(math.exp(3), rel=1e-4)
    assert 0 < status["kl/ess"] < 1


@pytest.mark.parametrize(("copies", "dropped"), [(1, 2), (2, 1)])
def test_numbers_are_summed_over_ranks_but_not_over_copies_of_the_same_rows(
    make_actor, planned, hooked, copies, dropped
):
    args = planned("--train.batch_size", str(ROWS), kl="k2_as_loss", kl_nonfinite="drop")
    args.ds.tensor_parallel_size = copies  # then both ranks hold the same rows
    trainer = make_actor(args)
    two_ranks = {"sum": lambda x: 2 * x, "max": lambda x: x, "mean": lambda x: x}
    trainer.strategy.all_reduce = lambda data, op="mean": two_ranks[op](data)
    batch, _ = made_up(args, trainer)
    batch.base_action_log_probs[tuple(batch.action_mask.nonzero()[0].tolist())] = float("nan")
    status = train(trainer, args, batch)
    assert status["kl/dropped"] == dropped
    assert status["kl/ess"] < 1


def test_a_rank_without_a_step_takes_part_in_the_reductions(make_actor, planned):
    trainer = make_actor(planned(kl="k2_as_loss"))
    asked = []

    def of_two_ranks(data, op="mean"):
        asked.append(op)
        return data + theirs

    trainer.strategy.all_reduce = of_two_ranks
    idle = ppo_train(lambda trainer, kl_ctl: {"actor_lr": 1.0})
    theirs = 0.0
    assert idle(trainer, 0.1) == {"actor_lr": 1.0}
    assert asked == ["sum", "sum"]
    theirs = 2.0
    asked.clear()
    status = idle(trainer, 0.1)
    assert asked == ["sum", "max", "sum"]
    assert (status["kl/dropped"], status["kl/weight_max"], status[KL_SUMS].tolist()) == (2, 2, [2.0] * len(SUMS))


def test_an_unplanned_step_or_one_that_never_asks_for_a_kl_is_refused(make_actor, planned, hooked):
    args = planned(kl="k2_as_loss")
    trainer = make_actor(args)
    batch, _ = made_up(args, trainer)
    args.algo.kl.use_loss = False  # as a version would look that computes it elsewhere
    with pytest.raises(PatchError, match="1 times here, found 0"):
        step(trainer, batch)
    del args.kl_plugins
    with pytest.raises(PatchError, match="no KL configuration"):
        step(trainer, batch)


def test_an_unhooked_process_refuses_to_train(make_actor, planned):
    args = planned(kl="k2_as_loss")
    trainer = make_actor(args)
    batch, _ = made_up(args, trainer)
    with pytest.raises(ValueError, match="Unknown kl_estimator: kl_plugins:k2_as_loss"):
        step(trainer, batch)


def test_nonfinite_scores_stop_or_are_dropped(make_actor, planned, hooked):
    args = planned(kl="k2_as_loss")
    trainer = make_actor(args)
    batch, _ = made_up(args, trainer)
    where = batch.action_mask.nonzero()[0].tolist()
    batch.base_action_log_probs[tuple(where)] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        step(trainer, batch)
    args = planned(kl="k2_as_loss", kl_nonfinite="drop")
    trainer.args = args
    assert step(trainer, batch)[1].isfinite().all()
    assert trainer.kl_plugins_recorder.since_update()[SUMS.index("dropped")] == 1


def bound(target):
    found = importlib.import_module(target.module)
    *holders, name = target.qualname.split(".")
    for holder in holders:
        found = getattr(found, holder)
    return vars(found)[name]


def test_after_a_hooked_step_everything_is_the_hosts_again(make_actor, planned):
    args = planned(kl="k2_as_loss")
    trainer = make_actor(args)
    batch, _ = made_up(args, trainer)
    patches = load_patches("openrlhf")
    replaced = [target for target in patches.targets if target.wrapper]
    before = [bound(target) for target in replaced]
    loss_fn, attributes = trainer.actor_loss_fn, set(vars(trainer))
    with Patching(patches) as patching:
        assert not any(bound(target) is own for target, own in zip(replaced, before, strict=True))
        step(trainer, batch)
        calls = {binding.target.partition(":")[2]: binding.calls for binding in patching.bindings()}
    assert calls["ActorPPOTrainer.training_step"] == 1
    assert all(bound(target) is own for target, own in zip(replaced, before, strict=True))
    assert trainer.actor_loss_fn is loss_fn
    assert set(vars(trainer)) - attributes <= {"kl_plugins_recorder"}
    check(patches)
