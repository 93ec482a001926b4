"""A CPU engine of a model whose LM head is tied, before and after syncs, see tests/trl/test_vllm.py.

usage: vllm_tied.py FOLDER, which gets the model and gaps.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import ensure_master_addr_port
from vllm import LLM, SamplingParams

from kl_plugins.trl import vllm as ours

PROMPTS = [[5, 6, 7, 8 + i] for i in range(8)]


def gap(model, engine):
    """How far the log-probs of the engine are from those of the policy, in nats a token, on average."""
    asked = SamplingParams(max_tokens=24, logprobs=0, seed=0, detokenize=False, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], asked, use_tqdm=False)
    ids = torch.tensor([[*p, *o.outputs[0].token_ids] for p, o in zip(PROMPTS, outputs, strict=True)])
    said = torch.tensor([[next(iter(t.values())).logprob for t in o.outputs[0].logprobs] for o in outputs])
    with torch.no_grad():
        logp = model(ids).logits[:, 3:-1].log_softmax(-1).gather(-1, ids[:, 4:, None]).squeeze(-1)
    return (logp - said).abs().mean().item()


def main(folder):
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=4, initializer_range=0.1)
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    options = {"skip_tokenizer_init": True, "max_model_len": 64, "logprobs_mode": "processed_logprobs"}
    engine = LLM(model=folder, **options, distributed_executor_backend="external_launcher", enforce_eager=True)
    generation = SimpleNamespace(mode="colocate", llm=engine, _iter_named_params=model.named_parameters)
    ours.follow_policy_on_cpu(generation)

    gaps = {"loaded": gap(model, engine)}
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight.add_(torch.randn_like(weight) * 0.5 * weight.std())
    with mock.patch.object(ours, "_repack_heads"):
        generation.sync_weights()
        gaps["head not packed anew"] = gap(model, engine)
    generation.sync_weights()
    gaps["synced"] = gap(model, engine)
    (Path(folder) / "gaps.json").write_text(json.dumps(gaps))


if __name__ == "__main__":
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    ensure_master_addr_port()
    main(sys.argv[1])
