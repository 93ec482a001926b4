"""The conformance kit, on the loss of real trainers: the log-probs are made up, everything after them is theirs."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import trl

from kl_plugins.conformance import Subject, learn, problems
from kl_plugins.trl import GRPOTrainer, RLOOTrainer

CONFIGURATIONS = [
    ({"kl": "k2_as_loss"}, "local_reverse_kl"),
    ({"kl": "k3_as_loss", "kl_coefficient_bound": 1e30}, "local_forward_kl"),
    ({"kl": "k1_in_reward", "kl_off_policy": "prefix", "kl_baseline": None}, "reverse_kl"),
    ({"kl": "k1_in_reward", "kl_off_policy": "sequence", "kl_credit": "sequence", "kl_baseline": None}, "reverse_kl"),
    ({"kl": "k1_in_reward", "kl_off_policy": "prefix", "kl_baseline": "leave_one_out"}, "reverse_kl"),
    ({"kl": "k2_as_loss", "kl_off_policy": "sequence", "kl_credit": "sequence"}, "reverse_kl"),
]


def subject_of(trainer):
    """What `compute_loss` of a trainer sends into the log-probs, before beta, for the sum over rows."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    base = trl.GRPOTrainer if isinstance(trainer, trl.GRPOTrainer) else trl.RLOOTrainer
    grouped = trainer.kl_spec is not None and trainer.kl_spec.baseline is not None

    def coefficient(scored):
        live = scored.logp.detach().clone().requires_grad_()
        given = (live, torch.zeros_like(scored.logp), None)
        ids = torch.zeros(live.shape, dtype=torch.long)
        batch = {
            "prompt_ids": ids,
            "prompt_mask": ids,
            "completion_ids": ids,
            "completion_mask": scored.mask.long(),
            "advantages": live.new_zeros(len(live)),
            "num_items_in_batch": scored.mask.sum(),
            "old_per_token_logps": scored.old_logp,
            "old_logps": (scored.old_logp * scored.mask).sum(-1),
            "ref_per_token_logps": scored.ref_logp,
        }
        if scored.engine_logp is not None:
            batch["sampling_per_token_logps"] = scored.engine_logp
        if grouped:
            trainer.num_generations = scored.group_size
            batch["kl_baseline"] = trainer._rollout_baseline(scored.behavior_logp, batch)
        scores = mock.patch.object(base, "_get_per_token_logps_and_entropies", lambda *_, **__: given)  # noqa: PT008
        with scores, torch.enable_grad():
            loss = trainer.compute_loss(trainer.model, batch)
            return torch.autograd.grad(loss * len(live) / trainer.beta, live)[0]

    return Subject(name=type(trainer).__name__, coefficient=coefficient, knows_engine=True, grouped=grouped)


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
@pytest.mark.parametrize(("options", "claims"), CONFIGURATIONS, ids=lambda x: x if isinstance(x, str) else None)
def test_the_trainers_term_has_the_gradient_of_its_name(make_trainer, cls, options, claims):
    if cls is GRPOTrainer:
        options = options | {"loss_type": "luspo"}
    trainer = make_trainer(cls, kl_weight_clip=[0.0, 1e6], **options)
    assert problems(learn(subject_of(trainer), claims), claims) == {}


def test_twin_trls_own_kl_ignores_the_engine_and_loses_its_digits(make_trainer):
    trainer = make_trainer(GRPOTrainer, kl=None, loss_type="luspo", use_bias_correction_kl=True)
    found = problems(learn(subject_of(trainer), "local_reverse_kl"), "local_reverse_kl")
    assert set(found) == {"gradient under an engine mismatch", "dead zone", "float32"}


def test_twin_a_mean_over_tokens_is_not_the_divergences_gradient(make_trainer):
    trainer = make_trainer(GRPOTrainer, kl="k2_as_loss", kl_weight_clip=[0.0, 1e6], loss_type="grpo")
    found = problems(learn(subject_of(trainer), "local_reverse_kl"), "local_reverse_kl")
    assert "the gradient of none of the divergences" in found["on-policy gradient"]
