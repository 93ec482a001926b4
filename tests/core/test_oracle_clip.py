"""PPO's clip on the coefficient: the gradient of max(rho c, clip(rho) c), and what a combined host computes."""

import math

import pytest
import torch

from kl_plugins import KLSpec, kl_terms
from kl_plugins.oracle import RTOL, expected_gradient, relative_error

LOSSES = [
    ("k1_in_reward", "to_go"),
    ("k1_in_reward", "sequence"),
    ("k1_in_reward", "token"),
    ("k2_as_loss", "token"),
    ("k3_as_loss", "token"),
]
# Every loss at the default, and other ranges.
LOSS_AND_EPSILON = [(*loss, 0.2) for loss in LOSSES] + [("k1_in_reward", "to_go", 0.1), ("k3_as_loss", "token", 0.5)]


def spec_of(name, credit, clip, epsilon=0.2, **options):
    if clip is not None and epsilon != 0.2:
        options["clip_epsilon"] = epsilon
    return KLSpec.from_name(name, credit=credit, clip=clip, weight_clip=(0.0, math.inf), **options)


def batch(seed=0, rows=64, length=5):
    """Log-probs whose ratios lie below, inside and above every clip range, and a ragged mask."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale):
        return scale * torch.randn(rows, length, dtype=torch.float64, generator=generator)

    logp = draw(1.0) - 2
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)
    return {"logp": logp, "ref_logp": logp + draw(1.0), "behavior_logp": logp + draw(0.4), "mask": mask}


def coefficient_by_hand(name, credit, inputs):
    u = torch.where(inputs["mask"], inputs["logp"] - inputs["ref_logp"], 0.0)
    c = 1 - (-u).exp() if name == "k3_as_loss" else u
    if credit == "to_go":
        c = c.flip(-1).cumsum(-1).flip(-1)
    return c.sum(-1, keepdim=True).expand_as(c) if credit == "sequence" else c


def head(cost, inputs, epsilon, choose=torch.maximum):
    """Gradient with respect to logp of sum choose(rho c, clip(rho) c), the ratio live and the cost detached."""
    logp = inputs["logp"].clone().requires_grad_()
    rho = (logp - inputs["behavior_logp"]).exp()
    loss = choose(rho * cost, rho.clamp(1 - epsilon, 1 + epsilon) * cost)
    return torch.autograd.grad((loss * inputs["mask"]).sum(), logp)[0]


def ours(spec, inputs, **more):
    logp = inputs["logp"].clone().requires_grad_()
    terms = kl_terms(spec, **(inputs | {"logp": logp}), **more)
    return terms, torch.autograd.grad(terms.loss.sum(), logp)[0]


@pytest.mark.parametrize("clip", ["separate", "combined"])
@pytest.mark.parametrize(("name", "credit", "epsilon"), LOSS_AND_EPSILON)
def test_clipped_head_is_the_max_differentiated(name, credit, epsilon, clip):
    inputs = batch()
    terms, found = ours(spec_of(name, credit, clip, epsilon), inputs)
    expected = head(coefficient_by_hand(name, credit, inputs), inputs, epsilon)
    assert relative_error(found, expected) <= RTOL
    clipped = inputs["mask"] & (expected == 0)
    assert 0 < clipped.sum() < inputs["mask"].sum()
    assert torch.equal(terms.weight[clipped], torch.zeros(int(clipped.sum()), dtype=torch.float64))
    assert torch.equal(found[clipped], torch.zeros(int(clipped.sum()), dtype=torch.float64))
    assert torch.equal(terms.cut, clipped)


WRONG_HEADS = {
    "min instead of max": lambda cost, inputs, eps: head(cost, inputs, eps, torch.minimum),
    "clipped on both sides": lambda cost, inputs, eps: head(cost, inputs, eps, lambda plain, clipped: clipped),
    "not clipped": lambda cost, inputs, eps: head(cost, inputs, eps, lambda plain, clipped: plain),
    "sign flipped": lambda cost, inputs, eps: -head(cost, inputs, eps),
    "cost taken for an advantage": lambda cost, inputs, eps: -head(cost, inputs, eps, torch.minimum),
    "another range": lambda cost, inputs, eps: head(cost, inputs, eps * 1.3),
    "ratio forgotten": lambda cost, inputs, eps: cost * inputs["mask"],
}


@pytest.mark.parametrize("wrong", WRONG_HEADS)
@pytest.mark.parametrize(("name", "credit"), [("k1_in_reward", "to_go"), ("k3_as_loss", "token")])
def test_wrong_heads_are_noticed(wrong, name, credit):
    """Twin of the test above."""
    inputs = batch()
    _, found = ours(spec_of(name, credit, "separate"), inputs)
    cost = coefficient_by_hand(name, credit, inputs)
    assert relative_error(WRONG_HEADS[wrong](cost, inputs, 0.2), found) > 1e-2


@pytest.mark.parametrize("name", ["k1_in_reward", "k2_as_loss"])
def test_baseline_is_subtracted_before_the_clip(name):
    inputs = batch()
    spec = KLSpec.from_name(name, clip="separate", weight_clip=(0.0, math.inf), baseline="leave_one_out")
    given = torch.randn(inputs["logp"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    _, found = ours(spec, inputs, baseline=given)
    cost = coefficient_by_hand(name, spec.credit, inputs)
    assert relative_error(found, head(cost - given, inputs, 0.2)) <= RTOL
    after = head(cost, inputs, 0.2) - given * (inputs["logp"] - inputs["behavior_logp"]).exp() * inputs["mask"]
    assert relative_error(after, found) > 1e-2


def test_weight_bound_still_holds_where_the_head_does_not_clip():
    """A cost above zero leaves large ratios alone: only `weight_clip` bounds them."""
    inputs = {
        "logp": torch.tensor([[-1.0, -1.0]], dtype=torch.float64),
        "ref_logp": torch.tensor([[-2.0, -0.5]], dtype=torch.float64),
        "behavior_logp": torch.tensor([[-5.0, -5.0]], dtype=torch.float64),
        "mask": torch.ones(1, 2),
    }
    terms, _ = ours(KLSpec.from_name("k2_as_loss", clip="separate", weight_clip=(0.0, 3.0)), inputs)
    assert terms.weight.tolist() == [[3.0, 0.0]]
    assert terms.cut.tolist() == [[True, True]]


def host(advantage, inputs, epsilon):
    """What a host does with an advantage: the gradient of -min(rho A, clip(rho) A)."""
    return head(advantage, inputs, epsilon, lambda plain, clipped: -torch.minimum(plain, clipped))


@pytest.mark.parametrize(("name", "credit"), LOSSES)
def test_combined_coefficient_in_an_advantage(name, credit):
    """A' = A - beta c in the host's own head: on-policy the KL's share is beta times the unclipped gradient."""
    beta, inputs = 0.05, batch()
    inputs["behavior_logp"] = inputs["logp"]
    advantage = torch.randn(inputs["logp"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    terms, combined = ours(spec_of(name, credit, "combined"), inputs)
    _, unclipped = ours(spec_of(name, credit, None), inputs)
    share = host(advantage - beta * terms.coefficient, inputs, 0.2) - host(advantage, inputs, 0.2)
    assert relative_error(share, beta * unclipped) <= 1e-9  # a difference of two larger gradients
    assert relative_error(combined, unclipped) <= RTOL
    opposite = host(advantage + beta * terms.coefficient, inputs, 0.2) - host(advantage, inputs, 0.2)
    assert relative_error(opposite, beta * unclipped) > 1


@pytest.mark.parametrize(("name", "credit"), LOSSES)
def test_combined_at_zero_advantage_off_policy(name, credit):
    """Where the reward says nothing, the host's head on -beta c is beta times our clipped term."""
    beta, inputs = 0.05, batch()
    terms, found = ours(spec_of(name, credit, "combined"), inputs)
    assert relative_error(host(-beta * terms.coefficient, inputs, 0.2), beta * found) <= RTOL
    _, unclipped = ours(spec_of(name, credit, None), inputs)
    assert relative_error(host(-beta * terms.coefficient, inputs, 0.2), beta * unclipped) > 1e-2


@pytest.mark.parametrize(("name", "credit"), LOSSES)
def test_clip_changes_nothing_on_policy(name, credit, steered):
    def found(clip, behavior):
        spec = spec_of(name, credit, clip)
        return expected_gradient(spec, steered.sequences, steered.policy, steered.reference, behavior=behavior)

    for behavior in (None, steered.policy):
        assert relative_error(found("separate", behavior), found(None, None)) <= RTOL
    assert relative_error(found("separate", steered.behavior), found(None, steered.behavior)) > 1e-3  # but off-policy
