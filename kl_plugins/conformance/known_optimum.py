"""Training towards a known optimum: the share of the attainable E[R] - beta KL that a KL term reaches.

The reference is a Markov chain, the policy a table of logits, the reward a sum over steps that is handed out as an
outcome, one number a completion, as GRPO and RLOO do. Samples are the only noise: gradients follow from them in closed
form, and what the policy is worth is computed by backward recursion, at any length. So is the best policy, of which
`Trained.share` says how much was reached with the samples that were spent.

    problem = terminal(length=16, beta=0.3, seed=0)
    train(KLSpec.from_name("k2_as_loss"), problem, seed=0).share
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kl_plugins.conformance.subject import Scored, Subject, from_spec, terms_of
from kl_plugins.core.reward_scale import EPSILON, reward_scale
from kl_plugins.core.spec import KLSpec
from kl_plugins.errors import ConfigError

VOCABULARY = 6
ENGINE_CAP = 2.0
"""Largest weight of the policy gradient for what another engine drew: truncated importance sampling."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Completions of T tokens from a vocabulary of V; the first one follows token 0. float64 throughout."""

    name: str
    reference: Tensor
    """(T, V, V) log-probs, in nats, of each next token at each step, after each token."""
    reward: Tensor
    """(T, V, V): what that token pays. A completion's reward is the sum."""
    beta: float
    """Reward per nat of KL(policy || reference) of whole completions."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run came to. All but the gradient is exact: of the policy, not of samples."""

    reward: float
    """E[R] of the trained policy."""
    kl: float
    """KL(policy || reference) of whole completions, in nats."""
    share: float
    """Of the attainable E[R] - beta KL: 0 is the reference, 1 the optimum."""
    largest_gradient: float
    """Largest norm of an update's gradient."""
    hacks: float
    """Probability that the policy's first token is 0, which `hackable` pays for."""
    policy: Tensor = field(compare=False, repr=False)
    """(T, V, V) logits."""


@dataclass(frozen=True, kw_only=True)
class InReward:
    """A framework's whole treatment of a KL in the reward, down to the advantages, by its own functions."""

    name: str
    advantages: Callable[[Scored, Tensor, float], Tensor]
    """`advantages(scored, outcome, beta)`: (B, T) of a rollout, where `scored.logp` is the old policy's and `outcome`
    (B,) what each completion earned."""
    origin: str = ""
    """Which functions are run, for reports."""


def terminal(*, length: int, beta: float, seed: int) -> Problem:
    """The last token pays: 1 if it is the last of the vocabulary."""
    reference = _reference(length, seed)[0]
    reward = torch.zeros_like(reference)
    reward[-1, :, -1] = 1.0
    return Problem(name="terminal", reference=reference, reward=reward, beta=beta)


def dense(*, length: int, beta: float, seed: int) -> Problem:
    """Every pair of neighbouring tokens pays its own random amount."""
    reference, generator = _reference(length, seed)
    amount = torch.randn(VOCABULARY, VOCABULARY, dtype=torch.float64, generator=generator) * 1.5 / length**0.5
    return Problem(name="dense", reference=reference, reward=amount.expand_as(reference).clone(), beta=beta)


def hackable(*, length: int, beta: float, seed: int, rare: float = 3e-3, pays: float = 1.0) -> Problem:
    """`terminal`, where a completion that starts with token 0 earns `pays` on top.

    The reference starts one so with probability `rare`: the optimum does it now and then, a policy that is held by too
    weak a KL always.
    """
    base = terminal(length=length, beta=beta, seed=seed)
    reference, reward = base.reference.clone(), base.reward.clone()
    first = reference[0, 0].exp()
    first[0] = 0.0
    first *= (1 - rare) / first.sum()
    first[0] = rare
    reference[0, 0] = first.log()
    reward[0, 0, 0] += pays
    return Problem(name="hackable", reference=reference, reward=reward, beta=beta)


def _reference(length: int, seed: int) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(VOCABULARY, VOCABULARY, dtype=torch.float64, generator=generator).log_softmax(-1)
    return table.expand(length, VOCABULARY, VOCABULARY).clone(), generator


PROBLEMS: dict[str, Callable[..., Problem]] = {"terminal": terminal, "dense": dense, "hackable": hackable}


def optimum(problem: Problem) -> tuple[Tensor, float]:
    """The policy with the largest E[R] - beta KL, (T, V, V) log-probs, and that value.

    value(s) = beta log sum_v ref(v|s) exp((r(s, v) + value(v)) / beta), backwards from the end.
    """
    value, steps = torch.zeros_like(problem.reference[0, 0]), []
    for reference, reward in zip(reversed(problem.reference), reversed(problem.reward), strict=True):
        tilted = reference + (reward + value) / problem.beta
        steps.append(tilted.log_softmax(-1))
        value = problem.beta * tilted.logsumexp(-1)
    return torch.stack(steps[::-1]), value[0].item()


def reward_and_kl(logits: Tensor, problem: Problem) -> tuple[float, float]:
    """E[R] and the KL to the reference, in nats, of the policy with these (T, V, V) logits; exact."""
    reward, kl = worth(logits, problem)
    return reward.item(), kl.item()


def worth(logits: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """`reward_and_kl` as () tensors that can be differentiated."""
    logp = logits.log_softmax(-1)
    probability = logp.exp()
    reward = kl = torch.zeros_like(logp[0, 0])
    for t in reversed(range(len(logp))):
        reward = (probability[t] * (problem.reward[t] + reward)).sum(-1)
        kl = (probability[t] * (logp[t] - problem.reference[t] + kl)).sum(-1)
    return reward[0], kl[0]


def share(logits: Tensor, problem: Problem) -> float:
    """Of the attainable E[R] - beta KL, by the policy with these (T, V, V) logits: 0 the reference, 1 the optimum."""
    (reward, kl), (start, _) = reward_and_kl(logits, problem), reward_and_kl(problem.reference, problem)
    return (reward - problem.beta * kl - start) / (optimum(problem)[1] - start)


Term = KLSpec | Subject | InReward | None


def train(term: Term, problem: Problem, *, seed: int = 0, **options: Any) -> Trained:
    """One run of `train_all`, whose options it takes."""
    return train_all(term, [problem], seeds=[seed], **options)[0]


def train_all(
    term: Term,
    problems: Sequence[Problem],
    *,
    seeds: Sequence[int],
    steps: int = 200,
    batch: int = 64,
    group_size: int = 8,
    baseline: str = "group_mean",
    scale: str = "none",
    kl_scale: str = "none",
    iterations: int = 1,
    staleness: int = 0,
    engine_noise: float = 0.0,
    clip_epsilon: float = 0.2,
    rate: float = 0.05,
    start: Sequence[Tensor] | None = None,
) -> list[Trained]:
    """Train a table of logits with Adam on E[R] - beta KL, from the reference on, once for each problem and seed.

    Runs side by side, of problems of one shape and one beta, take little longer than one of them. The policy's own
    part is that of GRPO and RLOO: advantages over groups, PPO's ratio and clip, and a truncated weight where a rollout
    engine differs.

    Args:
        term: The KL. None: none. A configuration of ours, with `clip="combined"` inside the advantage; a `Subject`,
            any framework's term beside the policy's loss; an `InReward`, which makes the advantages as well.
        problems: S of them.
        seeds: S of them: of the samples of each run, which don't depend on the other runs.
        steps: Rollouts, of `batch` completions each.
        batch: A multiple of `group_size`.
        group_size: Completions that are compared with each other.
        baseline: Of the rewards: `"group_mean"` (GRPO, with the completion's own) or `"leave_one_out"` (RLOO).
        scale: What rewards are divided by: `"none"`, or `"group"`, the standard deviation of the group's.
        kl_scale: `"reward"`: a KL that isn't `InReward` is divided by the same (`reward_scale`).
        iterations: Updates on each rollout.
        staleness: How many updates the policy that samples lags behind.
        engine_noise: Standard deviation of what the rollout engine's logits are off by, the same all along. Its
            log-probs are known, as vLLM's are.
        clip_epsilon: Half width of PPO's clip range.
        rate: Adam's learning rate.
        start: S (T, V, V) logits to start from instead of the references'.

    Raises:
        ConfigError: a `batch` that isn't a multiple of `group_size`, an unknown `baseline`, `scale` or `kl_scale`, or
            problems that differ in shape or beta.
    """
    _check(problems, batch, group_size, baseline, scale, kl_scale)
    generators = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]
    run = _Run(term, problems, batch, group_size, clip_epsilon)
    logits = (run.reference if start is None else torch.stack(list(start))).log_softmax(-1)
    off = torch.stack(
        [engine_noise * torch.randn(logits[0].shape, dtype=logits.dtype, generator=g) for g in generators]
    )
    optimizer = torch.optim.Adam([logits], lr=rate, betas=(0.9, 0.99))
    past, largest = [logits.clone()], torch.zeros(len(logits), dtype=logits.dtype)
    for _ in range(steps):
        rollout = run.roll_out(past[0], past[0] + off if engine_noise else None, generators)
        deviation = _deviation(rollout.outcome, group_size) if scale == "group" else torch.ones_like(rollout.outcome)
        advantage = run.advantages(rollout, baseline, deviation)
        beta = torch.full_like(rollout.outcome, run.beta)
        if kl_scale == "reward":
            rewards = rollout.outcome.view(len(seeds), -1)
            beta = beta * torch.cat([reward_scale(each, group_size, per="group") for each in rewards])
        for _ in range(iterations):
            logits.grad = run.gradient(logits, rollout, advantage, beta[:, None])
            largest = largest.maximum(logits.grad.flatten(1).norm(dim=1))
            optimizer.step()
            past = [*past, logits.clone()][-(staleness + 1) :]
    return [_judge(*each) for each in zip(problems, logits, largest.tolist(), strict=True)]


def gradients(
    term: Term,
    problem: Problem,
    policy: Tensor,
    *,
    seeds: Sequence[int],
    batch: int = 64,
    group_size: int = 8,
    baseline: str = "leave_one_out",
) -> Tensor:
    """(S, T, V, V) gradients of reward and KL together at a policy, one for each seed: what on-policy training gets.

    Their mean estimates that of -E[R] + beta KL with respect to the (T, V, V) logits `policy`, of which
    `worth` gives the exact value (with `baseline="group_mean"` 1 - 1/G of it); their spread is the noise.
    Other arguments and errors are those of `train_all`.
    """
    problems = [problem] * len(seeds)
    _check(problems, batch, group_size, baseline, "none", "none")
    run = _Run(term, problems, batch, group_size, epsilon=0.2)
    logits = policy.log_softmax(-1).expand(len(seeds), *policy.shape)
    rollout = run.roll_out(logits, None, [torch.Generator().manual_seed(1000 + seed) for seed in seeds])
    advantage = run.advantages(rollout, baseline, torch.ones_like(rollout.outcome))
    return run.gradient(logits, rollout, advantage, torch.full_like(rollout.outcome, run.beta)[:, None])


def _judge(problem: Problem, logits: Tensor, largest: float) -> Trained:
    reward, kl = reward_and_kl(logits, problem)
    hacks = logits[0, 0].softmax(-1)[0].item()
    return Trained(
        reward=reward, kl=kl, share=share(logits, problem), largest_gradient=largest, hacks=hacks, policy=logits
    )


def _check(problems: Sequence[Problem], batch: int, group_size: int, baseline: str, scale: str, kl_scale: str) -> None:
    if len({(each.reference.shape, each.beta) for each in problems}) != 1:
        raise ConfigError(
            "train_all was given problems of several shapes or betas, or none: give them one after another"
        )
    if batch % group_size or group_size < 2:
        raise ConfigError(f"batch={batch} with group_size={group_size}: give whole groups, of at least two")
    for name, value, offered in (
        ("baseline", baseline, ("group_mean", "leave_one_out")),
        ("scale", scale, ("none", "group")),
        ("kl_scale", kl_scale, ("none", "reward")),
    ):
        if value not in offered:
            raise ConfigError(f"{name}={value!r}: choose from {', '.join(map(repr, offered))}")


@dataclass(frozen=True, kw_only=True)
class _Rollout:
    """Completions of S runs, B each, scored by the policy that the trainer takes for the one that drew them."""

    scored: Scored
    """Of N = S * B rows."""
    states: Tensor
    """(N, T): the row of the (S * T * V, V) table that each token was drawn from."""
    cells: Tensor
    """(N, T): the cell of the flat table that the token is."""
    outcome: Tensor
    """(N,) rewards."""


def _deviation(outcome: Tensor, group_size: int) -> Tensor:
    """(N,) standard deviation of each completion's group, with GRPO's small constant."""
    return outcome.view(-1, group_size).std(1).repeat_interleave(group_size) + EPSILON


class _Run:
    """S runs of one term side by side; their tables are (S, T, V, V)."""

    def __init__(self, term: Term, problems: Sequence[Problem], batch: int, group_size: int, epsilon: float):
        self.term, self.beta = term, problems[0].beta
        self.reference = torch.stack([each.reference for each in problems])
        self.reward = torch.stack([each.reward for each in problems])
        self.batch, self.group_size, self.epsilon = batch, group_size, epsilon
        self.inside = term if isinstance(term, KLSpec) and term.clip == "combined" else None
        self.beside = from_spec(term) if isinstance(term, KLSpec) and not self.inside else term

    def roll_out(self, old: Tensor, engine: Tensor | None, generators: Sequence[torch.Generator]) -> _Rollout:
        """Draw from the `engine`, None: from the `old` policy."""
        runs, length, size, _ = old.shape
        below = (old if engine is None else engine).softmax(-1).cumsum(-1)[..., :-1].flatten(0, 2)
        rows = [torch.rand(length, self.batch, dtype=old.dtype, generator=generator) for generator in generators]
        uniform = torch.cat(rows, 1)[..., None]
        first = torch.arange(runs).repeat_interleave(self.batch) * (length * size)
        token, tokens, states = torch.zeros_like(first), [], []
        for t in range(length):
            states.append(first + t * size + token)
            token = (uniform[t] > below[states[-1]]).sum(-1)
            tokens.append(token)
        state, token = torch.stack(states, 1), torch.stack(tokens, 1)
        cells = state * size + token
        old_logp = old.log_softmax(-1).flatten()[cells]
        scored = Scored(
            logp=old_logp,
            ref_logp=self.reference.flatten()[cells],
            mask=torch.ones_like(cells, dtype=torch.bool),
            old_logp=old_logp,
            engine_logp=None if engine is None else engine.log_softmax(-1).flatten()[cells],
            group_size=self.group_size,
            tokens=token,
        )
        return _Rollout(scored=scored, states=state, cells=cells, outcome=self.reward.flatten()[cells].sum(-1))

    def advantages(self, rollout: _Rollout, baseline: str, deviation: Tensor) -> Tensor:
        """(N, T), of the rewards, or of rewards and KL together."""
        if isinstance(self.term, InReward):
            return self.term.advantages(rollout.scored, rollout.outcome, self.beta)
        groups = rollout.outcome.view(-1, self.group_size)
        less = groups - groups.mean(1, keepdim=True)
        if baseline == "leave_one_out":
            less = less * self.group_size / (self.group_size - 1)
        return (less.flatten() / deviation)[:, None].expand_as(rollout.cells)

    def gradient(self, logits: Tensor, rollout: _Rollout, advantage: Tensor, beta: Tensor) -> Tensor:
        """(S, T, V, V), with respect to the logits: of the mean over each run's completions, summed over tokens."""
        table = logits.log_softmax(-1)
        scored = replace(rollout.scored, logp=table.flatten()[rollout.cells])
        if self.inside is not None:
            advantage = advantage - beta * terms_of(self.inside, scored).coefficient  # before any weight
        coefficient = -advantage * _clipped_ratio(scored, advantage, self.epsilon)
        found = torch.zeros_like(logits)
        if isinstance(self.beside, Subject):
            if self.beside.gradient is None:
                assert self.beside.coefficient is not None
                coefficient = coefficient + beta * self.beside.coefficient(scored)
            else:
                rows, ref_rows = (x.flatten(0, 2)[rollout.states] for x in (table, self.reference))
                kl = beta[..., None] * self.beside.gradient(replace(scored, logits=rows, ref_logits=ref_rows))
                found.view(-1, logits.size(-1)).index_add_(0, rollout.states.flatten(), kl.flatten(0, 1))
        taken = torch.zeros_like(logits)
        taken.view(-1).index_add_(0, rollout.cells.flatten(), coefficient.flatten())
        found += taken - table.exp() * taken.sum(-1, keepdim=True)
        return found / self.batch


def _clipped_ratio(scored: Scored, advantage: Tensor, epsilon: float) -> Tensor:
    """(N, T): PPO's ratio, 0 where its clipped objective has no gradient, times the engine's truncated weight."""
    ratio = (scored.logp - scored.old_logp).exp()
    clipped = ((advantage > 0) & (ratio > 1 + epsilon)) | ((advantage < 0) & (ratio < 1 - epsilon))
    ratio = ratio.masked_fill(clipped, 0.0)
    if scored.engine_logp is None:
        return ratio
    return ratio * (scored.old_logp - scored.engine_logp).exp().clamp(max=ENGINE_CAP)


__all__ = [
    "PROBLEMS",
    "InReward",
    "Problem",
    "Trained",
    "dense",
    "gradients",
    "hackable",
    "optimum",
    "reward_and_kl",
    "share",
    "terminal",
    "train",
    "train_all",
    "worth",
]
