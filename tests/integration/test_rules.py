"""A configuration is refused by its config exactly if `explain` says so, in the same words: one body of rules."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from dataclasses import dataclass, fields

import pytest
from random_configurations import HOST, OURS, configurations

import kl_plugins.core.registry
from kl_plugins import ConfigError, UnknownLossError
from kl_plugins.explain import run
from kl_plugins.explain.host_terms import OPTIONS
from kl_plugins.explain.verdict import explain_run
from kl_plugins.integration import rules, rules_openrlhf, rules_trl, sampling
from kl_plugins.integration.leave_out import LeaveOut
from kl_plugins.integration.options import KLOptions, OpenRLHFOptions, PPOOptions, option
from kl_plugins.integration.problem import Problem, refuse_problems, with_remedies
from kl_plugins.openrlhf import plan
from kl_plugins.trl import GMPOConfig, GRPOConfig, RLOOConfig

NUMBER = 300
QUIET = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}
CONFIGS = {"grpo": GRPOConfig, "gmpo": GMPOConfig, "rloo": RLOOConfig}
EVERY_TRAINER = pytest.mark.parametrize("trainer", OURS)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Installed packages are read once, and no tokenizer is loaded: which tokens are meant is no rule."""
    entry_points = functools.cache(kl_plugins.core.registry.entry_points)
    monkeypatch.setattr(kl_plugins.core.registry, "entry_points", entry_points)
    monkeypatch.setattr(plan, "_left_out", lambda options, args: LeaveOut())


def host_settings(trainer, given):
    host = {name: default for name, (_, default) in OPTIONS[trainer].items()}
    return host | {name: value for name, value in given.items() if name in host}


def flags_of(given):
    """The arguments that OpenRLHF's parser makes, as far as they have a say in the KL."""
    return run.nested(host_settings("openrlhf", given))


def make(trainer, given):
    """The config of `given`, or the launcher's plan. PPO, which this TRL has not, by the rules of its config."""
    if trainer in CONFIGS:
        CONFIGS[trainer](**QUIET, **given)
        return
    ours = {name: value for name, value in given.items() if name not in HOST[trainer]}
    if trainer == "ppo":
        settings = PPOOptions(**ours)
        settings._none_from_words()
        vars(settings).update(host_settings(trainer, given))
        refuse_problems(rules_trl.ppo_problems(settings), allow_biased=settings.kl_allow_biased)
    elif ours:  # else it isn't our launcher that is started
        plan.plan_run(OpenRLHFOptions(**ours), flags_of(given))


def said_by_config(trainer, given):
    try:
        make(trainer, dict(given))
    except (ConfigError, UnknownLossError) as error:
        return set(error.args)
    return set()


def said_by_explain(trainer, given):
    found = explain_run(given, trainer)  # which has something to say of each of them: no error is expected
    said = {flaw.says for flaw in found.flaws if flaw.effect == "refused"}
    assert (found.verdict == "refused", found.exit_code == 2) == (bool(said), bool(said))
    return said


def differences(trainer):
    for given in configurations(trainer, NUMBER):
        config, explained = said_by_config(trainer, given), said_by_explain(trainer, given)
        if config != explained:
            yield given, config, explained


@EVERY_TRAINER
def test_refused_exactly_if_explain_says_so_in_the_same_words(trainer):
    assert list(differences(trainer)) == []


def test_what_is_refused_before_the_flags_are_read_is_refused_with_them():
    refused = 0
    for given in configurations("openrlhf", NUMBER):
        ours = {name: value for name, value in given.items() if name not in HOST["openrlhf"]}
        early = {problem.refusal for problem in rules_openrlhf.openrlhf_problems(OpenRLHFOptions(**ours), None)}
        refused += bool(early)
        assert not ours or early <= {
            problem.refusal for problem in rules_openrlhf.openrlhf_problems(OpenRLHFOptions(**ours), flags_of(given))
        }
    assert 0 < refused < NUMBER


@EVERY_TRAINER
def test_some_of_these_configurations_are_right_and_some_are_not(trainer):
    refused = [bool(said_by_explain(trainer, given)) for given in configurations(trainer, 150)]
    assert 0.1 < sum(refused) / len(refused) < 0.9


@EVERY_TRAINER
def test_every_option_of_ours_is_drawn(trainer):
    assert {f.name for f in fields(run.OPTIONS_OF[trainer])} == {"kl", *OURS[trainer]}


@pytest.mark.parametrize(
    ("trainer", "module", "name", "says"),
    [
        ("grpo", rules_trl, "sampling_problems", "top_p"),
        ("grpo", rules_trl, "reference_problems", "kl_reference"),
        ("grpo", rules_trl, "beta_problems", "beta"),
        ("rloo", rules_trl, "spec_problems", "gradient"),
        ("gmpo", rules_trl, "gmpo_clip_problems", "GMPO's advantage"),
        ("ppo", rules_trl, "placement_problems", "in the reward"),
        ("openrlhf", rules_openrlhf, "placement_problems", "in the reward"),
        ("openrlhf", rules_openrlhf, "sampler_problems", "top_p"),
        ("openrlhf", rules_openrlhf, "_flag_problems", "--algo.kl.target"),
    ],
)
@pytest.mark.parametrize("side", [said_by_config, said_by_explain])
def test_a_rule_that_one_side_lacks_is_noticed(trainer, module, name, says, side, monkeypatch):
    def lacking(*args, **kwargs):
        return (problem for problem in rule(*args, **kwargs) if says not in problem.says)

    def without_the_rule(trainer, given):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, lacking)
            return side(trainer, given)

    rule = getattr(module, name)
    monkeypatch.setitem(globals(), side.__name__, without_the_rule)
    assert next(differences(trainer), None) is not None


def test_random_configurations_meet_every_rule(monkeypatch):
    """Every `Problem(...)` in the rules is said of one of them, but for three that no such configuration can have."""
    met = set()
    modules = (rules, rules_trl, rules_openrlhf, sampling)
    for module in modules:

        def recording(*args, module=module, **kwargs):
            met.add((module.__name__, sys._getframe(1).f_lineno))
            return Problem(*args, **kwargs)

        monkeypatch.setattr(module, "Problem", recording)
    for trainer in OURS:
        for given in configurations(trainer, NUMBER):
            said_by_explain(trainer, given)
    missed = []
    for module in modules:
        source = inspect.getsource(module)
        for node in ast.walk(ast.parse(source)):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") == "Problem"
                and (module.__name__, node.lineno) not in met
            ):
                missed.append(ast.get_source_segment(source, node.args[0]))
    elsewhere = (
        "use_liger_kernel=True: this TRL then",  # older versions
        "'base' or 'adapter:NAME' was expected",  # no file has it
        "in a GRPOConfig picked kl_clip='combined'",  # a GMPOTrainer with another trainer's config
    )
    assert [says for says in missed if not any(of in says for of in elsewhere)] == []
    assert len(missed) == len(elsewhere)


@EVERY_TRAINER
def test_remedies_mend(trainer):
    """Who follows what `explain` says to change has a configuration that is right, after three rounds at most."""
    for given in configurations(trainer, 100, seed=1):
        mended, host = dict(given), trainer
        for _ in range(3):
            change = explain_run(mended, host).change
            mended = {name: value for name, value in {**mended, **change}.items() if value is not None}
            host = "grpo" if trainer == "gmpo" and "kl" in change else host
        assert explain_run(mended, host).verdict in ("principled", "another divergence"), (given, mended)


@dataclass
class _Options(KLOptions):
    speed: int = option(1, "of a host")


def test_a_remedy_is_the_first_change_that_silences_a_message():
    def messages(options):
        return ["too fast"] if options.speed > 1 else []

    changes = [{"kl": "k2_as_loss"}, {"speed": None}, {"speed": 0}]
    assert [p.change for p in with_remedies(_Options(speed=3), messages, changes)] == [{"speed": None}]
    assert [p.change for p in with_remedies(_Options(speed=3), messages, changes[:1])] == [{}]
    assert list(with_remedies(_Options(), messages, changes)) == []
