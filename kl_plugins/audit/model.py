"""Policy and reference with Transformers: sampling from the policy's own distribution, and scoring by both."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kl_plugins.audit.gradients import ScoredCompletions
from kl_plugins.errors import ConfigError
from kl_plugins.integration.tokenizers import require_one_tokenizer


class Pair:
    """A policy and the reference it is regularized to.

    Raises `ConfigError` for a model that can't be loaded, or two that don't have the same vocabulary.
    """

    def __init__(self, model: str, reference: str, *, device: str = "auto", dtype: str = "float32") -> None:
        try:
            import transformers
        except ModuleNotFoundError as error:
            raise ConfigError(
                "an audit needs transformers, which isn't installed: pip install transformers"
            ) from error
        transformers.utils.logging.disable_progress_bar()
        self.device = _device(device)
        self.tokenizer = _loaded(transformers.AutoTokenizer, "tokenizer", model)
        self.policy, self.reference = (
            _loaded(transformers.AutoModelForCausalLM, "model", name, dtype=dtype).to(self.device).eval()
            for name in (model, reference)
        )
        _require_one_vocabulary(self.policy, self.reference, model, reference)
        require_one_tokenizer(self.tokenizer, model, reference)
        self.ends = _end_tokens(self.policy, self.tokenizer)
        self.pad = next(
            i for i in (self.tokenizer.pad_token_id, *sorted(self.ends), 0) if i is not None
        )  # what stands after the end is masked
        self._generation = transformers.GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=sorted(self.ends) or None,
            pad_token_id=self.pad,
        )
        self.shortest = sys.maxsize
        """The fewest new tokens that a prompt left positions for, as far as was asked."""
        self._head_input: list[Tensor] = []
        head = self.policy.get_output_embeddings()
        head.register_forward_pre_hook(lambda module, inputs: self._head_input.append(inputs[0].detach()))

    @property
    def vocabulary(self) -> int:
        """V, the number of logits."""
        return int(self.policy.get_output_embeddings().weight.shape[0])

    @property
    def hidden(self) -> int:
        """H, what the head makes them of."""
        return int(self.policy.get_output_embeddings().weight.shape[1])

    def room(self, prompt: list[int], wanted: int) -> int:
        """How many of the tokens `wanted` after a prompt the model has positions for; at least 1."""
        limit = getattr(self.policy.config.get_text_config(), "max_position_embeddings", None)
        found = wanted if limit is None else min(wanted, limit - len(prompt))
        if found < 1:
            raise ConfigError(
                f"a prompt has {len(prompt)} tokens, but the model has {limit} positions: leave the prompt out"
            )
        self.shortest = min(self.shortest, found)
        return found

    def prompt_ids(self, prompt: Any) -> list[int]:
        """Token ids of a text, a chat or token ids. Raises `ConfigError` if there is none."""
        if isinstance(prompt, str):
            ids = list(self.tokenizer(prompt).input_ids)
        elif isinstance(prompt[0], dict):
            try:
                text = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            except ValueError as error:
                raise ConfigError(f"a prompt is a chat, but the tokenizer can't format it: {error}") from error
            ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        else:
            ids = list(prompt)
        if not ids or max(ids) >= self.vocabulary:
            raise ConfigError(f"prompt {prompt!r} has {'an unknown token' if ids else 'no token'}: leave it out")
        return ids

    def texts(self, completions: Sequence[list[int]]) -> list[str]:
        """The texts of token ids, special tokens left out."""
        return list(self.tokenizer.batch_decode(completions, skip_special_tokens=True))

    @torch.no_grad()
    def sample(self, prompt: list[int], count: int, *, max_new_tokens: int) -> list[list[int]]:
        """`count` completions of a prompt, drawn from the policy's distribution as it is, up to and with the end."""
        self.policy.generation_config = self._generation  # the model's own may bend the distribution
        ids = torch.tensor([prompt], device=self.device)
        drawn = self.policy.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.room(prompt, max_new_tokens),
            num_return_sequences=count,
        )
        self._head_input.clear()
        return [self._until_end(row) for row in drawn[:, len(prompt) :].tolist()]

    def _until_end(self, tokens: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(tokens) if token in self.ends), len(tokens) - 1)
        return tokens[: end + 1]

    def score(
        self,
        prompt: list[int],
        completions: Sequence[list[int]],
        behavior_logp: Sequence[list[float]] | None = None,
        *,
        batch: int,
    ) -> Iterator[ScoredCompletions]:
        """Micro-batches of at most `batch` completions, scored by one forward pass of each model."""
        for start in range(0, len(completions), batch):
            rows = slice(start, start + batch)
            yield self._scored(prompt, completions[rows], behavior_logp and behavior_logp[rows])

    @torch.no_grad()
    def _scored(
        self, prompt: list[int], completions: Sequence[list[int]], behavior_logp: Sequence[list[float]] | None
    ) -> ScoredCompletions:
        tokens, mask = self._padded(completions, self.pad)
        ids = torch.cat([torch.tensor(prompt, device=self.device).expand(len(tokens), -1), tokens], dim=1)
        seen = torch.cat([torch.ones_like(ids[:, : len(prompt)]), mask.long()], dim=1)
        self._head_input.clear()
        logits, ref_logits = (
            self._logits(model, ids, seen, tokens.size(1)) for model in (self.policy, self.reference)
        )
        hidden = self._head_input.pop()[:, -tokens.size(1) - 1 : -1].float()
        behavior = None
        if behavior_logp is not None:
            behavior = self._padded(behavior_logp, 0.0)[0]
        return ScoredCompletions(
            tokens=tokens,
            mask=mask,
            logits=logits,
            ref_logits=ref_logits,
            hidden=hidden,
            behavior_logp=behavior,
            host_behavior_logp=behavior,
        )

    def _logits(self, model: Any, ids: Tensor, seen: Tensor, length: int) -> Tensor:
        """(B, T, V) float32 logits that predict the last `length` tokens."""
        options = {}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            options["logits_to_keep"] = length + 1
        logits: Tensor = model(input_ids=ids, attention_mask=seen, **options).logits
        return logits[:, -length - 1 : -1].float()

    def _padded(self, rows: Sequence[Sequence[float]], value: float) -> tuple[Tensor, Tensor]:
        tensors = [torch.tensor(row, device=self.device) for row in rows]
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
        return padded, torch.arange(padded.size(1), device=self.device) < lengths[:, None]


def _device(asked: str) -> torch.device:
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=asked).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {asked!r} was asked for, but it can't be used: {error}") from error


def _loaded(factory: Any, what: str, name: str, **options: Any) -> Any:
    try:
        return factory.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        where = "the folder" if Path(name).is_dir() else "there is no such folder here, and the hub's model"
        raise ConfigError(
            f"{name} was given, but its {what} can't be loaded ({where} {name}): {str(error).splitlines()[0]}"
        ) from error


def _require_one_vocabulary(policy: Any, reference: Any, model: str, other: str) -> None:
    heads = [m.get_output_embeddings() for m in (policy, reference)]
    if any(head is None for head in heads):
        raise ConfigError(f"{model} or {other} has no language-model head: an audit needs two causal language models")
    sizes = [int(head.weight.shape[0]) for head in heads]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"{model} has a vocabulary of {sizes[0]} and the reference {other} one of {sizes[1]}: a KL needs one and "
            "the same; the reference is usually the model that training started from"
        )


def _end_tokens(policy: Any, tokenizer: Any) -> set[int]:
    given = policy.generation_config.eos_token_id
    ends = set(given) if isinstance(given, list) else {given}
    return {int(end) for end in {*ends, tokenizer.eos_token_id} if end is not None}
