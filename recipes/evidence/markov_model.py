"""A table of logits as a Hugging Face model, so that real trainers train a policy whose objective is known exactly.

The policy draws token t from row (t, token before) of its table; the first row is that of token 0, the prompt. Its
trunk's hidden state is one-hot in that row, so the weight of its head *is* the table, and everything that a host does
with a model (a frozen copy, scoring, AdamW, a fused head) works as with any other. `generate` draws from the table
at once, without a forward pass a token, which makes a training step some ten times as fast.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

IMPOSSIBLE = -30.0
"""The logit of <pad>, <eos> and <bos>: a completion always has full length."""


class MarkovConfig(PretrainedConfig):
    """`tokens` that can be drawn, 0 to tokens - 1, and behind them <pad>, <eos> and <bos>; completions of `length`."""

    model_type = "markov-table"
    auto_map: ClassVar = {}  # TRL reads it

    def __init__(self, tokens: int = 6, length: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tokens, self.length = tokens, length
        self.vocab_size, self.hidden_size = tokens + 3, length * tokens
        self.num_hidden_layers = self.num_attention_heads = 1


class Trunk(nn.Module):
    """(B, S) token ids -> (B, S, length * tokens): one-hot in position and token."""

    def __init__(self, config: MarkovConfig) -> None:
        super().__init__()
        self.tokens, self.length, self.unused = config.tokens, config.length, nn.Embedding(config.vocab_size, 1)
        self.unused.weight.requires_grad_(False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> BaseModelOutputWithPast:
        """The prompt, one token, is at position 0; what follows a whole completion has no row and takes the last."""
        position = (attention_mask.long().cumsum(-1) - 1).clamp(0, self.length - 1)
        before = torch.where(input_ids < self.tokens, input_ids, 0)
        hidden = nn.functional.one_hot(position * self.tokens + before, self.length * self.tokens).float()
        return BaseModelOutputWithPast(last_hidden_state=hidden, hidden_states=(hidden,))


class MarkovModel(PreTrainedModel, GenerationMixin):
    """The policy. `table` is what its head holds."""

    config_class, base_model_prefix = MarkovConfig, "model"

    def __init__(self, config: MarkovConfig) -> None:
        super().__init__(config)
        self.model, self.lm_head = Trunk(config), nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The table is set by hand."""

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def get_input_embeddings(self) -> nn.Embedding:
        """A parameter that nothing uses: hosts ask for it."""
        return self.model.unused

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int = 0, **_: Any
    ) -> CausalLMOutputWithPast:
        """The logits of the token after each of the last `logits_to_keep` positions (0: of all)."""
        hidden = self.model(input_ids, attention_mask).last_hidden_state
        hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        return CausalLMOutputWithPast(logits=self.lm_head(hidden), hidden_states=(hidden,))

    @property
    def table(self) -> torch.Tensor:
        """(length, tokens, tokens): the logits of token t after each token before it, detached, in float64."""
        tokens, length = self.config.tokens, self.config.length
        return self.lm_head.weight.detach()[:tokens].T.reshape(length, tokens, tokens).double()

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor, *, return_dict_in_generate: bool = False, **_: Any) -> Any:
        """(B, 1 + length): the prompts and a completion of each, drawn from the table at temperature 1."""
        drawn = draw(self.lm_head.weight.T.view(self.config.length, self.config.tokens, -1), input_ids[:, -1])
        sequences = torch.cat([input_ids, drawn], dim=1)
        if not return_dict_in_generate:
            return sequences
        logits = self(sequences, torch.ones_like(sequences)).logits[:, -1 - drawn.size(1) : -1]
        return SimpleNamespace(sequences=sequences, scores=logits.unbind(1))


def draw(logits: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """(B, length) tokens by (length, tokens, size) `logits`, each after the one before, the first after `first`."""
    up_to = logits.softmax(-1).cumsum(-1)
    uniform = torch.rand(len(logits), len(first), 1) * up_to[..., -1:].amin()  # which is 1, but for rounding
    drawn, before = [], first
    for t in range(len(logits)):
        before = (up_to[t, before] <= uniform[t]).sum(-1)
        drawn.append(before)
    return torch.stack(drawn, dim=1)


AutoConfig.register(MarkovConfig.model_type, MarkovConfig)
AutoModelForCausalLM.register(MarkovConfig, MarkovModel)


def markov_model(table: torch.Tensor) -> MarkovModel:
    """The model of a (length, tokens, tokens) table of logits."""
    length, tokens, _ = table.shape
    model = MarkovModel(MarkovConfig(tokens=tokens, length=length))
    with torch.no_grad():
        model.lm_head.weight.fill_(IMPOSSIBLE)
        model.lm_head.weight[:tokens] = table.reshape(length * tokens, tokens).T
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = tokens, tokens + 1
    model.generation_config.use_cache = False
    return model


def markov_tokenizer(tokens: int) -> PreTrainedTokenizerFast:
    """Its words are the numbers of the tokens, divided by spaces."""
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    words = [*map(str, range(tokens)), *special.values()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **special)


class Critic(nn.Module):
    """A value of each row of the table, in the shape that TRL's PPO asks for: a backbone, and a `score` on top.

    As exact as a critic can be here: what is to come depends on nothing but position and token before.
    """

    base_model_prefix = "model"

    def __init__(self, config: MarkovConfig) -> None:
        super().__init__()
        self.model, self.score = Trunk(config), nn.Linear(config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.score.weight)
