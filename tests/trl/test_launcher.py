"""`kl-plugins trl grpo ...`: TRL's own command line, its launcher, its script, with the KL in every process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from drift import EDITS, change
from typer.testing import CliRunner

from kl_plugins.cli import app
from kl_plugins.patching import active, load_patches

REWARDS = (
    "def digit_share(completions, **_):\n    return [sum(c.isdigit() for c in text) / 8 for text in completions]\n"
)


@pytest.fixture
def arguments(model, tmp_path, monkeypatch):
    """What `trl grpo` and `trl rloo` need to run here, in a folder with a data set and a reward function."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "data").mkdir()
    prompts = [{"prompt": f"{a}+{b}="} for a in range(8) for b in range(8)]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in prompts))
    words = f"""--model_name_or_path {model} --dataset_name data --reward_funcs my_rewards.digit_share --output_dir out
        --beta 0.1 --max_steps 3 --num_iterations 3 --per_device_train_batch_size 16 --num_generations 4
        --max_completion_length 8 --use_cpu true --bf16 false --report_to none --logging_steps 1 --dtype float32
        --learning_rate 1e-3"""
    return words.split()


def invoke(*words, code=2):
    result = CliRunner().invoke(app, ["trl", *words], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    assert not active()
    return result.output


@pytest.mark.slow
def test_trl_rloo_from_a_file_and_flags(arguments, tmp_path):
    (tmp_path / "run.yaml").write_text("kl: k1_as_loss\nkl_off_policy: sequence\n")
    command = [sys.executable, "-W", "ignore", "-m", "kl_plugins.cli", "trl", "rloo", "--config", "run.yaml"]
    done = subprocess.run([*command, *arguments, "--kl", "k3_as_loss"], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert "RLOOTrainer work now" in said
    assert said.count("'kl/k3'") == 3
    saved = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert (saved.kl, saved.kl_off_policy) == ("k3_as_loss", "sequence")


def test_what_can_not_be_is_refused_before_anything_is_started(arguments, tmp_path):
    assert "no KL was named: add kl=... (--kl NAME)" in invoke("grpo", *arguments)
    assert "no KL was named" in invoke("grpo", *arguments, "--kl", "none")
    assert "k1_as_loss was asked for, but its expected gradient is zero" in invoke(
        "grpo", *arguments, "--kl", "k1_as_loss"
    )
    assert "did you mean 'k2_as_loss'" in invoke("rloo", *arguments, "--kl", "k2_in_los")
    assert "kl-plugins trl sft: choose from grpo, rloo" in invoke("sft")
    assert "unrecognized arguments: --kl_of_policy" in invoke(
        "grpo", *arguments, "--kl", "k2_as_loss", "--kl_of_policy", "token"
    )
    assert not (tmp_path / "out").exists()


def test_its_help_is_trls_with_our_options():
    said = invoke("grpo", "--help", code=0)
    assert "--kl_weight_clip" in said
    assert "--num_generations" in said


@pytest.mark.parametrize("edit", EDITS)
def test_a_changed_launcher_keeps_everything_from_starting(arguments, edit, tmp_path, monkeypatch):
    (target,) = load_patches("trl", "command").targets
    change(target, edit, tmp_path, monkeypatch)
    assert f"- {target.name}" in invoke("grpo", *arguments, "--kl", "k2_as_loss")
    assert not (tmp_path / "out").exists()
