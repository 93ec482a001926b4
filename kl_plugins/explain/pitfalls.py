"""Settings of TRL and OpenRLHF under which a KL isn't what was meant, as a table for `kl-plugins explain`.

Read from the sources that `kl_plugins.explain.host_terms` names, like everything there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kl_plugins.explain.run import Run
from kl_plugins.integration.rules_openrlhf import FILTERED


@dataclass(frozen=True)
class Pitfall:
    """A setting under which the KL isn't what was meant."""

    on: tuple[str, ...]
    when: Callable[[Run], bool]
    effect: str
    """`biased` or `note`."""
    says: str
    """Filled in with the run's settings."""
    change: Mapping[str, Any] = field(default_factory=dict)
    """Which options mend it. `kl=""`: name one of ours; a value of None: leave the option out."""


_GROUPS, _OPENRLHF = ("grpo", "gmpo", "rloo"), ("openrlhf",)
_ALL = (*_GROUPS, "ppo", *_OPENRLHF)
_NORMALIZED = (
    "the advantages are centred and divided by their deviation with the KL in them, so a nat doesn't cost beta"
)


PITFALLS = (
    Pitfall(
        ("grpo",),
        lambda run: run.stock and run["use_bias_correction_kl"] and run["importance_sampling_level"] == "sequence",
        "biased",
        "importance_sampling_level='sequence' multiplies every token's k3 by one differentiated ratio of the whole "
        "completion (use_bias_correction_kl): use 'token', or kl=, which keeps the sequence ratio for the policy",
        {"kl": ""},
    ),
    Pitfall(
        _ALL,
        lambda run: run.stock and run.reused and not run.in_reward and not run.host_term.weighs_stale,
        "biased",
        "samples of an older policy are not weighted for the KL",
        {"kl": ""},
    ),
    Pitfall(
        _ALL,
        lambda run: run.stock and run.reused and run.in_reward,
        "biased",
        "the KL in the reward is frozen at rollout and reused: later updates get grad KL(policy || ref) - grad "
        "KL(policy || old policy)",
        {"kl": ""},
    ),
    Pitfall(
        _ALL,
        lambda run: run.spec is not None and run.spec.off_policy == "none" and run.stale and not run.combined,
        "biased",
        "kl_off_policy='none' on samples of an older policy",
        {"kl_off_policy": "token"},
    ),
    Pitfall(
        _OPENRLHF,
        lambda run: run.stock and bool(run.host_term.dead_zone),
        "biased",
        "the clamp of the value at 10 makes the gradient exactly 0 where the policy has left the reference; "
        "OpenRLHF's own --algo.kl.unbiased_gradient has no such zone, nor has --kl",
        {"kl": ""},
    ),
    Pitfall(
        _OPENRLHF,
        lambda run: (
            run.stock
            and run["train.async_enable"]
            and run["algo.advantage.is_correction_level"] != "off"
            and not run.in_reward
        ),
        "biased",
        "--train.async_enable: vLLM's log-probs, which tell how stale a sample is, don't reach the KL in the loss",
        {"kl": ""},
    ),
    Pitfall(
        _OPENRLHF,
        lambda run: run.stock and run.in_reward and run["actor.policy_loss_type"] == "gspo",
        "biased",
        "--actor.policy_loss_type gspo gives every token the mean KL coefficient of its sequence",
        {"kl": "", "kl_placement": "loss"},
    ),
    Pitfall(
        _OPENRLHF,
        lambda run: (
            run.stock
            and run.in_reward
            and run["algo.advantage.gamma"] not in (0, 1)
            and run["algo.advantage.estimator"] in ("gae", "reinforce")
        ),
        "biased",
        "--algo.advantage.gamma {algo.advantage.gamma} discounts the KL: the gradient of neither the local nor the "
        "sequence KL",
        {"algo.advantage.gamma": 1.0},
    ),
    Pitfall(
        ("ppo",),
        lambda run: run.stock and run.in_reward and run["gamma"] not in (0, 1),
        "biased",
        "gamma={gamma} discounts the KL: the gradient of neither the local nor the sequence KL",
        {"gamma": 1.0},
    ),
    Pitfall(
        ("ppo",),
        lambda run: run.stock and run.in_reward and run["whiten_rewards"],
        "biased",
        "whiten_rewards=True divides the KL by the rewards' deviation and adds a constant to every token, which "
        "rewards length",
        {"whiten_rewards": False},
    ),
    # What is worth knowing.
    Pitfall(
        _GROUPS,
        lambda run: run.stock and run.engine,
        "note",
        "use_vllm: the KL is not weighted for the difference between vLLM and the trainer; with kl= it is",
    ),
    Pitfall(
        _ALL,
        lambda run: (
            run.spec is not None
            and run.spec.off_policy == "token"
            and run.spec.credit != "token"
            and (run.stale or run.engine)
            and not run.combined
        ),
        "note",
        "kl_off_policy='token' with credit beyond the token leaves the bias of the prefixes; 'prefix' removes it, at "
        "more variance",
    ),
    Pitfall(
        _GROUPS,
        lambda run: run["mask_truncated_completions"],
        "note",
        "mask_truncated_completions: the KL is that of the completions that ended",
    ),
    Pitfall(_GROUPS, lambda run: run["sync_ref_model"], "note", "sync_ref_model: the reference follows the policy"),
    Pitfall(
        ("gmpo",),
        lambda run: run.stock and run["use_bias_correction_kl"],
        "note",
        "GMPO ignores use_bias_correction_kl: its k3 has no ratio, whatever is set",
    ),
    Pitfall(
        ("rloo",),
        lambda run: run.stock and run["normalize_advantages"],
        "note",
        "normalize_advantages: " + _NORMALIZED,
    ),
    Pitfall(("ppo",), lambda run: run.in_reward, "note", "PPO: " + _NORMALIZED),
    Pitfall(
        ("ppo",),
        lambda run: run.in_reward and run["lam"] < 1,
        "note",
        "lam={lam}: GAE takes the critic's word for the KL of later tokens; unbiased as far as the critic is right",
    ),
    Pitfall(
        _OPENRLHF,
        lambda run: (
            run.in_reward
            and run["algo.advantage.estimator"] in ("gae", "reinforce", "reinforce_baseline")
            and not run["algo.advantage.no_std_norm"]
        ),
        "note",
        "--algo.advantage.estimator {algo.advantage.estimator}: " + _NORMALIZED,
    ),
    Pitfall(
        _OPENRLHF,
        lambda run: run.in_reward and run["algo.advantage.estimator"] == "gae" and run["algo.advantage.lambd"] < 1,
        "note",
        "--algo.advantage.lambd {algo.advantage.lambd}: GAE takes the critic's word for the KL of later tokens",
    ),
    Pitfall(
        _OPENRLHF,
        lambda run: run.stock and run.in_reward and run["algo.kl.unbiased_gradient"],
        "note",
        "--algo.kl.unbiased_gradient is ignored for a KL in the reward: it needs --algo.kl.use_loss",
    ),
    Pitfall(
        _OPENRLHF,
        lambda run: run.stock and not run.in_reward,
        "note",
        "OpenRLHF's logged kl is weighted by tokens twice with --algo.kl.use_loss; the gradient is not",
    ),
    Pitfall(
        _OPENRLHF,
        lambda run: run.stock and not run.in_reward and run["algo.kl.target"] is not None,
        "note",
        "--algo.kl.target adapts beta to that wrong number",
    ),
    Pitfall(
        _OPENRLHF,
        lambda run: run.stock,
        "note",
        "vLLM samples with min_tokens=1, which no flag changes: the first token is drawn without its end-of-sequence "
        "token, but scored with it; with --kl it is 0",
    ),
    Pitfall(
        _OPENRLHF,
        lambda run: run.spec is not None and not run.in_reward and run["algo.advantage.is_correction_level"] == "off",
        "note",
        "without --algo.advantage.is_correction_level token the KL is weighed against the trainer's old policy, not "
        "against vLLM",
    ),
    Pitfall(
        _OPENRLHF,
        lambda run: run["algo.dynamic_filtering_enable"],
        "note",
        FILTERED,
    ),
)
