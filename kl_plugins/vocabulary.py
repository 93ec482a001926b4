"""Whether two models speak of the same tokens, without which a KL between them is no KL."""

from __future__ import annotations

from typing import Any

from kl_plugins.errors import ConfigError


def require_one_tokenizer(tokenizer: Any, model: str, reference: str) -> bool:
    """Raise `ConfigError` if the tokenizer saved with `reference` differs; False if none is saved with it."""
    from transformers import AutoTokenizer

    try:
        other = AutoTokenizer.from_pretrained(reference)
    except (OSError, ValueError, KeyError):
        return False
    mine, theirs = tokenizer.get_vocab(), other.get_vocab()
    if mine != theirs:
        words = sorted(word for word in {*mine, *theirs} if mine.get(word) != theirs.get(word))
        first = words[0]
        raise ConfigError(
            f"the tokenizers of {model} and of the reference {reference} differ in {len(words)} tokens, such as "
            f"{first!r} ({mine.get(first)} and {theirs.get(first)}): a KL needs the same tokens in both"
        )
    return True
