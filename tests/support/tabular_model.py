"""Tables of logits as a model that `kl_plugins.audit` can audit: its head's weight is the table itself."""

from __future__ import annotations

import torch

from kl_plugins.audit.gradients import ScoredCompletions


class Tabular:
    """Policy and reference over `oracle.enumerate_sequences`; the hidden state is the prefix, one-hot."""

    def __init__(self, sequences, policy, reference, seed=0):
        self.sequences, self.policy, self.reference = sequences, policy, reference
        self.generator = torch.Generator().manual_seed(seed)
        self.rows = {}
        for row, (tokens, mask) in enumerate(zip(sequences.tokens.tolist(), sequences.mask.tolist(), strict=True)):
            self.rows[tuple(token for token, counts in zip(tokens, mask, strict=True) if counts)] = row

    vocabulary = property(lambda self: self.sequences.vocabulary)
    hidden = property(lambda self: self.sequences.prefixes)

    def prompt_ids(self, prompt):
        return [0]

    def draw(self, logits, count):
        """Rows of the enumeration, drawn by a table of logits."""
        logp = logits.log_softmax(-1)[self.sequences.prefix, self.sequences.tokens] * self.sequences.mask
        return torch.multinomial(logp.sum(-1).exp(), count, replacement=True, generator=self.generator)

    def completion(self, row):
        tokens, mask = self.sequences.tokens[row], self.sequences.mask[row]
        return tokens[mask].tolist()

    def sample(self, prompt, count, *, max_new_tokens):
        return [self.completion(row) for row in self.draw(self.policy, count)]

    def score(self, prompt, completions, behavior_logp=None, *, batch):
        for start in range(0, len(completions), batch):
            rows = torch.tensor([self.rows[tuple(ids)] for ids in completions[start : start + batch]])
            prefix, tokens = self.sequences.prefix[rows], self.sequences.tokens[rows]
            behavior = None
            if behavior_logp is not None:
                length = tokens.size(1)
                padded = [row + [0.0] * (length - len(row)) for row in behavior_logp[start : start + batch]]
                behavior = torch.tensor(padded, dtype=torch.float64)
            yield ScoredCompletions(
                tokens=tokens,
                mask=self.sequences.mask[rows],
                logits=self.policy[prefix],
                ref_logits=self.reference[prefix],
                hidden=torch.nn.functional.one_hot(prefix, self.sequences.prefixes).double(),
                behavior_logp=behavior,
                host_behavior_logp=behavior,
            )
