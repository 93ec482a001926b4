"""The KL in the reward, through OpenRLHF's real `RemoteExperienceMaker` and `ActorPPOTrainer`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_openrlhf import FLAGS, make_experiences, parse, step
from transformers import AutoModelForCausalLM

from kl_plugins import kl_terms
from kl_plugins.core.terms import leave_one_out_baseline
from kl_plugins.openrlhf import actor
from kl_plugins.patching import Patching, load_patches

BETA, GROUP, PROMPT = 0.1, 4, 3
WIDE = ("--actor.eps_clip_low_high", "0.999999", "1e9")  # PPO's clip out of the way
ESTIMATORS = ("gae", "reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo", "flash_reinforce")


def rollout(*, rows=8, length=5, spread=1.0, seed=0, rewards=True):
    """Samples of `rows // GROUP` prompts with ragged completions, and log-probs and values for them."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale=1.0):
        return scale * torch.randn(rows, PROMPT + length - 1, generator=generator)

    sequences = torch.randint(2, 12, (rows, PROMPT + length), generator=generator)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    position = torch.arange(1 - PROMPT, length)
    mask = ((position < lengths) & (position >= 0)).long()
    reward = torch.randn(rows, generator=generator) if rewards else torch.zeros(rows)
    # Masked positions hold something that must not get anywhere.
    logp, ref_logp, values = noise() - 3, noise(spread) - 3, noise()
    return sequences, mask, reward, logp, ref_logp, values


def joined(experiences, name):
    """(rows, T) of a field, in the order of the prompts."""
    rows = torch.tensor([i for e in experiences for i in e.index])
    return torch.cat([getattr(e, name) * e.action_mask for e in experiences])[rows.argsort()]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_identity_with_openrlhfs_own_k1_where_it_does_not_clamp(planned, estimator):
    batch = rollout()
    flags = ("--algo.advantage.estimator", estimator)
    stock = make_experiences(parse(*FLAGS, *flags), batch)
    with Patching(load_patches("openrlhf")):
        found = make_experiences(planned(*flags, kl="k1_in_reward", kl_credit="to_go", kl_baseline="none"), batch)
    for name in ("advantages", "returns"):
        torch.testing.assert_close(joined(found, name), joined(stock, name))
    assert (batch[3] - batch[4]).abs().max() < 10  # or there would be nothing to agree about


def test_beyond_the_hosts_clamp_the_cost_goes_on_and_masked_tokens_cost_nothing(planned, hooked):
    args = planned("--algo.advantage.estimator", "reinforce", "--algo.advantage.no_std_norm", kl="k1_in_reward")
    batch = rollout(spread=30.0)
    _, mask, reward, logp, ref_logp, _ = batch
    u = (logp - ref_logp) * mask
    assert u.abs().max() > 20
    found = make_experiences(args, batch)
    returned = torch.cat([e.info["return"] for e in found])
    torch.testing.assert_close(returned, reward - BETA * u.sum(-1))


@pytest.mark.parametrize("estimator", ["rloo", "group_norm", "dr_grpo", "reinforce_baseline"])
@pytest.mark.parametrize("credit", ["sequence", "to_go"])
@pytest.mark.parametrize("baseline", ["auto", "leave_one_out", "group_mean"])
@pytest.mark.parametrize("micro", [(8,), (3, 5)], ids=str)
def test_group_estimators_get_their_baseline_from_whole_groups(planned, hooked, estimator, credit, baseline, micro):
    """The advantages are those without a KL less beta times the coefficients, and then normalized by the host."""
    args = planned(
        *("--algo.advantage.estimator", estimator), kl="k1_in_reward", kl_credit=credit, kl_baseline=baseline
    )
    batch = rollout()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3)).tolist()
    now = 0.3  # what a controller has made of --algo.kl.init_coef
    found = make_experiences(args, batch, micro=micro, order=order, kl_coef=now)
    without = joined(make_experiences(args, batch, micro=micro, order=order, kl_coef=0.0), "returns")
    _, mask, _, logp, ref_logp, _ = batch
    spec = args.kl_plugins.spec
    own = "leave_one_out" if estimator == "rloo" else "group_mean"
    assert spec.baseline == (own if baseline == "auto" else baseline)
    terms = kl_terms(spec, logp=logp, ref_logp=ref_logp, mask=mask, group_size=GROUP)
    plain = kl_terms(replace(spec, baseline=None), logp=logp, ref_logp=ref_logp, mask=mask)
    assert (terms.coefficient - plain.coefficient).abs().max() > 0.1
    wanted = without - now * terms.coefficient
    share = 1 - 1 / GROUP if spec.baseline == "group_mean" else 1
    scale = found[0].info[actor.SCALE][0].item()
    if estimator == "reinforce_baseline":
        counted = wanted[mask.bool()]
        wanted = (wanted - counted.mean()) / counted.std(correction=0) * mask
        assert scale == pytest.approx(share / counted.std(correction=0).item(), rel=1e-4)
    else:
        assert scale == share
    torch.testing.assert_close(joined(found, "advantages"), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        ("rloo", {}),
        ("dr_grpo", {}),
        ("reinforce_baseline", {}),
        ("reinforce", {"kl_credit": "sequence"}),
    ],
)
def test_the_kl_is_treated_as_the_reward(planned, hooked, estimator, options):
    """The advantages are OpenRLHF's own, without any KL, for the reward R - beta U, U a completion's log-ratio."""
    flags = ("--algo.advantage.estimator", estimator)
    sequences, mask, reward, logp, ref_logp, values = batch = rollout()
    ref_logp[:GROUP] += 1  # one prompt is further from the reference than the other
    whole = reward - BETA * ((logp - ref_logp) * mask).sum(-1)
    args = planned(*flags, kl="k1_in_reward", **options)
    wanted = make_experiences(args, (sequences, mask, whole, logp, ref_logp, values), kl_coef=0.0)
    found = make_experiences(args, batch, micro=(3, 5))
    for name in ("advantages", "returns"):
        torch.testing.assert_close(joined(found, name), joined(wanted, name), rtol=1e-4, atol=1e-5)
    for twin in ({"kl_credit": "to_go"}, *([{"kl_baseline": "none"}] if args.kl_plugins.spec.baseline else [])):
        other = make_experiences(planned(*flags, kl="k1_in_reward", **options | twin), batch)
        assert (joined(other, "advantages") - joined(wanted, "advantages")).abs().max() > 0.01


def test_a_baseline_for_a_term_in_the_loss_travels_to_the_actor(planned, hooked):
    args = planned("--algo.advantage.estimator", "group_norm", kl="k2_as_loss", kl_baseline="leave_one_out")
    batch = rollout()
    found = make_experiences(args, batch, micro=(3, 5))
    _, mask, _, logp, ref_logp, _ = batch
    wanted = leave_one_out_baseline(args.kl_plugins.spec, logp=logp, ref_logp=ref_logp, mask=mask, group_size=GROUP)
    torch.testing.assert_close(joined(found, "kl"), wanted * mask)


@pytest.mark.parametrize(
    ("credit", "flags"),
    [
        ("to_go", ("--algo.advantage.estimator", "gae", "--algo.advantage.lambd", "0.9")),
        ("to_go", ("--algo.advantage.estimator", "reinforce")),
        ("to_go", ("--algo.advantage.estimator", "reinforce", "--algo.advantage.gamma", "0.8")),
        ("to_go", ("--algo.advantage.estimator", "reinforce_baseline")),
        ("to_go", ("--algo.advantage.estimator", "group_norm")),
        ("sequence", ("--algo.advantage.estimator", "reinforce")),
        ("sequence", ("--algo.advantage.estimator", "reinforce_baseline")),
        ("sequence", ("--algo.advantage.estimator", "group_norm")),
    ],
    ids=lambda words: words if isinstance(words, str) else "-".join(words[1::2]),
)
def test_later_updates_see_the_log_ratios_of_the_policy_they_update(
    make_actor, planned, hooked, covers, flags, credit
):
    """The advantages reaching the loss are those that OpenRLHF would compute from the current policy's log-ratios."""
    covers("openrlhf", "RemoteExperienceMaker", f"k1_in_reward {credit}")
    options = {"kl_credit": credit, "kl_baseline": "none", "kl_allow_biased": "0.8" in flags}
    args = planned(*flags, kl="k1_in_reward", **options)
    batch = rollout()
    sequences, mask, reward, _, ref_logp, values = batch
    (made,) = make_experiences(args, batch, micro=(8,))
    trainer = make_actor(args)
    received = []

    def loss_fn(logp, old_logp, advantages, **_):
        received.append((logp.detach(), advantages))
        return logp.sum(), *4 * [torch.zeros(())]

    trainer.actor_loss_fn = loss_fn
    made.info[actor.SCALE] = list(made.info[actor.SCALE])  # as the replay buffer hands it on
    step(trainer, made, beta=BETA)
    [(now, advantages)] = received
    (fresh,) = make_experiences(args, (sequences, mask, reward, now, ref_logp, values), micro=(8,))
    counted = mask.bool()
    found, wanted, stale = (each[counted] for each in (advantages, fresh.advantages, made.advantages))
    if "group_norm" not in flags:  # up to OpenRLHF's own centring and scaling
        found, wanted, stale = ((each - each.mean()) / each.std() for each in (found, wanted, stale))
        assert 0.5 < advantages[counted].std() < 2
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (found - stale).norm() > 0.1 * found.norm()


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("flags", [(), ("--algo.advantage.no_std_norm",)], ids=["normalized", "not"])
def test_equal_rewards_and_a_tiny_kl_are_not_blown_up_by_the_normalization(make_actor, planned, hooked, noise, flags):
    """OpenRLHF divides by a deviation of 1e-4 at least: what it does to a tiny KL must not be done to later ones."""
    args = planned("--algo.advantage.estimator", "reinforce", *flags, kl="k1_in_reward")
    sequences, mask, reward, logp, _, values = rollout(rewards=False)
    generator = torch.Generator().manual_seed(5)
    ref_logp = logp + noise * torch.randn(logp.shape, generator=generator)
    (made,) = make_experiences(args, (sequences, mask, reward, logp, ref_logp, values), micro=(8,))
    made.info[actor.SCALE] = list(made.info[actor.SCALE])
    trainer = make_actor(args)
    received = []

    def loss_fn(now, old_logp, advantages, **_):
        received.append(advantages)
        return now.sum(), *4 * [torch.zeros(())]

    trainer.actor_loss_fn = loss_fn
    step(trainer, made, beta=BETA)  # whose policy is far from the one at rollout
    assert received[0].isfinite().all()
    bound = 10 if not flags else BETA * 60
    assert received[0].abs().max() < bound
    if flags:  # nothing is normalized, and nothing lost
        assert received[0].abs().max() > 0.1


@pytest.mark.parametrize("estimator", ["rloo", "reinforce_baseline"])
def test_an_unmoved_policy_keeps_its_advantages_also_with_a_baseline(make_actor, planned, hooked, estimator):
    args = planned("--algo.advantage.estimator", estimator, kl="k1_in_reward")
    trainer = make_actor(args)
    sequences, mask, reward, _, ref_logp, values = rollout()
    with torch.no_grad():
        logp = trainer.actor(sequences, mask, attention_mask=torch.ones_like(sequences))
    (made,) = make_experiences(args, (sequences, mask, reward, logp, ref_logp, values), micro=(8,))
    made.info[actor.SCALE] = list(made.info[actor.SCALE])
    received = []

    def loss_fn(now, old_logp, advantages, **_):
        received.append(advantages)
        return now.sum(), *4 * [torch.zeros(())]

    trainer.actor_loss_fn = loss_fn
    step(trainer, made, beta=BETA)
    torch.testing.assert_close(received[0] * mask, made.advantages * mask, rtol=1e-4, atol=1e-5)
    assert trainer.actor_loss_fn is loss_fn


def test_an_exponential_cost_is_bounded(planned, hooked):
    options = {"kl": "k3_in_reward", "kl_allow_biased": True, "kl_coefficient_bound": 100.0}
    args = planned("--algo.advantage.estimator", "reinforce", "--algo.advantage.no_std_norm", **options)
    sequences, mask, reward, logp, _, values = rollout()
    found = make_experiences(args, (sequences, mask, reward, logp, logp + 50, values))
    returned = torch.cat([e.info["return"] for e in found])
    torch.testing.assert_close(returned, reward - BETA * 100.0 * mask.sum(-1))


V, EOS = 16, 1
PAIRS = torch.tensor([(a, b) for a in range(V) for b in range(V) if a != EOS or b == 0])
SINGLES = torch.arange(V)[:, None]
QUESTION = torch.tensor([[3, 12, 4]])


def enumerated(completions):
    """Sequences (N, T) and action mask (N, T - 1) of every completion."""
    sequences = torch.cat([QUESTION.expand(len(completions), -1), completions], dim=1)
    mask = torch.zeros(len(completions), sequences.size(1) - 1, dtype=torch.long)
    mask[:, PROMPT - 1 :] = 1
    if completions.size(1) == 2:
        mask[:, -1] = completions[:, 0] != EOS
    return sequences, mask


def scores(model, sequences, mask):
    logits = model(sequences).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, sequences[:, 1:, None]).squeeze(-1) * mask


def other(model_folder, seed, scale):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def expected_gradient(args, trainer, completions, old, reference):
    """sum over completions of their probability under `old`, times the gradient of the real step; rewards are 0."""
    sequences, mask = enumerated(completions)
    with torch.no_grad():
        old_logp, ref_logp = scores(old, sequences, mask), scores(reference, sequences, mask)
    n = len(completions)
    args.rollout.n_samples_per_prompt = 1  # every completion by itself: no group, and no normalization
    batch = (sequences, mask, torch.zeros(n), old_logp, ref_logp, torch.zeros(n, mask.size(1)))
    total = 0
    for one, p in zip(make_experiences(args, batch, micro=[1] * n), old_logp.sum(-1).exp().tolist(), strict=True):
        total = total + step(trainer, one, beta=BETA, tokens=torch.tensor(1 / p))[1].double()
    return total


def true_gradient(trainer, completions, reference):
    """Of beta times the reverse KL of whole completions."""
    trainer.actor.zero_grad()
    sequences, mask = enumerated(completions)
    logp = scores(trainer.actor.model, sequences, mask).sum(-1)
    with torch.no_grad():
        ref_logp = scores(reference, sequences, mask).sum(-1)
    (BETA * (logp.exp() * (logp - ref_logp)).sum()).backward()
    return torch.cat([p.grad.flatten() for p in trainer.actor.parameters()]).double()


def error(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def test_expected_gradient_of_k1_in_reward_is_that_of_the_sequence_kl(make_actor, planned, hooked, model_folder):
    args = planned("--algo.advantage.estimator", "dr_grpo", *WIDE, kl="k1_in_reward", kl_baseline="none")
    args.algo.advantage.estimator = "flash_reinforce"
    trainer = make_actor(args, torch.float64)
    reference = other(model_folder, 1, 0.06)
    found = expected_gradient(args, trainer, PAIRS, trainer.actor.model, reference)
    wanted = true_gradient(trainer, PAIRS, reference)
    assert error(found, wanted) < 1e-4
    assert error(1.01 * found, wanted) > 1e-3  # so that the bound means something


def test_it_stays_so_when_the_policy_has_moved_on_and_not_without_the_recomputation(
    make_actor, planned, hooked, model_folder, monkeypatch
):
    """Single-token completions, where OpenRLHF's token ratio is the whole importance weight."""
    args = planned("--algo.advantage.estimator", "flash_reinforce", *WIDE, kl="k1_in_reward")
    trainer = make_actor(args, torch.float64)
    reference, old = other(model_folder, 1, 0.06), other(model_folder, 2, 0.04)
    wanted = true_gradient(trainer, SINGLES, reference)
    assert error(expected_gradient(args, trainer, SINGLES, old, reference), wanted) < 1e-4
    monkeypatch.setattr(actor, "refresh_advantages", lambda advantages, **_: advantages)
    assert error(expected_gradient(args, trainer, SINGLES, old, reference), wanted) > 0.05
