"""TRL's own GRPO, watched, with a colocated vLLM engine; see tests/trl/test_monitor.py. usage: ... MODEL OUT"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import trl
from datasets import Dataset
from tiny_trl import ARGUMENTS, digit_share

from kl_plugins.trl.monitor import KLMonitorCallback
from kl_plugins.trl.vllm import follow_policy_on_cpu


def main(model: str, out: str) -> None:
    options = {"learning_rate": 2e-3, "max_steps": 4, "num_iterations": 2, "output_dir": f"{out}.trainer"}
    options |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 32}
    prompts = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(8) for b in range(8)])
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=digit_share,
        args=trl.GRPOConfig(**(ARGUMENTS | options)),
        train_dataset=prompts,
        callbacks=[KLMonitorCallback()],
    )
    follow_policy_on_cpu(trainer.vllm_generation)  # TRL's own weight sync fails on a CPU engine
    trainer.train()
    Path(out).write_text(json.dumps([row for row in trainer.state.log_history if "kl/k1_se" in row]))


if __name__ == "__main__":
    main(*sys.argv[1:])
