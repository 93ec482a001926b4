"""The flags of `recipes/openrlhf.sh`, for each algorithm and machine, against OpenRLHF's own parser and our checks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from openrlhf_run import RECIPE
from tiny_openrlhf import parse

from kl_plugins.openrlhf.driver import options_from_words
from kl_plugins.openrlhf.plan import plan_run

ALGORITHMS = {
    "grpo": ("group_norm", "k1_in_reward", "group_mean"),
    "reinforce++": ("reinforce", "k1_in_reward", None),
    "reinforce++-baseline": ("reinforce_baseline", "k1_in_reward", "group_mean"),
    "rloo": ("rloo", "k1_in_reward", "leave_one_out"),
    "ppo": ("gae", "k1_in_reward", None),
}


def words(tmp_path, *arguments) -> tuple[str, list[str]]:
    """What the recipe would hand to `kl-plugins openrlhf`: the KL's options and OpenRLHF's flags."""
    program = tmp_path / "kl-plugins"
    program.write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
    program.chmod(0o755)
    (tmp_path / "flash_attn").mkdir()  # which the GPU variants look for
    (tmp_path / "flash_attn" / "__init__.py").touch()
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "PYTHONPATH": str(tmp_path), "MODEL": "m", "PROMPTS": "p", "REWARD": "r"}
    command = ["bash", str(RECIPE), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split("\0")[:-1]
    assert printed[0] == "openrlhf"
    cut = printed.index("--")
    return " ".join(printed[1:cut]), printed[cut + 1 :]


@pytest.mark.parametrize("where", ["cpu", "1gpu", "8gpu"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_flags_are_accepted_and_mean_what_the_recipe_says(tmp_path, algorithm, where):
    options, flags = words(tmp_path, algorithm, where)
    args = parse(*flags)
    estimator, kl, baseline = ALGORITHMS[algorithm]
    plan = plan_run(options_from_words(options), args)
    assert (args.algo.advantage.estimator, plan.spec.name, plan.spec.baseline) == (estimator, kl, baseline)
    assert args.algo.advantage.is_correction_level == "token"
    assert bool(args.critic.model_name_or_path) is (algorithm == "ppo")
    if where != "cpu":
        assert args.train.colocate_all
        assert args.vllm.enable_sleep
        assert args.vllm.num_engines == args.actor.num_gpus_per_node == int(where[0])


def test_what_the_user_adds_wins(tmp_path):
    options, flags = words(tmp_path, "grpo", "8gpu", "--kl", "k3_as_loss", "--", "--algo.kl.init_coef", "0.5")
    args = parse(*flags)
    assert plan_run(options_from_words(options), args).spec.name == "k3_as_loss"
    assert args.algo.kl.init_coef == 0.5


@pytest.mark.parametrize("arguments", [(), ("grpo",), ("gpro", "cpu"), ("grpo", "2gpu")])
def test_wrong_words_give_the_usage(tmp_path, arguments):
    done = subprocess.run(["bash", str(RECIPE), *arguments], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "ALGO" in done.stderr
