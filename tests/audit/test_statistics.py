"""The audit's targets, biases and variances against enumeration, with wrong twins."""

from __future__ import annotations

import math

import pytest
import torch
from tabular_model import Tabular

from kl_plugins import KLSpec, oracle
from kl_plugins.audit import pages
from kl_plugins.audit.collect import collect
from kl_plugins.audit.configurations import own_configurations
from kl_plugins.audit.data import Prompt, Rollouts
from kl_plugins.audit.gradients import TARGETS
from kl_plugins.audit.sketch import Sketch
from kl_plugins.audit.statistics import Resampled, interval, squared_norm, standard_error


@pytest.fixture(scope="module")
def policies():
    sequences = oracle.enumerate_sequences(3, 3)
    return sequences, *oracle.structured_policies(sequences, seed=1, strength=2.0)


def in_rows(vector, sequences):
    """What the audit keeps of a (prefix, vocabulary) gradient, as the oracle shapes it."""
    return vector.view(sequences.vocabulary, sequences.prefixes).T


def stale_rollouts(model, behavior, *, prompts, completions):
    """Completions drawn by another table, with its log-probs."""
    logp = oracle.token_logp(behavior, model.sequences)
    found = []
    for _ in range(prompts):
        rows = model.draw(behavior, completions)
        scores = [logp[row][model.sequences.mask[row]].tolist() for row in rows]
        found.append(Rollouts(prompt=[0], completions=[model.completion(r) for r in rows], behavior_logp=scores))
    return found


def measured(policies, found, *, units=None, seed=0, prompts=24, completions=8, target_completions=32):
    sequences, policy, reference, _ = policies
    model = Tabular(sequences, policy, reference, seed=seed)
    return collect(
        model,
        units(model) if units else [Prompt(prompt=[0])] * prompts,
        found,
        completions=completions,
        target_completions=target_completions,
        max_new_tokens=3,
        batch=64,
        sketch=Sketch(model.vocabulary, model.hidden),
    )


def test_noise_is_subtracted_from_norms_and_variances_are_unbiased():
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]])
    squares, variances, errors = [], [], []
    for seed in range(200):
        resampled = Resampled(resamples=100, seed=seed)
        for _ in range(10):
            resampled = resampled.plus(truth[:, None] + 2 * torch.randn(2, 4, 3, generator=generator))
        squares.append([float(squared_norm(resampled.mean[:, i])[0]) for i in (0, 1)])
        variances.append(resampled.variance[0].tolist())
        errors.append(standard_error(resampled.mean[:, 0]))
    zero, far = torch.tensor(squares).T
    standard = math.sqrt(12 / 40)  # three coordinates of variance 4, 40 draws
    assert abs(float(zero.mean())) < 4 * float(zero.std()) / math.sqrt(200)
    assert abs(float(far.mean()) - 25) < 4 * float(far.std()) / math.sqrt(200)
    assert torch.tensor(variances).mean(0).tolist() == pytest.approx([12, 12], rel=0.03)
    assert sum(errors) / len(errors) == pytest.approx(standard, rel=0.05)


def test_an_interval_of_what_is_undefined_is_none():
    nothing = torch.full((11,), torch.nan)
    assert interval(nothing) == {"value": None, "low": None, "high": None}
    assert interval(torch.arange(11.0))["low"] == pytest.approx(1.225)


@pytest.mark.parametrize("of", TARGETS)
def test_the_target_converges_to_the_enumerated_gradient_within_its_error(policies, of):
    sequences, policy, reference, _ = policies
    true, index = oracle.true_gradient(of, sequences, policy, reference), TARGETS.index(of)
    errors, stated, one = [], [], own_configurations(off_policy=False)[:1]
    for prompts in (4, 64):
        found = [measured(policies, one, prompts=prompts, seed=seed).targets for seed in range(12)]
        apart = [float((in_rows(targets.mean[0, index], sequences) - true).norm()) for targets in found]
        errors.append(math.sqrt(sum(x * x for x in apart) / len(apart)))
        stated.append(sum(standard_error(targets.mean[:, index]) for targets in found) / len(found))
    assert errors == pytest.approx(stated, rel=0.4)  # the root mean square of 12 errors
    assert errors[1] / errors[0] == pytest.approx(1 / 4, rel=0.5)
    other = oracle.true_gradient(TARGETS[index - 1], sequences, policy, reference)
    assert float((in_rows(found[0].mean[0, index], sequences) - other).norm()) > 8 * stated[1]


@pytest.fixture(scope="module", params=["on-policy", "off-policy"])
def against_enumeration(request, policies):
    """For each configuration and target, of several seeds, whether the interval holds the enumerated number."""
    sequences, policy, reference, behavior = policies
    off_policy = request.param == "off-policy"
    found = [c for c in own_configurations(off_policy=off_policy) if not c.analytic]
    specs = [KLSpec(name=c.name, credit=c.credit, off_policy=c.off_policy or "none", allow_biased=True) for c in found]
    drawn_by = behavior if off_policy else None
    gradients = {
        c.label: oracle.expected_gradient(spec, sequences, policy, reference, behavior=drawn_by)
        for c, spec in zip(found, specs, strict=True)
    }
    rows = []
    for seed in range(6):

        def units(model):
            return stale_rollouts(model, behavior, prompts=24, completions=8)

        rows += measured(policies, found, units=units if off_policy else None, seed=seed).statistics()["rows"]
    return off_policy, gradients, rows


def test_every_bias_agrees_with_the_enumerated_one_and_a_wrong_twin_does_not(policies, against_enumeration):
    sequences, policy, reference, _ = policies
    off_policy, gradients, rows = against_enumeration
    held, told_apart = [], []
    for row in rows:
        if row["unseen"] > pages.HEAVY and row["off_policy"] in ("none", "token"):
            assert row["name"].startswith("k3")
            continue  # said so on the page
        for of in ("reverse_kl", "local_reverse_kl"):
            true = oracle.true_gradient(of, sequences, policy, reference)
            holds = [
                row["against"][of]["bias"]["low"] - 1e-6
                <= oracle.relative_error(gradient, true)
                <= row["against"][of]["bias"]["high"] + 1e-6
                for gradient in (gradients[row["label"]], 1.5 * gradients[row["label"]] + 0.5 * true)
            ]
            held.append(holds[0])
            told_apart.append(not holds[1])
    assert sum(held) / len(held) >= 0.9
    assert sum(told_apart) / len(told_apart) >= (0.6 if off_policy else 0.75)


def test_what_kl_plugins_declares_is_found_and_another_declaration_is_not(policies):
    own = own_configurations(off_policy=False)
    for row in measured(policies, own, prompts=64).statistics()["rows"]:
        if row["own_name"] is not None:
            assert row["own_name"]["seen"] is False, row["label"]
    wrong = [c for c in own if c.name in ("k3_as_loss", "k1_as_loss", "k2_in_reward")]
    for configuration in wrong:
        object.__setattr__(configuration, "gradient_of", "reverse_kl")
    for row in measured(policies, wrong, prompts=64).statistics()["rows"]:
        assert row["own_name"]["seen"] is True, row["label"]


def test_too_few_completions_to_tell_are_said_to_be(policies):
    own = [c for c in own_configurations(off_policy=False) if c.label == "k3_as_loss token"]
    object.__setattr__(
        own[0], "pointwise", lambda logp, ref_logp: torch.full_like(logp, torch.nan)
    )  # nothing averaged
    (row,) = measured(policies, own, prompts=2, completions=3).statistics()["rows"]
    assert row["own_name"]["bias"]["high"] > 0.5
    assert row["own_name"]["seen"] is None
    assert "can&#39;t be told" in pages.render(title="", lead=[], sections=[pages._summary({"rows": [row]})])


def test_the_variance_is_the_enumerated_one(policies):
    sequences, policy, reference, _ = policies
    found = [c for c in own_configurations(off_policy=False) if c.label in ("k2_as_loss token", "k1_in_reward to_go")]
    rows = measured(policies, found, prompts=400, target_completions=2).statistics()["rows"]
    for configuration, row in zip(found, rows, strict=True):
        spec = KLSpec.from_name(configuration.name, credit=configuration.credit)
        _, variance = oracle.second_moment(spec, sequences, policy, reference, group_size=1)
        deviation = row["deviation"]
        assert deviation["low"] <= math.sqrt(variance) <= deviation["high"]


def test_an_analytic_term_has_the_least_noise(policies):
    rows = {r["label"]: r for r in measured(policies, own_configurations(off_policy=False)).statistics()["rows"]}
    deviation = {label: row["deviation"]["value"] for label, row in rows.items()}
    assert deviation["exact_as_loss token"] < deviation["k2_as_loss token"]
    assert deviation["exact_in_reward to_go"] < deviation["k1_in_reward to_go"] < deviation["k1_in_reward sequence"]


def test_where_the_policy_is_the_reference_nothing_is_related_to_a_target_of_zero(policies):
    sequences, policy, _, behavior = policies
    found = measured((sequences, policy, policy, behavior), own_configurations(off_policy=False), prompts=8)
    result = found.statistics()
    assert not any(target["told_from_zero"] for target in result["targets"])
    assert all(row["against"]["reverse_kl"]["bias"]["value"] is None for row in result["rows"])
