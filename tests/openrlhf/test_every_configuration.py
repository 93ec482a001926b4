"""Each configuration through OpenRLHF's actor: refused, or its own term in the gradient of a training step."""

from __future__ import annotations

import pytest
from matrix import CONFIGURATIONS, REFUSED, TRAINED
from tiny_openrlhf import expected_kl_gradient, made_up, step

from kl_plugins import ConfigError


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_refused_or_in_the_loss(make_actor, planned, hooked, covers, name):
    covers("openrlhf", "ActorPPOTrainer", name)

    def plan(each):
        in_loss = {"kl_placement": "loss", "kl_baseline": None} if "in_reward" in each else {}
        return planned("--algo.kl.init_coef", "0.1", **CONFIGURATIONS[each] | in_loss)

    if name in REFUSED:
        with pytest.raises(ConfigError, match=r"expected gradient is (zero|biased)"):
            plan(name)
        return
    args = plan(name)
    trainer = make_actor(args)
    batch, _ = made_up(args, trainer)
    found = step(trainer, batch)[1] - step(trainer, batch, beta=0.0)[1]
    for other in TRAINED:
        wanted = expected_kl_gradient(trainer, batch, plan(other).kl_plugins.spec)
        distance = (found - wanted).norm() / wanted.norm()
        same = other.split()[1] == name.split()[1] and not any("k3" in each for each in (name, other))
        assert distance < 1e-4 if other == name else distance > 1e-2 or same
