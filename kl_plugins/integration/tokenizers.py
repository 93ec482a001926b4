"""What a tokenizer of Hugging Face says: ends, special tokens, ids of words; and whether two know the same tokens."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from kl_plugins.errors import ConfigError

WORDS = ("eos", "special", "first")
"""What `kl_leave_out` names besides tokens."""


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


def eos_ids(tokenizer: Any, eos_token_id: int | Collection[int] | None) -> set[int]:
    """The tokens that end a completion: the tokenizer's, and those of the generation config."""
    also = {eos_token_id} if eos_token_id is None or isinstance(eos_token_id, int) else set(eos_token_id)
    return {int(index) for index in {tokenizer.eos_token_id, *also} - {None}}


def special_ids(tokenizer: Any) -> set[int]:
    """The tokens that mark text instead of being some, ends included."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *added}


def token_classes(tokenizer: Any, eos_token_id: int | Collection[int] | None) -> list[int]:
    """Token id -> index into `monitor.CLASSES`: text, ends of a completion, other special tokens; the last is text."""
    eos, special = eos_ids(tokenizer, eos_token_id), special_ids(tokenizer)
    return [1 if index in eos else 2 if index in special else 0 for index in range(max(eos | special, default=-1) + 2)]


def token_id(word: str | int, tokenizer: Any) -> int:
    """The token that `kl_leave_out` names by its id or text. Raises `ConfigError` if that is no single token."""
    kind, _, rest = str(word).partition(":")
    kind, text = (kind, rest) if kind in ("id", "text") and rest else ("", str(word))
    vocabulary = tokenizer.get_vocab()
    if kind == "id" or (not kind and text.lstrip("-").isdigit()):
        if not text.isdigit() or int(text) >= len(tokenizer):
            raise ConfigError(f"kl_leave_out has the token id {text}: the tokenizer has 0 to {len(tokenizer) - 1}")
        if not kind and vocabulary.get(text, int(text)) != int(text):
            raise ConfigError(
                f"kl_leave_out has {text!r}, a token id and the text of token {vocabulary[text]}: write "
                f"'id:{text}' or 'text:{text}'"
            )
        return int(text)
    if text in vocabulary:
        return int(vocabulary[text])
    pieces = tokenizer.encode(text, add_special_tokens=False)
    if len(pieces) == 1 and pieces[0] != getattr(tokenizer, "unk_token_id", None):
        return int(pieces[0])
    raise ConfigError(
        f"kl_leave_out has {text!r}, which is {len(pieces)} tokens ({pieces}) of this tokenizer, or an unknown one: "
        f"name a single token, its id, or one of {', '.join(WORDS)}"
    )
