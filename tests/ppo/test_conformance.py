"""The conformance kit's oracle on real PPO updates: whose gradient is it that arrives in the parameters?

The rollout is every completion of two tokens once, drawn from a uniform policy, so that a mean over the batch is an
exact expectation; plain gradient descent shows the gradient as what the update changed.
"""

from __future__ import annotations

import pytest
import torch

from kl_plugins.conformance import identify
from kl_plugins.oracle import enumerate_sequences, true_gradient

PROMPT, V, EOS = [3, 12, 4, 13], 16, 1
PAIRS = torch.cartesian_prod(torch.arange(V), torch.arange(V))  # what follows an end-of-sequence is cut off
COUNTED = len(PAIRS) + V * (V - 1)  # tokens
SEQUENCES = enumerate_sequences(V, 2)
ORDER = torch.tensor([EOS, 0, *range(2, V)])  # the oracle's token 0 is the end
DIVERGENCES = ("reverse_kl", "local_reverse_kl", "forward_kl", "local_forward_kl")


def table(model):
    """(S, V) logits after each of the oracle's prefixes; the graph reaches the model."""
    last = torch.stack([model(torch.tensor([PROMPT])).logits[0, -1]])
    firsts = torch.cat([torch.tensor([PROMPT]).expand(V, -1), ORDER[:, None]], dim=1)
    rows = torch.cat([last, model(firsts).logits[:, -1]])[:, ORDER]
    first_of = {}
    for tokens, prefix in zip(SEQUENCES.tokens.tolist(), SEQUENCES.prefix.tolist(), strict=True):
        first_of[prefix[1]] = tokens[0]
    return torch.stack([rows[0], *(rows[1 + first_of[s]] for s in range(1, SEQUENCES.prefixes))])


def targets(trainer):
    """Divergence -> its gradient with respect to the parameters."""
    found = {}
    with torch.no_grad():
        reference = table(trainer.ref_model)
    for of in DIVERGENCES:
        trainer.policy_model.zero_grad()
        logits = table(trainer.policy_model)
        logits.backward(true_gradient(of, SEQUENCES, logits.detach(), reference))
        found[of] = torch.cat([p.grad.flatten() for p in trainer.policy_model.parameters()])
    return found


@pytest.fixture
def term(make_trainer, scripted, parameters):
    """`term(**config)`: the gradient of the KL term in one real update; TRL's own part cancels in the difference."""

    def one(**options):
        trainer = make_trainer(
            updates=1,
            dtype=torch.float64,
            rate=1e-3,
            score=False,
            pad_in_vocabulary=False,
            per_device_train_batch_size=len(PAIRS),
            response_length=2,
            prompts=[PROMPT] * len(PAIRS),
            cliprange=1e9,
            **({} if options["kl_off_policy"] == "none" else {"kl_weight_clip": [0.0, 1e6]}),
            **options,
        )
        scripted(PAIRS, torch.zeros(*PAIRS.shape, V, dtype=torch.float64))
        start = parameters(trainer)
        trainer.train()
        return parameters(trainer) - start

    def found(**options):
        large, small = (one(kl_coef=coef, **options) for coef in (1.1, 0.1))
        return (small - large) / 1e-3 * COUNTED / len(PAIRS)  # TRL divides by tokens, not by completions

    return found


@pytest.mark.parametrize(
    ("options", "claims"),
    [
        ({"kl": "k2_as_loss", "kl_off_policy": "prefix"}, ["local_reverse_kl"]),
        ({"kl": "k3_as_loss", "kl_off_policy": "prefix"}, ["local_forward_kl"]),
        ({"kl": "k1_in_reward", "kl_placement": "loss", "kl_off_policy": "prefix"}, ["reverse_kl"]),
        ({"kl": "k2_as_loss", "kl_off_policy": "none"}, []),  # the twin: stale samples taken for the policy's own
    ],
)
def test_the_updates_gradient_is_that_of_its_name(make_trainer, term, options, claims):
    assert identify(term(**options), targets(make_trainer(dtype=torch.float64)), 1e-5) == claims
