"""Trainings with one colocated vLLM engine, see tests/trl/test_vllm.py. usage: vllm_run.py MODEL OUT

An engine takes 20 to 35 seconds to start, so the trainers share the first one. The one that never gives it the
policy's weights comes first: it finds the model's own in the engine, as a new engine would have them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import trl
from datasets import Dataset
from tiny_trl import ARGUMENTS, digit_share
from trl.generation import vllm_generation

from kl_plugins.trl import GRPOConfig, GRPOTrainer, KLMonitorCallback, RLOOConfig, RLOOTrainer
from kl_plugins.trl.vllm import follow_policy_on_cpu

OURS = {"kl": "k2_as_loss", "beta": 0.02, "max_steps": 10}
WATCHED = {"max_steps": 4, "num_iterations": 2}


def share_engine():
    """Let TRL make one engine; whoever asks for the same one again gets it, for another one is an error."""
    make, made = vllm_generation.LLM, []

    def engine(**options):
        if not made:
            made.append((options, make(**options)))
        asked, found = made[0]
        assert options == asked, f"{options} was asked for, {asked} there is"
        return found

    vllm_generation.LLM = engine


def rows_of(case, model, folder):
    """What 10 steps of `case` log, or 4 of TRL's own trainer under the monitor."""
    trainer_of = {"rloo": RLOOTrainer, "watched": trl.GRPOTrainer}.get(case, GRPOTrainer)
    config_of = {"rloo": RLOOConfig, "watched": trl.GRPOConfig}.get(case, GRPOConfig)
    options = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 32, "learning_rate": 2e-3}
    options |= {"output_dir": f"{folder}/{case}"} | (WATCHED if case == "watched" else OURS)
    trainer = trainer_of(
        model=model,
        reward_funcs=digit_share,
        args=config_of(**(ARGUMENTS | options)),
        train_dataset=Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(8) for b in range(8)]),
        callbacks=[KLMonitorCallback()] if case == "watched" else [],
    )
    if case == "no_sync":
        trainer.vllm_generation.sync_weights = lambda: None
    if case == "watched":
        follow_policy_on_cpu(trainer.vllm_generation)  # TRL's own weight sync fails on a CPU engine
    trainer.train()
    logged = "kl/k1_se" if case == "watched" else "kl/k1"
    return [row for row in trainer.state.log_history if logged in row]


def main(model, out):
    share_engine()
    found = {case: rows_of(case, model, f"{out}.trainers") for case in ("no_sync", "grpo", "rloo", "watched")}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
