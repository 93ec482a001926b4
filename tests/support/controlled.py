"""What the tests of the controllers share."""

from __future__ import annotations

from kl_plugins.core.controllers import ControllerSpec

FEEDBACK = ("proportional", "pi")
OPTIONS = {
    "fixed": {},
    "linear": {"kl_beta_end": 0.01, "kl_beta_steps": 40},
    "cosine": {"kl_beta_end": 0.01, "kl_beta_steps": 40},
    "proportional": {"kl_target": 0.1},
    "pi": {"kl_target": 0.1},
}


def spec_of(controller, **options):
    return ControllerSpec(kl_controller=controller, **{**OPTIONS[controller], **options})


def batch(kl, tokens=1000, sequences=10):
    """Sums of a batch whose KL is `kl` nats per token."""
    return {"kl_sum": kl * tokens, "tokens": tokens, "sequences": sequences}
