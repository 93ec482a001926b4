"""`kl-plugins explain` of whole configurations: verdicts, and remedies that hold."""

from __future__ import annotations

import json
import re
from functools import partial

import command_line
import pytest
from tiny_openrlhf import parse

from kl_plugins import ConfigError
from kl_plugins.core.registry import GRADIENTS
from kl_plugins.explain.host_terms import OPTIONS
from kl_plugins.explain.pitfalls import PITFALLS
from kl_plugins.explain.reading import convert, from_flags, read_flags
from kl_plugins.explain.run import kl_options
from kl_plugins.explain.verdict import explain_run
from kl_plugins.openrlhf.plan import OpenRLHFOptions, plan_run
from kl_plugins.trl import GRPOConfig, RLOOConfig

invoke = partial(command_line.invoke, "explain")

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
    ("grpo", "--beta 0.04 --kl k1_as_loss", "refused", "or pass kl_allow_biased=True (--kl-allow-biased)"),
    ("grpo", "--beta 0.04 --kl k1_as_loss --kl_allow_biased", "zero", "lets it through"),
    ("grpo", "--beta 0.04 --kl k3_in_reward", "refused", "grad reverse KL - grad local forward KL"),
    ("grpo", "--beta 0.04 --kl k1_in_reward --kl_credit to_go --kl_gamma 0.9", "refused", "use kl_gamma=1"),
    (
        "grpo",
        "--beta 0.04 --kl k1_in_reward --kl_credit to_go --kl_gamma 0.9 --kl_allow_biased",
        "biased",
        "kl_gamma=0.9 discounts",
    ),
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
    ("rloo", "--kl k1_in_reward --kl_clip combined --kl_credit to_go", "refused", "kl_credit='sequence'"),
    ("rloo", "--kl k1_in_reward --kl_clip combined", "principled", "own ratio and clip"),
    ("ppo", "--kl k1_in_reward", "principled", "brought up to date"),
    ("ppo", "--kl k2_as_loss", "principled", "each token's own bias"),
    ("ppo", "--kl exact_in_reward", "refused", "needs the full next-token distributions"),
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
    ("openrlhf", "--kl exact_in_reward -- --algo.kl.init_coef 0.01", "refused", "needs the full next-token"),
    ("openrlhf", "--kl k1_as_loss", "refused", "or pass kl_allow_biased=True (--kl-allow-biased)"),
    ("openrlhf", "--kl k1_as_loss --kl-allow-biased", "zero", "lets it through"),
    (
        "openrlhf",
        "--kl k2_as_loss -- --rollout.top_p 0.9",
        "refused",
        "use 1.0, or pass kl_allow_biased=True (--kl-allow-biased)",
    ),
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


DISCOUNTED = [
    ("ppo", "--kl k3_in_reward --kl_allow_biased --gamma 0.9", ["k3_in_reward: its expected", "gamma=0.9 discounts"]),
    ("ppo", "--kl k3_in_reward --kl_allow_biased --gamma 0", ["k3_in_reward: its expected"]),
    ("ppo", "--kl k3_in_reward --kl_allow_biased", ["k3_in_reward: its expected"]),
    (
        "openrlhf",
        "--kl k3_in_reward --kl-allow-biased -- --algo.advantage.gamma 0.9",
        ["k3_in_reward: its expected", "algo.advantage.gamma=0.9 discounts"],
    ),
    (
        "grpo",
        "--beta 0.04 --kl k3_in_reward --kl_gamma 0.9 --kl_allow_biased",
        ["k3_in_reward: its expected", "kl_gamma=0.9 discounts"],
    ),
]


@pytest.mark.parametrize(("trainer", "written", "said"), DISCOUNTED)
def test_a_discount_is_a_flaw_of_its_own(trainer, written, said):
    flaws = explain_run(given_by(trainer, written), trainer).flaws
    assert [(flaw.effect, flaw.says[: len(word)]) for flaw, word in zip(flaws, said, strict=True)] == [
        ("biased", word) for word in said
    ]


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


def test_every_pitfall_is_met_by_a_case():
    said = [text for trainer, written, *_ in (*CASES, *RARER) for text in texts(trainer, written)]
    for pitfall in PITFALLS:
        pattern = ".*".join(map(re.escape, re.split(r"\{[^}]*\}", pitfall.says)))
        assert any(re.fullmatch(pattern, text) for text in said), pitfall.says


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
