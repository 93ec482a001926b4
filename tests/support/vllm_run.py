"""Ten steps with a colocated vLLM engine, see tests/trl/test_vllm.py. usage: vllm_run.py CASE MODEL OUT"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import Dataset
from tiny_trl import ARGUMENTS, digit_share

from kl_plugins.trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer


def main(case: str, model: str, out: str) -> None:
    cls, config = (RLOOTrainer, RLOOConfig) if case == "rloo" else (GRPOTrainer, GRPOConfig)
    options = {"kl": "k2_as_loss", "beta": 0.02, "learning_rate": 2e-3, "max_steps": 10}
    options |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 32}
    args = config(**(ARGUMENTS | options | {"output_dir": f"{out}.trainer"}))
    prompts = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(8) for b in range(8)])
    trainer = cls(model=model, reward_funcs=digit_share, args=args, train_dataset=prompts)
    if case == "no_sync":
        trainer.vllm_generation.sync_weights = lambda: None
    trainer.train()
    Path(out).write_text(json.dumps([row for row in trainer.state.log_history if "kl/k1" in row]))


if __name__ == "__main__":
    main(*sys.argv[1:])
