"""`KLSpec`: every option is checked when it is made, and every refusal says what to do."""

import math
import pickle
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from kl_plugins import ConfigError, KLSpec, UnknownLossError
from kl_plugins.core import registry

GRADIENTS = {
    ("k1_in_reward", None, 1.0): "reverse_kl",
    ("k1_in_reward", "to_go", 1.0): "reverse_kl",
    ("k1_in_reward", "to_go", 0.9): "biased",
    ("k1_in_reward", "to_go", 0.01): "biased",
    ("k1_in_reward", "to_go", 0.0): "local_reverse_kl",
    ("k1_in_reward", "sequence", 1.0): "reverse_kl",
    ("k1_in_reward", "token", 1.0): "local_reverse_kl",
    ("k2_as_loss", None, 1.0): "local_reverse_kl",
    ("k2_as_loss", "sequence", 1.0): "reverse_kl",
    ("k3_as_loss", None, 1.0): "local_forward_kl",
    ("k1_as_loss", None, 1.0): "zero",
    ("k2_in_reward", None, 1.0): "biased",
    ("k3_in_reward", None, 1.0): "biased",
    ("k3_in_reward", "to_go", 0.0): "biased",
    ("exact_as_loss", None, 1.0): "local_reverse_kl",
    ("exact_in_reward", None, 1.0): "reverse_kl",
    ("exact_in_reward", "to_go", 0.9): "biased",
    ("exact_in_reward", "to_go", 0.0): "local_reverse_kl",
    ("exact_in_reward", "token", 1.0): "local_reverse_kl",
    ("exact_forward_as_loss", None, 1.0): "local_forward_kl",
}
REFUSED = [key for key, gradient in GRADIENTS.items() if gradient in ("zero", "biased")]


def spec_of(name, credit, gamma, **options):
    return KLSpec.from_name(name, credit=credit, gamma=gamma, **options)


@pytest.mark.parametrize("key", GRADIENTS)
def test_gradient_of(key):
    assert spec_of(*key, allow_biased=True).gradient_of == GRADIENTS[key]


def test_every_entry_and_credit_has_a_gradient_above():
    for name, loss in registry.LOSSES.items():
        for credit in loss.gradient_of:
            default = None if credit == loss.default_credit else credit
            assert (name, default, 1.0) in GRADIENTS


@pytest.mark.parametrize("key", [key for key in GRADIENTS if key not in REFUSED])
def test_principled_configurations_need_no_permission(key):
    assert spec_of(*key) == replace(spec_of(*key, allow_biased=True), allow_biased=False)


def test_credit_none_is_the_losss_default():
    assert KLSpec.from_name("k1_in_reward").credit == "to_go"
    assert KLSpec.from_name("k2_as_loss").credit == "token"
    assert KLSpec.from_name("k2_as_loss") == KLSpec(name="k2_as_loss", credit="token")


@pytest.mark.parametrize(
    ("name", "expected", "instead"),
    [
        ("k1_as_loss", r"zero \(E\[grad log pi\] = 0\)", "k2_as_loss"),
        ("k2_in_reward", r"biased \(grad E\[sum k2\] - grad local reverse KL\)", "k1_in_reward"),
        ("k3_in_reward", r"biased \(grad reverse KL - grad local forward KL\)", "k1_in_reward"),
    ],
)
def test_refusal_names_the_gradient_and_the_alternative(name, expected, instead):
    with pytest.raises(
        ConfigError, match=rf"{name} was asked for.*gradient is {expected}: use {instead} instead, or.*allow_biased"
    ):
        KLSpec.from_name(name)
    assert KLSpec.from_name(name, allow_biased=True).name == name
    KLSpec.from_name(instead)  # and the alternative is accepted


def test_discount_is_refused_with_what_to_do():
    with pytest.raises(ConfigError, match=r"gamma=0.9.*neither.*gamma=1 \(or credit='token'\).*allow_biased=True"):
        KLSpec.from_name("k1_in_reward", gamma=0.9)
    assert KLSpec.from_name("k1_in_reward", gamma=0.9, allow_biased=True).gamma == 0.9


def test_the_default_is_right_off_policy():
    spec = KLSpec.from_name("k2_as_loss")
    assert (spec.off_policy, spec.weight_clip, spec.weight_clip_mode) == ("token", (0.0, 10.0), "truncate")
    assert (spec.baseline, spec.clip, spec.nonfinite, spec.allow_biased) == (None, None, "error", False)


BAD_VALUES = [
    (
        {"credit": "suffix"},
        r"credit='suffix' is not offered by k1_in_reward: choose from 'to_go', 'sequence', 'token'",
    ),
    ({"credit": ""}, "credit='' is not offered"),
    ({"off_policy": "seq"}, "off_policy='seq'.*'none', 'token', 'prefix', 'sequence'"),
    ({"off_policy": None}, "off_policy=None"),
    ({"off_policy": True}, "off_policy=True"),
    ({"weight_clip_mode": "clamp"}, "weight_clip_mode='clamp'.*'truncate', 'mask'"),
    ({"baseline": "mean"}, "baseline='mean'.*None, 'leave_one_out', 'group_mean'"),
    ({"clip": "both"}, "clip='both'.*None, 'separate', 'combined'"),
    ({"nonfinite": "ignore"}, "nonfinite='ignore'.*'error', 'drop'"),
    *[({"gamma": gamma}, r"gamma=.*\[0, 1\]") for gamma in (-0.1, 1.1, math.nan, "1", None, True)],
    *[({"clip_epsilon": epsilon}, r"clip_epsilon=.*\(0, 1\)") for epsilon in (0, 1, "0.2")],
    *[
        ({"weight_clip": clip}, "weight_clip=.*0 <= low <= 1 <= high")
        for clip in (
            (0.0, 0.5),
            (1.5, 3.0),
            (-1.0, 10.0),
            (1.0, 1.0),
            (0.0, math.nan),
            (0.0,),
            ("0", "10"),
            10.0,
            "0,10",
        )
    ],
]


@pytest.mark.parametrize(("options", "message"), BAD_VALUES)
def test_bad_values(options, message):
    with pytest.raises(ConfigError, match=message):
        KLSpec.from_name("k1_in_reward", **options)


@pytest.mark.parametrize("bound", [0, math.inf, "10", True])
def test_bad_coefficient_bound(bound):
    with pytest.raises(ConfigError, match=r"coefficient_bound=.*positive finite"):
        KLSpec.from_name("k3_as_loss", coefficient_bound=bound)


@pytest.mark.parametrize("loss", [loss.name for loss in registry.LOSSES.values()])
def test_credit_must_be_one_that_the_loss_offers(loss):
    for credit in registry.CREDITS:
        if credit not in registry.LOSSES[loss].gradient_of:
            with pytest.raises(ConfigError, match=f"credit='{credit}' is not offered by {loss}"):
                KLSpec.from_name(loss, credit=credit, allow_biased=True)


UNUSED = [
    ("k2_as_loss", {"gamma": 0.9}, "gamma=0.9 is not used by k2_as_loss.*to_go.*leave it out"),
    ("k1_in_reward", {"gamma": 0.0, "credit": "sequence"}, "gamma=0.0 is not used"),
    ("k2_as_loss", {"off_policy": "none", "weight_clip": (0.0, 5.0)}, "weight_clip=.*off_policy='none'"),
    ("k2_as_loss", {"off_policy": "none", "weight_clip_mode": "mask"}, "weight_clip_mode='mask'.*off_policy='none'"),
    ("k2_as_loss", {"clip_epsilon": 0.3}, "clip_epsilon=0.3 is not used"),
    ("k2_as_loss", {"coefficient_bound": 5.0}, "coefficient_bound=5.0 is not used"),
    ("k1_in_reward", {"coefficient_bound": 5.0}, "coefficient_bound=5.0 is not used"),
    ("k2_as_loss", {"clip": "separate", "off_policy": "prefix"}, "clip='separate'.*off_policy='prefix'"),
    ("k2_as_loss", {"clip": "combined", "off_policy": "none"}, "clip='combined'.*off_policy='token'"),
]


@pytest.mark.parametrize(("name", "options", "message"), UNUSED)
def test_unused_options_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        KLSpec.from_name(name, **options)


USED = [
    ("k1_in_reward", {"gamma": 0.9, "allow_biased": True}),
    ("k1_in_reward", {"gamma": 0}),
    ("k2_as_loss", {"off_policy": "prefix", "weight_clip": (0.0, 5.0), "weight_clip_mode": "mask"}),
    ("k2_as_loss", {"off_policy": "none", "weight_clip": (0.0, 10.0)}),  # the default, spelled out
    ("k2_as_loss", {"clip": "separate", "clip_epsilon": 0.3}),
    ("k3_as_loss", {"clip": "combined", "coefficient_bound": 5}),
    ("k2_as_loss", {"weight_clip": (0, math.inf), "nonfinite": "drop", "baseline": "leave_one_out"}),
]


@pytest.mark.parametrize(("name", "options"), USED)
def test_used_options_are_accepted(name, options):
    spec = KLSpec.from_name(name, **options)
    for option, value in options.items():
        assert getattr(spec, option) == value


@pytest.mark.parametrize("given", [[0, 5], (0, 5), [0.0, 5.0]])
def test_weight_clip_becomes_a_tuple_of_floats(given):
    """A list is what YAML and the command line give."""
    spec = KLSpec.from_name("k2_as_loss", weight_clip=given)
    assert spec.weight_clip == (0.0, 5.0)
    assert type(spec.weight_clip) is tuple
    assert [type(bound) for bound in spec.weight_clip] == [float, float]
    assert hash(spec) == hash(KLSpec.from_name("k2_as_loss", weight_clip=(0.0, 5.0)))


def test_all_bad_values_at_once():
    with pytest.raises(ConfigError) as error:
        KLSpec.from_name("k1_in_reward", off_policy="x", baseline="y", gamma=7, weight_clip=3, clip_epsilon=9)
    lines = str(error.value).splitlines()
    assert all(line.startswith("- ") for line in lines)
    for option in ("off_policy='x'", "baseline='y'", "gamma=7", "weight_clip=3", "clip_epsilon=9"):
        assert any(line.startswith(f"- {option}") for line in lines)


def test_unused_options_and_the_refused_gradient_at_once():
    with pytest.raises(ConfigError) as error:
        KLSpec.from_name("k1_as_loss", gamma=0.5, clip_epsilon=0.3, off_policy="none", weight_clip=(0.0, 2.0))
    assert len(str(error.value).splitlines()) == 4
    for found in ("gamma=0.5", "clip_epsilon=0.3", "weight_clip=(0.0, 2.0)", "use k2_as_loss instead"):
        assert found in str(error.value)


def test_bad_values_and_the_refused_gradient_at_once():
    with pytest.raises(ConfigError) as error:
        KLSpec.from_name("k1_as_loss", baseline="y")
    assert "baseline='y'" in str(error.value)
    assert "use k2_as_loss instead" in str(error.value)


def test_unknown_options_and_bad_values_at_once():
    with pytest.raises(ConfigError) as error:
        KLSpec.from_name("k2_as_loss", of_policy="token", gamma=7)
    assert "of_policy" in str(error.value)
    assert "gamma=7" in str(error.value)


def test_unknown_options_name_the_closest():
    with pytest.raises(ConfigError) as error:
        KLSpec.from_name("k2_as_loss", of_policy="token", weigth_clip=(0, 5), colour=3)
    first, second, third = str(error.value).splitlines()
    assert "unknown KL option 'of_policy': did you mean 'off_policy'?" in first
    assert "unknown KL option 'weigth_clip': did you mean 'weight_clip'?" in second
    assert "did you mean" not in third
    assert "credit" in third


@pytest.mark.parametrize(
    ("asked", "meant"), [("k2_as_los", "k2_as_loss"), ("k1_in_rewards", "k1_in_reward"), ("K3_as_loss", "k3_as_loss")]
)
def test_unknown_names_name_the_closest(asked, meant):
    with pytest.raises(UnknownLossError, match=f"unknown KL loss '{asked}': did you mean '{meant}'") as error:
        KLSpec.from_name(asked)
    assert isinstance(error.value, KeyError)
    assert all(name in str(error.value) for name in registry.LOSSES)
    assert not str(error.value).startswith(("'", '"'))  # KeyError would quote it


@pytest.mark.parametrize("asked", ["", "zzz", None, 3])
def test_unknown_names_without_a_close_one(asked):
    with pytest.raises(UnknownLossError) as error:
        KLSpec.from_name(asked)
    assert "did you mean" not in str(error.value)
    assert "k2_as_loss" in str(error.value)


def test_config_error_is_a_value_error():
    with pytest.raises(ValueError, match="gamma"):
        KLSpec.from_name("k1_in_reward", gamma=2)


def test_frozen_and_keyword_only():
    spec = KLSpec.from_name("k2_as_loss")
    with pytest.raises(FrozenInstanceError):
        spec.gamma = 0.5
    with pytest.raises(TypeError):
        KLSpec("k2_as_loss")
    with pytest.raises(ConfigError, match="gamma"):
        replace(spec, gamma=0.5)  # a changed copy is checked again


def test_travels_between_processes():
    spec = KLSpec.from_name("k2_as_loss", weight_clip=[0, 5])
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert KLSpec(**{field.name: getattr(spec, field.name) for field in fields(spec)}) == spec
