"""The conformance kit, on OpenRLHF's real `training_step`: the actor's log-probs are made up, the rest is theirs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_openrlhf import FLAGS, experience, parse

from kl_plugins.conformance import Subject, learn, problems
from kl_plugins.openrlhf.actor import recorder_of

BETA = 0.1
CONFIGURATIONS = [
    ({"kl": "k2_as_loss"}, "local_reverse_kl"),
    ({"kl": "k3_as_loss", "kl_coefficient_bound": 1e30}, "local_forward_kl"),
    (
        {"kl": "k1_in_reward", "kl_placement": "loss", "kl_off_policy": "prefix", "kl_baseline": None},
        "reverse_kl",
    ),
    ({"kl": "k2_as_loss", "kl_credit": "sequence", "kl_off_policy": "sequence"}, "reverse_kl"),
]


class Given(torch.nn.Module):
    """An actor whose log-probs are a parameter."""

    def __init__(self, logp):
        super().__init__()
        self.logp = torch.nn.Parameter(logp)

    def forward(self, *_, **__):
        return self.logp, SimpleNamespace()


def subject_of(trainer, args):
    def coefficient(scored):
        rows, length = scored.logp.shape
        trainer.actor = Given(scored.logp.detach().clone())
        batch = experience(
            args,
            torch.zeros(rows, length + 1, dtype=torch.long),
            scored.mask.long(),
            advantages=torch.zeros_like(scored.logp),
            action_log_probs=scored.old_logp,
            base_action_log_probs=scored.ref_logp,
        )
        batch.rollout_log_probs = scored.engine_logp
        trainer.kl_plugins_recorder = recorder_of(trainer)
        info = {"dp_size": 1, "batch_num_tokens": rows, "global_batch_size": 1.0}  # a constant instead of the tokens
        with torch.enable_grad():
            trainer.training_step(batch, BETA, 0, info)
        return trainer.actor.logp.grad * rows / BETA

    return Subject(name="ActorPPOTrainer", coefficient=coefficient, knows_engine=True)


@pytest.mark.parametrize(("options", "claims"), CONFIGURATIONS, ids=lambda x: x if isinstance(x, str) else None)
def test_the_actors_term_has_the_gradient_of_its_name(make_actor, planned, hooked, options, claims):
    args = planned("--algo.kl.init_coef", str(BETA), **{"kl_weight_clip": [0.0, 1e6]} | options)
    subject = subject_of(make_actor(args), args)
    assert problems(learn(subject, claims), claims) == {}


def test_twin_openrlhfs_own_kl(make_actor):
    args = parse(*FLAGS, "--algo.kl.use_loss", "--algo.kl.estimator", "k3")
    found = problems(learn(subject_of(make_actor(args), args), "local_reverse_kl"), "local_reverse_kl")
    assert {"on-policy gradient", "gradient on stale samples", "dead zone"} <= set(found)
