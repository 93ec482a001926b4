"""A tiny causal LM made on the spot, and trainers on it. Real TRL, no network, CPU."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kl_plugins.trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer


def make_model(folder, *, seed: int, spread: float) -> str:
    """Save a 2-layer Llama over 16 characters. `spread` scales its logits, so that KLs are not all near 0."""
    alphabet = ["<pad>", "<eos>", *"0123456789+-= "]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(alphabet)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(spread)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("policy"), seed=0, spread=10.0)


@pytest.fixture(scope="session")
def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(8) for b in range(8)])


def digit_share(completions, **_):
    """A reward with variance: the share of digits."""
    return [sum(c.isdigit() for c in text) / 8 for text in completions]


CONFIGS = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}


@pytest.fixture
def make_trainer(model, prompts, tmp_path):
    """`make_trainer(cls, **config)`: a trainer of that class on the tiny model, 4 prompts x 4 completions a batch."""

    def make(cls, *, config=None, policy=model, **options):
        arguments = {
            "output_dir": str(tmp_path),
            "beta": 0.1,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 16,
            "num_generations": 4,
            "max_completion_length": 8,
            "max_steps": 2,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "seed": 0,
            "model_init_kwargs": {"dtype": "float32"},
        }
        peft_config = options.pop("peft_config", None)
        extra = {name: options.pop(name) for name in ("eval_dataset", "callbacks", "rollout_func") if name in options}
        args = (config or CONFIGS[cls])(**(arguments | options))
        return cls(
            model=policy, reward_funcs=digit_share, args=args, train_dataset=prompts, peft_config=peft_config, **extra
        )

    return make
