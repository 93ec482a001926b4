"""What each host does to its rewards, and what `kl="reverse_kl"` picks there: one table.

What users optimize is E[R] - beta KL, and the noise of its two parts belongs together: near the optimum
R - beta log(policy / reference) is the same for every completion, so that a KL that is sampled, credited and centred
as the reward is cancels the reward's noise (docs/evidence.md). So a KL in the reward gets what the host's reward gets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kl_plugins.core.registry import REVERSE_KL, get_loss

PICKED = "k1_in_reward"
"""The configuration that `reverse_kl` becomes, in every host, with the options of `TREATMENTS`."""
OFF_POLICY_OPTIONS = ("kl_off_policy", "kl_weight_clip", "kl_weight_clip_mode", "kl_clip", "kl_clip_epsilon")
"""Those that say how the KL of samples of another policy is weighted: one that is set leaves nothing to pick."""


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What a host makes of its rewards, and so of a KL among them."""

    credit: str
    """Which rewards a token answers for; see `KLSpec.credit`."""
    baseline: str | None
    """What is subtracted; see `KLSpec.baseline`."""
    why: str
    """The same in words, as `reverse_kl` gives its reason."""


_WITH_THE_MEAN = Treatment(
    credit="sequence",
    baseline="group_mean",
    why="{host} hands each completion's reward, less its group's mean, to all tokens; a KL that gets the same "
    "cancels the reward's own noise",
)
_WITHOUT_ITSELF = Treatment(
    credit="sequence",
    baseline="leave_one_out",
    why="{host} hands each completion's reward, less the mean of its group's others, to all tokens; a KL that gets "
    "the same cancels the reward's own noise",
)
_STANDARDIZED = replace(
    _WITH_THE_MEAN,
    why="{host} hands each completion's reward, less its group's mean and over its deviation, to all tokens; the KL "
    "gets the same but isn't divided, so that beta counts nats against rewards of deviation 1",
)
_WITH_A_CRITIC = Treatment(
    credit="to_go",
    baseline=None,
    why="{host} sums rewards from each token on and subtracts what its critic expects, and the KL is one of them",
)
_UNKNOWN = Treatment(credit="", baseline=None, why="its expected gradient is that of the reverse KL")
_RETURNS = Treatment(
    credit="to_go", baseline=None, why="{host} sums rewards from each token on, and the KL is one of them"
)

_WITH_THE_BATCH = Treatment(
    credit="to_go",
    baseline=None,
    why="{host} subtracts the batch's mean from rewards here, which a KL can't get; summed from each token on, its "
    "expected gradient is that of the reverse KL",
)

_NAMES = {"grpo": "GRPO", "gmpo": "GMPO", "rloo": "RLOO", "ppo": "PPO", "openrlhf": "OpenRLHF"}
# (host, its advantage estimator) -> what it does.
TREATMENTS: dict[tuple[str, str], Treatment] = {
    ("grpo", ""): _WITH_THE_MEAN,
    ("gmpo", ""): _WITH_THE_MEAN,
    ("rloo", ""): _WITHOUT_ITSELF,
    ("ppo", ""): _WITH_A_CRITIC,
    ("openrlhf", "gae"): _WITH_A_CRITIC,
    ("openrlhf", "reinforce"): _RETURNS,
    ("openrlhf", "rloo"): _WITHOUT_ITSELF,
    ("openrlhf", "reinforce_baseline"): _WITH_THE_MEAN,
    ("openrlhf", "group_norm"): _STANDARDIZED,
    ("openrlhf", "dr_grpo"): _WITH_THE_MEAN,
    ("openrlhf", "flash_reinforce"): _WITH_THE_BATCH,
}
# OpenRLHF's estimators that subtract something of a prompt's group from its rewards.
GROUP_ESTIMATORS = tuple(name for (_, name), treatment in TREATMENTS.items() if name and treatment.baseline)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A configuration that could be written by hand: what `kl`, and the options left open, stand for in a host."""

    kl: str
    """The name of the configuration."""
    picked: Mapping[str, Any]
    """The options that were left open, by the names of their fields."""
    kept: Mapping[str, Any]
    """Those of them that the user has set."""
    why: str = ""
    """The reason, if `reverse_kl` was asked for."""

    @property
    def options(self) -> dict[str, Any]:
        """All of them, as they could be written by hand."""
        return {**self.picked, **self.kept}

    @property
    def sentence(self) -> str:
        """What `reverse_kl` picked, and why. Empty if the configuration was named by the user."""
        if not self.why:
            return ""
        changed = {name: value for name, value in self.picked.items() if name != "kl_clip" or value}
        said = f"kl={REVERSE_KL!r} picked {_words({'kl': self.kl, **changed})}: {self.why}"
        if self.kept:
            said += f". It left {_words(self.kept)} as set"
        if self.kept.get("kl_credit") == "token":
            said += ", which makes it the sum of next-token KLs, in which no token answers for those after it"
        return said


def choose(
    kl: str,
    given: Mapping[str, Any],
    *,
    host: str = "",
    estimator: str = "",
    groups: bool = True,
    off_policy: bool = False,
    in_advantage: bool = False,
) -> Choice:
    """What `kl` stands for in a host, with the options that it leaves open.

    Args:
        kl: The name of a configuration, or `"reverse_kl"`.
        given: The options that the user has set, by the names of their fields. They win over what would be picked.
        host: Of `TREATMENTS`; `""`: not known, and nothing is matched to its rewards.
        estimator: Which of the host's advantage estimators, if it has several.
        groups: Whether a prompt has several completions.
        off_policy: Whether some samples are from an older policy, or from another engine.
        in_advantage: Whether the KL can be in the host's advantage, with the reward's own ratio and clip.

    Raises what `get_loss` raises.

    Example:
        >>> choose("reverse_kl", {}, host="rloo").options
        {'kl_credit': 'sequence', 'kl_baseline': 'leave_one_out', 'kl_clip': None}
        >>> choose("k2_as_loss", {}, host="rloo").options
        {'kl_credit': 'token', 'kl_baseline': None, 'kl_clip': None}
    """
    chosen = kl == REVERSE_KL
    loss, treatment = get_loss(PICKED if chosen else kl), TREATMENTS.get((host, estimator), _UNKNOWN)
    options: dict[str, Any] = {"kl_credit": loss.default_credit, "kl_baseline": None, "kl_clip": None}
    if loss.in_reward:
        if treatment.credit in loss.gradient_of:
            options["kl_credit"] = treatment.credit
        analytic = loss.exact and given.get("kl_credit") == "token"  # no token has a coefficient
        options["kl_baseline"] = treatment.baseline if groups and not analytic else None
    why = treatment.why.format(host=_NAMES.get(host, host))
    if chosen and off_policy and not given.keys() & set(OFF_POLICY_OPTIONS):
        options |= {"kl_clip": "combined"} if in_advantage else {"kl_off_policy": "token"}
        how = "and clipped in the advantage, as its reward is" if in_advantage else "by each token's own ratio"
        why += f"; what an older policy or vLLM has drawn is weighted {how}"
    return Choice(
        kl=loss.name,
        picked={name: value for name, value in options.items() if name not in given},
        kept={name: given[name] for name in options if name in given},
        why=why if chosen else "",
    )


def updates_per_rollout(settings: Any) -> tuple[float, bool]:
    """Optimizer steps on each rollout of TRL's GRPO, GMPO or RLOO, and whether some are made on an older policy's.

    `settings` is a config, or an object with its options.
    """
    accumulation, steps = settings.gradient_accumulation_steps, settings.steps_per_generation
    micro_batches = (steps or accumulation) * settings.num_iterations
    return micro_batches / accumulation, accumulation % micro_batches != 0


def in_advantage(host: str, settings: Any) -> bool:
    """Whether TRL's ratio and clip can be those of the KL, too, which then is in the advantage.

    `settings` are those of GRPO, GMPO or RLOO. Not with vLLM, of whose completions TRL drops those that it would draw
    too rarely, and with them their KL, just where it is needed (RLOO has no weight for vLLM at all). GRPO's masks
    would leave out the KL of the masked tokens; RLOO has one advantage a completion, as GMPO has, and GRPO's ratio of
    whole completions averages the advantages of their tokens.
    """
    if settings.use_vllm:
        return False
    one_a_row = settings.kl_credit in (None, "sequence") and not set(settings.kl_leave_out) - {"first"}
    if host == "grpo":
        unmasked = settings.off_policy_mask_threshold is None and settings.top_entropy_quantile == 1.0
        return unmasked and (one_a_row or settings.importance_sampling_level == "token")
    return host == "rloo" and one_a_row


def _words(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
