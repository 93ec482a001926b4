"""`kl-plugins audit`: its gradients against autograd, its targets and biases against enumeration, its command line."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import threading
import types

import pytest
import torch
import typer
from tabular_model import Tabular
from tiny_openrlhf import import_openrlhf
from tiny_trl import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from kl_plugins import KLSpec, kl_terms, oracle
from kl_plugins.audit import pages
from kl_plugins.audit.collect import TokenCounts, collect
from kl_plugins.audit.configurations import Tokens, host_configurations, own_configurations
from kl_plugins.audit.data import Rollouts, read_prompts, read_rollouts
from kl_plugins.audit.gradients import TARGETS, target_gradients, term_gradients
from kl_plugins.audit.model import Pair
from kl_plugins.audit.sketch import Sketch
from kl_plugins.audit.statistics import Resampled, interval, squared_norm, standard_error
from kl_plugins.cli.audit import audit
from kl_plugins.conformance import hosts
from kl_plugins.errors import ConfigError

UNCUT = (0.0, math.inf)
PROMPTS = ["1+2=", "34-5=", "7+8=", "9-9="]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy, a reference, one with another vocabulary, and prompts."""
    root = tmp_path_factory.mktemp("audit")
    make_model(root / "policy", seed=0, spread=8.0)
    make_model(root / "reference", seed=1, spread=8.0)
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return root


@pytest.fixture(scope="module")
def pair(folders):
    return Pair(str(folders / "policy"), str(folders / "reference"), device="cpu")


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
        units(model) if units else [None] * prompts,
        found,
        completions=completions,
        target_completions=target_completions,
        max_new_tokens=3,
        batch=64,
        sketch=Sketch(model.vocabulary, model.hidden),
    )


# The gradients


@pytest.mark.parametrize("off_policy", ["none", "token", "prefix"])
@pytest.mark.parametrize(
    ("name", "credit"), [("k1_in_reward", "to_go"), ("k2_as_loss", "token"), ("k3_as_loss", "token")]
)
def test_a_terms_gradient_is_the_one_that_autograd_gives_the_heads_weight(pair, name, credit, off_policy):
    prompt = pair.prompt_ids("1+2=")
    completions = [[5, 6, 7], [4, 1], [9, 3, 2, 1]]
    behavior = [[-1.0, -2.0, -0.5], [-3.0, -0.1], [-2.0, -2.0, -2.0, -0.3]]
    (scored,) = pair.score(prompt, completions, behavior, batch=8)
    own = own_configurations(off_policy=True)
    found = [c for c in own if (c.name, c.credit, c.off_policy) == (name, credit, off_policy)]
    sketch = Sketch(pair.vocabulary, pair.hidden)
    assert sketch.exact
    gradients = term_gradients(found, scored, sketch, rare=0.0).sampled[0]

    weight = pair.policy.lm_head.weight
    for row, ids in enumerate(completions):
        logits = pair.policy(torch.tensor([prompt + ids])).logits[:, len(prompt) - 1 : -1]
        ref_logits = pair.reference(torch.tensor([prompt + ids])).logits[:, len(prompt) - 1 : -1]
        logp, ref_logp = (
            x.log_softmax(-1).gather(-1, torch.tensor([ids])[..., None])[..., 0] for x in (logits, ref_logits)
        )
        spec = KLSpec.from_name(name, credit=credit, off_policy=off_policy)
        mask = torch.ones_like(logp)
        terms = kl_terms(spec, logp=logp, ref_logp=ref_logp, mask=mask, behavior_logp=torch.tensor([behavior[row]]))
        (expected,) = torch.autograd.grad(terms.loss.sum(), weight)
        torch.testing.assert_close(
            gradients[row].view_as(weight), expected, rtol=1e-3, atol=1e-3 * expected.abs().max()
        )


def test_the_next_token_part_of_the_target_is_the_gradient_of_the_exact_kl(pair):
    prompt, completions = pair.prompt_ids("34-5="), [[5, 6, 1], [4, 1]]
    (scored,) = pair.score(prompt, completions, batch=8)
    _, local, forward = target_gradients(scored, Sketch(pair.vocabulary, pair.hidden))
    weight = pair.policy.lm_head.weight
    for row, ids in enumerate(completions):
        both = [
            model(torch.tensor([prompt + ids])).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
            for model in (pair.policy, pair.reference)
        ]
        p, q = both[0], both[1].detach()
        for found, divergence in ((local, (p.exp() * (p - q)).sum()), (forward, (q.exp() * (q - p)).sum())):
            (expected,) = torch.autograd.grad(divergence, weight, retain_graph=True)
            scale = expected.abs().max()
            torch.testing.assert_close(found[row].view_as(weight), expected, rtol=1e-3, atol=1e-3 * scale)


def test_a_sketch_keeps_inner_products_and_is_linear():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 500, dtype=torch.float64, generator=generator)
    hidden, other = torch.randn(2, 40, dtype=torch.float64, generator=generator)
    products, norms = [], []
    for seed in range(20):
        sketch = Sketch(500, 40, size=2048, seed=seed)
        assert not sketch.exact
        a, b = sketch.outer(first, hidden), sketch.outer(first + second, hidden + 0.5 * other)
        products.append(float(a @ b / ((first @ (first + second)) * (hidden @ (hidden + 0.5 * other)))))
        norms.append(float(a @ a / (first @ first * (hidden @ hidden))))
        torch.testing.assert_close(
            sketch.outer(torch.stack([first, second]), hidden.expand(2, -1)).sum(0),
            sketch.outer(first + second, hidden),
        )
    bound = math.sqrt(8 / 2048)
    for ratios in (products, norms):
        ratios = torch.tensor(ratios)
        assert abs(float(ratios.mean()) - 1) < 3 * bound / math.sqrt(20)
        assert float((ratios - 1).abs().max()) < 4 * bound
    small = Sketch(5, 4)
    assert torch.equal(small.outer(first[:5], hidden[:4]), torch.outer(first[:5], hidden[:4]).flatten())


# The statistics


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


# The hosts' own


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    logp, ref_logp, old_logp = -3 * torch.rand(3, 4, 6, generator=generator)
    mask = torch.arange(6) < torch.tensor([6, 4, 1, 3])[:, None]
    return Tokens(
        logp=logp, ref_logp=ref_logp, mask=mask, behavior_logp=old_logp, host_behavior_logp=old_logp, kl=logp * 0
    )


def host_rows():
    import_openrlhf()
    found, left_out = host_configurations()
    return {row.name: row for row in found}, left_out


def test_hosts_own_functions_are_run(drawn):
    rows, left_out = host_rows()
    assert left_out == ["verl is not installed"]
    corrected, plain = "TRL GRPO (k3, bias correction)", "TRL GRPO (k3)"
    assert re.fullmatch(r"trl [\d.]+: GRPOTrainer._compute_loss, run on .*", rows[corrected].origin)
    assert re.fullmatch(r"openrlhf [\d.]+: compute_approx_kl, run", rows["OpenRLHF k2"].origin)
    u, rho = drawn.logp - drawn.ref_logp, (drawn.logp - drawn.behavior_logp).exp()
    expected = {
        corrected: rho * u,
        plain: -torch.expm1(-u),
        "OpenRLHF k1": torch.ones_like(u),
        "OpenRLHF k2": u,
        "OpenRLHF k3": -torch.expm1(-u),
        "OpenRLHF unbiased_gradient": rho.clamp(max=10) * u,
    }
    for name, coefficient in expected.items():
        found = rows[name].coefficients(drawn).score
        torch.testing.assert_close(found, coefficient * drawn.mask, rtol=1e-4, atol=1e-5)
        on_policy = {corrected: u, "OpenRLHF unbiased_gradient": u}.get(name, coefficient)
        torch.testing.assert_close(rows[name].pointwise(drawn.logp, drawn.ref_logp), on_policy, rtol=1e-4, atol=1e-5)
    frozen = torch.where(drawn.mask, drawn.behavior_logp - drawn.ref_logp, 0.0)
    to_go = frozen.flip(-1).cumsum(-1).flip(-1)
    found = rows["OpenRLHF k1 in reward"].coefficients(drawn).score
    torch.testing.assert_close(found, to_go * rho * drawn.mask, rtol=1e-4, atol=1e-5)


def test_where_trl_can_not_be_run_its_formula_says_so_and_is_the_same(drawn, monkeypatch):
    rows, _ = host_rows()
    monkeypatch.setitem(sys.modules, "trl", None)
    stated, (problem, _) = host_configurations()
    assert "its formula stands for it" in problem
    stated = [row for row in stated if row.name.startswith("TRL")]
    assert len(stated) == 2
    for row in stated:
        assert row.origin.startswith("formula of TRL 1.16, not run")
        found = row.coefficients(drawn).score
        torch.testing.assert_close(found, rows[row.name].coefficients(drawn).score, rtol=1e-4, atol=1e-5)


def test_a_host_that_is_missing_or_broken_is_said_to_be(monkeypatch):
    monkeypatch.setitem(sys.modules, "openrlhf.models.utils", None)
    assert "OpenRLHF is installed, but can't be imported" in hosts.installed("OpenRLHF")[1]
    monkeypatch.setattr(hosts, "installed_version", lambda host: None)
    assert hosts.installed("OpenRLHF") == ([], "OpenRLHF is not installed")


def test_verls_own_function_is_run_where_there_is_one(drawn, monkeypatch):
    def kl_penalty(logp, ref_logp, name):
        if name.endswith("+"):
            raise NotImplementedError
        return {"k1": lambda u: u, "k2": lambda u: u.square() / 2}.get(name, torch.exp)(logp - ref_logp)

    module = types.ModuleType("verl.trainer.ppo.core_algos")
    module.kl_penalty = kl_penalty
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo.core_algos", module)
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    rows, _ = host_rows()
    names = [name.removeprefix("verl ") for name in rows if name.startswith("verl ")]
    assert names == ["k1", "abs", "k2", "k3 (low_var_kl)", "k1 in reward"]
    u = drawn.logp - drawn.ref_logp
    torch.testing.assert_close(rows["verl k2"].coefficients(drawn).score, u * drawn.mask)


def test_tokens_whose_gradient_a_clamp_has_switched_off_are_counted():
    rows, _ = host_rows()
    ours = next(c for c in own_configurations(off_policy=False) if c.label == "k2_as_loss token")
    logp = torch.tensor([[-9.0, -1.0, -1.0, -1.0]])
    ref_logp = torch.tensor([[-1.0, -1.5, -1.0, -9.0]])
    mask = torch.tensor([[True, True, True, False]])
    tokens = Tokens(logp=logp, ref_logp=ref_logp, mask=mask, behavior_logp=None, host_behavior_logp=None, kl=logp * 0)
    dead = {}
    for row in (ours, *rows.values()):
        counts = TokenCounts()
        counts.add(row.coefficients(tokens), tokens, (1.0, 0.0, 3.0, 0.0))
        dead[row.name] = counts.shares()["dead"]
    assert dead["OpenRLHF k2"] == dead["OpenRLHF k3"] == pytest.approx(1 / 3)
    assert dead["k2_as_loss"] == dead["OpenRLHF unbiased_gradient"] == dead["TRL GRPO (k3, bias correction)"] == 0


def test_weights_tail_and_effective_sample_size():
    own = own_configurations(off_policy=True)
    row = next(c for c in own if c.label == "k2_as_loss token, token")
    logp = torch.zeros(1, 200)
    behavior = torch.cat([torch.full((1, 2), -math.log(50.0)), torch.zeros(1, 198)], dim=1)
    tokens = Tokens(
        logp=logp - 1,
        ref_logp=logp - 2,
        mask=torch.ones_like(logp, dtype=torch.bool),
        behavior_logp=behavior - 1,
        host_behavior_logp=behavior - 1,
        kl=logp,
    )
    counts = TokenCounts()
    counts.add(row.coefficients(tokens), tokens, (2.0, 1.0, 200.0, 40.0))
    found = counts.shares()
    assert found["unseen"] == pytest.approx((0.5 - 0.2) / 0.8)
    weights = [10.0] * 2 + [1.0] * 198  # cut at 10
    assert found["weights"] == pytest.approx(
        {
            "ess": sum(weights) ** 2 / sum(w * w for w in weights) / 200,
            "max": 10.0,
            "top_percent": 20 / sum(weights),
            "cut": 0.01,
        }
    )


# Prompts, rollouts and models


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "it has no line"),
        ([{"prompt": "a"}, '{"prompt": "b'], 'line 2: a JSON object was expected, found \'{"prompt": "b\''),
        ([{"prompt": "a"}, "[1]"], "line 2: a JSON object was expected, found [1]"),
        ([{"question": "a"}], "line 1: column 'prompt' was asked for, found 'question'"),
        ([{"prompt": "a"}, {"prompt": "  "}], "line 2: 'prompt' must be a text that isn't empty"),
        ([{"prompt": 3}], "found 3"),
    ],
)
def test_bad_prompts_are_refused_by_line(tmp_path, rows, says):
    path = lines(tmp_path / "prompts.jsonl", *rows)
    with pytest.raises(ConfigError, match=re.escape(says)):
        read_prompts(path, "prompt", limit=9, seed=0)


def test_more_prompts_than_asked_for_are_thinned_out_by_seed(tmp_path):
    path = lines(tmp_path / "prompts.jsonl", *({"prompt": str(i)} for i in range(50)))
    first, again, other = (read_prompts(path, "prompt", limit=5, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 5
    with pytest.raises(ConfigError, match="can't be read"):
        read_prompts(tmp_path / "none.jsonl", "prompt", limit=5, seed=0)


GOOD = {"prompt": "1+2=", "completion_ids": [4, 1], "behavior_logp": [-1.0, -0.5]}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (GOOD | {"behavior_logp": [-1.0]}, "needs one log-prob for each of 2 tokens, found 1 entries"),
        (GOOD | {"behavior_logp": [-1.0, math.nan]}, "behavior_logp[1] is nan"),
        (GOOD | {"behavior_logp": [-1.0, None]}, "behavior_logp[1] is nothing"),
        (GOOD | {"behavior_logp": [0.7, -1.0]}, "behavior_logp[0] is 0.7, not the natural log of a probability"),
        ({"prompt": "1+2=", "completion_ids": [4, 1]}, "in some lines and not in others"),
        ({"prompt": "1+2=", "completion": "3"}, "completion_ids, the sampled token ids, were expected, found nothing"),
        (GOOD | {"completion_ids": []}, "found []"),
        (GOOD | {"prompt_ids": "1"}, "prompt_ids are a list of one or more token ids"),
    ],
)
def test_bad_rollouts_are_refused_by_line(tmp_path, row, says):
    path = lines(tmp_path / "rollouts.jsonl", GOOD, row)
    with pytest.raises(ConfigError, match=rf"rollouts.jsonl, line 2: .*{re.escape(says)}"):
        read_rollouts(path, "prompt", limit=9, seed=0)


def test_rollouts_are_grouped_by_prompt_and_single_ones_refused(tmp_path):
    path = lines(tmp_path / "rollouts.jsonl", GOOD, GOOD | {"prompt": "x"}, GOOD, GOOD | {"prompt": "x"})
    found = read_rollouts(path, "prompt", limit=9, seed=0)
    assert [(len(r.completions), len(r.behavior_logp)) for r in found] == [(2, 2), (2, 2)]
    with pytest.raises(ConfigError, match="1 of 2 prompts have a single completion"):
        read_rollouts(lines(path, GOOD, GOOD | {"prompt": "x"}, GOOD), "prompt", limit=9, seed=0)


def test_models_of_two_vocabularies_or_tokenizers_are_refused(folders, tmp_path):
    policy, other = str(folders / "policy"), tmp_path / "other"
    make_model(other, seed=2, spread=1.0)
    tokenizer = AutoTokenizer.from_pretrained(other)
    vocabulary = tokenizer.backend_tokenizer.to_str().replace('"7":9', '"x":9')
    (other / "tokenizer.json").write_text(vocabulary)
    with pytest.raises(ConfigError, match=r"differ in 2 tokens, such as '7' \(9 and None\)"):
        Pair(policy, str(other))
    model = AutoModelForCausalLM.from_pretrained(other)
    model.resize_token_embeddings(20)
    model.save_pretrained(other)
    with pytest.raises(ConfigError, match=r"has a vocabulary of 16 and the reference .* one of 20"):
        Pair(policy, str(other))
    with pytest.raises(ConfigError, match="its tokenizer can't be loaded"):
        Pair(str(tmp_path / "nowhere"), policy)


def test_completions_are_drawn_from_the_policy_itself(folders):
    pair = Pair(str(folders / "policy"), str(folders / "reference"), device="cpu")
    pair.policy.generation_config.update(top_k=1, temperature=0.1, repetition_penalty=5.0, suppress_tokens=[5])
    torch.manual_seed(0)
    prompt = pair.prompt_ids("1+2=")
    drawn = pair.sample(prompt, 4000, max_new_tokens=2)
    logits = pair.policy(torch.tensor([prompt])).logits[0, -1]
    expected = logits.softmax(-1)
    found = torch.bincount(torch.tensor([ids[0] for ids in drawn]), minlength=16) / len(drawn)
    assert float((found - expected).detach().abs().max()) < 4 * math.sqrt(0.25 / len(drawn))
    assert all(1 not in ids[:-1] and 1 <= len(ids) <= 2 for ids in drawn)  # 1 ends a completion


def test_a_prompt_that_leaves_too_few_positions_is_said(pair):
    assert pair.room([2] * 60, 64) == 4
    with pytest.raises(ConfigError, match="a prompt has 64 tokens, but the model has 64 positions"):
        pair.room([2] * 64, 1)
    with pytest.raises(ConfigError, match="unknown token"):
        pair.prompt_ids([99])
    with pytest.raises(ConfigError, match="a prompt is a chat, but the tokenizer can't format it"):
        pair.prompt_ids([{"role": "user", "content": "1+2="}])


# The command


app = typer.Typer()
app.command()(audit)


def invoke(folders, *arguments, code=0, out=None):
    words = ["--model", str(folders / "policy"), "--reference", str(folders / "reference")]
    words += ["--completions", "2", "--target-completions", "4", "--max-new-tokens", "6", "--device", "cpu"]
    words += ["--out", str(out)] if out else []
    result = CliRunner().invoke(app, [*words, *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def strict(path):
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(path.read_text(), parse_constant=refuse)


def test_the_command_writes_a_page_and_the_numbers(folders, tmp_path):
    said = invoke(folders, "--prompts", folders / "prompts.jsonl", "--no-hosts", out=tmp_path / "<script>out")
    found = strict(tmp_path / "<script>out" / "audit.json")
    page = (tmp_path / "<script>out" / "audit.html").read_text()
    assert found["status"] == "complete"
    assert found["data"]["prompts"] == 4
    assert found["data"]["completions"] == 8
    assert found["cost"]["tokens_through_both_models"] > 0
    assert found["versions"]["torch"] == torch.__version__
    labels = [row["label"] for row in found["rows"]]
    assert "k1_in_reward to_go" in labels
    assert "k3_in_reward to_go" in labels
    assert "exact_in_reward to_go" in labels
    assert all(label in page for label in labels)
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!#)|url\((?!#)|@import', page)
    assert "Only 8 completions" in said
    assert "0 of" not in page


def test_the_same_seed_gives_the_same_numbers(folders, tmp_path):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        invoke(folders, "--prompts", folders / "prompts.jsonl", "--no-hosts", "--seed", seed, out=tmp_path / name)
        found.append(strict(tmp_path / name / "audit.json")["rows"])
    assert found[0] == found[1] != found[2]


def test_rollouts_of_another_policy_are_audited_off_policy(folders, tmp_path, pair):
    torch.manual_seed(0)
    rows = []
    for prompt in PROMPTS:
        ids = pair.prompt_ids(prompt)
        for completion in pair.sample(ids, 3, max_new_tokens=5):
            rows.append({"prompt": prompt, "completion_ids": completion, "behavior_logp": [-1.0] * len(completion)})
    path = lines(tmp_path / "rollouts.jsonl", *rows)
    import_openrlhf()
    invoke(folders, "--rollouts", path, out=tmp_path / "out")
    found = strict(tmp_path / "out" / "audit.json")
    labels = [row["label"] for row in found["rows"]]
    assert {f"k1_in_reward to_go, {kind}" for kind in ("none", "token", "prefix", "sequence")} <= set(labels)
    assert {"TRL GRPO (k3, bias correction)", "OpenRLHF k1 in reward"} <= set(labels)
    assert found["data"]["off_policy"]
    assert found["data"]["completions"] == 12
    assert found["left_out"] == ["verl is not installed"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", ""], "--model wasn't given: an audit is of your own models"),
        ([], "neither of --prompts and --rollouts were given"),
        (["--prompts", "p", "--rollouts", "r"], "both of --prompts and --rollouts were given"),
        (["--rollouts", "r", "--vllm"], "--vllm draws completions, but --rollouts has them already"),
        (["--prompts", "p", "--dtype", "int8"], "--dtype int8: choose from float32"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl can't be read"),
    ],
)
def test_bad_options_are_refused(folders, arguments, says):
    assert says in invoke(folders, *arguments, code=2)


def test_a_device_or_engine_that_is_not_there_is_refused(folders, monkeypatch):
    prompts = ["--prompts", folders / "prompts.jsonl", "--no-hosts"]
    assert "device 'cuda:7' was asked for, but" in invoke(folders, *prompts, "--device", "cuda:7", code=2)
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "--vllm was asked for, but vLLM can't be imported" in invoke(folders, *prompts, "--vllm", code=2)


def test_log_probs_that_are_not_finite_are_an_error(folders, tmp_path):
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(folders / "reference")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    model.save_pretrained(broken)
    arguments = ["--reference", broken, "--prompts", folders / "prompts.jsonl", "--no-hosts"]
    said = invoke(folders, *arguments, code=2)
    assert re.search(r"prompt 1: \d+ of \d+ sampled tokens have a log-probability or next-token KL that isn't", said)


@pytest.mark.parametrize("done", [0, 1, 3])
def test_an_interruption_leaves_a_report_on_what_was_done(folders, tmp_path, monkeypatch, done):
    sample, calls = Pair.sample, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) > done:
            raise KeyboardInterrupt
        return sample(self, *arguments, **options)

    monkeypatch.setattr(Pair, "sample", interrupted)
    arguments = ["--prompts", folders / "prompts.jsonl", "--no-hosts"]
    said = invoke(folders, *arguments, code=130, out=tmp_path / "out")
    if not done:
        assert "nothing to report" in said
        assert not (tmp_path / "out").exists()
        return
    found = strict(tmp_path / "out" / "audit.json")
    assert found["status"] == "partial"
    assert found["data"]["prompts"] == done
    page = (tmp_path / "out" / "audit.html").read_text()
    assert "(partial)</h1>" in page
    assert f"interrupted after {done} of 4 prompts" in page


def test_ctrl_c_at_any_moment_leaves_a_report(folders, tmp_path, monkeypatch):
    """A real SIGINT, from a timer: it arrives wherever the audit happens to be, not between two prompts."""
    prompts = lines(tmp_path / "prompts.jsonl", *({"prompt": p} for p in PROMPTS * 500))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    sample, drawn = Pair.sample, []

    def counted(self, *arguments, **options):
        drawn.append(1)
        if len(drawn) == 4:
            timer.start()
        return sample(self, *arguments, **options)

    monkeypatch.setattr(Pair, "sample", counted)
    try:
        invoke(folders, "--prompts", prompts, "--no-hosts", "--max-prompts", 2000, code=130, out=tmp_path / "out")
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    found = strict(tmp_path / "out" / "audit.json")
    assert found["status"] == "partial"
    assert 3 <= found["data"]["prompts"] <= len(drawn) < 2000


def test_without_matplotlib_the_page_has_its_tables(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "can_draw", lambda: False)
    invoke(folders, "--prompts", folders / "prompts.jsonl", "--no-hosts", out=tmp_path)
    page = (tmp_path / "audit.html").read_text()
    assert "<svg" not in page
    assert "pip install &#39;kl_plugins[plot]&#39;" in page


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_draws_from_the_same_policy(folders, pair):
    from kl_plugins.audit.engine import vllm_rollouts

    prompts = [pair.prompt_ids(p) for p in PROMPTS]
    found = vllm_rollouts(
        str(folders / "policy"), prompts, completions=8, max_new_tokens=6, ends=pair.ends, seed=0, dtype="float32"
    )
    for prompt, rollouts in zip(prompts, found, strict=True):
        assert rollouts.by_engine
        (scored,) = pair.score(prompt, rollouts.completions, rollouts.behavior_logp, batch=8)
        logp = scored.logits.log_softmax(-1).gather(-1, scored.tokens[..., None])[..., 0]
        torch.testing.assert_close(logp[scored.mask], scored.behavior_logp[scored.mask], rtol=0, atol=1e-3)
