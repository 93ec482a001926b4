"""The parts of recipes/known_optimum.py: the table as a model, its exact evaluation, and claims that don't hold."""

from __future__ import annotations

import itertools
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from kl_plugins.conformance.known_optimum import PROBLEMS, optimum

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
pytest.importorskip("transformers")

from evidence.markov_model import markov_model
from evidence.trl_regimes import evaluated, reward_of

RECIPE = Path(__file__).parents[2] / "recipes" / "known_optimum.py"
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "regime"),
    [
        ("no KL", "dense reward"),
        ("reverse_kl", "hackable reward"),
        ("exact_as_loss", "samples up to 4 updates old"),
        ("TRL's RLOO", "rewards scaled by the group"),
        ("k2_as_loss", "an engine off by 0.3"),
    ],
)
def test_a_run_through_a_real_trainer(arm, regime):
    from evidence import trl_trainers

    found = trl_trainers.work({"arm": arm, "regime": regime, "seed": 0, "steps": 3})
    assert found["kl"] > 1e-4
    assert found["share"] < 1.0


@pytest.mark.slow
def test_the_engine_reports_its_own_log_probs(tmp_path):
    """TRL takes it for vLLM: what it drew is scored by it and by the policy, and they differ by its noise."""
    from evidence import trl_trainers

    regime = trl_trainers.REGIMES["an engine off by 0.3"]
    trainer, _ = trl_trainers.make_trainer("reverse_kl", regime, 0, 2, str(tmp_path))
    batches, score = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: batches.append(score(inputs)) or batches[-1]
    trainer.train()
    gap = batches[0]["old_per_token_logps"] - batches[0]["sampling_per_token_logps"]
    assert 0.2 < gap.std().item() < 0.4


JUDGED = {
    ("terminal reward", "no KL"): (-0.9, 3.5),
    ("terminal reward", "k1_as_loss"): (-2.5, 5.4),
    ("terminal reward", "k2_as_loss"): (0.88, 0.9),
    ("terminal reward", "k1_in_reward, token, group_mean"): (0.88, 1.2),
    ("terminal reward", "k1_in_reward, sequence, group_mean"): (0.99, 0.9),
    ("hackable reward", "k2_as_loss"): (0.87, 1.0),
    ("hackable reward", "k3_as_loss"): (-0.1, 4.0),
}


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """`judged(changed)`: runs the recipe on made-up results, with those in `changed` instead; nothing is trained."""
    from evidence import trl_trainers

    def run(changed):
        with (tmp_path / "trl.jsonl").open("w") as file:
            for job in trl_trainers.jobs(quick=True):
                share, kl = (JUDGED | changed).get((job["regime"], job["arm"]), (0.8, 1.0))
                noise = 0.01 * job["seed"]
                found = {"share": share + noise, "kl": kl + noise**2, "reward": 1.0}
                file.write(json.dumps({**job, **found}) + "\n")
        options = ["--quick", "--parts", "trl", "--resume", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *options])
        runpy.run_path(str(RECIPE), run_name="__main__")

    return run


def test_orderings_that_hold(judged, tmp_path, capsys):
    judged({})
    assert capsys.readouterr().out.count(" holds ") == 5
    assert (tmp_path / "known_optimum.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arm", "found", "says"),
    [
        (("terminal reward", "k2_as_loss"), (-2.6, 0.9), "k2_as_loss reaches more than k1_as_loss"),
        (("terminal reward", "k1_as_loss"), (0.1, 5.4), "k1_as_loss ends below the reference"),
        (("terminal reward", "k1_as_loss"), (-2.5, 3.0), "k1_as_loss ends with more KL than no KL"),
        (("hackable reward", "k3_as_loss"), (-0.1, 0.9), "k3_as_loss drifts further"),
        (("terminal reward", "k1_in_reward, sequence, group_mean"), (0.87, 0.9), "k1 in reward reaches more"),
        (("terminal reward", "k1_in_reward, sequence, group_mean"), (0.88, 0.9), "k1 in reward reaches more"),  # a tie
    ],
)
def test_an_ordering_that_does_not_hold_ends_with_an_error(judged, arm, found, says):
    with pytest.raises(SystemExit, match=rf"^These orderings don't hold: {says}[^;]*$"):  # a text: exit status 1
        judged({arm: found})
