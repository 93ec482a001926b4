"""What the audit reads: prompts, rollouts and models, and what it refuses."""

from __future__ import annotations

import math
import re
from functools import partial

import pytest
import torch
from audit_inputs import lines
from tiny_trl import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from kl_plugins.audit.data import Rollouts, read_prompts, read_rollouts
from kl_plugins.audit.model import Pair
from kl_plugins.audit.rewards import load_reward, rewards_of
from kl_plugins.errors import ConfigError


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "it has no line"),
        ([{"prompt": "a"}, '{"prompt": "b'], 'line 2: a JSON object was expected, found \'{"prompt": "b\''),
        ([{"prompt": "a"}, "[1]"], "line 2: a JSON object was expected, found [1]"),
        ([{"question": "a"}], "line 1: column 'prompt' was asked for, found 'question'"),
        ([{"prompt": "a"}, {"prompt": "  "}], "line 2: 'prompt' must be a text that isn't empty"),
        ([{"prompt": 3}], "found 3"),
    ],
)
def test_bad_prompts_are_refused_by_line(tmp_path, rows, says):
    path = lines(tmp_path / "prompts.jsonl", *rows)
    with pytest.raises(ConfigError, match=re.escape(says)):
        read_prompts(path, "prompt", limit=9, seed=0)


def test_more_prompts_than_asked_for_are_thinned_out_by_seed(tmp_path):
    path = lines(tmp_path / "prompts.jsonl", *({"prompt": str(i)} for i in range(50)))
    first, again, other = (read_prompts(path, "prompt", limit=5, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len({found.prompt for found in first}) == 5
    with pytest.raises(ConfigError, match="can't be read"):
        read_prompts(tmp_path / "none.jsonl", "prompt", limit=5, seed=0)


GOOD = {"prompt": "1+2=", "completion_ids": [4, 1], "behavior_logp": [-1.0, -0.5]}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (GOOD | {"behavior_logp": [-1.0]}, "needs one log-prob for each of 2 tokens, found 1 entries"),
        (GOOD | {"behavior_logp": [-1.0, math.nan]}, "behavior_logp[1] is nan"),
        (GOOD | {"behavior_logp": [-1.0, None]}, "behavior_logp[1] is nothing"),
        (GOOD | {"behavior_logp": [0.7, -1.0]}, "behavior_logp[0] is 0.7, not the natural log of a probability"),
        ({"prompt": "1+2=", "completion_ids": [4, 1]}, "in some lines and not in others"),
        ({"prompt": "1+2=", "completion": "3"}, "completion_ids, the sampled token ids, were expected, found nothing"),
        (GOOD | {"completion_ids": []}, "found []"),
        (GOOD | {"prompt_ids": "1"}, "prompt_ids are a list of one or more token ids"),
    ],
)
def test_bad_rollouts_are_refused_by_line(tmp_path, row, says):
    path = lines(tmp_path / "rollouts.jsonl", GOOD, row)
    with pytest.raises(ConfigError, match=rf"rollouts.jsonl, line 2: .*{re.escape(says)}"):
        read_rollouts(path, "prompt", limit=9, seed=0)


def test_rollouts_are_grouped_by_prompt_and_single_ones_refused(tmp_path):
    path = lines(tmp_path / "rollouts.jsonl", GOOD, GOOD | {"prompt": "x"}, GOOD, GOOD | {"prompt": "x"})
    found = read_rollouts(path, "prompt", limit=9, seed=0)
    assert [(len(r.completions), len(r.behavior_logp)) for r in found] == [(2, 2), (2, 2)]
    with pytest.raises(ConfigError, match="1 of 2 prompts have a single completion"):
        read_rollouts(lines(path, GOOD, GOOD | {"prompt": "x"}, GOOD), "prompt", limit=9, seed=0)


def test_models_of_two_vocabularies_or_tokenizers_are_refused(folders, tmp_path):
    policy, other = str(folders / "policy"), tmp_path / "other"
    make_model(other, seed=2, spread=1.0)
    tokenizer = AutoTokenizer.from_pretrained(other)
    vocabulary = tokenizer.backend_tokenizer.to_str().replace('"7":9', '"x":9')
    (other / "tokenizer.json").write_text(vocabulary)
    with pytest.raises(ConfigError, match=r"differ in 2 tokens, such as '7' \(9 and None\)"):
        Pair(policy, str(other))
    model = AutoModelForCausalLM.from_pretrained(other)
    model.resize_token_embeddings(20)
    model.save_pretrained(other)
    with pytest.raises(ConfigError, match=r"has a vocabulary of 16 and the reference .* one of 20"):
        Pair(policy, str(other))
    with pytest.raises(ConfigError, match="its tokenizer can't be loaded"):
        Pair(str(tmp_path / "nowhere"), policy)


def test_completions_are_drawn_from_the_policy_itself(folders):
    pair = Pair(str(folders / "policy"), str(folders / "reference"), device="cpu")
    pair.policy.generation_config.update(top_k=1, temperature=0.1, repetition_penalty=5.0, suppress_tokens=[5])
    torch.manual_seed(0)
    prompt = pair.prompt_ids("1+2=")
    drawn = pair.sample(prompt, 4000, max_new_tokens=2)
    logits = pair.policy(torch.tensor([prompt])).logits[0, -1]
    expected = logits.softmax(-1)
    found = torch.bincount(torch.tensor([ids[0] for ids in drawn]), minlength=16) / len(drawn)
    assert float((found - expected).detach().abs().max()) < 4 * math.sqrt(0.25 / len(drawn))
    assert all(1 not in ids[:-1] and 1 <= len(ids) <= 2 for ids in drawn)  # 1 ends a completion


def test_a_prompt_that_leaves_too_few_positions_is_said(pair):
    assert pair.room([2] * 60, 64) == 4
    with pytest.raises(ConfigError, match="a prompt has 64 tokens, but the model has 64 positions"):
        pair.room([2] * 64, 1)
    with pytest.raises(ConfigError, match="unknown token"):
        pair.prompt_ids([99])
    with pytest.raises(ConfigError, match="a prompt is a chat, but the tokenizer can't format it"):
        pair.prompt_ids([{"role": "user", "content": "1+2="}])


def test_rewards_are_read_from_their_column_with_what_else_a_row_holds(tmp_path):
    rows = [GOOD | {"reward": reward, "answer": "3"} for reward in (1, 0.5)]
    (found,) = read_rollouts(lines(tmp_path / "r.jsonl", *rows), "prompt", limit=9, seed=0, reward_column="reward")
    assert found.rewards == [1.0, 0.5]
    assert found.columns[0]["answer"] == "3"
    assert "prompt" not in found.columns[0]
    assert found.first(1).rewards == [1.0]
    for wrong, says in ((None, "'reward' is nothing"), (math.inf, "'reward' is inf"), ("1", "'reward' is '1'")):
        path = lines(tmp_path / "r.jsonl", GOOD | {"reward": 1}, GOOD | {"reward": wrong})
        with pytest.raises(ConfigError, match=re.escape(f"line 2: {says}, and a reward is a finite number")):
            read_rollouts(path, "prompt", limit=9, seed=0, reward_column="reward")
    with pytest.raises(ConfigError, match="line 1: reward column 'score' was asked for, found 'prompt', "):
        read_rollouts(path, "prompt", limit=9, seed=0, reward_column="score")


def test_a_reward_function_is_called_as_trl_calls_it():
    rollouts = Rollouts(prompt="1+2=", completions=[[5], [6, 1]], columns=[{"answer": "3"}, {"answer": "4"}])
    seen = {}

    def everything(**given):
        seen.update(given)
        return [1, torch.tensor(0.5)]

    texts = {5: "3", 6: "4"}
    decode = partial(map, lambda ids: texts.get(ids[0], "?"))
    assert rewards_of(everything, "f", lambda ids: list(decode(ids)))(rollouts) == [1.0, 0.5]
    assert seen["prompts"] == ["1+2="] * 2
    assert seen["completions"] == ["3", "4"]
    assert seen["completion_ids"] == [[5], [6, 1]]
    assert seen["answer"] == ["3", "4"]
    assert {"trainer_state", "log_extra", "log_metric"} < set(seen)

    def few(completions, answer):
        return [float(a == b) for a, b in zip(completions, answer, strict=True)]

    assert rewards_of(few, "f", lambda ids: list(decode(ids)))(rollouts) == [1.0, 1.0]
    chat = Rollouts(prompt=[{"role": "user", "content": "1+2="}], completions=[[5]])
    seen.clear()
    rewards = rewards_of(lambda completions: [len(completions[0][0]["content"])], "f", lambda ids: list(decode(ids)))
    assert rewards(chat) == [1.0]


@pytest.mark.parametrize("returned", [[1.0], [1.0, None], [1.0, math.nan], ["a", "b"]])
def test_what_is_not_one_reward_for_each_completion_is_refused(returned):
    rollouts = Rollouts(prompt="1+2=", completions=[[5], [6, 1]])
    with pytest.raises(ConfigError, match=r"--reward f was called with 2 completions and returned"):
        rewards_of(lambda completions: returned, "--reward f", lambda ids: [""] * len(ids))(rollouts)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("reward", "give package.module:function or file.py:function"),
        ("nowhere.at.all:f", "nowhere.at.all can't be imported"),
        ("nowhere.py:f", "nowhere.py can't be imported"),
        ("rewards.py:g", "rewards.py has no function g; it has f"),
    ],
)
def test_a_reward_function_that_is_not_there_is_refused(tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text("def f(completions):\n    return [0.0 for _ in completions]\n")
    assert load_reward("rewards.py:f")([1, 2]) == [0.0, 0.0]
    with pytest.raises(ConfigError, match=re.escape(says)):
        load_reward(name)
