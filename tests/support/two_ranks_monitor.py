"""Run by `torchrun` (see tests/trl/test_monitor.py): the numbers of KLMonitorCallback with 2 gloo ranks.

usage: torchrun --nproc_per_node 2 two_ranks_monitor.py MODEL OUT
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import trl
from datasets import Dataset
from tiny_trl import ARGUMENTS, digit_share, loss_and_gradients, micro_batch, parameters

from kl_plugins.trl.monitor import KLMonitorCallback

model, out = sys.argv[1:]
prompts = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(8) for b in range(8)])


def trainer_of(callbacks=(), **options):
    sizes = {"output_dir": f"{out}.trainer", "per_device_train_batch_size": 8 // world}
    args = trl.GRPOConfig(**(ARGUMENTS | sizes | options))
    return trl.GRPOTrainer(
        model=model, reward_funcs=digit_share, args=args, train_dataset=prompts, callbacks=list(callbacks)
    )


def logged(trainer):
    trainer.log({})
    return {name: value for name, value in trainer.state.log_history[-1].items() if name.startswith("kl/")}


dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
results = {}

trainer, monitor = trainer_of(), KLMonitorCallback()
whole = micro_batch(trainer)
whole["ref_per_token_logps"][1, 0] = torch.nan
rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
batch = {key: x[rows] if x.dim() else x for key, x in whole.items()}
monitor.attach(trainer)
loss_and_gradients(trainer, batch)
results["numbers"] = logged(trainer)
trainer._compute_loss(trainer.model, batch)
if rank == 1:
    monitor._sums.clear()  # nothing seen here since the last log: the collective has to be met all the same
results["one rank had nothing"] = logged(trainer)
monitor.detach()

for name, callbacks in (("trained unwatched", []), ("trained", [KLMonitorCallback(gradient_ratio_every=1)])):
    trained = trainer_of(callbacks, num_iterations=2, max_steps=3, gradient_accumulation_steps=2)
    trained.train()
    results[name] = parameters(trained)
watched = [row for row in trained.state.log_history if "kl/sequence" in row]
results |= {"trained rows": len(watched), "gradient ratio": watched[-1].get("kl/gradient_ratio", 0)}
torch.save(results, f"{out}.{rank}")
dist.barrier()
dist.destroy_process_group()
