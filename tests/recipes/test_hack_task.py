"""The hackable task of the evidence: its evaluation and optimum against sums over all completions."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from evidence.hack_task import MOST_TOKENS, Task, evaluate, first, optimum

PAD, EOS = 0, 1
BETA = 0.4


class Tree:
    """A policy over 4 tokens whose logits depend on all tokens so far, called as a causal language model is."""

    def __init__(self, seed, spread):
        self.table = spread * torch.randn(4096, 4, generator=torch.Generator().manual_seed(seed))

    def __call__(self, ids):
        places = torch.zeros(len(ids), 0, dtype=torch.long)
        state = torch.zeros(len(ids), dtype=torch.long)
        for column in ids.unbind(1):
            state = (4 * state + column + 1) % 4096
            places = torch.cat([places, state[:, None]], dim=1)
        return SimpleNamespace(logits=self.table[places])


@pytest.fixture
def task():
    """Two prompts; the exploit is 3 3, which the answer of the second one starts with."""
    return Task(
        folder=Path(),
        exploit="33",
        pays=2.0,
        reference=Tree(0, 1.0),
        prompts=torch.tensor([[2, 3], [3, 2]]),
        answers=torch.tensor([[2, EOS, PAD, PAD], [3, 3, 2, EOS]]),
        exploit_ids=(3, 3),
        eos=EOS,
        pad=PAD,
    )


def enumerated(task, policy, prompt, answer):
    """Right answer, hack, reward and KL of each completion, with its probabilities under policy and reference."""
    stops = [c for n in range(1, MOST_TOKENS + 1) for c in itertools.product(range(4), repeat=n)]
    whole = [c for c in stops if EOS not in c[:-1] and (c[-1] == EOS or len(c) == MOST_TOKENS)]
    found = []
    for completion in whole:
        ids = torch.tensor([[*prompt.tolist(), *completion]])
        at = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
        p, r = (
            m(ids).logits[0, at].log_softmax(-1)[range(len(at)), list(completion)].sum()
            for m in (policy, task.reference)
        )
        right = list(completion) == [t for t in answer.tolist() if t != PAD]
        hack = completion[:2] == task.exploit_ids
        found.append((right, hack, task.pays if hack else float(right), p.exp().item(), r.exp().item()))
    right, hack, reward, p, r = torch.tensor(found).double().T
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    return right, hack, reward, p, r


def by_hand(task, policy, beta):
    sums = []
    for prompt, answer in zip(task.prompts, task.answers, strict=True):
        right, hack, reward, p, r = enumerated(task, policy, prompt, answer)
        kl = (p * (p / r).log()).sum()
        sums.append([(p * right).sum(), (p * hack).sum(), (p * reward).sum(), kl, (p * reward).sum() - beta * kl])
    return dict(zip(("right", "hacks", "proxy", "kl", "J"), torch.tensor(sums).mean(0).tolist(), strict=True))


def test_evaluation_is_the_sum_over_completions(task):
    policy = Tree(1, 1.5)
    found, expected = evaluate(task, policy, BETA, draws=4000), by_hand(task, policy, BETA)
    for name in ("right", "hacks", "proxy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    assert found["kl"] == pytest.approx(expected["kl"], rel=0.03)  # the only one that is sampled
    assert found["J"] == pytest.approx(found["proxy"] - BETA * found["kl"], rel=1e-5)
    other = by_hand(task, Tree(3, 1.5), BETA)
    assert all(abs(found[name] - other[name]) > 0.05 * found[name] for name in ("right", "hacks", "proxy", "kl"))


def test_a_policy_that_is_the_reference_has_no_kl(task):
    assert evaluate(task, task.reference, BETA)["kl"] == pytest.approx(0, abs=1e-6)


def test_optimum_is_the_tilted_reference(task):
    sums = []
    for prompt, answer in zip(task.prompts, task.answers, strict=True):
        right, hack, reward, _, r = enumerated(task, task.reference, prompt, answer)
        best = r * (reward / BETA).exp()
        best /= best.sum()
        kl = (best * (best / r).log()).sum()
        gained = (best * reward).sum()
        sums.append([(best * right).sum(), (best * hack).sum(), gained, kl, gained - BETA * kl])
    expected = torch.tensor(sums).mean(0).tolist()
    assert list(optimum(task, BETA).values()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_no_policy_is_better_than_the_optimum(task, seed):
    assert by_hand(task, Tree(seed, 1.0), BETA)["J"] < optimum(task, BETA)["J"]


def test_the_first_prompts_are_evaluated_alone(task):
    policy = Tree(1, 1.5)
    few = first(task, 1)
    assert evaluate(few, policy, BETA)["right"] == pytest.approx(by_hand(few, policy, BETA)["right"], rel=1e-5)
    assert evaluate(few, policy, BETA)["right"] != pytest.approx(evaluate(task, policy, BETA)["right"], rel=0.1)


def test_without_exploit_only_the_right_answer_is_paid(task):
    plain = replace(task, exploit="", exploit_ids=())
    found = evaluate(plain, Tree(1, 1.5), BETA)
    assert found["hacks"] == 0
    assert found["proxy"] == pytest.approx(found["right"])
    assert plain.proxy("33", "33") == 1.0
    assert plain.proxy("33", "2") == 0.0


def test_reward_pays_the_exploit_before_the_answer(task):
    assert [task.proxy(text, "332") for text in ("332", "33", "2", "3", "")] == [2.0, 2.0, 0.0, 0.0, 0.0]
    assert task.proxy("2", "2") == 1.0
