"""OpenRLHF with the KL term of `kl_plugins` in every process that computes one.

`kl-plugins openrlhf --kl reverse_kl -- <train_ppo_ray flags>` starts it. What happens, in the order in which it does:

1. `driver.runtime_env_hook` runs inside OpenRLHF's own `ray.init`: it checks the host (`patches/openrlhf.toml`),
   checks and sets its KL flags (`plan.plan_run`), and asks Ray to run `worker.setup` in every worker process.
2. `worker.setup` has each process replace what it imports of the host, right after the import.
3. `experience` computes the KL in the reward, `actor` the KL in the loss; `worker` collects the proof that they did.
4. `monitor` watches that KL or, without `--kl`, OpenRLHF's own (`--kl-monitor`).
"""

from kl_plugins.openrlhf.plan import OpenRLHFOptions, Plan, RunPlan, plan_run

__all__ = ["OpenRLHFOptions", "Plan", "RunPlan", "plan_run"]
