"""Random configurations of every trainer, right ones and wrong ones, for the tests of the rules about options."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from kl_plugins import all_losses

# Option -> values, of which about half are right somewhere.
_SPEC: dict[str, list[Any]] = {
    "kl_credit": [None, "token", "to_go", "sequence", "tokens"],
    "kl_gamma": [1.0, 0.9, 0.0, 1.5],
    "kl_off_policy": ["token", "none", "prefix", "sequence", "both"],
    "kl_weight_clip": [[0.0, 10.0], [0.0, 2.0], [2.0, 3.0]],
    "kl_weight_clip_mode": ["truncate", "mask", "cut"],
    "kl_baseline": ["auto", None, "none", "leave_one_out", "group_mean", "mean"],
    "kl_clip": [None, "separate", "combined", "both"],
    "kl_clip_epsilon": [0.2, 0.1, 1.0],
    "kl_coefficient_bound": [None, 50.0, -1.0],
    "kl_nonfinite": ["error", "drop", "skip"],
    "kl_allow_biased": [False, True],
    "kl_leave_out": [[], ["first"], ["eos"], ["first", "special"]],
    "kl_leave_out_equal_rewards": [False, True],
}
_CONTROLLER: dict[str, list[Any]] = {
    "kl_controller": ["fixed", "linear", "cosine", "proportional", "pi", "adaptive"],
    "kl_target": [None, 0.05, -0.1],
    "kl_target_per": ["token", "sequence", "batch"],
    "kl_horizon": [20.0, 50.0, 0.5],
    "kl_beta_end": [None, 0.01, -1.0],
    "kl_beta_steps": [None, 100, 0],
    "kl_beta_min": [1e-6, 0.5],
    "kl_beta_max": [100.0, 0.01],
}
_REFERENCE: dict[str, list[Any]] = {
    "kl_reference": [None, "none", "base", "adapter:first", "adapter:ref", "some/model"],
    "kl_reference_every": [None, 100, 0],
    "kl_reference_decay": [0.0, 0.9, 1.5],
    "kl_scale": ["none", "none", "reward", "reward", "batch"],
}
_SAMPLING: dict[str, list[Any]] = {
    "temperature": [1.0, 0.7],
    "top_p": [1.0, 0.9],
    "top_k": [0, 50],
    "min_p": [None, 0.1],
    "repetition_penalty": [1.0, 1.1],
    "generation_kwargs": [None, {"seed": 1}, {"temperature": 0.7}, {"top_p": 0.9, "min_tokens": 1}],
    "vllm_structured_outputs_regex": [None, "[0-9]+"],
}
_GROUPS: dict[str, list[Any]] = {
    **_SAMPLING,
    "beta": [0.04, 0.04, 0.04, 0.5, 0.0, -0.1],
    "num_iterations": [1, 2],
    "sync_ref_model": [False, True],
    "mask_truncated_completions": [False, True],
}
_GRPO: dict[str, list[Any]] = {
    **_GROUPS,
    "loss_type": ["dapo", "grpo", "dr_grpo"],
    "scale_rewards": ["group", "batch", "none"],
    "multi_objective_aggregation": ["sum_then_normalize", "normalize_then_sum"],
    "use_bias_correction_kl": [True, False],
    "importance_sampling_level": ["token", "sequence"],
    "off_policy_mask_threshold": [None, 0.5],
    "top_entropy_quantile": [1.0, 0.5],
    "use_liger_kernel": [False, True],
}
_PLACEMENT: dict[str, list[Any]] = {"kl_placement": ["auto", "loss", "reward", "advantage"]}
OURS: dict[str, dict[str, list[Any]]] = {
    "grpo": {**_SPEC, **_CONTROLLER, **_REFERENCE},
    "gmpo": {**_SPEC, **_CONTROLLER, **_REFERENCE},
    "rloo": {**_SPEC, **_CONTROLLER, **_REFERENCE},
    "ppo": {**_SPEC, **_CONTROLLER, **_PLACEMENT},
    "openrlhf": {
        **_SPEC,
        **_CONTROLLER,
        **_PLACEMENT,
        "kl_monitor": [False, True],
    },
}
"""The options of ours, by trainer."""
HOST: dict[str, dict[str, list[Any]]] = {
    "grpo": _GRPO,
    "gmpo": _GRPO,
    "rloo": {**_GROUPS, "use_liger_kernel": [False, True], "normalize_advantages": [False, True]},
    "ppo": {
        "kl_coef": [0.05, 0.05, 0.05, 0.0, -1.0],
        "kl_estimator": ["k1", "k3"],
        "num_ppo_epochs": [4, 1],
        "gamma": [1.0, 0.9],
        "lam": [0.95, 1.0],
        "whiten_rewards": [False, True],
    },
    "openrlhf": {
        "algo.kl.init_coef": [0.01, 0.01, 0.5, 0.0],
        "algo.kl.use_loss": [False, True],
        "algo.kl.estimator": ["k1", "k2", "k3"],
        "algo.kl.unbiased_gradient": [False, True],
        "algo.kl.target": [None, 6.0],
        "algo.advantage.estimator": ["gae", "reinforce", "rloo", "group_norm", "reinforce_baseline"],
        "algo.advantage.gamma": [1.0, 0.9],
        "algo.advantage.is_correction_level": ["off", "token"],
        "actor.policy_loss_type": ["ppo", "gspo"],
        "actor.loss_agg_mode": ["token-mean", "seq-mean-token-mean"],
        "rollout.n_samples_per_prompt": [1, 4],
        "rollout.top_p": [1.0, 0.9],
        "train.async_enable": [False, True],
    },
}
"""The host's own options that have a say in the KL."""
_COMBINED = {"beta": 0.04, "kl": "k2_as_loss", "kl_clip": "combined"}
_CORNERS: dict[str, list[dict[str, Any]]] = {
    "grpo": [
        {"beta": 0.04, "kl": "k2_in_reward", "kl_allow_biased": True, "kl_leave_out": ["eos"]},
        _COMBINED,
        _COMBINED | {"kl_weight_clip_mode": "mask"},
        _COMBINED | {"top_entropy_quantile": 0.5},
        _COMBINED | {"importance_sampling_level": "sequence"},
        {"beta": 0.04, "kl": "k2_as_loss", "kl_reference": "base", "kl_reference_every": 100},
    ],
    "rloo": [_COMBINED | {"kl_credit": "sequence"}, _COMBINED | {"kl_credit": "sequence", "kl_leave_out": ["eos"]}],
    "openrlhf": [
        {"kl_monitor": True, "kl_clip": "separate", "algo.kl.init_coef": 0.0},
        {"kl": "k1_in_reward", "algo.kl.target": 6.0, "kl_controller": "linear"},
        {"kl": "k2_as_loss", "kl_clip": "combined", "kl_placement": "loss"},
        {"kl": "k1_in_reward", "kl_credit": "sequence"},
        {
            "kl": "k1_in_reward",
            "kl_baseline": "group_mean",
            "rollout.n_samples_per_prompt": 4,
            "algo.advantage.estimator": "reinforce",
            "algo.advantage.gamma": 0.9,
        },
    ],
}
"""What is so rarely drawn that it is written down."""
_BETA = {"ppo": "kl_coef", "openrlhf": "algo.kl.init_coef"}


def configurations(trainer: str, number: int, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`number` configurations of `trainer`, and its corners, as the options that are given.

    Each has at most three options of ours and four others, besides the KL and its coefficient.
    """
    yield from _CORNERS.get(trainer, ())
    draw = random.Random(f"{trainer} {seed}")
    beta = _BETA.get(trainer, "beta")
    for _ in range(number):
        given: dict[str, Any] = {beta: draw.choice(HOST[trainer][beta])}
        if draw.random() < 0.95:
            given["kl"] = draw.choice(
                [*all_losses(), "k1_in_reward", "k2_as_loss", "k2_as_loss", "reverse_kl", "reverse_kl"]
            )
        for options, most in ((OURS[trainer], 3), (HOST[trainer], 4)):
            how_many = max(0, draw.randint(-1, most))
            for name in draw.sample(sorted(set(options) - {beta}), how_many):
                given[name] = draw.choice(options[name])
        yield given
