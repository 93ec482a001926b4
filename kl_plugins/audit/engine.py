"""Completions from a vLLM engine, with its own log-probs."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from kl_plugins.audit.data import Rollouts
from kl_plugins.errors import ConfigError


def vllm_rollouts(
    model: str,
    prompts: Sequence[list[int]],
    *,
    completions: int,
    max_new_tokens: int,
    ends: Collection[int],
    seed: int,
    dtype: str,
) -> list[Rollouts]:
    """`completions` of each prompt (token ids), drawn at temperature 1 from the engine's whole distribution.

    Raises `ConfigError` if there is no vLLM.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise ConfigError(
            f"--vllm was asked for, but vLLM can't be imported ({error}): pip install vllm, or leave --vllm out"
        ) from error
    engine = LLM(
        model=model,
        dtype=dtype,
        seed=seed,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        gpu_memory_utilization=0.5,
        enforce_eager=True,
    )
    sampling = SamplingParams(
        n=completions,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_tokens=max_new_tokens,
        stop_token_ids=sorted(ends),
        logprobs=0,
        seed=seed,
    )
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return [
        Rollouts(
            prompt=list(prompt),
            completions=[list(one.token_ids) for one in output.outputs],
            behavior_logp=[
                [step[token].logprob for token, step in zip(one.token_ids, one.logprobs, strict=True)]
                for one in output.outputs
            ],
            by_engine=True,
        )
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
