"""What a whole training configuration does about the KL: the term that is really applied, its gradient, its flaws.

Loads neither torch nor a host. What hosts do is in `host_terms` and `pitfalls`, what is refused in
`integration.rules`; `cli.explain` shows what is found here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

from kl_plugins.core.registry import LOSSES, REVERSE_KL
from kl_plugins.explain.host_terms import BETA, HOSTS, NO_ENGINE, OURS, TERMS, VERSIONS, HostTerm
from kl_plugins.explain.pitfalls import PITFALLS
from kl_plugins.explain.run import Finding, Run, kl_options, nested, read_run
from kl_plugins.integration.problem import Problem
from kl_plugins.integration.reward_scale import meaning_of_beta
from kl_plugins.integration.rules_openrlhf import reward_length_problems, sampler_problems
from kl_plugins.integration.rules_trl import SUGGESTED_BETA, length_problems
from kl_plugins.integration.sampling import sampling_problems

TRAINERS = ("grpo", "rloo", "ppo", "gmpo")
CONFIGS = {
    "grpo": "kl_plugins.trl.GRPOConfig",
    "rloo": "kl_plugins.trl.RLOOConfig",
    "ppo": "kl_plugins.trl.PPOConfig",
    "gmpo": "kl_plugins.trl.GMPOConfig",
}
# The host's own discount, which is that of a KL in the reward.
DISCOUNT = {"ppo": "gamma", "openrlhf": "algo.advantage.gamma"}

MEANING = {
    "reverse_kl": "KL(policy || reference) of whole sequences",
    "local_reverse_kl": "the sum of next-token KL(policy || reference), the visited prefixes held fixed: an early "
    "token does not answer for the states it leads to",
    "forward_kl": "KL(reference || policy) of whole sequences",
    "local_forward_kl": "the sum of next-token KL(reference || policy), the visited prefixes held fixed",
    "zero": "nothing: it adds noise and no regularization",
    "biased": "that of no KL divergence",
}
OFF_POLICY = {
    "none": "biased as soon as the sampler is not the policy (stale samples, another engine)",
    "token": "(default) each token's own bias is removed; prefixes stay the sampler's",
    "prefix": "unbiased, with any credit",
    "sequence": "unbiased, with any credit; more variance",
}


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What `kl-plugins explain` says about a whole configuration."""

    host: str
    facts: str
    """Which source the host's part of this was read from."""
    verdict: str
    """`principled`, `another divergence`, `biased`, `zero`, `void` or `refused` (by kl_plugins, before training)."""
    exit_code: int
    """0: principled, or another divergence; 1: zero, biased or void; 2: refused."""
    configuration: dict[str, Any]
    """Every option that was looked at, defaults included."""
    given: list[str]
    """The names in `configuration` that the user set; all others are at their defaults."""
    ignored: list[str]
    """Options that were given but have no say in the KL."""
    assumed: list[str]
    """What was assumed about what the configuration doesn't tell, such as which trainer it is for."""
    beta: float
    placement: str
    """`loss`, `advantage` or `reward`."""
    term: str
    coefficient: str
    gradient_of: str
    meaning: str
    samples: str
    stale: str
    engine: str
    variance: str
    dead_zone: str
    overflow: str
    flaws: list[Finding]
    notes: list[str]
    change: dict[str, Any]
    """The options that make it principled; None leaves one out. Empty if it is."""
    instead: str
    """`change` written out, as a config in Python or as a command line; empty if nothing has to change."""
    estimator: str
    """k1, k2 or k3: the word by which hosts know the term; empty if it is none of them."""
    elsewhere: list[dict[str, Any]]
    """What each host, and kl_plugins, does with the same estimator; `yours` marks the one that is explained."""


def explain_run(given: Mapping[str, Any], trainer: str, assumed: Sequence[str] = ()) -> Explanation:
    """What the configuration `given`, named as the host names its options, does in `trainer`, one of `OPTIONS`.

    `assumed` is what was assumed until here. Raises `ConfigError` or `UnknownLossError` for what is no configuration:
    unknown options about a KL, values that don't exist.
    """
    assumptions = list(assumed)
    run, problems = read_run(given, trainer, assumptions)
    gradient = run.spec.gradient_of if run.spec else run.host_term.gradient_of
    waives = run.kl is not None and run.kl.kl_allow_biased
    findings = [
        Finding("biased", problem.says, problem.change)
        if problem.biases and waives
        else Finding("refused", problem.refusal, problem.change)
        for problem in problems
    ]
    findings += [*_gradient_findings(run, gradient), *_beta_findings(run, given), *_host_findings(run)]
    findings += _choice_findings(run, given)
    words = vars(nested(run.settings))  # for "{rollout.top_p}"
    findings += [
        Finding(pitfall.effect, pitfall.says.format_map(words), pitfall.change)
        for pitfall in PITFALLS
        if trainer in pitfall.on and pitfall.when(run)
    ]
    flaws = [finding for finding in findings if finding.effect != "note"]
    verdict = _verdict(gradient, {finding.effect for finding in flaws})
    change = {} if verdict == "principled" else _change(run, flaws, given)
    word = run.spec.name[:2] if run.spec else run.host_term.estimator
    estimator = word if word in ("k1", "k2", "k3") else ""
    kl = {f.name: getattr(run.kl, f.name) for f in fields(run.kl)} if run.kl else {"kl": None}
    configuration = {**run.settings, **kl}
    return Explanation(
        host=HOSTS[trainer] if run.spec is None else f"{HOSTS[trainer]} with kl_plugins",
        facts=f"{VERSIONS[trainer]}: {run.term.source}"
        if run.term
        else f"kl_plugins/core/terms.py; {VERSIONS[trainer]}",
        verdict=verdict,
        exit_code={"principled": 0, "another divergence": 0, "refused": 2}.get(verdict, 1),
        configuration=configuration,
        given=[name for name in configuration if name in given],
        ignored=sorted(set(given) - set(configuration)),
        assumed=assumptions,
        beta=run.beta,
        placement="reward" if run.in_reward else "advantage" if run.combined else "loss",
        gradient_of=gradient,
        meaning=_meaning(run, gradient),
        samples=_samples(run),
        **(_host_properties(run, run.term) if run.term else _our_properties(run)),
        flaws=flaws,
        notes=[finding.says for finding in findings if finding.effect == "note"],
        change=change,
        instead=_line(run, change),
        estimator=estimator,
        elsewhere=_elsewhere(run, estimator) if estimator else [],
    )


def _samples(run: Run) -> str:
    if run.reused:
        what = f"stale: {run.updates:g} updates on each rollout, all but the first on an older policy's samples"
        return what if run.updates > 1 else "stale: rollouts and updates don't coincide"
    return "stale: sampling runs ahead of training" if run.stale else "on-policy: one update on each rollout"


def _verdict(gradient: str, effects: set[str]) -> str:
    for effect in ("refused", "void"):
        if effect in effects:
            return effect
    if gradient == "zero":
        return "zero"
    if gradient == "biased" or "biased" in effects:
        return "biased"
    return "another divergence" if "forward" in gradient else "principled"


def _meaning(run: Run, gradient: str) -> str:
    expected = run.spec.loss.expected if run.spec else run.host_term.expected
    return f"{MEANING[gradient]}: {expected}" if expected and gradient in ("zero", "biased") else MEANING[gradient]


def _gradient_findings(run: Run, gradient: str) -> Iterator[Finding]:
    """A zero or biased gradient of the host's own term, or of ours where `kl_allow_biased` lets it through."""
    if gradient not in ("zero", "biased"):
        return
    if run.spec is None or run.kl is None:
        says = f"{run.host_term.term}: its expected gradient is {_meaning(run, gradient)}"
        yield Finding(gradient, says, {"kl": ""})
        return
    if not run.kl.kl_allow_biased:
        return
    by_the_loss = run.spec.loss.gradient_of[str(run.spec.credit)] in ("zero", "biased")
    if by_the_loss:
        says = f"{run.spec.name}: its expected gradient is {_meaning(run, gradient)} (kl_allow_biased lets it through)"
        yield Finding(gradient, says, {"kl": ""})
    if not by_the_loss or run.spec.gamma not in (0, 1):  # gamma=0 makes a right loss the local KL
        name = DISCOUNT.get(run.trainer, "kl_gamma") if run.in_reward else "kl_gamma"
        says = f"{name}={run.spec.gamma:g} discounts the KL: the gradient of neither the local nor the sequence KL"
        yield Finding("biased", says, {name: None})


def _beta_findings(run: Run, given: Mapping[str, Any]) -> Iterator[Finding]:
    """What the coefficient of the host's own term does to it; with ours it is refused."""
    name, beta = BETA[run.trainer], run.beta
    if 0 < beta < float("inf") or not run.stock:
        return
    change = {name: SUGGESTED_BETA[run.trainer]}
    default = "" if name in given else ", the default"
    if beta == 0 or run.trainer == "openrlhf":
        yield Finding("void", f"{name}={beta:g}{default}: no KL is applied", change)
    else:
        yield Finding("biased", f"{name}={beta:g}: minus the KL drives the policy away from the reference", change)


def _choice_findings(run: Run, given: Mapping[str, Any]) -> Iterator[Finding]:
    """What is worth knowing about what was picked, what beta counts, tokens left out, and a reference of one's own."""
    if run.kl is not None:
        flags = [nested(run.settings)] if run.trainer == "openrlhf" else []
        grouped = run.trainer in ("grpo", "gmpo", "rloo")
        for says in (run.kl.kl_choice(*flags).sentence, meaning_of_beta(run.kl) if grouped else ""):
            yield from [Finding("note", says)] if says else []
    if run.kl is not None and set(run.kl.kl_leave_out) - {"first"}:
        yield Finding(
            "note",
            f"kl_leave_out={run.kl.kl_leave_out}: the divergence is the generalized one over the other tokens, "
            "sum (p log(p / r) - p + r)",
        )
    if run.kl is not None and run.kl.kl_leave_out_equal_rewards:
        yield Finding(
            "note", "kl_leave_out_equal_rewards: the KL is that of prompts whose completions' rewards differ"
        )
    if given.get("kl_reference_every"):
        yield Finding(
            "note",
            f"kl_reference_every={given['kl_reference_every']}: the KL is to a policy that follows; it bounds how "
            "fast the policy moves, not how far",
        )


def _host_findings(run: Run) -> Iterator[Finding]:
    """What of the host's own options biases its own KL, or any KL without being refused with ours."""
    problems: list[Problem] = []
    if run.trainer == "openrlhf" and run.stock:
        args = nested(run.settings)
        problems += [*sampler_problems(args), *reward_length_problems(args, run.in_reward)]
    elif run.trainer in ("grpo", "rloo", "gmpo"):
        problems += sampling_problems(SimpleNamespace(**run.settings)) if run.stock else ()
        problems += length_problems(run.trainer, run.settings.get("loss_type"))
    yield from (Finding("biased", problem.says, problem.change) for problem in problems)


def _change(run: Run, flaws: Sequence[Finding], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that mend all flaws; None leaves one out."""
    change: dict[str, Any] = {}
    for flaw in flaws:
        change |= {name: value for name, value in flaw.change.items() if value is not None or name in given}
    if not flaws:  # another divergence
        change["kl"] = ""
    if "kl" in change:
        change["kl"] = change["kl"] or REVERSE_KL
        discount = DISCOUNT.get(run.trainer, "")
        if discount in given and change["kl"] == REVERSE_KL:  # which is among the rewards there
            change[discount] = 1.0
        replaced = ["use_bias_correction_kl", "kl_estimator", "algo.kl.estimator", "algo.kl.unbiased_gradient"]
        replaced += ["algo.kl.use_loss", "algo.kl.target", *kl_options(run.trainer)]
        change = {name: None for name in replaced if name in given} | change
    if run.trainer == "gmpo" and "kl" in change:  # the nearest that kl_plugins has is GRPO with a sequence's ratio
        change |= {"importance_sampling_level": "sequence", "loss_type": "dapo"}
    return change


def _line(run: Run, change: Mapping[str, Any]) -> str:
    if not change:
        return ""
    beta = BETA[run.trainer]
    kl = {name: value for name, value in {"kl": run.kl and run.kl.kl, **change}.items() if name.startswith("kl")}
    wanted = {**kl, beta: run.beta, **change}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    out = [name for name, value in change.items() if value is None]
    if run.trainer == "openrlhf":
        ours = [f"--{name.replace('_', '-')} {value}" for name, value in wanted.items() if name.startswith("kl")]
        flags = [f"--{name} {value}" for name, value in wanted.items() if not name.startswith("kl")]
        line = " ".join(["kl-plugins openrlhf", *ours, "--", *flags, "..."] if ours else flags)
        out = [f"--{name}" for name in out]
    else:
        words = [
            f'{name}="{value}"' if isinstance(value, str) else f"{name}={value}" for name, value in wanted.items()
        ]
        line = f"{CONFIGS['grpo' if run.trainer == 'gmpo' else run.trainer]}({', '.join(words)})"
        if "kl" not in wanted:
            line = ", ".join(words)
    return line + (f"   without {', '.join(out)}" if out else "")


def _host_properties(run: Run, term: HostTerm) -> dict[str, Any]:
    return {
        "term": term.term,
        "coefficient": term.coefficient,
        "stale": term.stale,
        "engine": term.engine if run.engine else _NO_VLLM,
        "variance": term.variance,
        "dead_zone": term.dead_zone,
        "overflow": term.overflow,
    }


_NO_VLLM = "none: the trainer's own model draws the tokens"


def _our_properties(run: Run) -> dict[str, Any]:
    spec = run.spec
    assert spec is not None
    coefficient, variance = OURS.get((spec.name, str(spec.credit)), ("see its package", "not known"))
    combined = "the host's own ratio and clip apply; brought up to date before each later update"
    engine = "weighted: the behavior policy is vLLM itself, by its own log-probs"
    if run.combined and run.trainer == "openrlhf":
        engine = TERMS["openrlhf_reward_k1"].engine
    elif run.combined and run.trainer == "grpo":
        engine = "weighted with the policy term by vllm_importance_sampling_correction (the default)"
    elif run.combined or run.settings.get("algo.advantage.is_correction_level") == "off" or spec.off_policy == "none":
        engine = NO_ENGINE
    return {
        "term": spec.loss.summary,
        "coefficient": coefficient,
        "stale": combined if spec.clip == "combined" else OFF_POLICY[spec.off_policy].removeprefix("(default) "),
        "engine": engine if run.engine else _NO_VLLM,
        "variance": variance,
        "dead_zone": "",
        "overflow": (
            f"the coefficient is bounded at {spec.coefficient_bound:g}, never zeroed"
            if spec.coefficient_bound is not None
            else "none: no exp() is differentiated"
        ),
    }


def _elsewhere(run: Run, estimator: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for term in TERMS.values():
        if term.estimator == estimator:
            names = ("host", "setting", "coefficient", "gradient_of", "dead_zone")
            rows.append({name: getattr(term, name) for name in names} | {"yours": term is run.term})
    for name, loss in LOSSES.items():
        if name.startswith(f"{estimator}_"):
            mine = run.spec is not None and run.spec.name == name
            credit = str(run.spec.credit) if run.spec and mine else loss.default_credit
            row = {"host": "kl_plugins", "setting": f"kl={name}, kl_credit={credit}", "dead_zone": "", "yours": mine}
            coefficient = OURS.get((name, credit), ("", ""))[0]
            rows.append(row | {"coefficient": coefficient, "gradient_of": loss.gradient_of[credit]})
    return rows


def not_offered(estimator: str) -> dict[str, str]:
    """The hosts that don't offer an estimator, with what they use instead."""
    offered: dict[str, set[str]] = {}
    for term in TERMS.values():
        offered.setdefault(term.host, set()).add(term.estimator)
    return {host: ", ".join(sorted(names)) for host, names in offered.items() if estimator not in names}
