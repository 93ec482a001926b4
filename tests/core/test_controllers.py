"""Controllers of beta on simulated plants: they reach the target, stay in their bounds, and continue bit for bit."""

import json
import math
import random
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kl_plugins import ConfigError
from kl_plugins.core import controllers
from kl_plugins.core.controllers import PI, ControllerSpec, Proportional

FEEDBACK = ("proportional", "pi")
OPTIONS = {
    "fixed": {},
    "linear": {"kl_beta_end": 0.01, "kl_beta_steps": 40},
    "cosine": {"kl_beta_end": 0.01, "kl_beta_steps": 40},
    "proportional": {"kl_target": 0.1},
    "pi": {"kl_target": 0.1},
}
TAIL = 300
# Reproducible, and no database: a run leaves nothing behind.
example = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def spec_of(controller, **options):
    return ControllerSpec(kl_controller=controller, **{**OPTIONS[controller], **options})


def batch(kl, tokens=1000, sequences=10):
    """Sums of a batch whose KL is `kl` nats per token."""
    return {"kl_sum": kl * tokens, "tokens": tokens, "sequences": sequences}


class Lag:
    """A sequence's KL goes a share `rate` of the way to c / (beta + 1e-3) per update. Noise of 30%, 10 tokens each."""

    def __init__(self, rate=0.1, c=0.05, noise=0.3, seed=0):
        self.rate, self.c, self.noise, self.random = rate, c, noise, random.Random(seed)
        self.kl_per = {"sequence": 0.0, "token": 0.0}

    def right_beta(self, target):
        """Where the KL per sequence settles at `target`."""
        return self.c / target - 1e-3

    def change(self, factor):
        self.c *= factor

    def update(self, beta):
        kl = self.kl_per["sequence"]
        kl += self.rate * (self.c / (beta + 1e-3) - kl)
        self.kl_per = {"sequence": kl, "token": kl / 10}
        return {"kl_sum": 32 * kl * (1 + self.noise * self.random.gauss()), "tokens": 320, "sequences": 32}


class Policy:
    """A softmax over 8 completions of 3 to 10 tokens: 10 exact gradient steps on E[reward] - beta KL per update.

    The measurement is k1 of 64 completions that it draws. Its optimum is known: reference * exp(reward / beta).
    """

    def __init__(self, learning_rate=0.2, seed=0):
        self.random = random.Random(seed)
        self.reference = softmax([self.random.gauss() / 2 for _ in range(8)])
        self.reward = [self.random.gauss() / 5 for _ in range(8)]
        self.learning_rate = learning_rate
        self.logits = [math.log(q) for q in self.reference]

    def right_beta(self, target):
        """Of the optimum whose KL per sequence is `target`."""
        low, high = 1e-3, 1e3
        while high / low > 1 + 1e-9:
            middle = math.sqrt(low * high)
            p = softmax([math.log(q) + r / middle for q, r in zip(self.reference, self.reward, strict=True)])
            kl = sum(a * u for a, u in zip(p, self.log_ratios(p), strict=True))
            low, high = (middle, high) if kl > target else (low, middle)
        return low

    def change(self, factor):
        self.reward = [factor * r for r in self.reward]

    def log_ratios(self, p):
        return [math.log(max(a, 1e-300) / q) for a, q in zip(p, self.reference, strict=True)]

    def update(self, beta):
        for _ in range(10):
            p = softmax(self.logits)
            gain = [r - beta * u for r, u in zip(self.reward, self.log_ratios(p), strict=True)]
            mean = sum(a * x for a, x in zip(p, gain, strict=True))
            score = [a * (x - mean) for a, x in zip(p, gain, strict=True)]
            self.logits = [logit + self.learning_rate * g for logit, g in zip(self.logits, score, strict=True)]
        p = softmax(self.logits)
        u = self.log_ratios(p)
        kl = sum(a * x for a, x in zip(p, u, strict=True))
        self.kl_per = {"sequence": kl, "token": kl / sum(a * length for length, a in enumerate(p, start=3))}
        drawn = self.random.choices(range(8), weights=p, k=64)
        return {"kl_sum": sum(u[y] for y in drawn), "tokens": sum(3 + y for y in drawn), "sequences": 64}


def softmax(logits):
    largest = max(logits)
    p = [math.exp(logit - largest) for logit in logits]
    total = sum(p)
    return [a / total for a in p]


# name -> plant, target in nats per sequence
PLANTS = {
    "instant": (lambda: Lag(rate=1.0), 1.0),
    "lag": (lambda: Lag(rate=0.1), 1.0),
    "slow": (lambda: Lag(rate=0.02), 1.0),
    "policy": (Policy, 0.3),
    "another policy": (lambda: Policy(seed=1), 0.3),
}


def plant_and_spec(name, controller, **options):
    make, target = PLANTS[name]
    return make(), spec_of(controller, **{"kl_target": target, "kl_target_per": "sequence", **options})


def run(controller, plant, updates):
    """The plant's true KL as a share of the target, and the beta, after each update."""
    kls, betas = [], []
    for _ in range(updates):
        betas.append(controller.update(**plant.update(controller.beta)))
        kls.append(plant.kl_per[controller.spec.kl_target_per] / controller.spec.kl_target)
    return kls, betas


def reached(kls):
    """Whether the last updates hold the target."""
    return abs(fmean(kls[-TAIL:]) - 1) < 0.1


def updates_until_reached(kls):
    """After which the mean over 20 updates stays within a quarter of the target."""
    means = [fmean(kls[i : i + 20]) for i in range(len(kls) - 19)]
    return max((i + 1 for i, mean in enumerate(means) if abs(mean - 1) > 0.25), default=0)


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
    [(0.1, 0.0), (0.11, 0.1), (0.09, -0.1), (0.12, 0.2), (0.5, 0.2), (1e6, 0.2), (0.0, -0.2), (-3.0, -0.2)],
)
@pytest.mark.parametrize("horizon", [1, 10, 19.5])
def test_proportional_is_ziegler_et_al(kl, error, horizon):
    """beta (1 + K_beta clip(error, -0.2, 0.2)), K_beta = 0.1 at a horizon of 10."""
    found = spec_of("proportional", kl_horizon=horizon).start(0.04).update(**batch(kl))
    assert found == pytest.approx(0.04 * (1 + error / horizon), rel=1e-12)


def test_a_horizon_in_samples_is_divided_by_the_samples_per_update():
    """As OpenRLHF and others count it: 10,000 samples, 512 of them per update, target per sequence."""
    plant, spec = plant_and_spec("lag", "proportional", kl_horizon=10_000 / 512)
    controller, beta = spec.start(0.01), 0.01
    for _ in range(300):
        sums = plant.update(controller.beta)
        beta *= 1 + min(max(sums["kl_sum"] / sums["sequences"] / spec.kl_target - 1, -0.2), 0.2) * 512 / 10_000
        assert controller.update(**sums) == pytest.approx(beta, rel=1e-12)


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
    *[{name: value} for name in ("kl_sum", "tokens", "sequences") for value in (math.nan, math.inf, -math.inf)],
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


# ---------------------------------------------------------------- plants


@pytest.mark.parametrize("kind", FEEDBACK)
@pytest.mark.parametrize("name", PLANTS)
@pytest.mark.parametrize("factor", [0.01, 1, 100])
def test_reaches_the_target(kind, name, factor):
    """From a beta that is far too low, right, or far too high; and the beta it finds is the right one."""
    plant, spec = plant_and_spec(name, kind)
    right = plant.right_beta(spec.kl_target)
    kls, betas = run(spec.start(factor * right), plant, 1500)
    assert reached(kls)
    assert fmean(betas[-TAIL:]) == pytest.approx(right, rel=0.15)
    assert all(spec.kl_beta_min <= beta <= spec.kl_beta_max for beta in betas)


@pytest.mark.parametrize("name", PLANTS)
@pytest.mark.parametrize("factor", [0.01, 100])
def test_a_fixed_beta_does_not_reach_it(name, factor):
    plant, spec = plant_and_spec(name, "pi")
    fixed = ControllerSpec().start(factor * plant.right_beta(spec.kl_target))
    for _ in range(1500):
        plant.update(fixed.update(**batch(0.1)))
    assert abs(plant.kl_per["sequence"] / spec.kl_target - 1) > 0.9


@pytest.mark.parametrize("controller", [Proportional, PI])
@pytest.mark.parametrize("name", PLANTS)
def test_a_controller_that_steers_the_wrong_way_is_noticed(controller, name):
    class Backwards(controller):
        def _step(self, error):
            super()._step(-error)

    # Where the policy's steps are unstable, beyond this bound, backwards is right.
    plant, spec = plant_and_spec(name, controller.__name__.lower(), kl_beta_max=10.0)
    kls, _ = run(Backwards(spec, 1.05 * plant.right_beta(spec.kl_target)), plant, 1500)
    assert not reached(kls)


@pytest.mark.parametrize("kind", FEEDBACK)
@pytest.mark.parametrize("name", PLANTS)
def test_a_target_per_token_is_reached(kind, name):
    plant, spec = plant_and_spec(name, kind, kl_target=0.05, kl_target_per="token")
    kls, _ = run(spec.start(0.05), plant, 1500)
    assert reached(kls)


@pytest.mark.parametrize("kind", FEEDBACK)
@pytest.mark.parametrize("name", PLANTS)
@pytest.mark.parametrize("factor", [1 / 3, 3])
def test_recovers_when_the_plant_changes(kind, name, factor):
    plant, spec = plant_and_spec(name, kind)
    controller = spec.start(plant.right_beta(spec.kl_target))
    run(controller, plant, 500)
    plant.change(factor)
    kls, betas = run(controller, plant, 1000)
    assert max(abs(kl - 1) for kl in kls[:100]) > 0.25  # it was felt
    assert reached(kls)
    assert fmean(betas[-TAIL:]) == pytest.approx(plant.right_beta(spec.kl_target), rel=0.15)


@pytest.mark.parametrize("kind", FEEDBACK)
@pytest.mark.parametrize("name", PLANTS)
@pytest.mark.parametrize("factor", [1 / 3, 2])
def test_follows_a_target_that_was_changed(kind, name, factor):
    """A run that continues under another target keeps its state and the new option."""
    plant, spec = plant_and_spec(name, kind)
    controller = spec.start(plant.right_beta(spec.kl_target))
    run(controller, plant, 500)
    changed = replace(spec, kl_target=factor * spec.kl_target).start(1.0)
    changed.load_state_dict(controller.state_dict())
    assert changed.beta == controller.beta
    kls, _ = run(changed, plant, 1000)
    assert reached(kls)


def test_pi_gets_home_sooner():
    """From a beta 100 times too low or too high, in updates."""
    for name in ("instant", "lag", "policy"):
        for factor in (0.01, 100):
            took = {}
            for kind in FEEDBACK:
                plant, spec = plant_and_spec(name, kind)
                kls, _ = run(spec.start(factor * plant.right_beta(spec.kl_target)), plant, 1500)
                took[kind] = updates_until_reached(kls)
            assert 3 * took["pi"] < took["proportional"] < 700


@pytest.mark.parametrize("kind", FEEDBACK)
def test_a_horizon_as_long_as_the_lag_keeps_beta_from_swinging(kind):
    swing = {}
    for horizon in (5, 20, 100):
        plant = Lag(rate=0.01, noise=0)
        spec = spec_of(kind, kl_target=1.0, kl_target_per="sequence", kl_horizon=horizon)
        _, betas = run(spec.start(plant.right_beta(1.0)), plant, 3000)
        swing[horizon] = max(betas) / min(betas)
    assert swing[100] < 2 < 3 < swing[20] < swing[5] / 3


@pytest.mark.parametrize("kind", FEEDBACK)
def test_an_unstable_plant_takes_beta_to_its_upper_bound(kind):
    """Beyond what the learning rate allows more beta is more KL: the bound is what ends it, or prevents it."""
    plant, spec = plant_and_spec("policy", kind)
    for bound, beta, expected in ((100.0, 80.0, 100.0), (10.0, 8.0, plant.right_beta(spec.kl_target))):
        _, betas = run(replace(spec, kl_beta_max=bound).start(beta), Policy(learning_rate=0.5), 1500)
        assert fmean(betas[-TAIL:]) == pytest.approx(expected, rel=0.15)


# ------------------------------------------------------------ anti-windup


class WindsUp(PI):
    """Without anti-windup: only what comes out is bounded."""

    def _step(self, error):
        error = min(max(error, -1.0), 1.0)
        self.integral += error / self.spec.kl_horizon
        self.beta = math.exp(min(max(self.integral + 0.2 * error, self.bounds[0]), self.bounds[1]))

    def _settle(self):
        pass


class WindsUpToo(Proportional):
    """Likewise: a product that goes on growing behind the bound."""

    def _step(self, error):
        self.unbounded = getattr(self, "unbounded", self.beta)
        self.unbounded *= 1 + min(max(error, -0.2), 0.2) / self.spec.kl_horizon
        self.beta = self.unbounded


# Ten times less KL: too little even at the lower bound. Ten times more: too much even at the upper one.
@pytest.mark.parametrize(("unreachable", "bound"), [(0.1, 0.02), (10, 0.2)])
@pytest.mark.parametrize(("controller", "twin"), [(PI, WindsUp), (Proportional, WindsUpToo)])
def test_recovery_from_an_unreachable_target(controller, twin, unreachable, bound):
    """After 2000 updates at a bound it takes no longer than a controller that starts there."""
    spec = spec_of(
        controller.__name__.lower(), kl_target=1.0, kl_target_per="sequence", kl_beta_min=0.02, kl_beta_max=0.2
    )
    took = {}
    for name, cls in (("ours", controller), ("twin", twin), ("fresh", controller)):
        plant = Lag(c=0.05 * unreachable, noise=0.1)
        pinned = cls(spec, 0.05)
        _, betas = run(pinned, plant, 2000)
        assert betas[-TAIL:] == pytest.approx([bound] * TAIL)
        plant.change(1 / unreachable)
        kls, _ = run(cls(spec, bound) if name == "fresh" else pinned, plant, 4000)
        took[name] = updates_until_reached(kls)
    assert took["ours"] <= 1.2 * took["fresh"] + 5
    assert took["twin"] > 5 * took["ours"]


def test_an_integral_that_stops_while_the_error_is_clipped_never_arrives():
    """Why a clipped error is integrated."""

    class Stops(PI):
        def _step(self, error):
            before = self.integral
            super()._step(error)
            if abs(error) > 1:
                self.integral = before

    plant, spec = plant_and_spec("lag", "pi")
    kls, _ = run(Stops(spec, plant.right_beta(1.0) / 100), plant, 1500)
    assert kls[-1] > 10


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
    plant, spec = plant_and_spec("lag", kind)
    controller = spec.start(0.01)
    run(controller, plant, 50)
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
        for beta in (math.nan, math.inf, 0.0, -0.1, "0.04", None, True)
    ],
    *[
        ("pi", {**PI_STATE, "integral": integral}, "integral=.* is nothing that")
        for integral in (math.nan, math.inf, -math.inf, "0", None)
    ],
    *[
        ("linear", {"controller": "linear", "updates": updates}, "updates=.* is nothing that")
        for updates in (-1, 1.5, 3.0, "3", None, True)
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
    *[
        ("pi", {"kl_horizon": horizon}, "kl_horizon=.*at least 1")
        for horizon in (0, 0.5, -10, math.nan, math.inf, "10", None)
    ],
    *[("pi", {"kl_beta_min": bound}, "kl_beta_min=.*positive") for bound in (0, -1.0, math.nan, math.inf, None, "0")],
    *[("pi", {"kl_beta_max": bound}, "kl_beta_max=.*positive") for bound in (0, -1.0, math.nan, math.inf, None, "1")],
    ("pi", {"kl_beta_min": 0.2, "kl_beta_max": 0.1}, "kl_beta_min=0.2 is above kl_beta_max=0.1"),
    *[("linear", {"kl_beta_end": end}, "kl_beta_end=.*at least 0") for end in (-0.1, math.nan, math.inf, "0")],
    *[("cosine", {"kl_beta_steps": steps}, "kl_beta_steps=.*whole") for steps in (0, -1, 1.5, 10.0, "10", True)],
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
    *[("fixed", beta, "at least 0") for beta in (-0.1, math.nan, math.inf, "0.1", None, True)],
    ("linear", -1, "at least 0"),
    *[("pi", beta, "from kl_beta_min=1e-06 to kl_beta_max=100.0, or") for beta in (0, 1e-7, 101, -1, math.nan)],
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
