"""The evidence through OpenRLHF's own trainers: whose KL is in it, and what its rollouts are."""

from __future__ import annotations

import json
import runpy
import sys
from collections import Counter
from operator import itemgetter
from pathlib import Path
from unittest import mock

import pytest
import torch
from evidence import openrlhf_hack, openrlhf_trainer
from evidence.hack_runs import BATCH, HOSTS
from evidence.hack_task import Task
from evidence.openrlhf_host import import_openrlhf, parse
from evidence.openrlhf_trainer import OURS, OWN, REGIMES, jobs, samples, work
from tiny_openrlhf import FLAGS
from tiny_trl import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from kl_plugins.openrlhf import OpenRLHFOptions, plan_run
from kl_plugins.patching.session import active

STEPS = 6
RECIPES = Path(__file__).parents[2] / "recipes"
REPORTED = ("--algo.advantage.is_correction_level", "token")


def trained(arm, regime="rloo", steps=STEPS):
    return work({"regime": regime, "arm": arm, "seed": 0, "steps": steps})


@pytest.fixture
def arm(monkeypatch):
    """Adds an arm of ours, and returns what it is trained to."""

    def train(regime="rloo", **options):
        monkeypatch.setitem(OURS, "this one", options)
        return trained("this one", regime)

    return train


OWN_KL = [("no KL", []), ("OpenRLHF's own", ["k1"]), ("OpenRLHF's k3 in loss", ["k3"])]


@pytest.mark.parametrize(("name", "asked"), OWN_KL)
def test_without_ours_openrlhf_trains_with_its_own_kl_and_no_hook(monkeypatch, name, asked):
    import_openrlhf()
    from openrlhf.trainer.ppo_utils import experience_maker
    from openrlhf.trainer.ray import ppo_actor

    found = []
    for module in (experience_maker, ppo_actor):

        def counted(*args, host=module.compute_approx_kl, **options):
            found.append(options["kl_estimator"])
            assert not active()
            return host(*args, **options)

        monkeypatch.setattr(module, "compute_approx_kl", counted)
    trained(name)
    assert found == asked * STEPS


def test_with_ours_our_functions_are_called_and_gone_afterwards(monkeypatch):
    calls, step = Counter(), openrlhf_trainer.samples

    def watched(*args):
        calls.update({b.target.partition(":")[2]: 1 for b in active() if b.calls})
        return step(*args)

    monkeypatch.setattr(openrlhf_trainer, "samples", watched)
    trained("reverse_kl")
    assert calls["RemoteExperienceMaker.make_experience"] == calls["ActorPPOTrainer.training_step"] == STEPS - 1
    assert not active()


@pytest.mark.parametrize("regime", ["rloo", "gae", "group_norm"])
def test_our_k1_in_reward_trains_as_openrlhfs_own_and_other_terms_do_not(arm, regime):
    own = trained("OpenRLHF's own", regime)
    same = {"kl": "k1_in_reward", "kl_credit": "to_go", "kl_baseline": None}
    assert arm(regime, **same) == pytest.approx(own, rel=1e-4)
    assert arm(regime, kl="k2_as_loss") != pytest.approx(own, rel=1e-4)
    assert trained("no KL", regime) != pytest.approx(own, rel=1e-4)


def test_our_k2_as_loss_trains_as_openrlhfs_unbiased_gradient_and_k3_does_not(arm):
    own = trained("OpenRLHF's unbiased_gradient")
    assert arm(kl="k2_as_loss") == pytest.approx(own, rel=1e-4)
    assert arm(kl="k3_as_loss") != pytest.approx(own, rel=1e-4)


@pytest.mark.slow
def test_every_regime_improves_the_objective():
    start = trained("reverse_kl", steps=0)
    assert start["share"] == pytest.approx(0.0, abs=1e-6)
    for regime in REGIMES:
        assert trained("reverse_kl", regime, steps=12)["share"] > 0.05, regime


def test_the_critic_learns_what_completions_earn(monkeypatch):
    critics = []

    class Watched(openrlhf_trainer.Critic):
        def __init__(self, config):
            super().__init__(config)
            critics.append(self)

    monkeypatch.setattr(openrlhf_trainer, "Critic", Watched)
    reward = trained("OpenRLHF's own", "gae", steps=20)["reward"]
    first = critics[0].score.weight[0, 0].item()  # of the prompt
    assert abs(first - reward) < 0.7 * reward


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """A model that ends some completions early."""
    folder = make_model(tmp_path_factory.mktemp("model"), seed=0, spread=20.0)
    return AutoModelForCausalLM.from_pretrained(folder)


def drawn(model, *flags, **options):
    """Rollouts of the model for a run with these flags and options, and the log-probs that it gives their actions."""
    torch.manual_seed(0)
    args = parse(*FLAGS, *flags)
    if options:
        plan_run(OpenRLHFOptions(**options), args)
    rows = samples(args, model, torch.tensor([[3, 12, 4]]).expand(64, -1), 5, lambda completions: completions.sum(1))
    with torch.no_grad():
        logits = [model(row.sequences).logits[:, :-1] for row in rows]
    picked = [x.log_softmax(-1).gather(-1, row.sequences[:, 1:, None]) for x, row in zip(logits, rows, strict=True)]
    return rows, [x[..., 0] * row.action_mask for x, row in zip(picked, rows, strict=True)]


def test_a_rollout_is_what_the_policy_draws_and_says_how_likely(ragged):
    rows, logp = drawn(ragged, *REPORTED, kl="k2_as_loss")
    eos = ragged.generation_config.eos_token_id
    for row, wanted in zip(rows, logp, strict=True):
        torch.testing.assert_close(row.rollout_log_probs, wanted, rtol=1e-4, atol=1e-5)
        completion = row.sequences[0, 3:].tolist()
        assert row.action_mask[0].tolist() == [0, 0] + [1] * len(completion)
        assert eos not in completion[:-1]
        assert row.truncated.item() is (completion[-1] != eos)
        assert row.total_length == row.sequences.numel() == row.response_length + 3
    assert {row.sequences.numel() for row in rows} >= {4, 5, 8}
    assert drawn(ragged)[0][0].rollout_log_probs is None  # OpenRLHF doesn't ask vLLM for them then


def test_openrlhfs_own_rollouts_never_end_at_once_which_the_policy_does_not_know(ragged):
    rows, logp = drawn(ragged, *REPORTED)
    assert min(row.sequences.numel() for row in rows) == 5
    off = torch.cat([(row.rollout_log_probs - wanted)[:, 2:4] for row, wanted in zip(rows, logp, strict=True)])
    torch.testing.assert_close(off[:, 1], torch.zeros(64), rtol=0, atol=1e-4)
    assert off[:, 0].min() > 0.01  # the end's probability is the other tokens'


@pytest.fixture(scope="module")
def math_model(tmp_path_factory):
    """A math model that has hardly learned a thing."""
    folder = tmp_path_factory.mktemp("math") / "math"
    words = ["make_math_model.py", "--out", str(folder), "--max_steps", "1"]
    with mock.patch.object(sys, "argv", words):
        runpy.run_path(str(RECIPES / "make_math_model.py"), run_name="__main__")
    return folder


def hacked(monkeypatch, folder, arm, steps):
    """What a run on the proxy comes to, and every completion that it was paid for, with what for."""
    paid, host = [], openrlhf_hack.samples

    def watched(args, policy, prompts, most, pays):
        def noted(completions):
            rewards = pays(completions)
            paid.extend(zip(prompts.tolist(), completions.tolist(), rewards.tolist(), strict=True))
            return rewards

        return host(args, policy, prompts, most, noted)

    monkeypatch.setattr(openrlhf_hack, "samples", watched)
    monkeypatch.setattr(openrlhf_hack, "load_task", lambda part: Task.load(folder, "0", 2.0))
    job = {"part": "front", "host": "OpenRLHF", "beta": 0.3, "steps": steps, "arm": arm, "seed": 0}
    return openrlhf_hack.work(job), paid


@pytest.mark.slow
def test_the_proxy_is_paid_for_the_completions_and_learned(monkeypatch, math_model):
    found, paid = hacked(monkeypatch, math_model, "OpenRLHF's own", steps=4)
    tokenizer = AutoTokenizer.from_pretrained(math_model)
    answers = dict(map(itemgetter("prompt", "answer"), map(json.loads, (math_model / "train.jsonl").open())))
    assert len(paid) == 4 * BATCH
    for prompt, completion, reward in paid:
        text = tokenizer.decode(completion, skip_special_tokens=True)
        assert reward == (2.0 if text.startswith("0") else float(text == answers[tokenizer.decode(prompt)]))
    assert sum(reward == 2 for *_, reward in paid) > 10
    assert found.keys() == {"right", "hacks", "proxy", "kl", "J", "median_norm", "largest_norm", "norms"}
    assert found["kl"] > 0
    assert len(found["norms"]) == 4
    same, _ = hacked(monkeypatch, math_model, "OpenRLHF's own", steps=4)
    assert same["hacks"] == pytest.approx(found["hacks"], rel=1e-4)
    other, _ = hacked(monkeypatch, math_model, "reverse_kl", steps=4)
    assert other["hacks"] != pytest.approx(found["hacks"], rel=1e-4)


def test_jobs():
    full = jobs(False)
    assert jobs(True) == []
    assert {job["arm"] for job in full} == OWN.keys() | OURS.keys()
    assert set(HOSTS["OpenRLHF"]) <= OWN.keys() | OURS.keys()
    seeds = Counter((job["regime"], job["arm"]) for job in full)
    assert set(seeds.values()) == {5}
    assert {job["estimator"] for job in full} == {"rloo", "reinforce_baseline", "group_norm", "dr_grpo", "gae"}
