"""What `kl="reverse_kl"` picks for each host, and that what the user sets wins."""

import pytest

from kl_plugins import UnknownLossError
from kl_plugins.core.registry import LOSSES
from kl_plugins.core.spec import KLSpec
from kl_plugins.integration.choice import GROUP_ESTIMATORS, OFF_POLICY_OPTIONS, TREATMENTS, choose

HOSTS = [{"host": host, "estimator": estimator} for host, estimator in TREATMENTS]


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("host", HOSTS, ids=lambda host: " ".join(host.values()))
def test_the_pick_is_a_configuration_with_the_gradient_of_the_reverse_kl(host, off_policy):
    found = choose("reverse_kl", {}, **host, off_policy=off_policy)
    spec = KLSpec(name=found.kl, **{name.removeprefix("kl_"): value for name, value in found.options.items()})
    assert spec.gradient_of == "reverse_kl"
    assert found.sentence.startswith("kl='reverse_kl' picked kl='k1_in_reward', kl_credit=")
    by_hand = choose(found.kl, {}, **host, off_policy=off_policy)
    assert by_hand.options.items() <= found.options.items()
    assert by_hand.sentence == ""


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: " ".join(host.values()))
def test_what_is_set_wins(host):
    given = {"kl_credit": "token", "kl_baseline": None, "kl_off_policy": "prefix", "kl_clip": "separate"}
    found = choose("reverse_kl", given, **host, off_policy=True)
    assert not found.picked.keys() & given.keys()
    assert found.options.items() <= given.items()
    assert "It left kl_credit='token'" in found.sentence
    assert "sum of next-token KLs" in found.sentence


@pytest.mark.parametrize("option", OFF_POLICY_OPTIONS)
def test_an_option_about_weights_leaves_nothing_to_pick(option):
    off_policy = {"host": "grpo", "off_policy": True, "in_advantage": True}
    assert choose("reverse_kl", {}, **off_policy).picked["kl_clip"] == "combined"
    assert choose("reverse_kl", {option: "set"}, **off_policy).picked.get("kl_clip") is None
    assert choose("k1_in_reward", {}, **off_policy).picked["kl_clip"] is None


def test_a_group_of_one_has_no_baseline():
    for estimator in GROUP_ESTIMATORS:
        assert choose("reverse_kl", {}, host="openrlhf", estimator=estimator).options["kl_baseline"]
        alone = choose("reverse_kl", {}, host="openrlhf", estimator=estimator, groups=False)
        assert alone.options["kl_baseline"] is None


@pytest.mark.parametrize("name", LOSSES)
def test_only_a_kl_in_the_reward_is_treated_as_the_reward(name):
    found = choose(name, {}, host="grpo").options
    assert (found["kl_baseline"] is not None) == LOSSES[name].in_reward
    assert found["kl_credit"] in LOSSES[name].gradient_of


def test_the_core_has_no_host_to_pick_for():
    with pytest.raises(UnknownLossError, match="a host picks the configuration"):
        KLSpec(name="reverse_kl")
    with pytest.raises(UnknownLossError, match="did you mean 'reverse_kl'"):
        choose("reverse_k", {}, host="grpo")
