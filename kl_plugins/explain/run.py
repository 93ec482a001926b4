"""A configuration as a run: completed, checked, and with the KL term that its host would make of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any, get_args, get_origin, get_type_hints

from kl_plugins.core.registry import distribution_problems, get_loss
from kl_plugins.core.spec import KLSpec
from kl_plugins.errors import ConfigError, refuse
from kl_plugins.explain.host_terms import BETA, CHOICES, HOSTS, MARKS, OPTIONS, TERMS, VERSIONS, HostTerm
from kl_plugins.explain.reading import convert, refuse_unknown_kl
from kl_plugins.integration.options import LEAVE_OUT_OPTIONS, KLOptions, ReferenceOptions
from kl_plugins.openrlhf.plan import OpenRLHFOptions, plan_kl
from kl_plugins.patching.versions import installed_version


@dataclass(frozen=True)
class Finding:
    """One thing about a configuration."""

    effect: str
    """What is wrong: `void`, `zero`, `biased` or `refused`; or `note`, where it is only worth knowing."""
    says: str
    change: Mapping[str, Any] = field(default_factory=dict)


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


def read_run(given: Mapping[str, Any], trainer: str, assumed: list[str]) -> tuple[Run, list[Finding]]:
    """The run that `given` is in `trainer`, and what kl_plugins would refuse of it. Adds to `assumed`.

    Raises `ConfigError` or `UnknownLossError` for what is no configuration.
    """
    options, kl = dict(OPTIONS[trainer]), kl_options(trainer)
    refuse_unknown_kl(given, [*options, *kl], of=f"{HOSTS[trainer]} and kl_plugins")
    host = "openrlhf" if trainer == "openrlhf" else "trl"
    installed = installed_version(host)
    if installed and installed != VERSIONS[trainer].split()[1]:
        assumed.append(f"what {VERSIONS[trainer]} does, though {installed} is installed")
    if host == "trl" and "use_bias_correction_kl" in options and _before(installed, 1, 10):
        options["use_bias_correction_kl"] = (bool, False)
    settings = {name: default for name, (_, default) in options.items()} | convert(given, options, CHOICES)
    ours = convert(given, kl, {})
    updates, reused = _updates(trainer, settings, assumed)
    if str(ours.get("kl")).lower() in ("none", "null"):
        without = ", ".join(sorted(set(ours) - {"kl"}))
        refuse([f"{without} set, but kl is None: name a configuration with kl"] if without else [])
        term = _host_term(trainer, settings)
        return Run(trainer, settings, None, None, term, term.in_reward, updates, reused), []
    if trainer == "openrlhf":
        chosen, spec, in_reward, refused = _openrlhf_spec(ours, settings, given)
    else:
        chosen, spec, in_reward, refused = _trl_spec(ours, trainer, settings)
    return Run(trainer, settings, chosen, spec, None, in_reward, updates, reused), refused


def _before(installed: str | None, *version: int) -> bool:
    return installed is not None and tuple(map(int, re.findall(r"\d+", installed)[:2])) < version


def kl_options(trainer: str) -> dict[str, tuple[type, Any]]:
    """The options of `KLOptions`, as `OPTIONS` has the host's. None is a value of each of them."""
    names: dict[str, tuple[type, Any]] = {}
    for name, hint in get_type_hints(KLOptions).items():
        names[name] = (_kind(hint), None)
    if trainer in ("grpo", "rloo", "gmpo"):
        names |= {name: (_kind(hint), None) for name, hint in get_type_hints(ReferenceOptions).items()}
    return names | ({"kl_placement": (str, None)} if trainer in ("ppo", "openrlhf") else {})


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


def _trl_spec(
    ours: Mapping[str, Any], trainer: str, settings: Mapping[str, Any]
) -> tuple[KLOptions, KLSpec, bool, list[Finding]]:
    """As `kl_plugins.trl`'s configs make it, biased gradients let through."""
    placement = ours.get("kl_placement") or "auto"
    plain = {f.name for f in fields(KLOptions)}
    kl = KLOptions(**{name: value for name, value in ours.items() if name in plain})
    kl._none_from_words()
    reference = ReferenceOptions(**{name: value for name, value in ours.items() if name.startswith("kl_reference")})
    loss = get_loss(str(kl.kl))
    refuse(distribution_problems(loss.name, "TRL's PPOTrainer") if trainer == "ppo" else [])
    if placement not in ("auto", "loss", "reward"):
        raise ConfigError(f"kl_placement={placement!r}: choose from auto, loss, reward")
    in_reward = trainer == "ppo" and (placement == "reward" or (placement == "auto" and loss.in_reward))
    chosen, problems = replace(kl, kl_allow_biased=True), []
    if trainer == "rloo" and ours.get("kl_baseline", "auto") == "auto":
        chosen.kl_baseline = kl.kl_baseline = "leave_one_out" if loss.in_reward else None
    unused = {"kl_clip_epsilon", "kl_weight_clip", "kl_weight_clip_mode"} & set(ours)
    if in_reward:
        unused |= {"kl_gamma", "kl_off_policy", "kl_clip"} & set(ours)
        problems = [
            f"{name} is not used in the reward, where TRL's own apply: leave it out" for name in sorted(unused)
        ]
        problems += _ppo_reward_problems(kl, loss.in_reward)
        gamma = settings["gamma"] if kl.kl_credit in (None, "to_go") else 1.0
        defaults = {name: getattr(KLOptions(), name) for name in unused}
        chosen = replace(chosen, **defaults | {"kl_clip": "combined", "kl_gamma": gamma})
    elif kl.kl_clip == "combined":
        problems = [f"{name} is not used with kl_clip='combined', where TRL's own apply" for name in sorted(unused)]
        if trainer == "ppo":
            problems.append("kl_clip='combined' puts the KL into the advantage: use kl_placement='reward' instead")
    spec = chosen.kl_spec()
    assert spec is not None
    problems += [*kl.left_out_problems(spec), *reference.reference_problems()]
    if trainer == "rloo" and kl.kl_clip == "combined" and set(kl.kl_leave_out) - {"first"}:
        problems.append("kl_leave_out of tokens with kl_clip='combined', where a sequence has one number: drop one")
    if trainer == "ppo" and kl.kl_leave_out_equal_rewards:
        problems.append("kl_leave_out_equal_rewards needs several completions of a prompt: PPO generates one")
    return kl, spec, in_reward, [_refused(problem, ours) for problem in problems]


def _ppo_reward_problems(kl: KLOptions, loss_in_reward: bool) -> list[str]:
    problems = []
    if not loss_in_reward:
        problems.append(f"{kl.kl} is a term of the loss: leave kl_placement out, or use kl='k1_in_reward'")
    if kl.kl_credit not in (None, "to_go"):
        problems.append(f"kl_credit={kl.kl_credit!r}: PPO's rewards have credit 'to_go'; use kl_placement='loss'")
    left_out = [name for name in kl.changed_kl_options() if name in LEAVE_OUT_OPTIONS]
    problems += [f"{name} is not offered in the reward: use kl_placement='loss'" for name in left_out]
    return problems


def _openrlhf_spec(
    ours: Mapping[str, Any], settings: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[KLOptions, KLSpec, bool, list[Finding]]:
    """As the launcher itself makes it, biased gradients let through."""
    options = OpenRLHFOptions(**ours)
    loss = get_loss(str(options.kl))
    in_reward = options.kl_placement == "reward" or (options.kl_placement == "auto" and loss.in_reward)
    args = nested(settings)
    if args.algo.kl.init_coef <= 0:  # which is a finding of its own
        args.algo.kl.init_coef = 1.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = plan_kl(replace(options, kl_allow_biased=True), args, resolve_tokens=False)
            return options, plan.spec, in_reward, []
    except ConfigError as error:
        refused = [_refused(problem, given) for problem in error.args]
    plain = KLOptions(**{name: value for name, value in ours.items() if name in {f.name for f in fields(KLOptions)}})
    spec = replace(plain, kl_allow_biased=True, kl_baseline=None, kl_clip=None).kl_spec()
    assert spec is not None
    return options, spec, in_reward, refused


def _refused(problem: str, given: Mapping[str, Any]) -> Finding:
    """What kl_plugins refuses to start, with the options that it names as those to leave out."""
    if "use kl_placement='loss'" in problem:
        return Finding("refused", problem, {"kl_placement": "loss"})
    return Finding("refused", problem, {name: None for name in given if name in problem and name != "kl"})


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
    accumulation, steps = settings["gradient_accumulation_steps"], settings["steps_per_generation"]
    if steps is None and settings["generation_batch_size"] is not None:
        steps = max(1, settings["generation_batch_size"] // settings["per_device_train_batch_size"])
        assumed.append(f"one process, so that generation_batch_size makes steps_per_generation {steps}")
    micro_batches = (steps or accumulation) * settings["num_iterations"]
    return micro_batches / accumulation, accumulation % micro_batches != 0
