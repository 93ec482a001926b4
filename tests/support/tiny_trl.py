"""A tiny causal LM made on the spot, batches for it, and what to read off a trainer. Real TRL, no network, CPU."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def make_model(folder, *, seed: int, spread: float, characters: str = "0123456789+-= ") -> str:
    """Save a 2-layer Llama over 16 tokens. `spread` scales its logits, so that KLs are not all near 0."""
    alphabet = ["<pad>", "<eos>", *characters]
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
    gc.freeze()  # saving imports DeepSpeed: as in `pytest_collection_finish` (tests/conftest.py)
    return str(folder)


BETA = 0.1
# What every trainer of the tests is configured with, unless a test says otherwise.
ARGUMENTS = {
    "beta": BETA,
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
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


def micro_batch(trainer, *, rows=8, length=6, seed=0, ragged=True) -> dict[str, torch.Tensor]:
    """What TRL's generation would hand to `_compute_loss`: an off-policy batch, made up, ragged by default."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        return scale * torch.randn(rows, length, generator=generator)

    ids = torch.randint(2, 12, (rows, length + 4), generator=generator)
    lengths = torch.randint(1, length + 1, (rows,), generator=generator) if ragged else torch.full((rows,), length)
    mask = (torch.arange(length) < lengths[:, None]).long()
    batch = {
        "prompt_ids": ids[:, :4],
        "prompt_mask": torch.ones(rows, 4, dtype=torch.long),
        "completion_ids": ids[:, 4:],
        "completion_mask": mask,
        "advantages": torch.randn(rows, generator=generator),
        "num_items_in_batch": mask.sum(),
    }
    with torch.no_grad():
        logp, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.cat([batch["prompt_mask"], mask], dim=1), length
        )
    batch["old_per_token_logps"] = logp + noise(0.3)
    batch["ref_per_token_logps"] = logp + noise(0.5)
    batch["old_logps"] = (batch["old_per_token_logps"] * mask).sum(-1)  # what RLOO keeps
    return batch


def loss_and_gradients(trainer, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """One `compute_loss` and its backward pass: the loss and every parameter's gradient in one vector."""
    trainer.current_gradient_accumulation_steps = 1  # set by Trainer.train otherwise
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(gradients)


def reduced(per_token, mask, loss_type, max_length, num_items):
    """TRL's documented normalizations of a per-token loss, one process, no accumulation."""
    total = (per_token * mask).sum()
    if loss_type in ("grpo", "sapo"):
        return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    if loss_type == "bnpo":
        return total / mask.sum()
    if loss_type == "dr_grpo":
        return total / (per_token.size(0) * max_length)
    if loss_type == "luspo":
        return (per_token * mask).sum(-1).mean()
    return total / num_items


def kl_part(trainer, batch):
    """Loss and gradients with the term, less those without it (reference = a policy at u = 0)."""
    loss, gradients = loss_and_gradients(trainer, batch)
    trainer.beta, spec, trainer.kl_spec = 0.0, trainer.kl_spec, None
    base, base_gradients = loss_and_gradients(trainer, batch)
    trainer.beta, trainer.kl_spec = BETA, spec
    return loss - base, gradients - base_gradients


def parameters(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def digit_share(completions, **_):
    """A reward with variance: the share of digits."""
    return [sum(c.isdigit() for c in text) / 8 for text in completions]
