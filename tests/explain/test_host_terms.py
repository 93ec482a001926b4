"""What `kl-plugins explain` says of the hosts is true: their defaults, their lines, the gradients of their terms."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest
import torch
import trl
from tiny_openrlhf import import_openrlhf, parse
from trl.experimental.gmpo import GMPOTrainer
from trl_versions import CACHE

from kl_plugins.conformance.hosts import grpo_loss
from kl_plugins.core.registry import GRADIENTS, LOSSES
from kl_plugins.explain.host_terms import MARKS, OPTIONS, OURS, TERMS
from kl_plugins.oracle import (
    enumerate_sequences,
    relative_error,
    sequence_probability,
    structured_policies,
    token_logp,
    true_gradient,
)

FLAG_DEFAULTS = ("algo", "actor", "rollout", "train")


def test_defaults_are_the_hosts_own():
    configs = {"grpo": trl.GRPOConfig, "rloo": trl.RLOOConfig, "gmpo": trl.experimental.gmpo.GMPOConfig}
    for trainer, config in configs.items():
        fields = {field.name: field.default for field in dataclasses.fields(config)}
        assert {name: fields[name] for name in OPTIONS[trainer]} == {n: d for n, (_, d) in OPTIONS[trainer].items()}
        assert set(MARKS["grpo" if trainer == "gmpo" else trainer]) <= set(fields)
    assert not set(MARKS["rloo"]) & {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    assert not set(MARKS["grpo"]) & {field.name for field in dataclasses.fields(trl.RLOOConfig)}
    args = parse("--reward.remote_url", "reward.py", "--vllm.num_engines", "1")
    for name, (_, default) in OPTIONS["openrlhf"].items():
        value = args
        for part in name.split("."):
            value = getattr(value, part)
        assert value == default, name


def test_defaults_of_ppo_are_the_hosts_own():
    source = CACHE / "trl-1.12.0/trl/experimental/ppo/ppo_config.py"
    if not source.is_file():
        pytest.skip("TRL 1.12.0 was not fetched: make matrix")
    (config,) = (node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef))
    found = {}
    for node in config.body:
        if isinstance(node, ast.AnnAssign):
            (default,) = (word.value for word in node.value.keywords if word.arg == "default")
            found[node.target.id] = ast.literal_eval(default)
    assert {name: found[name] for name in OPTIONS["ppo"]} == {n: d for n, (_, d) in OPTIONS["ppo"].items()}
    assert set(MARKS["ppo"]) - {"kl_placement"} <= set(found)


# Source of a term -> what stands in these lines of it.
STANDS_THERE = {
    "grpo": ("per_token_kl = per_token_kl * coef_1", "per_token_loss = per_token_loss + self.beta * per_token_kl"),
    "gmpo": ("seq_kl = (per_token_kl * mask).sum(-1) / mask.sum(-1)", "loss = per_sequence_loss.mean()"),
    "rloo": ("rewards = rewards - self.beta * kl", "advantages = rewards - baselines", "coef_1 * advantages"),
    "ppo": ("non_score_reward = -args.kl_coef * kl",),
    "openrlhf_loss_k3": ("value = value.clamp(min=-10, max=10)", "loss = actor_loss + kl_loss * kl_ctl"),
    "openrlhf_reward_k1": ("kl_reward = -kl_coef * kl", "kl = compute_approx_kl(", "self.kl_ctl.value"),
}


@pytest.mark.parametrize("name", STANDS_THERE)
def test_what_was_read_stands_where_it_is_said_to(name):
    text, root, file = "", Path(trl.__file__).parents[1], ""
    if name == "ppo":
        root = CACHE / "trl-1.12.0"
        if not root.is_dir():
            pytest.skip("TRL 1.12.0 was not fetched: make matrix")
    for part in TERMS[name].source.split(", "):
        file, lines = part.split(":") if ":" in part else (file, part)
        first, last = map(int, lines.split("-"))
        text += "\n".join((root / file).read_text().splitlines()[first - 1 : last]) + "\n"
    assert all(words in text for words in STANDS_THERE[name]), text


SEQUENCES = enumerate_sequences(vocabulary=3, length=3)


def per_token(name, logp, ref_logp, old_logp, mask):
    """The loss of one sequence, (1, T) inputs, summed over its tokens: by the host's own function."""
    if name.startswith("openrlhf_loss"):
        import_openrlhf()
        from openrlhf.models.utils import compute_approx_kl

        *_, estimator = name.split("_")
        unbiased = estimator == "unbiased"
        kl = compute_approx_kl(
            logp, ref_logp, old_logp, kl_estimator="k3" if unbiased else estimator, unbiased_gradient=unbiased
        )
        return (kl * mask).sum()
    if name.startswith("openrlhf_reward"):
        return -(openrlhf_advantages(name[-2:], old_logp, ref_logp, mask) * (logp - old_logp).exp() * mask).sum()
    options = {
        "grpo_plain": {"use_bias_correction_kl": False},
        "grpo_sequence": {"importance_sampling_level": "sequence"},
    }.get(name, {})
    trainer = GMPOTrainer if name == "gmpo" else trl.GRPOTrainer
    loss = grpo_loss(trainer, logp, ref_logp=ref_logp, old_logp=old_logp, mask=mask, **options)
    return loss * (mask.sum() if name == "gmpo" else 1)  # GMPO divides by the length; that is a flaw of its own


def openrlhf_advantages(estimator, old_logp, ref_logp, mask):
    import_openrlhf()
    from openrlhf.models.utils import compute_approx_kl, compute_reward
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    kl = compute_approx_kl(old_logp, ref_logp, kl_estimator=estimator)
    reward = compute_reward(torch.zeros(len(kl)), 1.0, kl, action_mask=mask)
    return RemoteExperienceMaker.get_cumulative_returns(None, reward, mask, 1.0)


def host_gradient(name, policy, reference, behavior=None, sequences=SEQUENCES):
    """(S, V) exact expected gradient of a host's term, sampled from `behavior` (None: on-policy)."""
    theta = policy.clone().requires_grad_()
    sampler = policy if behavior is None else behavior
    probability = sequence_probability(sampler, sequences)
    logp, ref, old = (token_logp(logits, sequences) for logits in (theta, reference, sampler))
    rows = [
        p * per_token(name, logp[i : i + 1], ref[i : i + 1], old[i : i + 1].detach(), sequences.mask[i : i + 1])
        for i, p in enumerate(probability)
    ]
    return torch.autograd.grad(sum(rows), theta)[0]


def named(gradient, policy, reference, rtol, **options):
    divergences = ("reverse_kl", "local_reverse_kl", "forward_kl", "local_forward_kl", "zero")
    return [
        of
        for of in divergences
        if relative_error(gradient, true_gradient(of, SEQUENCES, policy, reference, **options)) < rtol
    ]


ENUMERATED = [name for name in TERMS if name not in ("rloo", "ppo", "ppo_k3")]


@pytest.mark.parametrize("name", ENUMERATED)
def test_the_gradient_of_a_hosts_term_by_its_own_function(name):
    """OpenRLHF's computes in float32. The policies stay within its clamps, whose dead zone is a flaw of its own."""
    policy, reference, _ = structured_policies(SEQUENCES, seed=2, strength=1.0)
    gap = ((token_logp(policy, SEQUENCES) - token_logp(reference, SEQUENCES)) * SEQUENCES.mask).abs().max()
    assert gap < 2.6
    found = named(host_gradient(name, policy, reference), policy, reference, 1e-5 if "openrlhf" in name else 1e-10)
    declared = TERMS[name].gradient_of
    assert found == ([] if declared == "biased" else [declared])


@pytest.mark.parametrize("name", ["openrlhf_loss_k2", "openrlhf_loss_k3"])
def test_beyond_its_clamp_the_gradient_is_that_of_no_divergence(name):
    policy, reference, _ = structured_policies(SEQUENCES, seed=0, strength=6.0)
    assert named(host_gradient(name, policy, reference), policy, reference, 1e-2) == []
    unclamped = host_gradient("openrlhf_loss_unbiased", policy, reference)
    assert named(unclamped, policy, reference, 1e-5) == ["local_reverse_kl"]


@pytest.mark.parametrize(
    "name", [name for name in ENUMERATED if not TERMS[name].in_reward and name != "grpo_sequence"]
)
def test_which_terms_weigh_stale_samples(name):
    policy, reference, behavior = structured_policies(SEQUENCES, seed=2, strength=1.0)
    gradient = host_gradient(name, policy, reference, behavior)
    found = named(gradient, policy, reference, 1e-5, prefixes_of=behavior)
    assert (TERMS[name].gradient_of in found) == TERMS[name].weighs_stale


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_what_biased_rewards_are_instead(estimator):
    policy, reference, _ = structured_policies(SEQUENCES, seed=2, strength=1.0)
    theta = policy.clone().requires_grad_()
    u = token_logp(theta, SEQUENCES) - token_logp(reference, SEQUENCES)
    k2 = (sequence_probability(theta, SEQUENCES) * (u.square() / 2 * SEQUENCES.mask).sum(-1)).sum()
    true = {of: true_gradient(of, SEQUENCES, policy, reference) for of in GRADIENTS[:4]}
    expected = {
        "k2": torch.autograd.grad(k2, theta)[0] - true["local_reverse_kl"],
        "k3": true["reverse_kl"] - true["local_forward_kl"],
    }
    found = host_gradient(f"openrlhf_reward_{estimator}", policy, reference)
    assert relative_error(found, expected[estimator]) < 1e-5
    assert relative_error(found, true["reverse_kl"]) > 1e-2


def test_a_reused_reward_has_the_gradient_that_is_said():
    """On sequences of one token, whose ratio is the whole of the sequence's."""
    single = enumerate_sequences(vocabulary=5, length=1)
    policy, reference, old = (torch.randn(1, 5, dtype=torch.float64, generator=torch.manual_seed(i)) for i in range(3))
    found = host_gradient("openrlhf_reward_k1", policy, reference, old, sequences=single)
    to_reference, to_old = (true_gradient("reverse_kl", single, policy, anchor) for anchor in (reference, old))
    assert relative_error(found, to_reference - to_old) < 1e-5
    assert relative_error(found, to_reference) > 1e-2


def test_every_credit_of_ours_has_a_formula():
    assert {(name, credit) for name, loss in LOSSES.items() for credit in loss.gradient_of} <= set(OURS)
