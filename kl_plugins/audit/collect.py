"""The measurement: prompt by prompt, completions are drawn, scored and turned into gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from kl_plugins.audit.configurations import Coefficients, Configuration, Tokens, reward_configuration
from kl_plugins.audit.data import Prompt, Rollouts
from kl_plugins.audit.gradients import (
    ScoredCompletions,
    TermGradients,
    target_gradients,
    term_gradients,
    whole_gradients,
)
from kl_plugins.audit.objective import Objective
from kl_plugins.audit.sketch import Sketch
from kl_plugins.audit.statistics import Resampled, target_statistics, term_statistics
from kl_plugins.core.estimators import k1, k2, k3

# A coefficient of 0 is a dead one if the log-ratio (nats) is further from 0 than float32's rounding.
DEAD_BEYOND = 1e-6
# Policy and reference are the same if no log-ratio (nats) is larger: rounding of logits that are themselves some 10.
SAME_WITHIN = 1e-5


class Model(Protocol):
    """What the audit asks of a policy and its reference; `kl_plugins.audit.model.Pair` is the real one."""

    @property
    def vocabulary(self) -> int:
        """The number of logits, V."""

    @property
    def hidden(self) -> int:
        """The width of what the head turns into logits, H."""

    def prompt_ids(self, prompt: Any) -> list[int]:
        """Token ids of a prompt, which may be a text, a chat's messages or ids already."""

    def sample(self, prompt: list[int], count: int, *, max_new_tokens: int) -> list[list[int]]:
        """Token ids of `count` completions drawn from the policy."""

    def score(
        self,
        prompt: list[int],
        completions: Sequence[list[int]],
        behavior_logp: Sequence[list[float]] | None = None,
        *,
        batch: int,
    ) -> Iterator[ScoredCompletions]:
        """The completions as micro-batches of at most `batch` rows, scored by policy and reference."""


@dataclass
class TokenCounts:
    """Counts of one configuration, summed over the sampled tokens."""

    tokens: int = 0
    dead: int = 0
    """Tokens whose gradient is exactly 0 although their log-ratio isn't."""
    nonfinite: int = 0
    """Tokens whose coefficient is NaN or inf; it is taken for 0."""
    cut: int = 0
    """Tokens whose importance weight was truncated."""
    unseen: list[float] = field(default_factory=lambda: [0.0] * 4)
    """Expected |coefficient|, its part on tokens so rare that the audit would draw less than one of them, and the
    same of their probability."""
    weights: list[Tensor] = field(default_factory=list)
    """Flat importance weights; empty where the term has none of its own."""

    def add(self, found: Coefficients, tokens: Tokens, unseen: Sequence[float]) -> None:
        """Add a micro-batch to the counts."""
        self.unseen = [a + b for a, b in zip(self.unseen, unseen, strict=True)]
        mask, score = tokens.mask, found.score
        apart = (tokens.logp - tokens.ref_logp).abs() > DEAD_BEYOND
        self.tokens += int(mask.sum())
        self.dead += int((mask & apart & (score == 0) & (found.local == 0)).sum())
        self.nonfinite += int((mask & ~score.isfinite()).sum())
        if found.weight is not None:
            self.weights.append(found.weight[mask].double().cpu())
        if found.cut is not None:
            self.cut += int((found.cut & mask).sum())

    def shares(self) -> dict[str, Any]:
        """The counts as shares of the tokens, and the effective sample size and the tail of the weights."""
        tokens = max(self.tokens, 1)
        size, rare_size, probability, rare = self.unseen
        unseen = None
        if size:  # how much more of it is there than draws are
            beyond = rare_size / size - rare / probability
            unseen = max(0.0, beyond) / (1 - rare / probability) if rare < probability else 0.0
        shares = {"dead": self.dead / tokens, "nonfinite": self.nonfinite, "unseen": unseen, "weights": None}
        if not self.weights:
            return shares
        weights = torch.cat(self.weights)
        total, squares = float(weights.sum()), float(weights.square().sum())
        top = float(weights.topk(max(1, len(weights) // 100)).values.sum())
        return shares | {
            "weights": {
                "ess": total**2 / squares / len(weights) if squares else 0.0,
                "max": float(weights.max()),
                "top_percent": top / total if total else 0.0,
                "cut": self.cut / tokens,
            }
        }


class Collected:
    """The gradients and counts of all prompts that were measured so far."""

    def __init__(
        self,
        configurations: Sequence[Configuration],
        *,
        asked: int,
        resamples: int,
        seed: int,
        objective: Objective | None = None,
    ) -> None:
        self.configurations = [c for c in configurations if c.pointwise is not None]
        """Those that have a gradient of one completion; the others are judged in the whole gradient only."""
        self.all_configurations = [*self.configurations, *(c for c in configurations if c.pointwise is None)]
        self.objective = objective
        """What the whole gradient is that of; None: there are no rewards."""
        self.asked = asked
        """Prompts that were to be measured."""
        self.counts = [TokenCounts() for _ in self.configurations]
        self.sampled = Resampled(resamples=resamples, seed=seed)
        """The configurations' gradients as training gets them, for their variance."""
        self.expected = Resampled(resamples=resamples, seed=seed + 1)
        """The configurations' gradients, the noise within a step averaged out where that can be, for their mean."""
        self.targets = Resampled(resamples=resamples, seed=seed + 2)
        """The gradients of `TARGETS`, from other completions."""
        self.whole = Resampled(resamples=resamples, seed=seed + 3, prompts_vary=True)
        """The whole gradients of groups: of the reward alone, then with each of `all_configurations`."""
        self.sums: dict[str, float] = {}
        """Over the tokens audited: `tokens`, `completions`, `k1`, `k2`, `k3`, `exact_kl`; `lowest` and `highest`
        log-ratio."""
        self.forward_tokens = 0
        """Tokens through a forward pass of both models, prompts included."""
        self.seconds = 0.0

    @property
    def prompts(self) -> int:
        """Prompts that were measured."""
        return self.targets.prompts

    @property
    def complete(self) -> bool:
        """Whether every prompt that was asked for was measured."""
        return self.prompts == self.asked

    @property
    def policy_is_reference(self) -> bool:
        """Whether no sampled token's log-ratio is further from 0 than rounding."""
        return max(abs(self.sums["lowest"]), abs(self.sums["highest"])) <= SAME_WITHIN

    def statistics(self, *, batch: int = 64) -> dict[str, Any]:
        """`targets` and `rows`, as plain data; `batch`: completions that the mean squared error is stated for."""
        mean, variance = self.expected.mean, self.sampled.variance
        rows = []
        for index, (configuration, counts) in enumerate(zip(self.configurations, self.counts, strict=True)):
            row = {name: getattr(configuration, name) for name in ("label", "name", "credit", "off_policy", "origin")}
            row |= {"gradient_of": configuration.gradient_of, "refused": configuration.refused}
            found = term_statistics(
                mean[:, index],
                variance[:, index],
                self.targets,
                gradient_of=configuration.gradient_of,
                batch=batch,
            )
            rows.append(row | found | counts.shares())
        return {"targets": target_statistics(self.targets), "rows": rows}


def collect(
    model: Model,
    units: Sequence[Prompt | Rollouts],
    configurations: Sequence[Configuration],
    *,
    completions: int,
    target_completions: int,
    max_new_tokens: int,
    batch: int,
    sketch: Sketch,
    objective: Objective | None = None,
    rewards: Callable[[Rollouts], list[float]] | None = None,
    resamples: int = 200,
    seed: int = 0,
    done: Callable[[int], None] = lambda prompts: None,
) -> Collected:
    """Measure prompt by prompt; an interruption (Ctrl-C) leaves those that were finished.

    Args:
        units: `Rollouts` to audit, or prompts, for which `completions` are drawn from the policy.
        configurations: Those without `pointwise` need an `objective`.
        target_completions: Drawn from the policy besides, per prompt, for the targets.
        batch: Completions in a forward pass. Memory: about 50 bytes times these, their tokens and the vocabulary.
        objective: Of what the whole gradients are judged as well; each prompt's completions must be two of its groups
            or more, and what is over is left out.
        rewards: Those of the completions; needed by `objective`.
        resamples: For the intervals; memory: resamples x configurations x size of the sketch x 4 bytes, twice that
            with an objective.
        seed: Of the resampling.
        done: Told how many prompts are finished.

    Raises `ValueError` for log-probs that aren't finite, and what `model` raises.
    """
    found = Collected(configurations, asked=len(units), resamples=resamples, seed=seed, objective=objective)
    started = time.perf_counter()
    try:
        for index, unit in enumerate(units):
            prompt = model.prompt_ids(unit.prompt)
            count = target_completions + (completions if isinstance(unit, Prompt) else 0)
            drawn = model.sample(prompt, count, max_new_tokens=max_new_tokens)
            rollouts = unit if isinstance(unit, Rollouts) else unit.drawn(drawn[target_completions:])
            if objective is not None and rewards is not None:
                rollouts = rollouts.first(len(rollouts.completions) // objective.group_size * objective.group_size)
                rollouts = replace(rollouts, rewards=rewards(rollouts))
            _measure(found, model, prompt, rollouts, drawn[:target_completions], batch, sketch, index)
            done(index + 1)
    except KeyboardInterrupt:
        pass
    found.seconds = time.perf_counter() - started
    return found


def _measure(
    found: Collected,
    model: Model,
    prompt: list[int],
    rollouts: Rollouts,
    target: list[list[int]],
    batch: int,
    sketch: Sketch,
    index: int,
) -> None:
    """Measure one prompt. Nothing is added to `found` unless all of it was measured."""
    found_here: list[TermGradients] = []
    total = found.asked * sum(map(len, rollouts.completions))  # about as many tokens as will be audited
    judged, rewards, size = list(found.all_configurations), None, None
    if found.objective is not None:
        judged.append(reward_configuration(found.objective))
        rewards = torch.tensor(rollouts.rewards, dtype=torch.float64)
        size = found.objective.group_size
        batch = max(batch // size, 1) * size
    done = 0
    try:
        targets = [target_gradients(scored, sketch).cpu() for scored in model.score(prompt, target, batch=batch)]
        for scored in model.score(prompt, rollouts.completions, rollouts.behavior_logp, batch=batch):
            if rollouts.by_engine:
                scored = replace(scored, host_behavior_logp=None)
            here = None if rewards is None else rewards[done : done + len(scored.tokens)].to(scored.logits.device)
            done += len(scored.tokens)
            found_here.append(term_gradients(judged, scored, sketch, rare=1 / total, rewards=here, group_size=size))
    except ValueError as error:
        raise ValueError(f"prompt {index + 1}: {error}") from error
    sampled = torch.cat([gradients.sampled.cpu() for gradients in found_here], dim=1)
    count = len(found.configurations)
    more = (
        found.sampled.plus(sampled[:count]),
        found.expected.plus(torch.cat([gradients.expected[:count].cpu() for gradients in found_here], dim=1)),
        found.targets.plus(torch.cat(targets, dim=1)),
        found.whole.plus(_whole(found, sampled)) if found.objective else found.whole,
    )
    # At once: an interruption must not split a prompt.
    found.sampled, found.expected, found.targets, found.whole = more
    for gradients in found_here:
        of_one = (found.counts, gradients.coefficients[:count], gradients.unseen[:count].tolist())
        for counts, one, unseen in zip(*of_one, strict=True):
            counts.add(one, gradients.tokens, unseen)
        _add_tokens(found.sums, gradients.tokens)
    found.forward_tokens += sum(len(prompt) + len(ids) for ids in (*target, *rollouts.completions))


def _whole(found: Collected, sampled: Tensor) -> Tensor:
    assert found.objective is not None
    shrinks = [c.shrink(found.objective.group_size) for c in found.all_configurations]
    return whole_gradients(sampled, shrinks, found.objective)


def _add_tokens(sums: dict[str, float], tokens: Tokens) -> None:
    mask = tokens.mask
    u = (tokens.logp - tokens.ref_logp)[mask].double()
    added = {
        "tokens": float(len(u)),
        "completions": float(len(mask)),
        "exact_kl": float(tokens.kl[mask].double().sum()),
    }
    added |= {name: float(k(u).sum()) for name, k in {"k1": k1, "k2": k2, "k3": k3}.items()}
    for name, value in added.items():
        sums[name] = sums.get(name, 0.0) + value
    sums["lowest"] = min(sums.get("lowest", float("inf")), float(u.min()))
    sums["highest"] = max(sums.get("highest", float("-inf")), float(u.max()))


__all__ = ["Collected", "Model", "TokenCounts", "collect"]
