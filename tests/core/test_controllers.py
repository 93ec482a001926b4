"""Controllers of beta: one update, the bounds, states that continue bit for bit, and options."""

import json
import math
import random
import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest
from controlled import FEEDBACK, OPTIONS, batch, spec_of
from hypothesis import given, settings
from hypothesis import strategies as st

from kl_plugins import ConfigError
from kl_plugins.core import controllers
from kl_plugins.core.controllers import ControllerSpec

# Reproducible, and no database: a run leaves nothing behind.
example = settings(max_examples=100, deadline=None, derandomize=True, database=None)


# ---------------------------------------------------------------- schedules


SCHEDULES = [
    ("linear", 0.1, 0.3, [0.1, 0.15, 0.2, 0.25, 0.3]),
    ("linear", 0.3, 0.1, [0.3, 0.25, 0.2, 0.15, 0.1]),
    ("linear", 0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
    ("cosine", 0.0, 1.0, [0.0, (2 - math.sqrt(2)) / 4, 0.5, (2 + math.sqrt(2)) / 4, 1.0]),
    ("cosine", 0.3, 0.1, [0.3, 0.1 + (2 + math.sqrt(2)) / 20, 0.2, 0.1 + (2 - math.sqrt(2)) / 20, 0.1]),
]


@pytest.mark.parametrize(("kind", "beta", "end", "quarters"), SCHEDULES)
@pytest.mark.parametrize("steps", [4, 400])
def test_schedules(kind, beta, end, quarters, steps):
    """At the start, each quarter and the end; and it stays there."""
    controller = spec_of(kind, kl_beta_end=end, kl_beta_steps=steps).start(beta)
    betas = [controller.beta] + [controller.update(**batch(0.1)) for _ in range(2 * steps)]
    assert betas[: steps + 1 : steps // 4] == pytest.approx(quarters, rel=1e-14, abs=1e-16)
    assert betas[0] == beta
    assert set(betas[steps:]) == {end}


def test_a_schedule_ends_exactly_where_it_should():
    """The usual way to write it doesn't."""
    assert 0.7 + 1.0 * (0.1 - 0.7) != 0.1
    controller = spec_of("linear", kl_beta_end=0.1, kl_beta_steps=1).start(0.7)
    assert controller.update(**batch(0.1)) == 0.1


@pytest.mark.parametrize("kind", ["fixed", "linear", "cosine"])
def test_without_a_target_the_measurement_is_not_read(kind):
    measured, blind = spec_of(kind).start(0.05), spec_of(kind).start(0.05)
    for kl in (0.1, 5.0, -1.0, math.nan):
        assert measured.update(**batch(kl)) == blind.update(kl_sum=0.0, tokens=0, sequences=0)
    assert (measured.beta == 0.05) == (kind == "fixed")


# ------------------------------------------------------------ one update


@pytest.mark.parametrize(
    ("kl", "error"),
    [(0.1, 0.0), (0.11, 0.1), (0.09, -0.1), (0.13, 0.2), (1e6, 0.2), (0.0, -0.2), (-3.0, -0.2)],
)
@pytest.mark.parametrize("horizon", [1, 19.5])
def test_proportional_is_ziegler_et_al(kl, error, horizon):
    """beta (1 + K_beta clip(error, -0.2, 0.2)), K_beta = 0.1 at a horizon of 10."""
    found = spec_of("proportional", kl_horizon=horizon).start(0.04).update(**batch(kl))
    assert found == pytest.approx(0.04 * (1 + error / horizon), rel=1e-12)


@pytest.mark.parametrize(("kl", "error"), [(0.1, 0), (0.13, 0.3), (0.05, -0.5), (0.7, 1), (0.0, -1), (-2.0, -1)])
def test_pi_step_by_step(kl, error):
    """A constant error: the integral grows by error / horizon, the proportional term stays."""
    controller = spec_of("pi", kl_horizon=25).start(0.04)
    for count in range(1, 5):
        expected = 0.04 * math.exp(0.2 * error + count * error / 25)
        assert controller.update(**batch(kl)) == pytest.approx(expected, rel=1e-12)


def test_the_first_update_is_no_larger_than_documented():
    assert spec_of("pi").start(0.04).update(**batch(1e9)) / 0.04 == pytest.approx(1.284, abs=1e-3)
    assert spec_of("proportional").start(0.04).update(**batch(1e9)) / 0.04 == pytest.approx(1.01, rel=1e-12)


@pytest.mark.parametrize("kind", FEEDBACK)
def test_target_per_token_or_sequence(kind):
    """30 nats in 100 tokens of 5 sequences are 0.3 per token and 6 per sequence."""
    sums = {"kl_sum": 30.0, "tokens": 100, "sequences": 5}
    for per, target in (("token", 0.3), ("sequence", 6.0)):
        assert spec_of(kind, kl_target=target, kl_target_per=per).start(0.04).update(**sums) == pytest.approx(0.04)
        assert spec_of(kind, kl_target=target * 1.1, kl_target_per=per).start(0.04).update(**sums) < 0.0399
        assert spec_of(kind, kl_target=target / 1.1, kl_target_per=per).start(0.04).update(**sums) > 0.0401


@pytest.mark.parametrize("kind", FEEDBACK)
@pytest.mark.parametrize("empty", [{"tokens": 0}, {"sequences": 0}, {"tokens": 0, "sequences": 0, "kl_sum": 0.0}])
def test_a_batch_without_tokens_or_sequences_changes_nothing(kind, empty):
    controller = spec_of(kind).start(0.04)
    controller.update(**batch(0.3))
    before = controller.state_dict()
    assert controller.update(**{**batch(0.3), **empty}) == before["beta"]
    assert controller.state_dict() == before
    assert controller.update(**batch(0.3)) != before["beta"]


BAD_SUMS = [
    *[{name: math.nan} for name in ("kl_sum", "tokens", "sequences")],
    {"kl_sum": math.inf},
    {"kl_sum": -math.inf},
    {"tokens": -1},
    {"sequences": -1},
    {"kl_sum": math.nan, "tokens": 0},
]


@pytest.mark.parametrize("kind", FEEDBACK)
@pytest.mark.parametrize("bad", BAD_SUMS)
def test_bad_sums_are_an_error_and_change_nothing(kind, bad):
    controller = spec_of(kind).start(0.04)
    controller.update(**batch(0.3))
    before = controller.state_dict()
    with pytest.raises(
        ValueError, match=rf"{kind}.*finite sums.*{next(iter(bad))}={next(iter(bad.values()))}.*: leave"
    ):
        controller.update(**{**batch(0.3), **bad})
    assert controller.state_dict() == before


@pytest.mark.parametrize("kind", FEEDBACK)
def test_ranks_that_feed_the_same_sums_agree_bit_for_bit(kind):
    """And those that feed their own don't."""
    rng = random.Random(0)
    ranks = [spec_of(kind).start(0.04) for _ in range(2)]
    alone = [spec_of(kind).start(0.04) for _ in range(2)]
    for _ in range(200):
        local = [batch(rng.gauss(0.1, 0.1), tokens=rng.randint(1, 99)) for _ in range(2)]
        reduced = {name: local[0][name] + local[1][name] for name in local[0]}
        assert len({rank.update(**reduced).hex() for rank in ranks}) == 1
        for rank, sums in zip(alone, local, strict=True):
            rank.update(**sums)
    assert alone[0].beta != alone[1].beta


# ------------------------------------------------------------- properties

numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.one_of(st.just(0), st.integers(1, 10**9), st.floats(0, 1e12))
measurements = st.lists(
    st.fixed_dictionaries({"kl_sum": st.one_of(numbers, st.floats(-100, 100)), "tokens": counts, "sequences": counts}),
    max_size=50,
)


@st.composite
def started(draw):
    kind = draw(st.sampled_from(FEEDBACK))
    low, beta, high = sorted(draw(st.lists(st.floats(1e-300, 1e300), min_size=3, max_size=3)))
    spec = ControllerSpec(
        kl_controller=kind,
        kl_target=draw(st.one_of(st.floats(1e-3, 100), st.floats(0, 1e300, exclude_min=True))),
        kl_target_per=draw(st.sampled_from(["token", "sequence"])),
        kl_horizon=draw(st.one_of(st.floats(1, 100), st.floats(1, 1e300))),
        kl_beta_min=low,
        kl_beta_max=high,
    )
    return spec.start(beta)


@example
@given(started(), measurements)
def test_beta_is_finite_and_within_its_bounds(controller, measured):
    for sums in measured:
        beta = controller.update(**sums)
        assert type(beta) is float
        assert controller.spec.kl_beta_min <= beta <= controller.spec.kl_beta_max


@example
@given(started(), measurements, measurements)
def test_a_state_continues_bit_for_bit(controller, before, after):
    """Through JSON, into a controller that started elsewhere."""
    for sums in before:
        controller.update(**sums)
    restored = controller.spec.start(controller.spec.kl_beta_max)
    restored.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert restored.beta.hex() == controller.beta.hex()
    for sums in after:
        assert restored.update(**sums).hex() == controller.update(**sums).hex()
    assert restored.state_dict() == controller.state_dict()


@example
@given(
    st.sampled_from(["linear", "cosine"]),
    st.floats(0, 1e300),
    st.floats(0, 1e300),
    st.integers(1, 30),
    st.integers(0, 40),
)
def test_a_schedule_stays_between_its_ends_and_continues_bit_for_bit(kind, beta, end, steps, at):
    spec = spec_of(kind, kl_beta_end=end, kl_beta_steps=steps)
    controller, restored = spec.start(beta), spec.start(beta)
    for _ in range(at):
        controller.update(**batch(0.1))
    restored.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    for _ in range(5):
        assert restored.beta.hex() == controller.beta.hex()
        assert min(beta, end) * (1 - 1e-15) <= controller.beta <= max(beta, end) * (1 + 1e-15)
        assert restored.update(**batch(0.1)) == controller.update(**batch(0.1))


def test_bounds_at_the_ends_of_the_floats():
    spec = spec_of("pi", kl_beta_min=5e-324, kl_beta_max=sys.float_info.max, kl_horizon=1)
    controller = spec.start(1.0)
    for kl, bound in ((9.0, spec.kl_beta_max), (-9.0, spec.kl_beta_min)):
        betas = [controller.update(**batch(kl)) for _ in range(2000)]
        assert betas[-1] == pytest.approx(bound, rel=1e-12)


# ------------------------------------------------------------------ state


@pytest.mark.parametrize("kind", FEEDBACK)
def test_an_integral_that_is_lost_is_noticed(kind):
    """What a state without it would do: the round trip above can fail."""
    spec = spec_of(kind)
    controller = spec.start(0.01)
    for kl in (0.3, 0.02, 0.15):
        controller.update(**batch(kl))
    lossy = spec.start(controller.beta)
    same = [controller.update(**batch(kl)) == lossy.update(**batch(kl)) for kl in (0.05, 0.2, 0.1)]
    assert all(same) == (kind == "proportional")  # whose state is beta


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("fixed", {"controller"}),
        ("linear", {"controller", "updates"}),
        ("cosine", {"controller", "updates"}),
        ("proportional", {"controller", "beta"}),
        ("pi", {"controller", "beta", "integral"}),
    ],
)
def test_what_a_state_holds(kind, keys):
    state = spec_of(kind).start(0.04).state_dict()
    assert set(state) == keys
    assert state["controller"] == kind
    assert json.loads(json.dumps(state)) == state


PI_STATE = {"controller": "pi", "beta": 0.04, "integral": -3.0}
BAD_STATES = [
    ("pi", {"controller": "proportional", "beta": 0.04}, "'pi' was asked to load.*'proportional': choose"),
    ("fixed", PI_STATE, "'fixed' was asked to load.*'pi': choose"),
    ("cosine", {"controller": "linear", "updates": 3}, "'cosine' was asked to load.*'linear': choose"),
    ("pi", {}, "controller=None: choose"),
    ("pi", {"controller": "pi", "beta": 0.04}, "'integral' is missing.*keys controller, beta, integral: load"),
    ("pi", {**PI_STATE, "gain": 1}, "unknown key 'gain'.*keys controller, beta, integral: load"),
    *[
        ("pi", {**PI_STATE, "beta": beta}, "beta=.* is nothing that 'pi' saves: load")
        for beta in (math.nan, 0.0, "0.04", True)
    ],
    *[("pi", {**PI_STATE, "integral": integral}, "integral=.* is nothing that") for integral in (math.inf, None)],
    *[
        ("linear", {"controller": "linear", "updates": updates}, "updates=.* is nothing that")
        for updates in (-1, 3.0, True)
    ],
]


@pytest.mark.parametrize(("kind", "state", "message"), BAD_STATES)
def test_bad_states_are_refused_and_change_nothing(kind, state, message):
    controller = spec_of(kind).start(0.05)
    before = controller.state_dict()
    with pytest.raises(ConfigError, match=message):
        controller.load_state_dict(state)
    assert controller.state_dict() == before
    assert controller.beta == 0.05


def test_all_problems_of_a_state_at_once():
    with pytest.raises(ConfigError) as error:
        spec_of("pi").start(0.05).load_state_dict({"controller": "pi", "beta": -1, "gain": 1})
    assert len(error.value.args) == 3


def test_bounds_that_were_changed_hold_for_a_loaded_state():
    saved = spec_of("pi").start(5.0).state_dict()
    controller = spec_of("pi", kl_beta_max=0.5).start(0.05)
    controller.load_state_dict(saved)
    assert controller.beta == 0.5
    assert controller.update(**batch(0.0)) < 0.4  # the integral was brought back too


# ---------------------------------------------------------------- options


def test_the_default_is_fixed():
    spec = ControllerSpec()
    assert spec == ControllerSpec.from_options()
    controller = spec.start(0.04)
    assert controller.update(**batch(9.0)) == controller.beta == 0.04
    assert ControllerSpec().start(0).update(**batch(9.0)) == 0.0


@pytest.mark.parametrize("kind", OPTIONS)
def test_options_that_are_used_are_accepted(kind):
    spec = spec_of(kind)
    assert ControllerSpec.from_options(**vars(spec)) == spec
    with pytest.raises(FrozenInstanceError):
        spec.kl_target = 1.0
    assert type(spec.start(1).beta) is float


BAD_OPTIONS = [
    ("fixed", {"kl_controller": "porportional"}, "kl_controller='porportional' is not.*did you mean 'proportional'"),
    ("fixed", {"kl_controller": "PI"}, "kl_controller='PI' is not offered: choose from fixed, linear, cosine"),
    ("fixed", {"kl_controller": None}, "kl_controller=None"),
    ("pi", {"kl_target_per": "tokens"}, "kl_target_per='tokens'.*did you mean 'token'.*token, sequence"),
    *[
        ("pi", {"kl_target": target}, "kl_target=.*positive finite KL")
        for target in (0, 0.0, -1.0, math.nan, math.inf, "0.1", True)
    ],
    *[("pi", {"kl_horizon": horizon}, "kl_horizon=.*at least 1") for horizon in (0.999, math.inf, None)],
    *[("pi", {"kl_beta_min": bound}, "kl_beta_min=.*positive") for bound in (0, math.inf, None)],
    *[("pi", {"kl_beta_max": bound}, "kl_beta_max=.*positive") for bound in (0, math.inf, None)],
    ("pi", {"kl_beta_min": 0.2, "kl_beta_max": 0.1}, "kl_beta_min=0.2 is above kl_beta_max=0.1"),
    *[("linear", {"kl_beta_end": end}, "kl_beta_end=.*at least 0") for end in (-0.1, math.inf)],
    *[("cosine", {"kl_beta_steps": steps}, "kl_beta_steps=.*whole") for steps in (0, 10.0, "10", True)],
    ("pi", {"kl_target": None}, "kl_controller='pi' needs kl_target.*set it"),
    ("linear", {"kl_beta_end": None}, "kl_controller='linear' needs kl_beta_end"),
    ("cosine", {"kl_beta_steps": None}, "kl_controller='cosine' needs kl_beta_steps"),
    ("fixed", {"kl_target": 0.1}, "kl_target=0.1 is not used by kl_controller='fixed'.*'proportional' or 'pi'"),
    ("fixed", {"kl_beta_end": 0.1}, "kl_beta_end=0.1 is not used by kl_controller='fixed'.*'linear' or 'cosine'"),
    ("linear", {"kl_horizon": 5.0}, "kl_horizon=5.0 is not used by kl_controller='linear'"),
    ("cosine", {"kl_beta_min": 0.1}, "kl_beta_min=0.1 is not used"),
    ("pi", {"kl_beta_steps": 3}, "kl_beta_steps=3 is not used by kl_controller='pi'"),
]


@pytest.mark.parametrize(("kind", "options", "message"), BAD_OPTIONS)
def test_bad_options(kind, options, message):
    with pytest.raises(ConfigError, match=message) as error:
        ControllerSpec(**{"kl_controller": kind, **OPTIONS[kind], **options})
    assert len(error.value.args) == 1


@pytest.mark.parametrize(
    ("option", "hint"), [("kl_targt", "did you mean 'kl_target'"), ("kl_beta_mim", "'kl_beta_min'"), ("x", "options")]
)
def test_an_unknown_option_names_the_closest(option, hint):
    with pytest.raises(ConfigError, match=f"unknown controller option '{option}': .*{hint}"):
        ControllerSpec.from_options(**{option: 1})


def test_all_bad_options_at_once():
    with pytest.raises(ConfigError) as error:
        ControllerSpec.from_options(
            kl_controller="pi", kl_taget=0.1, kl_horizon=0, kl_beta_end=0.1, kl_beta_max=-1, colour=3
        )
    lines = str(error.value).splitlines()
    for expected in ("kl_taget", "colour", "kl_horizon=0", "kl_beta_end=0.1", "kl_beta_max=-1", "needs kl_target"):
        assert any(expected in line for line in lines)
    assert len(lines) == 6
    assert "did you mean 'kl_target'?" in lines[0]
    assert "did you mean" not in lines[1]


BAD_BETAS = [
    *[("fixed", beta, "at least 0") for beta in (-0.1, math.nan, "0.1")],
    ("linear", -1, "at least 0"),
    *[("pi", beta, "from kl_beta_min=1e-06 to kl_beta_max=100.0, or") for beta in (0, 1e-7, 101)],
    ("proportional", 0.0, "kl_beta_min"),
]


@pytest.mark.parametrize(("kind", "beta", "message"), BAD_BETAS)
def test_a_beta_that_can_not_be_started_from(kind, beta, message):
    with pytest.raises(ConfigError, match=f"beta=.* can't start kl_controller='{kind}': choose.*{message}"):
        spec_of(kind).start(beta)


def test_every_option_is_read_by_some_controller():
    read = {option for reads in controllers.READS.values() for option in reads}
    assert {"kl_controller", *read} == set(vars(ControllerSpec()))
    assert controllers.READS.keys() == controllers.CONTROLLERS.keys() == OPTIONS.keys()


def test_needs_neither_torch_nor_numpy():
    program = "import sys, kl_plugins.core.controllers; print({'torch', 'numpy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
