"""Real TRL trainers on a tiny model."""

from __future__ import annotations

import pytest
from datasets import Dataset
from tiny_trl import ARGUMENTS, digit_share, make_model

from kl_plugins.trl import GMPOConfig, GMPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("policy"), seed=0, spread=10.0)


@pytest.fixture(scope="session")
def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(8) for b in range(8)])


CONFIGS = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig, GMPOTrainer: GMPOConfig}


@pytest.fixture
def config_of():
    """The config of one of our trainers."""
    return CONFIGS.__getitem__


@pytest.fixture
def make_trainer(model, prompts, tmp_path):
    """`make_trainer(cls, **config)`: a trainer of that class on the tiny model, 4 prompts x 4 completions a batch."""

    def make(cls, *, config=None, policy=model, **options):
        arguments = ARGUMENTS | {"output_dir": str(tmp_path)}
        peft_config = options.pop("peft_config", None)
        extra = {name: options.pop(name) for name in ("eval_dataset", "callbacks", "rollout_func") if name in options}
        args = (config or CONFIGS[cls])(**(arguments | options))
        return cls(
            model=policy, reward_funcs=digit_share, args=args, train_dataset=prompts, peft_config=peft_config, **extra
        )

    return make
