"""The parts of recipes/known_optimum.py: the table as a model, its exact evaluation, and claims that don't hold."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

from kl_plugins.conformance.known_optimum import PROBLEMS, optimum

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
pytest.importorskip("transformers")

from evidence.markov_model import markov_model
from evidence.trl_regimes import evaluated, reward_of

LENGTH, V = 3, 6
COMPLETIONS = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))
ROWS = torch.arange(len(COMPLETIONS))


@pytest.fixture
def model():
    return markov_model(torch.randn(LENGTH, V, V, generator=torch.Generator().manual_seed(7)))


def scored(model, completions):
    """(B, T) log-probs by the model's own forward pass, after the prompt 0."""
    ids = torch.nn.functional.pad(completions, (1, 0))
    logits = model(ids, torch.ones_like(ids)).logits[:, :-1].double()
    return logits.log_softmax(-1).gather(-1, completions[..., None])[..., 0].detach()


def test_the_model_scores_by_its_table(model):
    table = model.table.log_softmax(-1)
    before = torch.nn.functional.pad(COMPLETIONS, (1, 0))[:, :-1]
    wanted = table[torch.arange(LENGTH), before, COMPLETIONS]
    torch.testing.assert_close(scored(model, COMPLETIONS), wanted, rtol=1e-5, atol=1e-6)
    # Left padding, and a completion of which only the end is scored.
    ids = torch.nn.functional.pad(COMPLETIONS[:5], (1, 0))
    padded, mask = (torch.nn.functional.pad(x, (2, 0), value=v) for x, v in ((ids, V), (torch.ones_like(ids), 0)))
    torch.testing.assert_close(model(padded, mask, logits_to_keep=3).logits, model(ids, mask[:, 2:]).logits[:, -3:])


@pytest.mark.parametrize("twin", [False, True])
def test_generate_draws_from_the_table(model, twin):
    """Each of the 216 completions as often as its probability says; the twin draws at another temperature."""
    torch.manual_seed(0)
    many = 200_000
    other = markov_model(model.table * 1.05) if twin else model
    drawn = other.generate(torch.zeros(many, 1, dtype=torch.long))[:, 1:]
    assert drawn.shape == (many, LENGTH)
    seen = torch.bincount(drawn @ torch.tensor([V * V, V, 1]), minlength=V**LENGTH).double()
    wanted = many * scored(model, COMPLETIONS).sum(-1).exp()
    surprise = ((seen - wanted) ** 2 / wanted).sum().item()  # chi-squared with 215 degrees of freedom
    assert (surprise > 330) is twin  # which is less than 330 in all but one case of a million


def test_generate_hands_out_scores_as_ppo_wants_them(model):
    drawn = model.generate(torch.zeros(4, 1, dtype=torch.long), return_dict_in_generate=True, output_scores=True)
    logps = torch.stack(drawn.scores, 1).log_softmax(-1).gather(-1, drawn.sequences[:, 1:, None])[..., 0]
    torch.testing.assert_close(logps.double(), scored(model, drawn.sequences[:, 1:]))


@pytest.mark.parametrize("name", PROBLEMS)
def test_evaluation_is_that_of_all_completions(model, name):
    problem = PROBLEMS[name](length=LENGTH, beta=0.3, seed=1)
    reward = reward_of(problem, COMPLETIONS)

    def objective(logps):
        u = logps - scored(markov_model(problem.reference), COMPLETIONS).sum(-1)
        return (logps.exp() * reward).sum(), (logps.exp() * u).sum()

    logps = [scored(m, COMPLETIONS).sum(-1) for m in (model, markov_model(problem.reference))]
    (r, k), (start, _) = map(objective, logps)
    best = 0.3 * (logps[1] + reward / 0.3).logsumexp(-1)
    found = evaluated(model, problem)
    assert found["reward"] == pytest.approx(r.item(), rel=1e-5)
    assert found["kl"] == pytest.approx(k.item(), rel=1e-5)
    assert found["share"] == pytest.approx(((r - 0.3 * k - start) / (best - start)).item(), rel=1e-4)
    assert evaluated(markov_model(optimum(problem)[0]), problem)["share"] == pytest.approx(1.0, rel=1e-6)
    assert evaluated(markov_model(problem.reference), problem)["share"] == pytest.approx(0.0, abs=1e-6)
