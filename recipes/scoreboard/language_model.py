"""A language model that is trained on the spot, and what a KL term's gradient is on it.

Additions of two digits, character by character, with intermediate steps; in the second task only some of the examples
have them, so that a completion's first token decides what follows. The reference is what it learned, the policy what
reinforcement learning then made of it, the stale policy what it was some updates before. The gradient is that of the
weights of its head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kl_plugins.conformance.subject import Scored, Subject
from kl_plugins.core.terms import assign_credit

ALPHABET = "\n0123456789+=;"
END, PROMPT, LENGTH = 0, 6, 20
GROUP = 8
"""Completions per prompt."""
BLOCKS = 32
"""Blocks of prompts of which the jackknife leaves out one at a time."""
SETTINGS = ("on_policy", "stale")
TASKS = {"plain": 1.0, "steering": 0.7}
"""Name -> the share of examples with intermediate steps."""


class LanguageModel(nn.Module):
    """A GRU over characters with a head of its own."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), width)
        self.core = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, len(ALPHABET), bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) tokens -> (B, T, V) logits of the next one, and the (B, T, H) hidden states they are made of."""
        hidden, _ = self.core(self.embedding(tokens))
        return self.head(hidden), hidden

    @torch.no_grad()
    def sample(self, prompts: Tensor, generator: torch.Generator) -> Tensor:
        """(B, LENGTH) tokens drawn after each prompt; END after the end."""
        hidden, state = self.core(self.embedding(prompts))
        drawn, alive = [], torch.ones(len(prompts), dtype=torch.bool)
        last = hidden[:, -1]
        for _ in range(LENGTH):
            token = torch.multinomial(self.head(last).softmax(-1), 1, generator=generator)[:, 0]
            token = torch.where(alive, token, END)
            drawn.append(token)
            alive = alive & (token != END)
            hidden, state = self.core(self.embedding(token[:, None]), state)
            last = hidden[:, -1]
        return torch.stack(drawn, dim=1)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The policy that is trained, its reference, and what it was some updates before."""

    policy: LanguageModel
    reference: LanguageModel
    stale: LanguageModel


def train(task: str = "plain", *, seed: int = 0, steps: int = 700, updates: int = 60) -> Trained:
    """Supervised training, then policy gradients for right digits; deterministic on one machine."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = LanguageModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        stepwise = (torch.rand(128, generator=generator) < TASKS[task]).tolist()
        text = _encode([_example(a, b, s) for (a, b), s in zip(_numbers(128, generator), stepwise, strict=True)])
        logits, _ = model(text[:, :-1])
        mask = mask_of(text[:, PROMPT:])
        loss = nn.functional.cross_entropy(logits[:, PROMPT - 1 :].transpose(1, 2), text[:, PROMPT:], reduction="none")
        _step(optimizer, (loss * mask).sum() / mask.sum())
        schedule.step()
    reference = _copy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    stale = reference
    for update in range(updates):
        if update == updates - 12:
            stale = _copy(model)
        asked = [each for each in _numbers(32, generator) for _ in range(GROUP)]
        prompts = _encode([f"{a:02d}+{b:02d}=" for a, b in asked])
        tokens = model.sample(prompts, generator)
        reward = torch.tensor([_reward(a, b, row) for (a, b), row in zip(asked, tokens.tolist(), strict=True)])
        advantage = reward - reward.view(-1, GROUP).mean(1).repeat_interleave(GROUP)
        logits, _ = model(torch.cat([prompts, tokens[:, :-1]], dim=1))
        logp = logits[:, PROMPT - 1 :].log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        _step(optimizer, -(advantage[:, None] * logp * mask_of(tokens)).sum(-1).mean())
    return Trained(policy=_copy(model), reference=reference, stale=stale)


def mask_of(tokens: Tensor) -> Tensor:
    """bool: up to and with the first END."""
    return (tokens == END).cumsum(-1) - (tokens == END).long() == 0


def _numbers(count: int, generator: torch.Generator) -> list[tuple[int, int]]:
    return [tuple(pair) for pair in torch.randint(10, 100, (count, 2), generator=generator).tolist()]


def _example(a: int, b: int, steps: bool) -> str:
    units, tens = (f"{x}+{y}={x + y};" for x, y in ((a % 10, b % 10), (a // 10, b // 10)))
    return f"{a:02d}+{b:02d}={units + tens if steps else ''}{a + b}\n"


def _encode(lines: list[str]) -> Tensor:
    rows = [[ALPHABET.index(c) for c in line] for line in lines]
    longest = max(map(len, rows))
    return torch.tensor([row + [END] * (longest - len(row)) for row in rows])


def _reward(a: int, b: int, tokens: list[int]) -> float:
    text = "".join(ALPHABET[token] for token in tokens)
    answer, newline, _ = text.partition("\n")
    said, right = answer.rpartition(";")[2] if newline else "", str(a + b)
    return sum(x == y for x, y in zip(said, right, strict=False)) / max(len(said), len(right))


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _copy(model: LanguageModel) -> LanguageModel:
    twin = LanguageModel()
    twin.load_state_dict(model.state_dict())
    return twin.requires_grad_(False)


def draw(trained: Trained, *, prompts: int = 1024, seed: int = 1) -> dict[str, Any]:
    """Completions of each setting's sampler, scored, and the low-noise gradient of the reverse KL of each prompt."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {}
    for setting in SETTINGS:
        sampler = trained.policy if setting == "on_policy" else trained.stale
        asked = [each for each in _numbers(prompts, generator) for _ in range(GROUP)]
        prompt = _encode([f"{a:02d}+{b:02d}=" for a, b in asked])
        tokens = sampler.sample(prompt, generator)
        text = torch.cat([prompt, tokens[:, :-1]], dim=1)
        (logits, hidden), (ref_logits, _), (old_logits, _) = (
            tuple(x[:, PROMPT - 1 :].double() for x in model(text))
            for model in (trained.policy, trained.reference, sampler)
        )
        logp, ref_logp, old_logp = (
            x.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] for x in (logits, ref_logits, old_logits)
        )
        mask = mask_of(tokens)
        scored = Scored(
            logp=logp,
            ref_logp=ref_logp,
            mask=mask,
            old_logp=old_logp,
            group_size=GROUP,
            tokens=tokens,
            logits=logits,
            ref_logits=ref_logits,
        )
        found[setting] = {"scored": scored, "hidden": hidden}
        if setting == "on_policy":
            found["truth"] = _head_gradients(_low_noise(scored), hidden)
            kl = ((logp - ref_logp) * mask).sum(-1)
            found["about"] = {
                "sequence_kl": float(kl.mean()),
                "tokens": float(mask.sum(-1).double().mean()),
                "reward": sum(_reward(a, b, row) for (a, b), row in zip(asked, tokens.tolist(), strict=True))
                / len(asked),
                "parameters": sum(p.numel() for p in trained.policy.parameters()),
            }
    return found


def _low_noise(scored: Scored) -> Tensor:
    """(B, T, V) of the sequence reverse KL: within a step exact, later ones less their mean over the group's others.

    Amini et al., arXiv 2504.10637; Tang and Munos, arXiv 2506.09477.
    """
    assert scored.logits is not None
    assert scored.ref_logits is not None
    assert scored.tokens is not None
    logp, ref_logp = scored.logits.log_softmax(-1), scored.ref_logits.log_softmax(-1)
    p, u = logp.exp(), logp - ref_logp
    kl = (p * u).sum(-1) * scored.mask
    later = assign_credit(kl, "to_go") - kl
    groups = later.view(-1, scored.group_size, later.size(-1))
    others = (groups.sum(1, keepdim=True) - groups) / (scored.group_size - 1)
    score = torch.zeros_like(p).scatter_(-1, scored.tokens[..., None], 1.0) - p
    found = p * (u - (p * u).sum(-1, keepdim=True)) + (groups - others).view_as(later)[..., None] * score
    return found * scored.mask[..., None]


def _head_gradients(logit_gradient: Tensor, hidden: Tensor) -> Tensor:
    """(prompts, V * H): the gradient of the head's weights, averaged over each prompt's completions."""
    rows = torch.einsum("btv,bth->bvh", logit_gradient, hidden)
    return rows.view(-1, GROUP, rows.size(1) * rows.size(2)).mean(1)


def save(drawn: dict[str, Any], path: Path) -> None:
    """Write what `draw` found to `path`, where the processes that measure read it."""
    torch.save(drawn, path)


def load(path: Path) -> dict[str, Any]:
    """Completions and gradients of each task, read back from the file that `save` wrote."""
    found: dict[str, Any] = torch.load(path, weights_only=False)
    return found


def statistics(subject: Subject, drawn: dict[str, Any], *, samples: int) -> dict[str, Any]:
    """Per setting: relative bias and mean squared error at `samples`, against the sequence reverse KL's gradient.

    Each with its leave-one-block-out values, of which intervals are made (`jackknife`).
    """
    found = {}
    for setting in SETTINGS:
        scored, hidden = drawn[setting]["scored"], drawn[setting]["hidden"]
        part = subject.logit_gradient(scored).double()
        own = _head_gradients(torch.where(scored.mask[..., None], part, 0.0), hidden)
        values = _errors(own, drawn["truth"], groups=samples // GROUP, paired=setting == "on_policy")
        found[setting] = {"bias": values[0], "mse": values[1]}
    return found


def _errors(own: Tensor, truth: Tensor, *, groups: int, paired: bool) -> tuple[list[float], list[float]]:
    """Relative bias (signed as its square's estimate) and mean squared error, whole and with each block left out.

    Args:
        own: (N, K) gradients, one per prompt.
        truth: (N, K), of the same completions if `paired`.
        groups: Prompts in the batch that the error is of.
    """
    size = len(own) // BLOCKS * BLOCKS
    own, truth = own[:size], truth[:size]
    mine, true, apart = (_blocks(x) for x in (own, truth, own - truth))
    bias, error = [], []
    for left_out in range(-1, BLOCKS):
        _, variance, count = _left(mine, left_out)
        wanted, noise, _ = _left(true, left_out)
        gap, spread, _ = _left(apart, left_out)
        scale = float(wanted.square().sum()) - noise / count
        square = float(gap.square().sum()) - (spread if paired else variance + noise) / count
        bias.append(math.copysign(math.sqrt(abs(square) / scale), square))
        error.append((max(square, 0.0) + variance / groups) / scale)
    return bias, error


def _blocks(rows: Tensor) -> tuple[Tensor, Tensor, int]:
    """Of N rows in blocks: their (BLOCKS, K) sums, (BLOCKS,) sums of squared norms, and the rows of a block."""
    blocks = rows.view(BLOCKS, -1, rows.size(1))
    return blocks.sum(1), blocks.square().sum((1, 2)), blocks.size(1)


def _left(blocks: tuple[Tensor, Tensor, int], left_out: int) -> tuple[Tensor, float, int]:
    """Mean, total variance and number of the rows, without those of one block; -1: of all."""
    keep = torch.arange(BLOCKS) != left_out
    sums, squares, each = blocks
    count = int(keep.sum()) * each
    mean = sums[keep].sum(0) / count
    return mean, float(squares[keep].sum() - count * mean.square().sum()) / (count - 1), count


def jackknife(values: list[float]) -> dict[str, float]:
    """The first of the values with the 95% interval that the others, each with one block left out, make."""
    whole, others = values[0], values[1:]
    mean = sum(others) / len(others)
    spread = math.sqrt((len(others) - 1) / len(others) * sum((x - mean) ** 2 for x in others))
    return {"value": whole, "low": whole - 1.96 * spread, "high": whole + 1.96 * spread}


__all__ = ["draw", "jackknife", "load", "save", "statistics", "train"]
