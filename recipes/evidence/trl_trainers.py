"""The known optimum through TRL's own GRPOTrainer and RLOOTrainer, stock and ours.

A run trains a table of logits (`markov_model`) on a problem of `kl_plugins.conformance.known_optimum` for a number of
updates; every arm of a regime sees as many samples. What comes out is evaluated exactly.
"""

import functools
import gc
import tempfile
from dataclasses import dataclass, field
from unittest import mock

import torch
from evidence.trl_regimes import LENGTH, ROWS, SEEDS, evaluated, reward_of

from kl_plugins.conformance.known_optimum import PROBLEMS

SEQUENCE = {"kl": "k1_in_reward", "kl_credit": "sequence"}
TO_GO = {"kl": "k1_in_reward", "kl_credit": "to_go"}
RLOO = {"trainer": "rloo", "normalize_advantages": False}

# What each arm sets in TRL's config; every option that matters by name, so that no default of ours decides.
ARMS = {
    "no KL": {"beta": 0.0},
    "TRL's GRPO": {"kl": None},
    "TRL's RLOO": {**RLOO, "kl": None},
    "k1_as_loss": {"kl": "k1_as_loss", "kl_allow_biased": True},
    "k2_as_loss": {"kl": "k2_as_loss"},
    "k3_as_loss": {"kl": "k3_as_loss"},
    "exact_as_loss": {"kl": "exact_as_loss"},
    "exact_in_reward": {"kl": "exact_in_reward", "kl_baseline": "group_mean"},
    "k1_in_reward, token, group_mean": {"kl": "k1_in_reward", "kl_credit": "token", "kl_baseline": "group_mean"},
    "k1_in_reward, to_go": {**TO_GO, "kl_baseline": None},
    "k1_in_reward, to_go, group_mean": {**TO_GO, "kl_baseline": "group_mean"},
    "k1_in_reward, sequence": {**SEQUENCE, "kl_baseline": None},
    "k1_in_reward, sequence, leave_one_out": {**SEQUENCE, "kl_baseline": "leave_one_out"},
    "k1_in_reward, sequence, group_mean": {**SEQUENCE, "kl_baseline": "group_mean"},
    "reverse_kl": {"kl": "reverse_kl"},
    "reverse_kl in RLOO": {**RLOO, "kl": "reverse_kl"},
    "reverse_kl, kl_scale=reward": {"kl": "reverse_kl", "kl_scale": "reward"},
    "reverse_kl, in the advantage": {"kl": "reverse_kl", "kl_clip": "combined"},
}
SCALED, IN_ADVANTAGE = "reverse_kl, kl_scale=reward", "reverse_kl, in the advantage"
# In the other regimes; k2_as_loss trains like TRL's GRPO, which the first one shows.
CHOSEN = ("TRL's GRPO", "TRL's RLOO", "k3_as_loss", "exact_in_reward", "reverse_kl")
OFF_POLICY = (*CHOSEN[:-2], "k1_in_reward, to_go, group_mean", "reverse_kl", "reverse_kl in RLOO")
WITH_AN_ENGINE = (*OFF_POLICY, "k2_as_loss", IN_ADVANTAGE)
SEQUENCE_CREDIT, TOKEN_CREDIT = "k1_in_reward, sequence, group_mean", "k1_in_reward, token, group_mean"
QUICK = {
    "terminal reward": (
        *("no KL", "TRL's GRPO", "k1_as_loss", "k2_as_loss", "k3_as_loss"),
        *(TOKEN_CREDIT, SEQUENCE_CREDIT, "TRL's RLOO"),
    ),
    "hackable reward": ("k2_as_loss", "k3_as_loss"),
}


@dataclass(frozen=True)
class Regime:
    """What is trained on, and how; a regime differs from `Regime()` in one thing."""

    problem: str = "terminal"
    beta: float = 0.3
    group: int = 8
    options: dict = field(default_factory=dict)
    engine: float = 0.0
    """How far the logits of the engine that draws the samples are from the policy's: standard deviation, in nats."""

    @property
    def arms(self):
        """What is compared there."""
        if self.engine:
            return WITH_AN_ENGINE
        return OFF_POLICY if {"num_iterations", "steps_per_generation"} & self.options.keys() else CHOSEN


REGIMES = {
    "terminal reward": Regime(),
    "dense reward": Regime(problem="dense", beta=1.0),
    "hackable reward": Regime(problem="hackable"),
    "groups of 2": Regime(group=2),
    "groups of 4": Regime(group=4),
    "groups of 16": Regime(group=16),
    "rewards scaled by the group": Regime(options={"scale_rewards": "group"}),
    "4 updates a rollout": Regime(options={"num_iterations": 4}),
    "samples up to 4 updates old": Regime(options={"steps_per_generation": 4}),
    "an engine off by 0.1": Regime(engine=0.1),
    "an engine off by 0.3": Regime(engine=0.3),
}


def jobs(quick):
    """Every arm on the terminal reward, and in every other regime those that can differ there.

    Quick: what the orderings that are judged compare.
    """
    chosen = QUICK
    if not quick:
        chosen = {name: regime.arms for name, regime in REGIMES.items()}
        chosen["terminal reward"] = tuple(arm for arm in ARMS if arm not in (SCALED, IN_ADVANTAGE))
        chosen["rewards scaled by the group"] = (*CHOSEN, SCALED)
        chosen["hackable reward"] = ("no KL", "k2_as_loss", *CHOSEN)
    return [
        {"part": "trl", "regime": regime, "arm": arm, "seed": seed, "steps": 120 if quick else 200}
        for regime, arms in chosen.items()
        for seed in range(SEEDS)
        for arm in arms
    ]


class Engine:
    """Stands in for TRL's `VLLMGeneration`: draws from the policy's table plus a noise of its own.

    Real engines differ by rounding and kernels; this one differs by as much as it is told. TRL's default, which drops
    a completion whose ratio is above 3, then drops many: over 16 tokens 0.3 nats a token make a factor of 3.
    """

    mode = "stand-in"

    def __init__(self, model, *, noise, seed, **_):
        self.model = model
        self.off = noise * torch.randn(model.table.shape, generator=torch.Generator().manual_seed(seed)).double()

    def sync_weights(self):
        """It reads the policy's own table."""

    def generate(self, prompts, **_):
        """Tokens and log-probs of a completion for each prompt, in the shape of TRL's `VLLMGeneration.generate`."""
        from evidence.markov_model import draw

        logits = self.model.table + self.off
        first = torch.tensor([prompt[-1] for prompt in prompts])
        tokens = draw(logits, first)
        before = torch.cat([first[:, None], tokens[:, :-1]], dim=1)
        logps = logits.log_softmax(-1)[torch.arange(len(logits)), before, tokens]
        return prompts, tokens.tolist(), logps.unsqueeze(-1).tolist(), None


def make_trainer(arm, regime, seed, steps, folder):
    """A trainer, and its problem: each seed has a reference of its own, the same for all arms."""
    from datasets import Dataset
    from evidence.markov_model import markov_model, markov_tokenizer

    import kl_plugins.trl as ours

    problem = PROBLEMS[regime.problem](length=LENGTH, beta=regime.beta, seed=seed)
    markov_model(problem.reference).save_pretrained(folder)

    def pays(completion_ids, **_):
        return reward_of(problem, torch.tensor(completion_ids)).tolist()

    options = {
        "beta": regime.beta, "learning_rate": 0.05, "lr_scheduler_type": "constant", "adam_beta2": 0.99,
        "max_grad_norm": 1e9, "max_steps": steps, "per_device_train_batch_size": ROWS,
        "num_generations": regime.group, "max_completion_length": LENGTH, "output_dir": folder, "seed": seed,
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    options |= regime.options
    if regime.engine:
        options |= {"use_vllm": True, "vllm_mode": "colocate"}
    chosen = dict(ARMS[arm])
    host = chosen.pop("trainer", "grpo")
    if host == "rloo":
        config, cls = ours.RLOOConfig, ours.RLOOTrainer
        chosen["normalize_advantages"] = options.pop("scale_rewards", "none") == "group"
    else:
        config, cls = ours.GRPOConfig, ours.GRPOTrainer
        options = {"loss_type": "dr_grpo", "scale_rewards": "none"} | options
    engine = functools.partial(Engine, noise=regime.engine, seed=seed)
    with mock.patch(f"trl.trainer.{host}_trainer.VLLMGeneration", engine):
        trainer = cls(
            model=folder,
            reward_funcs=pays,
            args=config(**options | chosen),
            train_dataset=Dataset.from_dict({"prompt": ["0"] * ROWS * 4}),
            processing_class=markov_tokenizer(problem.reference.size(-1)),
        )
    return trainer, problem


def work(job):
    """Train one arm in one regime from one seed."""
    gc.freeze()  # TRL collects garbage: spare it what the imports left
    with tempfile.TemporaryDirectory() as folder:
        trainer, problem = make_trainer(job["arm"], REGIMES[job["regime"]], job["seed"], job["steps"], folder)
        trainer.train()
        return evaluated(trainer.model, problem)
