"""What the parts through TRL's trainers share: the size of the problem, its reward of tokens, the exact evaluation."""

import torch

from kl_plugins.conformance.known_optimum import reward_and_kl, share

LENGTH, ROWS = 16, 64
"""Tokens of a completion, and completions of an update."""
SEEDS = 5
"""Of the full run."""


def reward_of(problem, tokens):
    """(B,) rewards of (B, length) `tokens`, by the problem's (length, V, V) table."""
    before = torch.nn.functional.pad(tokens, (1, 0))[:, :-1]
    return problem.reward[torch.arange(tokens.size(1)), before, tokens].sum(-1)


def evaluated(model, problem):
    """What training came to: exact, not sampled."""
    reward, kl = reward_and_kl(model.table, problem)
    found = {"reward": reward, "kl": kl, "share": share(model.table, problem)}
    if problem.name == "hackable":
        found["hacks"] = model.table[0, 0].softmax(-1)[0].item()
    return found
