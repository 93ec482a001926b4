"""The audit's gradients against autograd's, and the sketch that stands for large ones."""

from __future__ import annotations

import math

import pytest
import torch

from kl_plugins import KLSpec, kl_terms
from kl_plugins.audit.configurations import own_configurations
from kl_plugins.audit.gradients import target_gradients, term_gradients
from kl_plugins.audit.sketch import Sketch


@pytest.mark.parametrize("off_policy", ["none", "token", "prefix"])
@pytest.mark.parametrize(
    ("name", "credit"), [("k1_in_reward", "to_go"), ("k2_as_loss", "token"), ("k3_as_loss", "token")]
)
def test_a_terms_gradient_is_the_one_that_autograd_gives_the_heads_weight(pair, name, credit, off_policy):
    prompt = pair.prompt_ids("1+2=")
    completions = [[5, 6, 7], [4, 1], [9, 3, 2, 1]]
    behavior = [[-1.0, -2.0, -0.5], [-3.0, -0.1], [-2.0, -2.0, -2.0, -0.3]]
    (scored,) = pair.score(prompt, completions, behavior, batch=8)
    own = own_configurations(off_policy=True)
    found = [c for c in own if (c.name, c.credit, c.off_policy) == (name, credit, off_policy)]
    sketch = Sketch(pair.vocabulary, pair.hidden)
    assert sketch.exact
    gradients = term_gradients(found, scored, sketch, rare=0.0).sampled[0]

    weight = pair.policy.lm_head.weight
    for row, ids in enumerate(completions):
        logits = pair.policy(torch.tensor([prompt + ids])).logits[:, len(prompt) - 1 : -1]
        ref_logits = pair.reference(torch.tensor([prompt + ids])).logits[:, len(prompt) - 1 : -1]
        logp, ref_logp = (
            x.log_softmax(-1).gather(-1, torch.tensor([ids])[..., None])[..., 0] for x in (logits, ref_logits)
        )
        spec = KLSpec.from_name(name, credit=credit, off_policy=off_policy)
        mask = torch.ones_like(logp)
        terms = kl_terms(spec, logp=logp, ref_logp=ref_logp, mask=mask, behavior_logp=torch.tensor([behavior[row]]))
        (expected,) = torch.autograd.grad(terms.loss.sum(), weight)
        torch.testing.assert_close(
            gradients[row].view_as(weight), expected, rtol=1e-3, atol=1e-3 * expected.abs().max()
        )


def test_the_next_token_part_of_the_target_is_the_gradient_of_the_exact_kl(pair):
    prompt, completions = pair.prompt_ids("34-5="), [[5, 6, 1], [4, 1]]
    (scored,) = pair.score(prompt, completions, batch=8)
    _, local, forward = target_gradients(scored, Sketch(pair.vocabulary, pair.hidden))
    weight = pair.policy.lm_head.weight
    for row, ids in enumerate(completions):
        both = [
            model(torch.tensor([prompt + ids])).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
            for model in (pair.policy, pair.reference)
        ]
        p, q = both[0], both[1].detach()
        for found, divergence in ((local, (p.exp() * (p - q)).sum()), (forward, (q.exp() * (q - p)).sum())):
            (expected,) = torch.autograd.grad(divergence, weight, retain_graph=True)
            scale = expected.abs().max()
            torch.testing.assert_close(found[row].view_as(weight), expected, rtol=1e-3, atol=1e-3 * scale)


def test_a_sketch_keeps_inner_products_and_is_linear():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 500, dtype=torch.float64, generator=generator)
    hidden, other = torch.randn(2, 40, dtype=torch.float64, generator=generator)
    products, norms = [], []
    for seed in range(20):
        sketch = Sketch(500, 40, size=2048, seed=seed)
        assert not sketch.exact
        a, b = sketch.outer(first, hidden), sketch.outer(first + second, hidden + 0.5 * other)
        products.append(float(a @ b / ((first @ (first + second)) * (hidden @ (hidden + 0.5 * other)))))
        norms.append(float(a @ a / (first @ first * (hidden @ hidden))))
        torch.testing.assert_close(
            sketch.outer(torch.stack([first, second]), hidden.expand(2, -1)).sum(0),
            sketch.outer(first + second, hidden),
        )
    bound = math.sqrt(8 / 2048)
    for ratios in (products, norms):
        ratios = torch.tensor(ratios)
        assert abs(float(ratios.mean()) - 1) < 3 * bound / math.sqrt(20)
        assert float((ratios - 1).abs().max()) < 4 * bound
    small = Sketch(5, 4)
    assert torch.equal(small.outer(first[:5], hidden[:4]), torch.outer(first[:5], hidden[:4]).flatten())
