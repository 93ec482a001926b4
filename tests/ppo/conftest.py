"""Real PPOTrainers on tiny models, in a TRL that has one: tests/support/suites.py runs them under such."""

from __future__ import annotations

import pytest
import torch

from kl_plugins.patching import load_patches
from kl_plugins.patching.versions import installed_version

collect_ignore_glob = [] if installed_version("trl") in load_patches("trl", "ppo").tested else ["test_*.py"]


def pytest_report_header():
    return f"trl {installed_version('trl')}"


ROWS = 16
ARGUMENTS = {
    "per_device_train_batch_size": ROWS,
    "gradient_accumulation_steps": 1,
    "num_mini_batches": 1,
    "num_ppo_epochs": 1,
    "response_length": 6,
    "stop_token": "eos",
    "temperature": 1.0,
    "learning_rate": 1e-3,
    "kl_coef": 0.1,
    "num_sample_generations": 0,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "seed": 0,
}


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    from tiny_trl import make_model

    return make_model(tmp_path_factory.mktemp("policy"), seed=0, spread=10.0)


@pytest.fixture
def make_trainer(model, tmp_path):
    """`make_trainer(cls, updates=3, **config)`: a PPO trainer on the tiny model, with critic, reward and reference.

    `rate`: plain gradient descent instead of AdamW, so that a step shows the gradient. `edit(policy)` changes the
    policy before the training. `score=False`: rewards of 0. `pad_in_vocabulary=False`: no sampled token is padding.
    """
    from datasets import Dataset
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        set_seed,
    )

    from kl_plugins.trl.ppo import PPOConfig, PPOTrainer

    def make(cls=PPOTrainer, *, config=PPOConfig, updates=3, dtype=torch.float32, rate=None, score=True, **options):
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        if not options.pop("pad_in_vocabulary", True):
            tokenizer.add_special_tokens({"pad_token": "<outside>"})
        edit, prompts = options.pop("edit", None), options.pop("prompts", None)
        extra = {name: options.pop(name) for name in ("callbacks", "ref_model") if name in options}
        arguments = ARGUMENTS | {"output_dir": str(tmp_path)} | options
        rows = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
        args = config(**arguments, total_episodes=updates * rows)
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        extra.setdefault("ref_model", perturbed(AutoModelForCausalLM.from_pretrained(model, dtype=dtype)))
        set_seed(3)  # numpy's too, with which TRL shuffles a rollout
        shape = AutoConfig.from_pretrained(model, num_labels=1)
        critic, reward = (AutoModelForSequenceClassification.from_config(shape).to(dtype) for _ in range(2))
        if not score:
            torch.nn.init.zeros_(reward.score.weight)
        if edit:
            edit(policy)
        if rate is not None:
            optimizer = torch.optim.SGD([*policy.parameters(), *critic.parameters()], lr=rate)
            extra["optimizers"] = (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
        if prompts is None:
            prompts = [[3 + row % 8, 12, 4 + row % 5, 13] for row in range(4 * rows)]
        return cls(
            args=args,
            processing_class=tokenizer,
            model=policy,
            reward_model=reward,
            value_model=critic,
            train_dataset=Dataset.from_dict({"input_ids": prompts}),
            **extra,
        )

    return make


def perturbed(model, *, seed=1, scale=0.06):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


@pytest.fixture
def parameters():
    """`parameters(trainer)`: those of the policy, as one vector."""
    return lambda trainer: torch.cat([p.detach().flatten() for p in trainer.policy_model.parameters()])


@pytest.fixture
def scripted(monkeypatch):
    """`scripted(responses, logits)`: every rollout gives these (B, T) tokens, sampled from these (B, T, V) logits."""
    from trl.experimental.ppo import ppo_trainer

    def script(responses, logits):
        def generated(model, queries, *args):
            return torch.cat([queries, responses], dim=1), logits.clone()

        monkeypatch.setattr(ppo_trainer, "batch_generation", generated)

    return script
