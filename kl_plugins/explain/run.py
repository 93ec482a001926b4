"""A configuration as a run: completed, checked, and with the KL term that its host would make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any, get_args, get_origin, get_type_hints

from kl_plugins.core.spec import KLSpec
from kl_plugins.errors import ConfigError, refuse
from kl_plugins.explain.host_terms import BETA, CHOICES, HOSTS, MARKS, OPTIONS, TERMS, VERSIONS, HostTerm
from kl_plugins.explain.reading import convert, refuse_unknown_kl
from kl_plugins.integration.choice import updates_per_rollout
from kl_plugins.integration.options import (
    GMPOOptions,
    KLOptions,
    OpenRLHFOptions,
    PlacementOptions,
    PPOOptions,
    ReferenceOptions,
    RLOOOptions,
)
from kl_plugins.integration.problem import Problem, changed
from kl_plugins.integration.rules_openrlhf import openrlhf_problems
from kl_plugins.integration.rules_trl import RULES, older_than
from kl_plugins.patching.versions import installed_version

# The options of ours that a trainer has.
OPTIONS_OF: dict[str, type[KLOptions]] = {
    "grpo": ReferenceOptions,
    "gmpo": GMPOOptions,
    "rloo": RLOOOptions,
    "ppo": PPOOptions,
    "openrlhf": OpenRLHFOptions,
}


@dataclass(frozen=True)
class Finding:
    """One thing about a configuration."""

    effect: str
    """What is wrong: `void`, `zero`, `biased` or `refused`; or `note`, where it is only worth knowing."""
    says: str
    change: Mapping[str, Any] = field(default_factory=dict)
    """The options that mend it; None leaves one out."""


@dataclass(frozen=True)
class Run:
    """A configuration, converted and complete."""

    trainer: str
    """`grpo`, `rloo`, `gmpo`, `ppo` or `openrlhf`."""
    settings: Mapping[str, Any]
    """Every option of `OPTIONS[trainer]`, by its name."""
    kl: KLOptions | None
    """Our options; None: the host's own KL."""
    spec: KLSpec | None
    """What they ask for."""
    term: HostTerm | None
    """The host's own term, where `kl` is None."""
    in_reward: bool
    """Whether the term is in the reward, and under the host's own ratio and clip."""
    updates: float
    """Optimizer steps on each rollout."""
    reused: bool
    """Whether some of them are made after the policy that drew the rollout has changed."""

    def __getitem__(self, option: str) -> Any:
        return self.settings[option]

    @property
    def stock(self) -> bool:
        """Whether the host's own KL is used."""
        return self.spec is None

    @property
    def combined(self) -> bool:
        """Whether our term is in the advantage, under the host's own ratio and clip."""
        return self.spec is not None and self.spec.clip == "combined"

    @property
    def host_term(self) -> HostTerm:
        """`term`, of a run that has one."""
        assert self.term is not None
        return self.term

    @property
    def beta(self) -> float:
        """The coefficient of the KL, by whatever name."""
        return float(self.settings[BETA[self.trainer]])

    @property
    def stale(self) -> bool:
        """Whether some updates are made on samples of an older policy, by reuse or because sampling runs ahead."""
        return self.reused or bool(self.settings.get("train.async_enable"))

    @property
    def engine(self) -> bool:
        """Whether vLLM draws the tokens."""
        return self.trainer == "openrlhf" or bool(self.settings.get("use_vllm"))


def infer_trainer(given: Mapping[str, Any], named: str | None, assumed: list[str]) -> str:
    """Which of TRL's trainers a configuration is for: the one that is `named`, or that its options give away.

    Adds what it assumes to `assumed`. Raises `ConfigError` for options of different trainers.
    """
    marks = {trainer: sorted(set(names) & set(given)) for trainer, names in MARKS.items()}
    found = [trainer for trainer, names in marks.items() if names]
    family = "grpo" if named == "gmpo" else named
    if len({*found, *([family] if family else [])}) > 1:
        listed = "; ".join(f"{', '.join(marks[trainer])} (of {HOSTS[trainer]})" for trainer in found)
        asked = f"--trainer {named} was asked for, but found" if named else "found"
        raise ConfigError(f"options of one trainer were expected, {asked} {listed}: keep those of one")
    if named:
        return named
    if found:
        assumed.append(f"--trainer {found[0]}: only {HOSTS[found[0]]} has {marks[found[0]][0]}")
        return found[0]
    assumed.append("--trainer grpo: nothing here tells GRPO from RLOO or GMPO")
    return "grpo"


def read_run(given: Mapping[str, Any], trainer: str, assumed: list[str]) -> tuple[Run, list[Problem]]:
    """The run that `given` is in `trainer`, and what is wrong with it by kl_plugins' rules. Adds to `assumed`.

    Raises `ConfigError` or `UnknownLossError` for what is no configuration.
    """
    options, kl = dict(OPTIONS[trainer]), kl_options(trainer)
    refuse_unknown_kl(given, [*options, *kl], of=f"{HOSTS[trainer]} and kl_plugins")
    host = "openrlhf" if trainer == "openrlhf" else "trl"
    installed = installed_version(host)
    if installed and installed != VERSIONS[trainer].split()[1]:
        assumed.append(f"what {VERSIONS[trainer]} does, though {installed} is installed")
    if host == "trl" and "use_bias_correction_kl" in options and older_than(installed, 1, 10):
        options["use_bias_correction_kl"] = (bool, False)
    if isinstance(given.get("scale_rewards"), bool):  # as TRL takes it
        given = {**given, "scale_rewards": "group" if given["scale_rewards"] else "none"}
    settings = {name: default for name, (_, default) in options.items()} | convert(given, options, CHOICES)
    ours = convert(given, kl, {})
    updates, reused = _updates(trainer, settings, assumed)
    chosen: Any = OPTIONS_OF[trainer](**ours)
    chosen._none_from_words()
    flags = [nested(settings)] if trainer == "openrlhf" else []
    if flags:  # without any option of ours it is OpenRLHF that is started, not our launcher
        problems = list(openrlhf_problems(chosen, *flags) if ours else ())
    else:  # a config of TRL has its options and ours in one object, which the rules read
        vars(chosen).update(settings | _steps(settings))
        problems = list(RULES[trainer](chosen))
    if chosen.kl is None:
        term = _host_term(trainer, settings)
        return Run(trainer, settings, None, None, term, term.in_reward, updates, reused), problems
    spec = _spec(chosen, problems, *flags)
    in_reward = isinstance(chosen, PlacementOptions) and chosen.kl_in_reward
    return Run(trainer, settings, chosen, spec, None, in_reward, updates, reused), problems


def kl_options(trainer: str) -> dict[str, tuple[type, Any]]:
    """The options of ours in a trainer, as `OPTIONS` has the host's. None is a value of each of them."""
    hints = get_type_hints(OPTIONS_OF[trainer])
    return {f.name: (_kind(hints[f.name]), None) for f in fields(OPTIONS_OF[trainer])}


def _kind(hint: Any) -> type:
    """`list` of two numbers, `tuple` of words, or the plain type."""
    if hint == list[str]:
        return tuple
    kinds = [get_origin(hint), hint, *get_args(hint)]
    return next(kind for kind in (list, bool, int, float, str) if kind in kinds)


def _host_term(trainer: str, settings: Mapping[str, Any]) -> HostTerm:
    name = trainer
    if trainer == "grpo" and not settings["use_bias_correction_kl"]:
        name = "grpo_plain"
    elif trainer == "grpo" and settings["importance_sampling_level"] == "sequence":
        name = "grpo_sequence"
    elif trainer == "ppo" and settings["kl_estimator"] == "k3":
        name = "ppo_k3"
    elif trainer == "openrlhf":
        estimator = settings["algo.kl.estimator"]
        name = f"openrlhf_reward_{estimator}"
        if settings["algo.kl.use_loss"]:
            name = f"openrlhf_loss_{'unbiased' if settings['algo.kl.unbiased_gradient'] else estimator}"
    return TERMS[name]


def _spec(chosen: Any, problems: Sequence[Problem], *flags: Any) -> KLSpec:
    """What `chosen` asks for, biased gradients let through.

    If that can't be, as it is without the options that don't fit, or else with none but `kl`: the page then says what
    is refused, and what the gradient of the rest is.
    """
    unfit = {name: None for problem in problems for name, value in problem.change.items() if value is None}
    ours = {f.name for f in fields(chosen)}
    for change in ({}, {name: None for name in unfit if name in ours}):
        try:
            spec: KLSpec = changed(chosen, change | {"kl_allow_biased": True}).kl_spec(*flags)
        except ConfigError:
            continue
        return spec
    return KLSpec.from_name(chosen.kl_loss.name, allow_biased=True)


def nested(settings: Mapping[str, Any]) -> SimpleNamespace:
    """`{"algo.kl.target": 1}` as OpenRLHF has it: `args.algo.kl.target`."""
    root = SimpleNamespace()
    for name, value in settings.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            node.__dict__.setdefault(part, SimpleNamespace())
            node = getattr(node, part)
        setattr(node, last, value)
    return root


def _updates(trainer: str, settings: Mapping[str, Any], assumed: list[str]) -> tuple[float, bool]:
    """Optimizer steps on each rollout, and whether some are made after the policy that drew it has changed."""
    counts = ("num_", "steps_per_generation", "gradient_acc", "train.", "rollout.", "generation_batch", "per_device")
    refuse(
        [
            f"{name}={value}: a positive number was expected"
            for name, value in settings.items()
            if name.startswith(counts) and isinstance(value, int) and not isinstance(value, bool) and value < 1
        ]
    )
    if trainer == "ppo":
        updates = settings["num_ppo_epochs"] * settings["num_mini_batches"]
        return updates, updates > 1
    if trainer == "openrlhf":
        samples = settings["rollout.batch_size"] * settings["rollout.n_samples_per_prompt"]
        updates = samples / settings["train.batch_size"] * settings["train.max_epochs"]
        return updates, updates > 1
    steps = _steps(settings)
    if steps:
        assumed.append(
            f"one process, so that generation_batch_size makes steps_per_generation {steps['steps_per_generation']}"
        )
    return updates_per_rollout(SimpleNamespace(**dict(settings, **steps)))


def _steps(settings: Mapping[str, Any]) -> dict[str, int]:
    """`steps_per_generation` as a config of TRL's GRPO or RLOO reckons it, where it isn't given."""
    batch = settings.get("generation_batch_size")
    if batch is None or settings["steps_per_generation"] is not None:
        return {}
    return {"steps_per_generation": max(1, batch // settings["per_device_train_batch_size"])}
