"""The computed parts of the evidence: the bare loop and the fixed points, on small problems."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from kl_plugins.conformance import Scored
from kl_plugins.conformance import known_optimum as known

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from evidence import bare_loop, fixed_points


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(bare_loop, "STEPS", 3)
    monkeypatch.setattr(bare_loop, "BACK_STEPS", 3)
    monkeypatch.setattr(bare_loop, "BATCHES", 8)


def small(job):
    return job | {"length": 4, "seeds": [0, 1]}


def test_the_jobs_of_each_part_are_done_and_stand_in_a_table(brief, monkeypatch):
    monkeypatch.setattr(bare_loop, "LENGTHS", (16,))
    wanted = ("on-policy", bare_loop.OFF_POLICY[0], *bare_loop.POINTS, "from far past it")
    jobs = [small(job) for job in bare_loop.jobs(False) if job["problem"] == "terminal" and job["regime"] in wanted]
    rows = bare_loop.by_seed([job | bare_loop.work(job) for job in jobs])
    assert len(rows) == 2 * len(jobs)
    assert {row["seed"] for row in rows} == {0, 1}
    full = [row | {"problem": problem} for row in rows for problem in bare_loop.BETAS]
    tables = bare_loop.sections(full)
    assert [title.split(":")[0] for title, *_ in tables] == [*["lengths", "regimes", "weights"] * 3, "back", "noise"]
    for _, columns, lines, says in tables:
        assert says
        assert lines
        assert {len(line) for line in lines} == {len(columns)}


def test_quick_has_what_the_orderings_need():
    here = {(job["part"], job["regime"], job["arm"]) for job in bare_loop.jobs(True)}
    for arm in ("no KL", "k1_as_loss", "k2_as_loss", "k3_as_loss", "reverse_kl"):
        assert ("regimes", "on-policy", arm) in here


def test_a_smaller_beta_is_another_problem(brief):
    job = small(bare_loop.jobs(False)[0]) | {"part": "regimes", "arm": "no KL"}
    shares = [bare_loop.work(job | {"regime": regime})["share"] for regime in ("on-policy", "a tenth of beta")]
    assert shares[0] != shares[1]


def test_between_to_go_and_sequence_the_expected_gradient_is_the_same():
    """At lambda 0, in the first batch, it is to_go; later what it subtracts is known before the batch is drawn."""
    term, beta = bare_loop.between(), 0.3
    generator = torch.Generator().manual_seed(0)

    def advantages():
        logp, ref_logp = torch.randn(2, bare_loop.BATCH, 3, dtype=torch.float64, generator=generator)
        outcome = torch.randn(bare_loop.BATCH, dtype=torch.float64, generator=generator)
        scored = Scored(logp=logp, ref_logp=ref_logp, mask=torch.ones(1), old_logp=logp, group_size=8)
        later, u = (logp - ref_logp).flip(-1).cumsum(-1).flip(-1), logp - ref_logp
        to_go, before = outcome[:, None] - beta * later, beta * (u.sum(-1, keepdim=True) - later)
        less = [(x.view(-1, 8, 3) - x.view(-1, 8, 3).mean(1, keepdim=True)).view_as(x) for x in (to_go, before)]
        return term.advantages(scored, outcome, beta), *less

    first, to_go, before = advantages()
    torch.testing.assert_close(first, to_go)
    wanted = ((to_go * before).sum(0) / before.square().sum(0).clamp(min=1e-12)).clamp(0, 1)
    second, to_go, before = advantages()
    torch.testing.assert_close(second, to_go - wanted * before)


def test_training_back_starts_far_past_the_optimum(brief, monkeypatch):
    monkeypatch.setattr(bare_loop, "BACK_STEPS", 0)
    job = small(bare_loop.jobs(False)[-1])
    assert job["part"] == "back"
    far = bare_loop.problem_of(job, 1, bare_loop.FAR)
    assert bare_loop.work(job)["kl"][1] == pytest.approx(known.reward_and_kl(known.optimum(far)[0], far)[1])


def test_a_mix_is_no_noisier_than_both_of_its_parts(monkeypatch):
    monkeypatch.setattr(bare_loop, "BATCHES", 256)
    problem = known.terminal(length=5, beta=0.3, seed=0)
    found = bare_loop.noise(problem, known.optimum(known.terminal(length=5, beta=0.1, seed=0))[0])
    assert found["mix"] < 1.1 * min(found["sequence"], found["exact"])


def test_sequence_credit_has_no_noise_at_the_optimum(monkeypatch):
    monkeypatch.setattr(bare_loop, "BATCHES", 64)
    problem = known.terminal(length=5, beta=0.3, seed=0)
    found = bare_loop.noise(problem, known.optimum(problem)[0])
    assert found["sequence"] < 1e-20
    assert found["exact"] > 0.1


def test_the_optimum_of_whole_completions_is_the_best_fixed_point():
    found = fixed_points.work({"part": "fixed points", "reward": "dense", "seed": 0})
    for beta in fixed_points.BETAS:
        assert found[f"sequence share {beta}"] == 1
        assert max(found[f"{term} share {beta}"] for term in ("local", "forward")) < 1
    for share in fixed_points.SHARES_OF_REWARD:
        assert min(found[f"{term} more KL {share}"] for term in ("local", "forward")) > 0


@pytest.mark.parametrize("term", ["local", "forward"])
def test_fixed_points_are_where_the_expected_gradient_vanishes(term):
    """By differentiating E[R] - beta sum_t KL_t with the visited prefixes of the KL held fixed."""
    reference, reward = (x[:3] for x in fixed_points.problem("dense", 1))
    reward = fixed_points.problem("dense", 1)[1].flatten(3)[..., 0]
    policy = fixed_points.fixed_point(term, reference, reward, 0.7)
    logits = [step.clone().requires_grad_() for step in policy]
    visits, value, total = [torch.ones(())], reward, 0.0
    for step in policy:
        visits.append(visits[-1][..., None] * step.exp())
    for t in reversed(range(3)):
        value = (logits[t].softmax(-1) * value).sum(-1)
        logp = logits[t].log_softmax(-1)
        local = logp.exp() * (logp - reference[t]) if term == "local" else reference[t].exp() * (reference[t] - logp)
        total = total + (visits[t] * local.sum(-1)).sum()
    gradients = torch.autograd.grad(value - 0.7 * total, logits)
    assert max(float(g.abs().max()) for g in gradients) < 1e-10
