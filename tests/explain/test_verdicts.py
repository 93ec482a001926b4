"""`kl-plugins explain` of whole configurations: verdicts, remedies that hold, and facts about hosts that are true."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import trl
from tiny_openrlhf import import_openrlhf, parse
from trl.experimental.gmpo import GMPOTrainer
from trl_versions import CACHE
from typer.testing import CliRunner

import kl_plugins.explain.run
from kl_plugins import ConfigError, UnknownLossError, all_losses
from kl_plugins.cli import app
from kl_plugins.conformance.hosts import grpo_loss
from kl_plugins.core.registry import GRADIENTS, LOSSES
from kl_plugins.explain import explain_words
from kl_plugins.explain.host_terms import MARKS, OPTIONS, OURS, TERMS
from kl_plugins.explain.pitfalls import TRAPS
from kl_plugins.explain.reading import convert, from_flags, read_flags
from kl_plugins.explain.run import kl_options
from kl_plugins.explain.verdict import explain_run
from kl_plugins.openrlhf.plan import OpenRLHFOptions, plan_run
from kl_plugins.oracle import (
    enumerate_sequences,
    relative_error,
    sequence_probability,
    structured_policies,
    token_logp,
    true_gradient,
)
from kl_plugins.trl import GRPOConfig, RLOOConfig


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, ["explain", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


# Trainer, what is written, verdict, a word of the explanation.
ON_POLICY = "--rollout.batch_size 128 --train.batch_size 128"
LOSS = f"{ON_POLICY} --algo.kl.use_loss --algo.kl.estimator"
CASES = [
    # tokens left out, and references
    ("grpo", "--beta 0.04 --kl k1_in_reward --kl_leave_out eos special", "principled", "generalized one"),
    ("rloo", "--beta 0.04 --kl k2_as_loss --kl_leave_out first", "principled", "u"),
    ("grpo", "--beta 0.04 --kl k2_in_reward --kl_leave_out eos --kl_allow_biased", "refused", "known for k1 only"),
    ("grpo", "--beta 0.04 --kl k2_as_loss --kl_leave_out_equal_rewards true", "principled", "rewards differ"),
    ("ppo", "--kl k1_in_reward --kl_leave_out eos", "refused", "only those before it owe"),
    ("ppo", "--kl k2_as_loss --kl_leave_out_equal_rewards true", "refused", "PPO generates one"),
    ("rloo", "--kl k1_in_reward --kl_clip combined --kl_credit sequence --kl_leave_out eos", "refused", "of its own"),
    ("grpo", "--beta 0.04 --kl k2_as_loss --kl_reference_every 100", "principled", "not how far"),
    (
        "rloo",
        "--beta 0.04 --kl k2_as_loss --kl_reference base --kl_reference_every 9",
        "refused",
        "no adapter to move",
    ),
    ("grpo", "--beta 0.04 --kl k2_as_loss --kl_reference_decay 0.9", "refused", "moves nothing by itself"),
    ("openrlhf", "--kl k2_as_loss --kl-leave-out first", "principled", ""),
    ("openrlhf", "--kl k1_in_reward --kl-leave-out eos", "refused", "use kl_placement='loss'"),
    # TRL as it is
    ("grpo", "", "void", "beta=0, the default"),
    ("grpo", "--beta 0.04", "principled", "rho * u"),
    ("grpo", "--beta 0.04 --num_iterations 4", "principled", "weighted token by token"),
    ("grpo", "--beta 0.04 --use_vllm", "principled", "with kl= it is"),
    ("grpo", "--beta -0.1", "biased", "drives the policy away"),
    ("grpo", "--beta 0.04 --use_bias_correction_kl false", "another divergence", "1 - exp(-u)"),
    ("grpo", "--beta 0.04 --no_use_bias_correction_kl --num_iterations 2", "biased", "not weighted"),
    ("grpo", "--beta 0.04 --no_use_bias_correction_kl --steps_per_generation 2", "biased", "not weighted"),
    ("grpo", "--beta 0.04 --importance_sampling_level sequence", "biased", "one differentiated ratio"),
    ("grpo", "--beta 0.04 --loss_type grpo", "biased", "its own length"),
    ("grpo", "--beta 0.04 --loss_type sapo", "biased", "its own length"),
    ("grpo", "--beta 0.04 --top_p 0.9", "biased", "another distribution"),
    ("grpo", '--beta 0.04 --generation_kwargs {"min_p":0.1}', "biased", "min_p"),
    ("gmpo", "--beta 0.04", "biased", "GMPO divides"),
    ("rloo", "", "principled", "sum of all u"),
    ("rloo", "--num_iterations 2", "biased", "frozen at rollout"),
    ("rloo", "--normalize_advantages true", "principled", "a nat doesn't cost beta"),
    ("rloo", "--beta 0", "void", "no KL is applied"),
    ("ppo", "", "biased", "frozen at rollout"),
    ("ppo", "--num_ppo_epochs 1", "principled", "critic"),
    ("ppo", "--num_ppo_epochs 1 --kl_estimator k3", "biased", "can point away"),
    ("ppo", "--num_ppo_epochs 1 --gamma 0.9", "biased", "discounts"),
    ("ppo", "--num_ppo_epochs 1 --whiten_rewards", "biased", "rewards length"),
    ("ppo", "--kl_coef 0", "void", "no KL is applied"),
    # TRL with our term
    ("grpo", "--beta 0.04 --kl k2_as_loss --num_iterations 4 --use_vllm", "principled", "vLLM itself"),
    ("grpo", "--beta 0.04 --kl k1_in_reward --num_iterations 4", "principled", "bias of the prefixes"),
    ("grpo", "--beta 0.04 --kl k1_in_reward --kl-off-policy prefix --num_iterations 4", "principled", "unbiased"),
    ("grpo", "--beta 0.04 --kl k2_as_loss --kl_off_policy none --num_iterations 4", "biased", "older policy"),
    ("grpo", "--beta 0.04 --kl k3_as_loss", "another divergence", "bounded at 1e+06"),
    ("grpo", "--beta 0.04 --kl k1_as_loss", "refused", "or pass kl_allow_biased=True"),
    ("grpo", "--beta 0.04 --kl k1_as_loss --kl_allow_biased", "zero", "lets it through"),
    ("grpo", "--beta 0.04 --kl k3_in_reward", "refused", "grad reverse KL - grad local forward KL"),
    ("grpo", "--beta 0.04 --kl k1_in_reward --kl_gamma 0.9", "refused", "use kl_gamma=1"),
    ("grpo", "--beta 0.04 --kl k1_in_reward --kl_gamma 0.9 --kl_allow_biased", "biased", "kl_gamma=0.9 discounts"),
    ("grpo", "--beta 0.04 --kl k2_as_loss --kl_gamma 0.9", "refused", "only kl_credit='to_go' discounts"),
    ("grpo", "--beta 0.04 --kl_off_policy none", "refused", "kl is None"),
    ("grpo", "--beta 0.04 --kl k2_as_loss --kl_controller pi", "refused", "needs kl_target"),
    ("grpo", "--kl k2_as_loss", "refused", "set a positive finite beta"),
    ("grpo", "--beta 0.04 --kl k2_as_loss --top_k 50", "refused", "top_k=50"),
    ("grpo", "--beta 0.04 --kl k2_as_loss --top_k 50 --kl_allow_biased", "biased", "top_k=50"),
    ("grpo", "--beta 0.04 --kl k2_as_loss --loss_type grpo", "biased", "its own length"),
    ("grpo", "--beta 0.04 --kl k2_as_loss --use_bias_correction_kl false", "refused", "use kl_off_policy"),
    ("grpo", "--beta 0.04 --kl k2_as_loss --kl_clip combined --top_entropy_quantile 0.5", "refused", "masks tokens"),
    (
        "grpo",
        "--beta 0.04 --kl k2_as_loss --kl_clip combined --kl_weight_clip 0 2",
        "refused",
        "kl_weight_clip=[0.0, 2.0] is not",
    ),
    ("gmpo", "--beta 0.04 --kl k2_as_loss", "biased", "GMPO divides"),
    ("rloo", "--kl k1_in_reward --num_iterations 2 --kl_off_policy prefix", "principled", "unbiased"),
    ("rloo", "--kl k1_in_reward --kl_clip combined", "refused", "kl_credit='sequence'"),
    ("rloo", "--kl k1_in_reward --kl_clip combined --kl_credit sequence", "principled", "own ratio and clip"),
    ("ppo", "--kl k1_in_reward", "principled", "brought up to date"),
    ("ppo", "--kl k2_as_loss", "principled", "each token's own bias"),
    ("ppo", "--kl k1_in_reward --kl_estimator k3", "refused", "leave it out"),
    ("ppo", "--kl k1_in_reward --kl_off_policy prefix", "refused", "not used in the reward"),
    ("ppo", "--kl k1_in_reward --kl_baseline leave_one_out", "refused", "several completions"),
    ("ppo", "--kl k1_in_reward --gamma 0.9", "refused", "use gamma=1"),
    ("ppo", "--kl k1_in_reward --gamma 0.9 --kl_allow_biased", "biased", "gamma=0.9 discounts"),
    # OpenRLHF as it is
    ("openrlhf", "", "biased", "frozen at rollout"),
    ("openrlhf", ON_POLICY, "principled", "centred and divided"),
    ("openrlhf", f"{ON_POLICY} --algo.advantage.estimator group_norm", "principled", "min_tokens=1"),
    ("openrlhf", f"{ON_POLICY} --algo.kl.init_coef 0", "void", "no KL is applied"),
    ("openrlhf", f"{ON_POLICY} --algo.kl.estimator k2", "biased", "grad E[sum k2]"),
    ("openrlhf", f"{ON_POLICY} --algo.kl.estimator k3", "biased", "can point away"),
    ("openrlhf", f"{ON_POLICY} --rollout.top_p 0.9", "biased", "--rollout.top_p 0.9 draws"),
    ("openrlhf", f"{ON_POLICY} --actor.loss_agg_mode seq-mean-token-mean", "biased", "its length"),
    ("openrlhf", f"{ON_POLICY} --actor.policy_loss_type gspo", "biased", "gspo gives every token the mean"),
    ("openrlhf", f"{ON_POLICY} --algo.advantage.gamma 0.9", "biased", "gamma 0.9 discounts"),
    ("openrlhf", f"{ON_POLICY} --train.async_enable", "biased", "nobody knows how stale"),
    ("openrlhf", f"{LOSS} k1", "zero", "adds noise"),
    ("openrlhf", f"{LOSS} k2", "biased", "exactly 0"),
    ("openrlhf", f"{LOSS} k3", "biased", "13.6 times less likely"),
    ("openrlhf", f"{LOSS} k3 --algo.kl.unbiased_gradient", "principled", "min(rho, 10) * u"),
    ("openrlhf", "--algo.kl.use_loss --algo.kl.unbiased_gradient", "principled", "at most 10"),
    ("openrlhf", f"{ON_POLICY} --algo.kl.unbiased_gradient", "principled", "is ignored"),
    (
        "openrlhf",
        f"{LOSS} k2 --algo.kl.unbiased_gradient --train.async_enable --algo.advantage.is_correction_level token",
        "biased",
        "don't reach the KL in the loss",
    ),
    # OpenRLHF with our term
    ("openrlhf", "--kl k2_as_loss -- --algo.kl.init_coef 0.02", "principled", "against the trainer's old policy"),
    (
        "openrlhf",
        "--kl k2_as_loss --kl-weight-clip 0 5 -- --algo.advantage.is_correction_level token",
        "principled",
        "",
    ),
    ("openrlhf", "--kl k1_in_reward", "principled", "brought up to date"),
    ("openrlhf", "--kl k1_as_loss", "refused", "or pass kl_allow_biased=True"),
    ("openrlhf", "--kl k1_as_loss --kl-allow-biased", "zero", "lets it through"),
    ("openrlhf", "--kl k2_as_loss -- --rollout.top_p 0.9", "refused", "top_p"),
    ("openrlhf", "--kl k2_as_loss -- --train.async_enable", "refused", "nobody knows"),
    ("openrlhf", "--kl k2_as_loss --kl-off-policy none", "biased", "older policy"),
    ("openrlhf", "--kl k2_as_loss -- --algo.kl.init_coef 0", "refused", "it must be positive"),
    ("openrlhf", "--kl k2_as_loss -- --algo.kl.estimator k3", "refused", "which kl replaces"),
    ("openrlhf", "--kl k1_in_reward -- --algo.kl.use_loss", "refused", "leave it out"),
    ("openrlhf", "--kl k1_in_reward -- --actor.loss_agg_mode seq-mean-token-mean", "refused", "its length"),
    ("openrlhf", "--kl k1_in_reward -- --algo.advantage.gamma 0.9", "refused", "use --algo.advantage.gamma 1"),
    ("openrlhf", "--kl-off-policy none", "refused", "no KL was named"),
    ("openrlhf", "--kl k2_as_loss --kl-clip combined", "refused", "use kl_placement='reward'"),
]
CODES = {"principled": 0, "another divergence": 0, "refused": 2}


def options_of(trainer):
    return ["--host", "openrlhf"] if trainer == "openrlhf" else ["--trainer", trainer]


def given_by(trainer, written):
    return from_flags(read_flags(written.split()), trl=trainer != "openrlhf")


@pytest.mark.parametrize(("trainer", "written", "verdict", "word"), CASES, ids=lambda value: str(value)[:60])
def test_verdict_and_exit_code(trainer, written, verdict, word):
    code = CODES.get(verdict, 1)
    found = json.loads(invoke("--json", *options_of(trainer), "--", *written.split(), code=code))
    assert (found["verdict"], found["exit_code"]) == (verdict, code)
    said = invoke(*options_of(trainer), "--", *written.split(), code=code)
    assert f": {verdict} (exit code {code})" in said
    assert word in " ".join(said.split())
    assert all(" ".join(note.split()) in " ".join(said.split()) for note in found["notes"])
    assert found["gradient_of"] in GRADIENTS
    assert found["meaning"] in " ".join(said.split())
    assert found["instead"] in said if found["change"] else "nothing has to change" in said
    assert bool(found["change"]) == (verdict != "principled")


@pytest.mark.parametrize(("trainer", "written"), [case[:2] for case in CASES if case[2] != "principled"])
def test_what_is_to_be_used_instead_is_principled(trainer, written):
    given = given_by(trainer, written)
    change = explain_run(given, trainer).change
    assert all(name in given for name, value in change.items() if value is None)
    mended = {name: value for name, value in {**given, **change}.items() if value is not None}
    found = explain_run(mended, "grpo" if trainer == "gmpo" else trainer)
    assert found.verdict == "principled", [flaw.says for flaw in found.flaws]


RARER = [
    ("grpo", "--beta 0.1 --sync_ref_model", "the reference follows the policy"),
    ("rloo", "--mask_truncated_completions", "completions that ended"),
    ("openrlhf", f"{LOSS} k2 --algo.kl.target 6", "adapts beta to that wrong number"),
    ("openrlhf", f"{ON_POLICY} --algo.dynamic_filtering_enable", "the prompts that remain"),
    ("openrlhf", f"{ON_POLICY} --algo.advantage.lambd 0.9", "the critic's word"),
    ("gmpo", "--beta 0.1 --kl k2_as_loss --kl_clip combined", "one number a sequence"),
]


def texts(trainer, written):
    found = explain_run(given_by(trainer, written), trainer)
    return [*found.notes, *(flaw.says for flaw in found.flaws)]


@pytest.mark.parametrize(("trainer", "written", "word"), RARER)
def test_rarer_settings(trainer, written, word):
    assert any(word in text for text in texts(trainer, written))


def test_every_trap_is_sprung_by_a_case():
    said = [text for trainer, written, *_ in (*CASES, *RARER) for text in texts(trainer, written)]
    for trap in TRAPS:
        pattern = ".*".join(map(re.escape, re.split(r"\{[^}]*\}", trap.says)))
        assert any(re.fullmatch(pattern, text) for text in said), trap.says


# What the hosts' own configs and launcher say to the same configurations.


@pytest.mark.parametrize(
    ("trainer", "written", "verdict"),
    [case[:3] for case in CASES if case[0] in ("grpo", "rloo") and "--kl" in case[1]],
)
def test_our_configs_refuse_what_is_said_to_be_refused(trainer, written, verdict):
    given = convert(given_by(trainer, written), {**OPTIONS[trainer], **KL}, {})
    given |= {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}
    given.pop("use_vllm", None)
    config = {"grpo": GRPOConfig, "rloo": RLOOConfig}[trainer]
    assert refused_by(config, **given) == (verdict == "refused")


def refused_by(check, *arguments, **options):
    try:
        check(*arguments, **options)
    except ConfigError:
        return True
    return False


KL = kl_options("grpo")


@pytest.mark.parametrize(
    ("written", "verdict"), [case[1:3] for case in CASES if case[0] == "openrlhf" and case[1].startswith("--kl")]
)
def test_the_launcher_refuses_what_is_said_to_be_refused(written, verdict):
    ours, _, host = written.partition(" -- ")
    given = convert(given_by("openrlhf", ours), kl_options("openrlhf"), {})
    # The command line of OpenRLHF itself reads the flags.
    args = parse("--reward.remote_url", "reward.py", "--vllm.num_engines", "1", *host.split())
    assert refused_by(plan_run, OpenRLHFOptions(**given), args) == (verdict == "refused")


# The facts about hosts.

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


# How configurations are read.


def test_a_file_and_flags_that_override_it(tmp_path):
    file = tmp_path / "grpo.yaml"
    file.write_text("kl: k2_as_loss\nbeta: 4e-2\nnum_iterations: 2\nloss_type: grpo\nlearning_rate: 1.0e-6\n")
    found = json.loads(invoke("--json", str(file), code=1))
    assert found["configuration"]["beta"] == 0.04
    assert found["ignored"] == ["learning_rate"]
    assert found["assumed"] == ["--trainer grpo: only TRL GRPOTrainer has loss_type"]
    assert found["change"] == {"loss_type": "dapo"}
    assert found["instead"] == 'kl_plugins.trl.GRPOConfig(kl="k2_as_loss", beta=0.04, loss_type="dapo")'
    assert json.loads(invoke("--json", str(file), "--", "--loss_type=dr_grpo"))["verdict"] == "principled"
    assert json.loads(invoke("--json", "--", "--config", str(file), "--loss_type", "luspo"))["verdict"] == "principled"
    file = tmp_path / "grpo.json"
    file.write_text('{"beta": 0.04, "use_vllm": true}')
    assert json.loads(invoke("--json", str(file)))["configuration"]["use_vllm"] is True


@pytest.mark.parametrize("recipe", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")))
def test_our_own_recipes_are_principled(recipe):
    assert explain_words([str(recipe)]).verdict == "principled"


@pytest.mark.parametrize(
    ("words", "trainer"),
    [
        ("--beta 0.1", "grpo"),
        ("--scale_rewards none", "grpo"),
        ("--normalize_advantages true", "rloo"),
        ("--kl_coef 0.1", "ppo"),
        ("--algo.kl.init_coef 0.1", "openrlhf"),
    ],
)
def test_what_is_assumed_is_said(words, trainer):
    found = json.loads(CliRunner().invoke(app, ["explain", "--json", "--", *words.split()]).output)
    assert found["host"] == {"openrlhf": "OpenRLHF"}.get(trainer, f"TRL {trainer.upper()}Trainer")
    asked = "--host openrlhf" if trainer == "openrlhf" else f"--trainer {trainer}"
    assert any(line.startswith(asked) for line in found["assumed"])


def test_generation_batch_size_counts_rollouts_of_one_process():
    found = explain_run({"beta": 0.1, "generation_batch_size": 32, "per_device_train_batch_size": 8}, "grpo")
    assert "4 updates on each rollout" in found.samples
    assert any("one process" in line for line in found.assumed)
    aligned = {"beta": 0.1, "gradient_accumulation_steps": 8, "steps_per_generation": 4}
    assert "on-policy" in explain_run(aligned, "grpo").samples
    assert "don't coincide" in explain_run(aligned | {"steps_per_generation": 3}, "grpo").samples


def test_an_older_trl_has_another_default(monkeypatch):
    monkeypatch.setattr(kl_plugins.explain.run, "installed_version", lambda host: "1.9.2")
    found = explain_run({"beta": 0.04}, "grpo")
    assert (found.verdict, found.gradient_of) == ("another divergence", "local_forward_kl")
    assert any("1.9.2 is installed" in line for line in found.assumed)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("-- --kl_of_policy none --beta 0.1", "did you mean 'kl_off_policy'?"),
        ("-- --use_bias_correcton_kl false", "did you mean 'use_bias_correction_kl'?"),
        ("--host openrlhf -- --algo.kl.use_los", "did you mean 'algo.kl.use_loss'?"),
        ("--host openrlhf -- --kl-of-policy none", "did you mean 'kl_off_policy'?"),
        ("--trainer grpo -- --kl k2_as_los --beta 0.1", "did you mean 'k2_as_loss'?"),
        ("--trainer grpo -- --kl k2_as_loss --kl_off_policy tokens --beta 0.1", "off_policy='tokens'"),
        ("--trainer grpo -- --kl_off_policy none --beta 0.1", "kl is None"),
        ("--trainer grpo -- --kl_placement loss --kl k2_as_loss", "kl_placement (of TRL PPOTrainer)"),
        ("--trainer grpo -- --kl_coef 0.1", "options of one trainer were expected"),
        ("-- --kl_coef 0.1 --loss_type grpo", "options of one trainer were expected"),
        ("--trainer rloo -- --loss_type grpo", "--trainer rloo was asked for"),
        ("-- --beta much", "beta='much': a number was expected"),
        ("-- --beta nan", "a number was expected"),
        ("-- --beta", "beta=True: a number was expected"),
        ("-- --num_iterations 1.5", "a whole number was expected"),
        ("-- --num_iterations 0", "a positive number was expected"),
        ("-- --use_vllm perhaps", "true or false was expected"),
        ("-- --loss_type grop", "choose from grpo, bnpo"),
        ("-- --kl_weight_clip 1", "two numbers was expected"),
        ("-- --generation_kwargs {", "a mapping was expected"),
        ("--host openrlhf -- --algo.kl.use_loss true", "takes no value"),
        ("--host openrlhf -- --algo.kl.estimator k4", "choose from k1, k2, k3"),
        ("--host openrlhf --trainer grpo -- --kl k2_as_loss", "has none"),
        ("--host verl -- --kl k2_as_loss", "choose from trl, openrlhf"),
        ("--trainer dpo -- --beta 0.1", "choose from grpo, rloo, ppo, gmpo"),
        ("--trainer grpo beta 0.1", "stands before any flag"),
        ("missing.yaml", "can't be read"),
        ("k2_as_loss k3_as_loss", "one name was expected"),
    ],
)
def test_bad_input_is_refused_with_exit_code_2(words, says):
    assert says in invoke(*words.split(), code=2)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "beta: [", "is not YAML"),
        ("a.json", "{beta: 1}", "is not JSON"),
        ("a.yaml", "- beta", "holds a list"),
        ("a.yaml", "", "holds nothing"),
        ("a.yaml", "kl_of_policy: none", "did you mean 'kl_off_policy'?"),
        ("a.yaml", "beta: null", "a number was expected"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, name, text, says):
    file = tmp_path / name
    file.write_text(text)
    assert says in invoke(str(file), code=2)
    file.write_bytes(b"\xff\xfe\x00")
    assert "can't be read" in invoke(str(file), code=2)
    assert "can't be read" in invoke(str(tmp_path / "none.yaml"), code=2)


def test_yaml_without_pyyaml(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    file = tmp_path / "a.yaml"
    file.write_text("beta: 1")
    assert "pip install pyyaml" in invoke(str(file), code=2)
    assert "beta" in invoke("--", "--beta", "0.1")


@pytest.mark.parametrize("name", all_losses())
def test_a_bare_name_keeps_exit_code_0(name):
    found = json.loads(invoke(name, "--json"))
    assert found[name]["gradient_of"] == dict(all_losses()[name].gradient_of)
    assert set(json.loads(invoke("--json"))) == set(all_losses())
    with pytest.raises(UnknownLossError):
        explain_run({"kl": f"{name}x", "beta": 1.0}, "grpo")
