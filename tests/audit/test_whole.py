"""The whole gradient, of reward and KL, against the enumeration of every group, with wrong twins."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tabular_model import Tabular
from tiny_openrlhf import import_openrlhf

from kl_plugins import KLSpec, oracle
from kl_plugins.audit.collect import collect
from kl_plugins.audit.configurations import (
    grouped_configurations,
    host_configurations,
    own_configurations,
    reward_configuration,
)
from kl_plugins.audit.data import Prompt, Rollouts
from kl_plugins.audit.gradients import term_gradients, whole_gradients
from kl_plugins.audit.objective import Objective
from kl_plugins.audit.sketch import Sketch
from kl_plugins.audit.statistics import Resampled, interval
from kl_plugins.audit.whole import _options, recommendation, whole_statistics
from kl_plugins.integration.choice import choose
from kl_plugins.trl import GRPOConfig, RLOOConfig

BETA = 0.3
OBJECTIVES = [Objective(trainer=trainer, beta=BETA, group_size=2) for trainer in ("grpo", "rloo")]


@pytest.fixture(scope="module")
def policies():
    sequences = oracle.enumerate_sequences(3, 2)
    policy, reference, _ = oracle.structured_policies(sequences, seed=1, strength=1.5)
    rewards = 2 * torch.rand(len(sequences.tokens), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return sequences, policy, reference, rewards


def log_ratio(sequences, policy, reference):
    """log(policy / reference) of each enumerated sequence."""
    logp, ref_logp = (oracle.token_logp(x, sequences) for x in (policy, reference))
    return torch.where(sequences.mask, logp - ref_logp, 0.0).sum(-1)


def reward_gradient(sequences, policy, rewards):
    """grad E[R], by autograd on the enumeration."""
    theta = policy.clone().requires_grad_()
    return torch.autograd.grad((oracle.sequence_probability(theta, sequences) * rewards).sum(), theta)[0]


def configurations(objective):
    return [*own_configurations(off_policy=False), *grouped_configurations(objective.baseline, off_policy=False)]


def enumerated(policies, objective, found):
    """Of every group of two the probability, and its gradients: of the reward alone, then with each KL term."""
    sequences, policy, reference, rewards = policies
    model, count = Tabular(sequences, policy, reference), len(rewards)
    rows = torch.cartesian_prod(torch.arange(count), torch.arange(count)).flatten()
    sketch = Sketch(model.vocabulary, model.hidden)
    assert sketch.exact
    (scored,) = model.score([0], [model.completion(row) for row in rows], batch=len(rows))
    judged = [*found, reward_configuration(objective)]
    gradients = term_gradients(judged, scored, sketch, rare=0.0, rewards=rewards[rows], group_size=2)
    whole = whole_gradients(gradients.sampled, [c.shrink(2) for c in found], objective)
    probability = oracle.sequence_probability(policy, sequences)[rows].view(-1, 2).prod(1)
    return probability, whole


def mean_and_variance(probability, whole, sequences):
    mean = torch.einsum("g,cgk->ck", probability, whole)
    variance = torch.einsum("g,cg->c", probability, (whole - mean[:, None]).square().sum(-1))
    return mean.view(len(whole), sequences.vocabulary, sequences.prefixes).mT, variance


def the_loss(policies, beta=BETA):
    """The gradient of -(E[R] - beta KL)."""
    sequences, policy, reference, rewards = policies
    of_kl = oracle.true_gradient("reverse_kl", sequences, policy, reference)
    return beta * of_kl - reward_gradient(sequences, policy, rewards)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.trainer)
def test_the_whole_gradient_is_that_of_reward_minus_beta_kl(policies, objective):
    """With every term whose gradient is the KL's, at the beta that was asked for; with the others it isn't."""
    found, true = configurations(objective), the_loss(policies)
    means, _ = mean_and_variance(*enumerated(policies, objective, found), policies[0])
    for configuration, mean in zip(found, means[1:], strict=True):
        error = oracle.relative_error(mean, true)
        assert (error < oracle.RTOL) == (configuration.gradient_of == "reverse_kl"), configuration.label
    assert oracle.relative_error(means[0], the_loss(policies, beta=0.0)) < oracle.RTOL


def test_what_is_judged_wrongly_is_not_that_gradient(policies, monkeypatch):
    """Twins: GRPO's shrink left in the KL, left in the reward, and the reward's part left out."""
    objective, true = OBJECTIVES[0], the_loss(policies)
    found = [c for c in configurations(objective) if c.baseline and c.credit == "sequence"]
    probability, whole = enumerated(policies, objective, found)

    def error(gradients):
        return oracle.relative_error(mean_and_variance(probability, gradients, policies[0])[0][-1], true)

    assert error(whole) < oracle.RTOL
    assert error(whole - whole[:1]) > 0.1
    assert error(whole - whole[:1] / 2) > 0.1  # advantages of GRPO as they are, with a KL that isn't shrunk
    monkeypatch.setattr(type(found[0]), "shrink", lambda configuration, group_size: 1.0)
    assert error(enumerated(policies, objective, found)[1]) > 0.05


@pytest.mark.parametrize("baseline", [None, "leave_one_out", "group_mean"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.trainer)
def test_the_beta_to_write_gives_the_trainer_the_objective_that_was_asked_for(policies, objective, baseline):
    """What the trainer then takes is a multiple of the gradient of E[R] - beta KL, with the beta that was judged."""
    sequences, policy, reference, rewards = policies
    (like,) = [c for c in own_configurations(off_policy=False) if c.label == "k1_in_reward sequence"]
    shrink = replace(like, baseline=baseline or "").shrink(2)
    spec = KLSpec.from_name("k1_in_reward", credit="sequence", baseline=baseline, off_policy="none")
    of_kl = oracle.expected_gradient(spec, sequences, policy, reference, group_size=2)
    of_reward = (0.5 if objective.trainer == "grpo" else 1.0) * reward_gradient(sequences, policy, rewards)
    taken = objective.beta_to_write(shrink) * of_kl - of_reward
    scale = 0.5 if objective.trainer == "grpo" else 1.0
    assert oracle.relative_error(taken, scale * the_loss(policies)) < oracle.RTOL
    as_asked = BETA * of_kl - of_reward  # the same only where the KL is treated as the reward
    alike = (baseline == "group_mean") == (objective.trainer == "grpo")
    assert (oracle.relative_error(as_asked, scale * the_loss(policies)) < oracle.RTOL) == alike


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.trainer)
def test_at_the_optimum_only_a_kl_that_is_treated_as_the_reward_cancels_its_noise(policies, objective):
    sequences, policy, reference, _ = policies
    rewards = BETA * log_ratio(sequences, policy, reference) + 1.0  # of which the policy is the optimum
    found = configurations(objective)
    _, variances = mean_and_variance(*enumerated((sequences, policy, reference, rewards), objective, found), sequences)
    of_term = dict(zip([c.label for c in found], variances[1:].tolist(), strict=True))
    cancelling = f"k1_in_reward sequence, {objective.baseline}"
    assert of_term.pop(cancelling) < 1e-25
    assert min(of_term.values()) > 1e-5
    assert of_term["exact_in_reward to_go"] > 1e-2
    assert float(variances[0]) > 1e-3


def test_trls_own_rloo_has_the_whole_gradient_of_what_reverse_kl_picks(policies):
    objective = OBJECTIVES[1]
    import_openrlhf()
    theirs = [c for c in host_configurations(grouped=True)[0] if c.pointwise is None]
    assert [c.name for c in theirs] == ["TRL RLOO (k1, whole sequences)"]
    ours = [c for c in configurations(objective) if c.label == theirs[0].same_mean_as + ", leave_one_out"]
    _, whole = enumerated(policies, objective, [*ours, *theirs])
    torch.testing.assert_close(whole[1], whole[2], rtol=1e-5, atol=1e-6)


def measured(policies, objective, *, prompts=24, seed=0):
    sequences, policy, reference, by_row = policies
    model = Tabular(sequences, policy, reference, seed=seed)

    def of(rollouts: Rollouts):
        return [float(by_row[model.rows[tuple(ids)]]) for ids in rollouts.completions]

    return collect(
        model,
        [Prompt(prompt=[0])] * prompts,
        configurations(objective),
        completions=8,
        target_completions=16,
        max_new_tokens=2,
        batch=3,  # which is no multiple of a group: whole groups are scored all the same
        sketch=Sketch(model.vocabulary, model.hidden),
        objective=objective,
        rewards=of,
        seed=seed,
    )


def test_the_squared_error_is_the_enumerated_one_and_without_the_rewards_noise_it_is_not(policies):
    objective, batch = OBJECTIVES[0], 16
    found = configurations(objective)
    means, variances = mean_and_variance(*enumerated(policies, objective, found), policies[0])
    true = the_loss(policies)
    errors = (means[1:] - true).square().sum((1, 2)) + variances[1:] * objective.group_size / batch
    relative = {c.label: float(e / true.square().sum()) for c, e in zip(found, errors, strict=True)}
    _, kl_only = mean_and_variance(
        *enumerated((*policies[:3], torch.zeros_like(policies[3])), objective, found), policies[0]
    )
    of_kl_only = {
        c.label: float(v * objective.group_size / batch / true.square().sum())
        for c, v in zip(found, kl_only[1:], strict=True)
    }
    held, told_apart, ratios = [], [], []
    pick = f"k1_in_reward sequence, {objective.baseline}"
    for seed in range(5):
        for row in whole_statistics(measured(policies, objective, seed=seed), batch=batch)["rows"]:
            low, high = row["error"]["low"], row["error"]["high"]
            held.append(low <= relative[row["label"]] <= high)
            if of_kl_only[row["label"]] < relative[row["label"]] / 2:
                told_apart.append(not low <= of_kl_only[row["label"]] <= high)
            low, high = row["ratio"]["low"], row["ratio"]["high"]
            ratios.append(low - 1e-9 <= relative[row["label"]] / relative[pick] <= high + 1e-9)
    assert len(told_apart) >= len(held) / 2
    assert sum(held) / len(held) >= 0.85
    assert sum(told_apart) / len(told_apart) >= 0.95
    assert sum(ratios) / len(ratios) >= 0.9


def test_two_draws_of_a_prompt_show_no_variance_of_their_variance_but_prompts_do():
    generator = torch.Generator().manual_seed(0)
    held, widths = [], []
    for seed in range(100):
        kinds = [Resampled(resamples=100, seed=seed, prompts_vary=vary) for vary in (False, True)]
        for _ in range(32):
            drawn = torch.randn(1, 2, 3, generator=generator)
            kinds = [kind.plus(drawn) for kind in kinds]
        by_draws, by_prompts = (interval(kind.variance[:, 0]) for kind in kinds)
        widths.append(by_draws["high"] - by_draws["low"])
        held.append(by_prompts["low"] <= 3 <= by_prompts["high"])
        assert by_draws["value"] == pytest.approx(by_prompts["value"])
    assert max(widths) < 1e-4  # why prompts are resampled
    assert 0.85 <= sum(held) / len(held) <= 1.0


def judged(found, **options):
    asked = {"trainer": found.objective.trainer, "beta": found.objective.beta, "scale_rewards": "group"} | options
    return recommendation(whole_statistics(found, batch=64), **asked)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.trainer)
def test_at_the_optimum_reverse_kl_is_recommended(policies, objective):
    sequences, policy, reference, _ = policies
    rewards = BETA * log_ratio(sequences, policy, reference) + 0.01 * torch.rand(len(sequences.tokens)).double()
    found = measured((sequences, policy, reference, rewards), objective)
    rows = {row["label"]: row for row in whole_statistics(found, batch=64)["rows"]}
    assert rows["exact_in_reward to_go"]["verdict"] == rows["k2_as_loss token"]["verdict"] == "worse"
    config = {"grpo": "GRPOConfig", "rloo": "RLOOConfig"}[objective.trainer]
    line = judged(found, scale_rewards={"grpo": "group", "rloo": "none"}[objective.trainer])["line"]
    assert line == f'{config}(..., beta=0.3, kl="reverse_kl")'


def test_what_measured_better_is_recommended_with_the_beta_to_write(policies):
    """Without noise of the reward the KL with the least noise of its own is best."""
    found = measured((*policies[:3], torch.zeros_like(policies[3])), OBJECTIVES[0], prompts=64)
    said = judged(found)
    assert said["line"].startswith('GRPOConfig(..., beta=0.15, kl="exact_')
    assert said["line"].endswith("num_generations=2)")
    assert "its beta is 0.3 x (1 - 1/2)." in said["why"]
    assert " of the squared error that reverse_kl (k1_in_reward sequence, group_mean) has, for this p" in said["why"]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.trainer)
@pytest.mark.parametrize("off_policy", [False, True])
def test_every_line_that_could_be_recommended_is_one_that_the_trainer_takes(objective, off_policy, tmp_path):
    ours = own_configurations(off_policy=off_policy)
    ours += grouped_configurations(objective.baseline, off_policy=off_policy)
    names = {"GRPOConfig": GRPOConfig, "RLOOConfig": RLOOConfig}
    lines = []
    for configuration in ours:
        if configuration.refused:
            continue
        options = _options(configuration, objective)
        better = row(configuration.label, 0.8, verdict="better") | {"options": options}
        line = recommendation({"rows": [PICK, better]}, trainer=objective.trainer, beta=BETA, scale_rewards="none")
        lines.append(line["line"])
        written = lines[-1].replace("...", f"output_dir={str(tmp_path)!r}, use_cpu=True, bf16=False")
        config = eval(written, names)
        assert (config.kl, config.kl_credit) == (configuration.name, configuration.credit)
        taken = choose(config.kl, {"kl_credit": config.kl_credit}, host=objective.trainer).options
        baseline = taken["kl_baseline"] if config.kl_baseline == "auto" else config.kl_baseline
        assert (baseline or "") == configuration.baseline
        assert config.kl_off_policy == (configuration.off_policy or "token")
    assert len(set(lines)) == len(lines) > 8


def test_few_prompts_tell_nothing(policies):
    found = measured((*policies[:3], torch.zeros_like(policies[3])), OBJECTIVES[0], prompts=4)
    said = judged(found, scale_rewards="none")
    assert said["line"] == 'GRPOConfig(..., scale_rewards="none", beta=0.3, kl="reverse_kl")'
    assert said["why"].startswith("These data can't tell the configurations apart")


def row(label, ratio, *, verdict, picked=False, options=True, refused=False):
    kl, credit = label.split()[:2]
    return {
        "label": label,
        "picked": picked,
        "refused": refused,
        "verdict": verdict,
        "gradient_of": "reverse_kl" if picked else "local_reverse_kl",
        "ratio": {"value": ratio, "low": ratio - 0.1, "high": ratio + 0.1},
        "options": {"kl": kl, "kl_credit": credit, "beta": 0.03} if options else {},
    }


PICK = row("k1_in_reward sequence, group_mean", 1.0, verdict="tie", picked=True)


def said(*rows):
    whole = {"rows": [PICK, *rows]}
    return recommendation(whole, trainer="grpo", beta=0.04, scale_rewards="group")


def test_a_tie_is_called_a_tie_and_what_is_refused_or_a_hosts_own_is_not_recommended():
    refused = row("k2_in_reward to_go", 0.5, verdict="better", refused=True)
    theirs = row("TRL GRPO (k3)", 0.6, verdict="better", options=False)
    tie = row("k2_as_loss token", 0.95, verdict="tie")
    found = said(refused, theirs, tie)
    assert found["line"] == 'GRPOConfig(..., beta=0.04, kl="reverse_kl")'
    assert "It is a tie with k2_as_loss token: then reverse_kl is recommended, because it is unbiased." in found["why"]
    assert "Of the hosts' own terms TRL GRPO (k3) measured better than reverse_kl." in found["why"]


def test_the_best_of_what_is_better_is_recommended_and_its_bias_said():
    found = said(row("k2_as_loss token", 0.8, verdict="better"), row("k3_as_loss token", 0.7, verdict="better"))
    assert found["line"] == 'GRPOConfig(..., beta=0.03, kl="k3_as_loss", kl_credit="token")'
    assert "It is the gradient of local_reverse_kl, though: that bias stays however large the batch." in found["why"]
    unbiased = row("exact_in_reward to_go", 0.75, verdict="better") | {"gradient_of": "reverse_kl"}
    assert 'kl="exact_in_reward"' in said(row("k3_as_loss token", 0.7, verdict="better"), unbiased)["line"]
    assert 'kl="k3_as_loss"' in said(row("k3_as_loss token", 0.5, verdict="better"), unbiased)["line"]


def test_advantages_are_those_of_rloo_and_of_grpo_but_for_its_shrink():
    rewards = torch.tensor([1.0, 0.0, 0.0, 3.0, 2.0, 2.0, 2.0, 2.0])
    groups = rewards.view(2, 4)
    others = (groups.sum(1, keepdim=True) - groups) / 3
    for trainer in ("grpo", "rloo"):
        found = Objective(trainer=trainer, group_size=4).advantages(rewards)
        torch.testing.assert_close(found, (groups - others).flatten())
    grpo = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    scaled = Objective(scale_rewards="group", group_size=4).advantages(rewards)
    torch.testing.assert_close(scaled * (1 - 1 / 4), grpo.flatten())
    assert math.isfinite(float(scaled.sum()))
