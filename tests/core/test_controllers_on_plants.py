"""Controllers of beta on simulated plants: they reach the target, recover and don't wind up; wrong ones do not."""

import math
import random
from dataclasses import replace
from statistics import fmean

import pytest
from controlled import FEEDBACK, batch, spec_of

from kl_plugins.core.controllers import PI, ControllerSpec, Proportional

TAIL = 300


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
@pytest.mark.parametrize("name", ["lag", "policy"])
def test_a_target_per_token_is_reached(kind, name):
    plant, spec = plant_and_spec(name, kind, kl_target=0.05, kl_target_per="token")
    kls, _ = run(spec.start(0.05), plant, 1500)
    assert reached(kls)


@pytest.mark.parametrize("kind", FEEDBACK)
@pytest.mark.parametrize("name", ["lag", "policy"])
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
@pytest.mark.parametrize("name", ["lag", "policy"])
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


def test_a_horizon_in_samples_is_divided_by_the_samples_per_update():
    """As OpenRLHF and others count it: 10,000 samples, 512 of them per update, target per sequence."""
    plant, spec = plant_and_spec("lag", "proportional", kl_horizon=10_000 / 512)
    controller, beta = spec.start(0.01), 0.01
    for _ in range(300):
        sums = plant.update(controller.beta)
        beta *= 1 + min(max(sums["kl_sum"] / sums["sequences"] / spec.kl_target - 1, -0.2), 0.2) * 512 / 10_000
        assert controller.update(**sums) == pytest.approx(beta, rel=1e-12)
