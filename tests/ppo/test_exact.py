"""The gradient that a real PPO update applies to the parameters, by enumerating every completion.

The rollout is every completion once, drawn from a uniform policy: the mean over the batch is then an exact
expectation. Plain gradient descent shows the gradient as what the update changed.
"""

from __future__ import annotations

import math

import pytest
import torch
from trl.experimental import ppo as stock

PROMPT, V, EOS = [3, 12, 4, 13], 16, 1
PAIRS = torch.cartesian_prod(torch.arange(V), torch.arange(V))  # after an end-of-sequence the second is cut off
MASK = torch.stack([torch.ones(V * V), (PAIRS[:, 0] != EOS).float()], dim=1)
TOKENS = torch.arange(V)[:, None]
UNBOUNDED = {"kl_weight_clip": [0.0, 1e6]}


def token_logp(model, completions):
    """(N, T) log-probability of the completions' tokens; the graph reaches the model."""
    prompts = torch.tensor([PROMPT]).expand(len(completions), -1)
    logits = model(torch.cat([prompts, completions], dim=1)).logits[:, len(PROMPT) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, completions[..., None]).squeeze(-1)


def gradient_of(model, value):
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def true_gradient(trainer, of):
    """Of the KL of whole completions, or of the next-token KLs on the policy's prefixes, which are held fixed."""
    model = trainer.policy_model
    logp = token_logp(model, PAIRS)
    with torch.no_grad():
        ref = token_logp(trainer.ref_model, PAIRS)
    first = PAIRS[:, 1] == 0  # each first token once
    if of == "reverse_kl":
        each = ((logp * MASK).sum(-1).exp() * ((logp - ref) * MASK).sum(-1))[MASK.bool()[:, 1] | first]
        return gradient_of(model, each.sum())
    weight, gap = (logp.exp(), logp - ref) if of == "local_reverse_kl" else (ref.exp(), ref - logp)
    kl = weight * gap
    prefix = logp[:, 0].exp().detach() * MASK[:, 1]
    return gradient_of(model, kl[first, 0].sum() + (prefix * kl[:, 1]).sum())


def relative_error(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def scaled_error(found, wanted):
    """The part of a gradient that no factor makes the wanted one."""
    return relative_error(found * (found @ wanted) / (found @ found), wanted)


def uniform(policy):
    torch.nn.init.zeros_(policy.lm_head.weight)


@pytest.fixture
def update(make_trainer, scripted, parameters):
    """`update(completions, **config)`: the trainer after one rollout of all completions, and what it moved by."""

    def one(completions, **options):
        trainer = make_trainer(
            **{"updates": 1, "dtype": torch.float64, "rate": 1e-3, "score": False, "pad_in_vocabulary": False}
            | {"per_device_train_batch_size": len(completions), "response_length": completions.size(1)}
            | {"prompts": [PROMPT] * len(completions), "cliprange": 1e9}
            | options
        )
        scripted(completions, torch.zeros(*completions.shape, V, dtype=torch.float64))
        start = parameters(trainer)
        trainer.train()
        return trainer, parameters(trainer) - start

    return one


@pytest.mark.parametrize(
    ("options", "of"),
    [
        ({"kl": "k2_as_loss", "kl_off_policy": "prefix"}, "local_reverse_kl"),
        ({"kl": "k3_as_loss", "kl_off_policy": "prefix"}, "local_forward_kl"),
        ({"kl": "k1_in_reward", "kl_placement": "loss", "kl_off_policy": "prefix"}, "reverse_kl"),
        ({"kl": "k1_in_reward", "kl_placement": "loss", "kl_off_policy": "sequence"}, "reverse_kl"),
        ({"kl": "k2_as_loss", "kl_credit": "sequence", "kl_off_policy": "sequence"}, "reverse_kl"),
    ],
)
def test_expected_gradient_of_a_term_in_the_loss(make_trainer, update, options, of):
    rate = 1e-3

    def found(**more):
        """A coefficient that is 1 larger moves the parameters by the term's gradient: TRL's own part cancels."""
        (_, large), (trainer, small) = (update(PAIRS, kl_coef=coef, **options | more) for coef in (1.1, 0.1))
        assert trainer.state.log_history[-1]["kl/clipped"] == 0
        return (small - large) / rate * MASK.sum() / len(PAIRS)  # TRL divides by tokens, not by completions

    wanted = true_gradient(make_trainer(dtype=torch.float64), of)
    assert relative_error(found(**UNBOUNDED), wanted) < 1e-5
    assert relative_error(found(kl_off_policy="none"), wanted) > 0.05  # the twin: samples taken for the policy's own


def test_expected_gradient_of_k1_in_reward_through_gae(make_trainer, update):
    """On-policy: the policy itself is uniform. With lambda = 1 the critic is a mere baseline."""
    rate, options = 1e-3, {"edit": uniform, "lam": 1.0, "kl_coef": 0.1}
    trainer, moved = update(PAIRS, kl="k1_in_reward", **options)
    scale = trainer.state.log_history[-1]["kl/advantage_scale"]
    wanted = true_gradient(make_trainer(dtype=torch.float64, edit=uniform), "reverse_kl")
    assert wanted.norm() > 1e-2
    assert relative_error(-moved / rate * MASK.sum() / len(PAIRS) / scale / 0.1, wanted) < 1e-5
    # The twins: TRL's other estimator in the reward, and our local divergence.
    _, k3 = update(PAIRS, cls=stock.PPOTrainer, config=stock.PPOConfig, kl_estimator="k3", **options)
    assert scaled_error(-k3, wanted) > 0.05
    local = true_gradient(make_trainer(dtype=torch.float64, edit=uniform), "local_reverse_kl")
    assert scaled_error(-moved, local) > 0.02


def test_the_second_update_on_a_rollout_has_the_kl_of_the_policy_that_moved(update):
    """One token a completion, so that PPO's ratio is the whole importance weight; the KL is all of the reward."""
    rate, options = 2.0, {"edit": uniform, "rate": 2.0, "kl_coef": 0.1}

    def second(**config):
        """The gradient of the second update, and the policy at which it was taken."""
        first, once = update(TOKENS, num_ppo_epochs=1, **options | config)
        _, twice = update(TOKENS, num_ppo_epochs=2, **options | config)
        return first, (once - twice) / rate

    trainer, found = second(kl="k1_in_reward")
    scale = trainer.state.log_history[-1]["kl/advantage_scale"]
    logp = token_logp(trainer.policy_model, TOKENS)
    assert (logp.exp() - 1 / V).abs().max() > 0.02  # it has moved
    wanted = gradient_of(
        trainer.policy_model, (logp.exp() * (logp - token_logp(trainer.ref_model, TOKENS).detach())).sum()
    )
    change = 0.1 * scale * (logp.detach() + math.log(V))  # in what each token costs
    scale = scale / (1 + change.square().mean()).sqrt()  # still whitened, as they would be now
    assert relative_error(found / scale / 0.1, wanted) < 1e-5
    _, frozen = second(cls=stock.PPOTrainer, config=stock.PPOConfig)  # TRL's own, the KL of the rollout
    assert relative_error(frozen / scale / 0.1, wanted) > 0.1
