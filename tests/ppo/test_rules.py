"""PPO's real config refuses exactly what `explain` says is refused, in the same words; see `tests/integration`."""

from __future__ import annotations

import functools

import pytest
from random_configurations import configurations

import kl_plugins.core.registry
from kl_plugins import ConfigError, UnknownLossError
from kl_plugins.explain.verdict import explain_run
from kl_plugins.integration import rules_trl
from kl_plugins.trl.ppo import PPOConfig


def differences(output_dir):
    for given in configurations("ppo", 200):
        said, explained = set(), set()
        try:
            PPOConfig(output_dir=str(output_dir), use_cpu=True, bf16=False, report_to="none", **given)
        except (ConfigError, UnknownLossError) as error:
            said = set(error.args)
        try:
            explained = {flaw.says for flaw in explain_run(given, "ppo").flaws if flaw.effect == "refused"}
        except (ConfigError, UnknownLossError) as error:
            explained = set(error.args)
        if said != explained:
            yield given, said, explained


@pytest.fixture(autouse=True)
def installed_packages_are_read_once(monkeypatch):
    entry_points = functools.cache(kl_plugins.core.registry.entry_points)
    monkeypatch.setattr(kl_plugins.core.registry, "entry_points", entry_points)


def test_refused_exactly_if_explain_says_so_in_the_same_words(tmp_path):
    assert list(differences(tmp_path)) == []


def test_a_rule_that_explain_lacks_is_noticed(tmp_path, monkeypatch):
    def lacking(settings):
        return (problem for problem in rules_trl.ppo_problems(settings) if "whiten_rewards" not in problem.says)

    monkeypatch.setitem(rules_trl.RULES, "ppo", lacking)
    assert next(differences(tmp_path), None) is not None
