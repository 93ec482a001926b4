"""Sampling options under which every sampled KL is a KL to something else than the policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kl_plugins.integration.problem import Problem

# Option -> values that leave the policy's own distribution alone.
_FIELDS = {
    "top_p": (1.0, None),
    "top_k": (0, -1, None),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0, None),
    "vllm_structured_outputs_regex": (None,),
}
_IN_A_MODEL = {
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "top_h": (None,),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "sequence_bias": (None,),
}
# Keys of `generation_kwargs` that don't change which token is drawn with which probability.
_HARMLESS = {"max_new_tokens", "max_tokens", "seed", "stop", "stop_strings", "stop_token_ids", "use_cache"}
_HARMLESS |= {"cache_implementation", "skip_special_tokens", "detokenize"}


def sampling_problems(config: Any) -> Iterator[Problem]:
    """What in a TRL config makes the sampler differ from the policy whose log-probs are taken."""
    for name, neutral in _FIELDS.items():
        if getattr(config, name) not in neutral:
            yield _problem(name, getattr(config, name), f"use {name}={neutral[0]!r}", {name: None})
    for name, value in (config.generation_kwargs or {}).items():
        same = (name == "temperature" and value == config.temperature) or (name == "do_sample" and value is True)
        if not same and name not in _HARMLESS and value not in _FIELDS.get(name, ()):
            yield _problem(f"generation_kwargs[{name!r}]", value, "leave it out", {"generation_kwargs": None})


def model_generation_problems(generation_config: Any) -> list[str]:
    """What in a model's own `generation_config` does: transformers applies it where TRL sets nothing."""
    return [
        _problem(f"the model's generation_config.{name}", value, "reset it", {}).refusal
        for name, neutral in _IN_A_MODEL.items()
        if (value := getattr(generation_config, name, None)) not in neutral
    ]


def _problem(name: str, value: Any, remedy: str, change: Mapping[str, Any]) -> Problem:
    return Problem(
        f"{name}={value!r}: tokens may be drawn from another distribution than the policy's, whose log-probs are "
        f"taken, which biases every sampled KL; {remedy} (the config's temperature is accounted for)",
        change,
        biases=True,
    )
