"""What TRL and OpenRLHF themselves do about the KL, as tables for `kl-plugins explain`. Loads no torch and no host.

Read from the sources of TRL 1.16.0 (GRPO, RLOO, GMPO), of TRL 1.12.0 (PPO, the last release that has it) and of
OpenRLHF 0.11.2; `HostTerm.source` says where. In formulas u = log policy - log reference at a token,
k3 = exp(-u) - 1 + u, rho = policy / old policy, the old policy being the trainer's own at rollout, and T is the length
of a completion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VERSIONS = {"grpo": "TRL 1.16.0", "rloo": "TRL 1.16.0", "gmpo": "TRL 1.16.0", "ppo": "TRL 1.12.0"}
VERSIONS |= {"openrlhf": "OpenRLHF 0.11.2"}
HOSTS = {"grpo": "TRL GRPOTrainer", "rloo": "TRL RLOOTrainer", "gmpo": "TRL GMPOTrainer", "ppo": "TRL PPOTrainer"}
HOSTS |= {"openrlhf": "OpenRLHF"}
# The option that is the KL's coefficient.
BETA = {"grpo": "beta", "gmpo": "beta", "rloo": "beta", "ppo": "kl_coef", "openrlhf": "algo.kl.init_coef"}

# What is known of the variance of a gradient with each coefficient.
OF_U = "that of u: vanishes as the policy approaches the reference"
OF_FORWARD = "that of 1 - exp(-u), heavy-tailed: one token that the policy made rare can outweigh a batch"
OF_ONE = "that of the score itself: it doesn't vanish as the policy approaches the reference"
OF_TO_GO = "2.2-6 times that of the local term (enumerated): every token carries all later log-ratios"
OF_SEQUENCE = "above that of reward-to-go: every token carries the earlier log-ratios, too"
OF_EXACT = "no sampling noise within a step"

NO_ENGINE = "vLLM's log-probs don't reach the KL: the mismatch between engine and trainer stays in it"


@dataclass(frozen=True, kw_only=True)
class HostTerm:
    """One KL term of a host, as shipped."""

    host: str
    """Who applies it."""
    setting: str = ""
    """With which of its options, where there is a choice."""
    estimator: str
    """The name that it goes by: k1, k2 or k3."""
    in_reward: bool = False
    """In the reward, and so frozen at rollout, instead of in the loss."""
    term: str
    """What is added to the loss, or subtracted from the reward."""
    coefficient: str
    """What multiplies the score grad log pi(y_t), before beta and the host's reduction."""
    gradient_of: str
    """The expected on-policy gradient, one of `core.registry.GRADIENTS`; a dead zone's tokens left aside."""
    expected: str = ""
    """Where it is biased: what it is instead."""
    weighs_stale: bool = False
    """Whether samples of an older policy are weighted for it."""
    stale: str
    """What samples of an older policy do."""
    engine: str = NO_ENGINE
    """What log-probs of the rollout engine that differ from the trainer's do."""
    variance: str
    """What is known of the gradient's variance."""
    dead_zone: str = ""
    """Where the coefficient is exactly 0 although the policy has left the reference."""
    overflow: str = "none: nothing exponential is differentiated"
    """What float32 does to it at large log-ratios."""
    source: str
    """File and lines, in the version of `VERSIONS`."""


_GRPO = "trl/trainer/grpo_trainer.py:3083-3150"
_GMPO = "trl/experimental/gmpo/gmpo_trainer.py:109-121"
_PPO = "trl/experimental/ppo/ppo_trainer.py:772-775"
_LOSS = "openrlhf/models/utils.py:69-128, openrlhf/trainer/ray/ppo_actor.py:318-338"
_REWARD = "openrlhf/models/utils.py:69-161, openrlhf/trainer/ppo_utils/experience_maker.py:205-213, 283-290"
_EXP = "float32: the value is inf and the coefficient -inf from u = -88.7 on"
_UNWEIGHTED = "not weighted: biased towards the old policy's samples"
_FROZEN = "u stays the old policy's: later updates get grad KL(policy || ref) - grad KL(policy || old policy)"
_CLAMP = "the clamp at 10 bounds it"
_FORWARD_ZONE = "u < -2.61 (a token 13.6 times less likely than under the reference) and u > 11"


def _k3_in_loss(host: str, setting: str, source: str, per: str = "") -> HostTerm:
    return HostTerm(
        host=host,
        setting=setting,
        estimator="k3",
        term="mean of k3 over the completion" if per else "k3",
        coefficient=f"{per}(1 - exp(-u))" if per else "1 - exp(-u)",
        gradient_of="local_forward_kl",
        stale=_UNWEIGHTED,
        variance=OF_FORWARD,
        overflow=_EXP,
        source=source,
    )


def _openrlhf_loss(estimator: str, coefficient: str, gradient_of: str, variance: str, dead_zone: str) -> HostTerm:
    return HostTerm(
        host="OpenRLHF, in the loss",
        setting=f"--algo.kl.use_loss --algo.kl.estimator {estimator}",
        estimator=estimator,
        term=f"{estimator}, its value clamped to [-10, 10]",
        coefficient=coefficient,
        gradient_of=gradient_of,
        stale=_UNWEIGHTED,
        variance=variance,
        dead_zone=dead_zone,
        overflow=f"none: {_CLAMP}, and k3's exp is bounded before it",
        source=_LOSS,
    )


def _openrlhf_reward(estimator: str, gradient_of: str, expected: str, variance: str) -> HostTerm:
    return HostTerm(
        host="OpenRLHF, in the reward",
        setting=f"--algo.kl.estimator {estimator}",
        estimator=estimator,
        in_reward=True,
        term=f"{estimator} of every token, its value clamped to [-10, 10]",
        coefficient=f"sum over s >= t of {estimator}_s, clamped to [-10, 10]",
        gradient_of=gradient_of,
        expected=expected,
        stale=_FROZEN,
        engine="weighted with the policy term by --algo.advantage.is_correction_level token; off (the default): not",
        variance=variance,
        overflow=f"none: {_CLAMP}",
        source=_REWARD,
    )


TERMS: dict[str, HostTerm] = {
    "grpo": HostTerm(
        host="TRL GRPOTrainer",
        setting="use_bias_correction_kl=True, the default since 1.10",
        estimator="k3",
        term="k3 * rho, rho differentiated as well",
        coefficient="rho * u",
        gradient_of="local_reverse_kl",
        weighs_stale=True,
        stale="weighted token by token, unbounded; prefixes stay the old policy's",
        variance="that of rho * u: " + OF_U.removeprefix("that of u: "),
        overflow="float32: loses digits from u = -10 on; -32 instead of -20 at u = -20, 0 at -40, NaN from -88.7 on",
        source=_GRPO,
    ),
    "grpo_plain": _k3_in_loss("TRL GRPOTrainer", "use_bias_correction_kl=False, the default before 1.10", _GRPO),
    "grpo_sequence": HostTerm(
        host="TRL GRPOTrainer",
        setting="importance_sampling_level='sequence'",
        estimator="k3",
        term="k3 * R, R = geometric mean of rho over the completion, differentiated as well",
        coefficient="R * (1 - exp(-u) + mean of k3 over the completion)",
        gradient_of="biased",
        expected="grad local forward KL, plus the mean k3 of the completion as a cost of all its tokens",
        stale="the ratio of a sequence is no token's weight: biased",
        variance=OF_FORWARD,
        overflow=_EXP,
        source=_GRPO,
    ),
    "gmpo": _k3_in_loss("TRL GMPOTrainer", "", _GMPO, per="1/T "),
    "rloo": HostTerm(
        host="TRL RLOOTrainer",
        estimator="k1",
        in_reward=True,
        term="sum of u over the completion, less the mean of the other completions of the prompt",
        coefficient="sum of all u, less the others' mean",
        gradient_of="reverse_kl",
        stale=_FROZEN,
        variance=OF_SEQUENCE + "; the leave-one-out baseline lowers it far from the reference",
        source="trl/trainer/rloo_trainer.py:1664-1701, 1822-1833",
    ),
    "ppo": HostTerm(
        host="TRL PPOTrainer",
        setting="kl_estimator='k1'",
        estimator="k1",
        in_reward=True,
        term="u of every token",
        coefficient="sum over s >= t of u_s, through GAE and the critic",
        gradient_of="reverse_kl",
        stale=_FROZEN,
        variance=OF_TO_GO + "; less with a good critic",
        source=_PPO,
    ),
    "ppo_k3": HostTerm(
        host="TRL PPOTrainer",
        setting="kl_estimator='k3'",
        estimator="k3",
        in_reward=True,
        term="k3 of every token",
        coefficient="sum over s >= t of k3_s, through GAE and the critic",
        gradient_of="biased",
        expected="grad reverse KL - grad local forward KL: it can point away from the reference",
        stale=_FROZEN,
        variance=OF_TO_GO,
        overflow="float32: inf from u = -88.7 on, and all advantages NaN with it",
        source=_PPO,
    ),
    "openrlhf_loss_k1": _openrlhf_loss("k1", "1 where |u| <= 10, else 0", "zero", OF_ONE, ""),
    "openrlhf_loss_k2": _openrlhf_loss(
        "k2",
        "u where |u| <= 4.47, else 0",
        "local_reverse_kl",
        OF_U,
        "|u| > 4.47 (a token 88 times less, or more, likely than under the reference)",
    ),
    "openrlhf_loss_k3": _openrlhf_loss(
        "k3", "1 - exp(-u) where -2.61 <= u <= 11, else 0", "local_forward_kl", OF_FORWARD, _FORWARD_ZONE
    ),
    "openrlhf_loss_unbiased": HostTerm(
        host="OpenRLHF, in the loss",
        setting="--algo.kl.use_loss --algo.kl.unbiased_gradient",
        estimator="k2",
        term="k2 * min(rho, 10), rho detached; --algo.kl.estimator names the logged value only",
        coefficient="min(rho, 10) * u",
        gradient_of="local_reverse_kl",
        weighs_stale=True,
        stale="weighted token by token, at most 10; prefixes stay the old policy's",
        variance="that of the weight * u: " + OF_U.removeprefix("that of u: "),
        source=_LOSS,
    ),
    "openrlhf_reward_k1": _openrlhf_reward("k1", "reverse_kl", "", OF_TO_GO),
    "openrlhf_reward_k2": _openrlhf_reward("k2", "biased", "grad E[sum k2] - grad local reverse KL", OF_TO_GO),
    "openrlhf_reward_k3": _openrlhf_reward(
        "k3", "biased", "grad reverse KL - grad local forward KL: it can point away from the reference", OF_TO_GO
    ),
}

# Our own configurations: (name, credit) -> coefficient and what is known of its variance.
OURS = {
    ("k1_in_reward", "to_go"): ("sum over s >= t of gamma^(s-t) u_s", OF_TO_GO),
    ("k1_in_reward", "sequence"): ("sum of all u", OF_SEQUENCE),
    ("k1_in_reward", "token"): ("u", OF_U),
    ("k2_as_loss", "token"): ("u", OF_U),
    ("k2_as_loss", "sequence"): ("sum of all u", OF_SEQUENCE),
    ("k3_as_loss", "token"): ("1 - exp(-u)", OF_FORWARD),
    ("k1_as_loss", "token"): ("1", OF_ONE),
    ("k2_in_reward", "to_go"): ("sum over s >= t of u_s^2 / 2", OF_TO_GO),
    ("k3_in_reward", "to_go"): ("sum over s >= t of k3_s", OF_TO_GO),
    ("exact_as_loss", "token"): ("analytic, over the whole vocabulary", OF_EXACT),
    ("exact_in_reward", "token"): ("analytic, over the whole vocabulary", OF_EXACT),
    ("exact_forward_as_loss", "token"): ("analytic, over the whole vocabulary: p - r of each logit", OF_EXACT),
    ("exact_in_reward", "to_go"): ("analytic local part + (sum over s > t of KL_s) on the score of t", OF_EXACT),
}

# The defaults of the options that have a say in the KL, with their types. TRL: per trainer.
_SAMPLING: dict[str, tuple[type, Any]] = {
    "temperature": (float, 1.0),
    "top_p": (float, 1.0),
    "top_k": (int, 0),
    "min_p": (float, None),
    "repetition_penalty": (float, 1.0),
    "generation_kwargs": (dict, None),
    "vllm_structured_outputs_regex": (str, None),
}
_GROUPS: dict[str, tuple[type, Any]] = {
    **_SAMPLING,
    "num_iterations": (int, 1),
    "steps_per_generation": (int, None),
    "generation_batch_size": (int, None),
    "per_device_train_batch_size": (int, 8),
    "gradient_accumulation_steps": (int, 1),
    "use_vllm": (bool, False),
    "mask_truncated_completions": (bool, False),
    "sync_ref_model": (bool, False),
    "use_liger_kernel": (bool, False),
}
_GRPO_OPTIONS: dict[str, tuple[type, Any]] = {
    **_GROUPS,
    "beta": (float, 0.0),
    "loss_type": (str, "dapo"),
    "scale_rewards": (str, "group"),
    "multi_objective_aggregation": (str, "sum_then_normalize"),
    "use_bias_correction_kl": (bool, True),
    "importance_sampling_level": (str, "token"),
    "off_policy_mask_threshold": (float, None),
    "top_entropy_quantile": (float, 1.0),
}
OPTIONS: dict[str, dict[str, tuple[type, Any]]] = {
    "grpo": _GRPO_OPTIONS,
    "gmpo": _GRPO_OPTIONS,
    "rloo": {**_GROUPS, "beta": (float, 0.05), "normalize_advantages": (bool, False)},
    "ppo": {
        "kl_coef": (float, 0.05),
        "kl_estimator": (str, "k1"),
        "num_ppo_epochs": (int, 4),
        "num_mini_batches": (int, 1),
        "gamma": (float, 1.0),
        "lam": (float, 0.95),
        "whiten_rewards": (bool, False),
    },
    "openrlhf": {
        "algo.kl.init_coef": (float, 0.01),
        "algo.kl.use_loss": (bool, False),
        "algo.kl.estimator": (str, "k1"),
        "algo.kl.unbiased_gradient": (bool, False),
        "algo.kl.target": (float, None),
        "algo.kl.horizon": (int, 10000),
        "algo.advantage.estimator": (str, "gae"),
        "algo.advantage.gamma": (float, 1.0),
        "algo.advantage.lambd": (float, 1.0),
        "algo.advantage.no_std_norm": (bool, False),
        "algo.advantage.is_correction_level": (str, "off"),
        "algo.dynamic_filtering_enable": (bool, False),
        "actor.policy_loss_type": (str, "ppo"),
        "actor.loss_agg_mode": (str, "token-mean"),
        "rollout.batch_size": (int, 1024),
        "rollout.n_samples_per_prompt": (int, 1),
        "rollout.top_p": (float, 1.0),
        "train.batch_size": (int, 128),
        "train.max_epochs": (int, 1),
        "train.async_enable": (bool, False),
    },
}
# What a file may choose from; a value that the host itself refuses is no configuration to explain.
CHOICES = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "kl_estimator": ("k1", "k3"),
    "algo.kl.estimator": ("k1", "k2", "k3"),
    "actor.policy_loss_type": ("ppo", "gspo"),
    "actor.loss_agg_mode": ("token-mean", "seq-mean-token-mean"),
    "algo.advantage.is_correction_level": ("off", "token", "seq"),
    "algo.advantage.estimator": (
        *("gae", "reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo", "flash_reinforce"),
    ),
}
# Options that only one of TRL's trainers has (GMPO has GRPO's), by which a file is known.
MARKS = {
    "grpo": ("loss_type", "use_bias_correction_kl", "importance_sampling_level", "scale_rewards", "delta"),
    "rloo": ("normalize_advantages", "reward_clip_range"),
    "ppo": (*OPTIONS["ppo"], "kl_placement", "response_length", "cliprange", "vf_coef", "missing_eos_penalty"),
}
