"""Run by `torchrun` (see tests/trl/test_distributed.py): gradients, metrics and baselines of 1 or 2 gloo ranks.

usage: torchrun --nproc_per_node N two_ranks.py MODEL OUT
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from datasets import Dataset
from tiny_trl import ARGUMENTS, digit_share, loss_and_gradients, micro_batch, parameters

from kl_plugins.trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

model, out = sys.argv[1:]
prompts = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(8) for b in range(8)])


def trainer_of(cls, config, **options):
    world = int(torch.distributed.get_world_size()) if dist.is_initialized() else 1
    sizes = {"output_dir": f"{out}.trainer", "per_device_train_batch_size": 8 // world}
    args = config(**(ARGUMENTS | sizes | options))
    return cls(model=model, reward_funcs=digit_share, args=args, train_dataset=prompts)


def mean_over_ranks(gradients):
    if dist.is_initialized():
        dist.all_reduce(gradients)
        gradients /= dist.get_world_size()
    return gradients


if not dist.is_initialized():
    dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
results = {}
for name, cls, config, options in [
    ("grpo", GRPOTrainer, GRPOConfig, {"kl": "k2_as_loss", "loss_type": "grpo"}),
    ("dapo", GRPOTrainer, GRPOConfig, {"kl": "k1_in_reward", "loss_type": "dapo", "kl_off_policy": "prefix"}),
    ("rloo", RLOOTrainer, RLOOConfig, {"kl": "k1_in_reward"}),
]:
    trainer = trainer_of(cls, config, **options)
    whole = micro_batch(trainer)
    whole["completion_mask"][4:, 5] = 0  # so that rank 1 can hold a narrower batch, as ranks do
    baseline = None
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    batch = {key: x[rows] if x.dim() else x for key, x in whole.items()}
    if trainer.kl_spec.baseline:
        width = 6 - rank
        narrow = {key: x[:, :width] if x.shape[1:] == (6,) else x for key, x in batch.items()}
        narrow["completion_mask"] = narrow["completion_mask"].clone()
        trainer.num_generations = 8  # one group over both ranks
        local = trainer._rollout_baseline(narrow["old_per_token_logps"], narrow)
        batch["kl_baseline"] = torch.nn.functional.pad(local, (0, 6 - width))
        baseline = batch["kl_baseline"]
    _, gradients = loss_and_gradients(trainer, batch)
    results[name] = {"gradients": mean_over_ranks(gradients), "metrics": trainer.kl_metrics(), "baseline": baseline}

controlled = {"kl_controller": "pi", "kl_target": 0.01, "kl_target_per": "sequence"}
trained = trainer_of(GRPOTrainer, GRPOConfig, kl="k2_as_loss", num_iterations=2, **controlled)
results["start"] = parameters(trained)
trained.train()
results["trained"] = parameters(trained)
results["controller"] = trained.kl_controller.state_dict()
for name, options in {
    "exact": {"kl": "exact_in_reward", "kl_baseline": "leave_one_out"},
    "left_out": {"kl": "k1_in_reward", "kl_leave_out": ["eos"], "kl_leave_out_equal_rewards": True},
    "moving": {"kl": "k2_as_loss", "kl_reference_every": 1, "kl_reference_decay": 0.5},
}.items():
    trained = trainer_of(GRPOTrainer, GRPOConfig, **options)
    trained.train()
    moved = trained.ref_model.parameters() if name == "moving" else ()
    results[f"trained {name}"] = torch.cat([parameters(trained), *(p.detach().flatten() for p in moved)])
    if name == "left_out":
        trained.model.train()
        trained._kl_rewards = torch.arange(8.0).clamp(max=4)[:, None]  # of all ranks: the second group has one reward
        rollout = {"completion_ids": torch.zeros(8 // world, 6)}
        trained._rollout_extras(rollout)
        results["equal rewards"] = rollout["kl_equal_rewards"]
torch.save(results, f"{out}.{rank}")
dist.barrier()
dist.destroy_process_group()
