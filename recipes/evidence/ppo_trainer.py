"""The known optimum through TRL's PPOTrainer, stock and ours: a critic and GAE. It needs TRL 1.12 (see `PATHS`)."""

import gc
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from evidence.trl_regimes import LENGTH, ROWS, SEEDS, evaluated, reward_of

from kl_plugins.conformance.known_optimum import PROBLEMS

# The last TRL with a PPOTrainer: `make evidence` puts it there, and workers have it in front of the newer one.
PATHS = (Path(__file__).parents[2] / ".cache" / "trl-1.12.0",)

# What each arm sets in TRL's config.
ARMS = {
    "no KL": {"kl_coef": 0.0},
    "TRL's PPO": {},
    "TRL's PPO, kl_estimator=k3": {"kl_estimator": "k3"},
    "k1_as_loss": {"kl": "k1_as_loss", "kl_allow_biased": True},
    "k2_as_loss": {"kl": "k2_as_loss"},
    "k3_as_loss": {"kl": "k3_as_loss"},
    "k1_in_reward": {"kl": "k1_in_reward"},
}
REGIMES = {
    "terminal reward": {},
    "4 updates a rollout": {"num_ppo_epochs": 4},
}
FEW = ("no KL", "TRL's PPO", "k1_in_reward")
"""The arms of all regimes but the first: a run takes several times as long as one of GRPO."""


class Reward(torch.nn.Module):
    """A problem's reward, in the shape of the sequence classifier that TRL asks for: a backbone and a score."""

    base_model_prefix = "backbone"

    def __init__(self, problem):
        super().__init__()
        self.problem, self.score = problem, torch.nn.Identity()

    def backbone(self, input_ids, **_):
        """(B, T, 1) as the last hidden state: the reward of each row, at all positions."""
        paid = reward_of(self.problem, input_ids[:, 1:]).float()
        return SimpleNamespace(hidden_states=[paid[:, None, None].expand(*input_ids.shape, 1)])


def jobs(quick):
    """Every arm in the first regime, a few in the other; quick: none."""
    return [
        {"part": "ppo", "regime": regime, "arm": arm, "seed": seed, "steps": 200}
        for regime in REGIMES
        for arm in (ARMS if regime == "terminal reward" else FEW)
        for seed in range(0 if quick else SEEDS)
    ]


def make_trainer(arm, regime, seed, steps, folder):
    """A trainer on the terminal reward, its policy, and the problem."""
    sys.modules["vllm"] = None  # beside the vLLM that newer TRL releases use, TRL 1.12 can't be imported
    from datasets import Dataset
    from evidence.markov_model import Critic, markov_model, markov_tokenizer
    from transformers import PrinterCallback

    from kl_plugins.trl.ppo import PPOConfig, PPOTrainer

    problem = PROBLEMS["terminal"](length=LENGTH, beta=0.3, seed=seed)
    options = {"num_ppo_epochs": 1} | REGIMES[regime] | {"kl_coef": problem.beta} | ARMS[arm]
    args = PPOConfig(
        total_episodes=steps // options["num_ppo_epochs"] * ROWS, per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=1, local_rollout_forward_batch_size=ROWS, response_length=LENGTH, temperature=1.0,
        learning_rate=0.05, lr_scheduler_type="constant", adam_beta2=0.99, max_grad_norm=1e9, seed=seed,
        num_sample_generations=0, output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    policy = markov_model(problem.reference)
    trainer = PPOTrainer(
        args=args,
        processing_class=markov_tokenizer(problem.reference.size(-1)),
        model=policy,
        ref_model=None,  # a copy of the policy
        reward_model=Reward(problem),
        value_model=Critic(policy.config),
        train_dataset=Dataset.from_dict({"input_ids": [[0]] * ROWS * 4}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, policy, problem


def work(job):
    """Train one arm from one seed."""
    gc.freeze()  # TRL collects garbage twice an update: spare it what the imports left
    with tempfile.TemporaryDirectory() as folder:
        trainer, policy, problem = make_trainer(job["arm"], job["regime"], job["seed"], job["steps"], folder)
        trainer.train()
        return evaluated(policy, problem)
