"""`recipes/ppo.py` on a model and prompts of one's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recipe_here import RECIPES, refusal
from transformers import AutoModelForSequenceClassification


@pytest.fixture
def start(model, tmp_path):
    rows = [{"question": f"{a}+{b}=", "solution": str(a + b)} for a in range(8) for b in range(2)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))

    paths = os.pathsep.join(str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", ".").split(os.pathsep))

    def run(*options):
        arguments = ["--model_name_or_path", model, "--dataset", "sums.jsonl", "--prompt_column", "question"]
        arguments += ["--answer_column", "solution", "--per_device_train_batch_size", 8, "--total_episodes", 16]
        arguments += ["--response_length", 4, "--gradient_checkpointing", "false", *options]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(RECIPES / "ppo.py"), *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.mark.slow
def test_it_trains_and_writes_what_it_says(start, tmp_path):
    start("--eval_split", "train", "--kl", "k2_as_loss")
    rows = [json.loads(line) for line in (tmp_path / "runs/ppo/metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2]
    assert {"reward", "kl", "kl/k1", "kl/ess"} <= rows[0].keys()
    for name in ("metrics.png", "model.safetensors"):
        assert (tmp_path / "runs/ppo" / name).stat().st_size > 10_000


@pytest.mark.slow
def test_a_reward_model(start, model, tmp_path):
    classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    torch.nn.init.constant_(classifier.score.weight, 0.1)
    classifier.save_pretrained(tmp_path / "reward")
    start("--reward_model", tmp_path / "reward", "--kl", "k1_in_reward")
    rewards = [json.loads(line)["reward"] for line in (tmp_path / "runs/ppo/metrics.jsonl").open()]
    assert any(reward * 8 != round(reward * 8) for reward in rewards)  # the rule's would be shares of 8


def test_mistakes_are_said_clearly(tmp_path):
    assert "use k2_as_loss" in refusal("ppo.py", "--kl", "k1_as_loss", folder=tmp_path)
