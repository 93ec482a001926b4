"""Reward and KL together: the expected gradient of a group estimator is a constant times grad (E[R] - beta KL).

Every completion of a tabular policy, and every group of them, goes through OpenRLHF's real experience maker, in
float64. What can't be seen in an expectation, the noise, is seen at the optimum: there it has to vanish.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from tiny_openrlhf import make_experiences

from kl_plugins.openrlhf import actor

BETA, END, MASKED = 0.75, 0, 5.0  # beta has few bits: the scale of a nat travels in float32
CONSTANT = {"rloo": lambda g: 1.0, "dr_grpo": lambda g: 1 - 1 / g, "reinforce_baseline": lambda g: 1 - 1 / g}


class Table:
    """Policies over completions of at most `length` tokens of `tokens`, of which END ends one: a logit for each
    prefix and token."""

    def __init__(self, tokens: int, length: int):
        self.prefixes = [p for n in range(length) for p in itertools.product(range(1, tokens), repeat=n)]
        ends = [(*p, END) for p in self.prefixes]
        self.completions = ends + [(*p, t) for p in self.prefixes if len(p) == length - 1 for t in range(1, tokens)]
        self.shape = len(self.prefixes), tokens
        self.sequences = torch.tensor([[END, *c, *[END] * (length - len(c))] for c in self.completions])
        self.mask = torch.tensor([[1] * len(c) + [0] * (length - len(c)) for c in self.completions])

    def draw(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.shape, dtype=torch.float64, generator=generator)

    def logp(self, logits: torch.Tensor) -> torch.Tensor:
        """(completions, length), something arbitrary where masked."""
        table = logits.log_softmax(-1)
        rows = [[table[self.prefixes.index(c[:t]), c[t]] for t in range(len(c))] for c in self.completions]
        return torch.stack([torch.stack(r + [logits.new_tensor(MASKED)] * (self.mask.size(1) - len(r))) for r in rows])

    def whole(self, per_token: torch.Tensor) -> torch.Tensor:
        return (per_token * self.mask).sum(-1)


TABLES = {2: Table(tokens=3, length=3), 4: Table(tokens=2, length=3)}
"""By the size of the groups, all of which are enumerated: 225 and 256."""


def rewards(table: Table) -> torch.Tensor:
    """Of each completion, such that early tokens decide about it."""
    generator = torch.Generator().manual_seed(9)
    own = torch.randn(len(table.completions), dtype=torch.float64, generator=generator)
    return own + torch.tensor([2.0 * (c[0] == 1) for c in table.completions])


def every_group(args, table, logp, ref_logp, group, *, beta=BETA):
    """An experience whose rows are all groups of completions, and which completion each row is."""
    rows = torch.tensor(list(itertools.product(range(len(table.completions)), repeat=group))).flatten()
    tensors = (table.sequences, table.mask, rewards(table), logp, ref_logp, torch.zeros_like(logp))
    (one,) = make_experiences(args, [tensor[rows] for tensor in tensors], micro=[len(rows)], kl_coef=beta)
    return one, rows


def expectation(table, advantages, rows, group, *, logits, sampler=None):
    """The gradient to `logits` of E[mean over a group of sum_t A_t log pi(y_t)], the advantages A held fixed.

    `sampler` are the logits that drew the completions; a row's own is weighted to those of `logits`.
    """
    logits = logits.clone().requires_grad_()
    logp = table.logp(logits)
    now = table.whole(logp.detach())[rows].view(-1, group)
    then = now if sampler is None else table.whole(table.logp(sampler))[rows].view(-1, group)
    probability = (then.sum(-1, keepdim=True) + now - then).exp().flatten()
    ((probability * (logp[rows] * advantages * table.mask[rows]).sum(-1)).sum() / group).backward()
    return logits.grad


def objective_gradient(table, ref_logp, *, logits, beta=BETA):
    """grad (E[R] - beta KL) to `logits`."""
    logits = logits.clone().requires_grad_()
    logp = table.whole(table.logp(logits))
    (logp.exp() * (rewards(table) - beta * (logp - table.whole(ref_logp)))).sum().backward()
    return logits.grad


def optimum(table, reference):
    """The logits of the policy with the largest E[R] - beta KL: the reference's times exp(R / beta)."""
    worth = {c: r / BETA for c, r in zip(table.completions, rewards(table).tolist(), strict=True)}
    logits = reference.log_softmax(-1)
    for row in reversed(range(len(table.prefixes))):  # longer ones first
        prefix = table.prefixes[row]
        logits[row] += logits.new_tensor([worth[(*prefix, token)] for token in range(table.shape[1])])
        worth[prefix] = logits[row].logsumexp(-1).item()
    return logits


def same_direction(found, wanted):
    torch.testing.assert_close(found / found.norm(), wanted / wanted.norm(), rtol=1e-10, atol=1e-10)


NO_STD = "--algo.advantage.no_std_norm"
OTHER = {"leave_one_out": "group_mean", "group_mean": "leave_one_out"}


@pytest.fixture(params=[2, 4], ids="groups of {}".format)
def group(request):
    return request.param


@pytest.fixture
def plan(planned, group):
    def make(estimator, *flags, **options):
        words = ("--algo.advantage.estimator", estimator, "--rollout.n_samples_per_prompt", str(group))
        return planned(*words, *flags, **{"kl": "k1_in_reward"} | options)

    return make


@pytest.mark.parametrize("credit", ["sequence", "to_go"])
@pytest.mark.parametrize(
    ("estimator", "flags"),
    [("rloo", ()), ("dr_grpo", ()), ("reinforce_baseline", (NO_STD,)), ("reinforce_baseline", ())],
    ids=lambda words: words if isinstance(words, str) else "-".join(words)[-11:],
)
def test_the_expected_gradient_is_that_of_the_objective(plan, hooked, group, estimator, flags, credit):
    table = TABLES[group]
    logits, reference = table.draw(1), table.logp(table.draw(2))

    def found(**options):
        args = plan(estimator, *flags, kl_credit=credit, **options)
        one, rows = every_group(args, table, table.logp(logits), reference, group)
        return expectation(table, one.advantages, rows, group, logits=logits), args.kl_plugins.spec.baseline

    whole, baseline = found()
    wanted = CONSTANT[estimator](group) * objective_gradient(table, reference, logits=logits)
    twin, _ = found(kl_baseline=OTHER[baseline])
    if estimator == "reinforce_baseline" and not flags:  # divided by the deviation of all advantages, reward and KL
        same_direction(whole, wanted)
        with pytest.raises(AssertionError):
            same_direction(twin, wanted)
    else:
        torch.testing.assert_close(whole, wanted, rtol=1e-10, atol=1e-12)
        assert (twin - wanted).norm() > 0.05 * wanted.norm()


def test_group_norm_adds_the_kl_of_the_policy_to_standardized_rewards(plan, hooked, group):
    """By (1 - 1/G), as the rewards: with rewards of standard deviation 1 beta counts nats against them."""
    table = TABLES[group]
    logits, reference = table.draw(1), table.logp(table.draw(2))

    def found(beta, **options):
        one, rows = every_group(plan("group_norm", **options), table, table.logp(logits), reference, group, beta=beta)
        return expectation(table, one.advantages, rows, group, logits=logits)

    both, of_rewards = (objective_gradient(table, reference, logits=logits, beta=beta) for beta in (BETA, 0.0))
    wanted = (1 - 1 / group) * (both - of_rewards)
    torch.testing.assert_close(found(BETA) - found(0.0), wanted, rtol=1e-10, atol=1e-12)
    twin = found(BETA, kl_baseline="leave_one_out") - found(0.0)
    assert (twin - wanted).norm() > 0.05 * wanted.norm()


@pytest.mark.parametrize("credit", ["sequence", "to_go"])
@pytest.mark.parametrize("estimator", ["rloo", "dr_grpo", "reinforce_baseline"])
def test_later_updates_have_the_gradient_of_the_policy_they_update(
    plan, hooked, group, estimator, credit, monkeypatch
):
    """Advantages of a rollout, as a hooked training step hands them to the loss of a policy that has moved on."""
    table = TABLES[group]
    logits, old, reference = table.draw(1), table.draw(3), table.logp(table.draw(2))
    flags = (NO_STD,) if estimator == "reinforce_baseline" else ()
    args = plan(estimator, *flags, kl_credit=credit)
    one, rows = every_group(args, table, table.logp(old), reference, group)
    one.info[actor.SCALE] = list(one.info[actor.SCALE])  # as the replay buffer hands it on
    trainer = SimpleNamespace(
        args=args,
        actor_loss_fn=lambda logp, old_logp, advantages: advantages,
        kl_plugins_recorder=SimpleNamespace(add=lambda *_: None),
    )

    def gradient():
        step = actor.training_step(lambda *_: trainer.actor_loss_fn(now[rows], one.action_log_probs, one.advantages))
        return expectation(table, step(trainer, one, BETA), rows, group, logits=logits, sampler=old)

    now = table.logp(logits)
    wanted = CONSTANT[estimator](group) * objective_gradient(table, reference, logits=logits)
    torch.testing.assert_close(gradient(), wanted, rtol=1e-10, atol=1e-12)
    monkeypatch.setattr(actor, "refresh_advantages", lambda advantages, **_: advantages)
    assert (gradient() - wanted).norm() > 0.05 * wanted.norm()


@pytest.mark.parametrize("estimator", ["rloo", "dr_grpo", "reinforce_baseline"])
def test_at_the_optimum_the_kl_cancels_the_noise_of_the_reward(plan, hooked, group, estimator):
    """There R - beta log(pi / ref) is the same for every completion, and every advantage is 0."""
    table = TABLES[group]
    reference = table.draw(2)
    best = optimum(table, reference)

    def largest(**options):
        args = plan(estimator, NO_STD, **options)
        one, _ = every_group(args, table, table.logp(best), table.logp(reference), group)
        return (one.advantages * one.action_mask).abs().max().item()

    assert objective_gradient(table, table.logp(reference), logits=best).abs().max() < 1e-12
    assert largest() < 1e-12
    baseline = plan(estimator).kl_plugins.spec.baseline
    for twin in ({"kl_credit": "to_go"}, {"kl_baseline": OTHER[baseline]}, {"kl_baseline": "none"}):
        assert largest(**twin) > 0.1
