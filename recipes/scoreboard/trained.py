"""What a framework trains like: each one's default in the same loop, towards an optimum that is known.

The loop is `kl_plugins.conformance.known_optimum.train_all`. A term of the loss is the framework's own function beside
the loop's policy loss; a KL in the reward is taken down to the advantages by the framework's own functions. Rewards
aren't divided by any deviation, so that every beta counts nats against the same rewards.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from kl_plugins.conformance import hosts
from kl_plugins.conformance import known_optimum as known
from kl_plugins.conformance.known_optimum import InReward
from kl_plugins.conformance.subject import Scored
from kl_plugins.core.spec import KLSpec
from kl_plugins.integration.choice import choose


def picked(*, engine: bool = False) -> KLSpec:
    """What `kl="reverse_kl"` is in GRPO, with samples of an older policy or of an `engine` that differs."""
    found = choose("reverse_kl", {}, host="grpo", off_policy=True, in_advantage=not engine)
    return KLSpec.from_name(found.kl, **{name.removeprefix("kl_"): value for name, value in found.options.items()})


PICKED = picked()
BETAS = {"terminal": 0.3, "hackable": 0.3, "dense": 1.0}
LENGTH, SEEDS = 16, 6
REGIMES: dict[str, dict[str, Any]] = {
    "on-policy": {},
    "4 updates a batch": {"iterations": 4, "rate": 0.02},
    "8 updates stale": {"staleness": 8},
    "an engine that differs": {"engine_noise": 0.2},
}


def shares(term: known.Term, *, seeds: int = SEEDS, steps: int = 200) -> dict[str, dict[str, list[float]]]:
    """Problem -> regime -> the share of the attainable that each seed has reached, each on a problem of its own."""
    found: dict[str, dict[str, list[float]]] = {}
    for kind, beta in BETAS.items():
        problems = [known.PROBLEMS[kind](length=LENGTH, beta=beta, seed=seed) for seed in range(seeds)]
        found[kind] = {
            regime: [
                each.share
                for each in known.train_all(
                    picked(engine=True) if term is PICKED and "engine_noise" in options else term,
                    problems,
                    seeds=range(seeds),
                    steps=steps,
                    **options,
                )
            ]
            for regime, options in REGIMES.items()
        }
    return found


def trl() -> list[InReward]:
    """RLOO's KL, which is in the reward."""
    how = "RLOOTrainer._generate_and_score_completions, run on a stub of a trainer"
    return [InReward(name="RLOO (k1, whole sequences)", advantages=hosts.rloo_advantages, origin=how)]


def openrlhf() -> list[InReward]:
    """k1 in the reward, with each estimator that compares the completions of a prompt, none over a deviation."""
    hosts.import_openrlhf()
    maker = import_module("openrlhf.trainer.ppo_utils.experience_maker").RemoteExperienceMaker
    approximate = import_module("openrlhf.models.utils").compute_approx_kl

    def of(estimator: str) -> InReward:
        def advantages(scored: Scored, outcome: Tensor, beta: float) -> Tensor:
            advantage = SimpleNamespace(estimator=estimator, gamma=1.0, no_std_norm=True)
            args = SimpleNamespace(
                algo=SimpleNamespace(advantage=advantage),
                rollout=SimpleNamespace(n_samples_per_prompt=scored.group_size),
                reward=SimpleNamespace(clip_range=None),
            )
            stub = SimpleNamespace(
                strategy=SimpleNamespace(args=args),
                kl_ctl=SimpleNamespace(value=beta),
                advantage_estimator=estimator,
                get_cumulative_returns=lambda *given: maker.get_cumulative_returns(stub, *given),
            )
            experience = SimpleNamespace(
                rewards=outcome.clone(),
                index=list(range(len(outcome))),
                kl=approximate(scored.old_logp, scored.ref_logp, kl_estimator="k1"),
                action_mask=scored.mask.long(),
                info={},
            )
            maker.compute_advantages_and_returns(stub, [experience])
            made: Tensor = experience.advantages
            return made.to(outcome)

        how = "RemoteExperienceMaker.compute_advantages_and_returns, run on a stub of a maker"
        return InReward(name=f"k1 in reward, {estimator}", advantages=advantages, origin=how)

    return [of(estimator) for estimator in ("rloo", "reinforce_baseline", "dr_grpo")]


def verl() -> list[InReward]:
    """k1 in the reward, with the advantages of GRPO."""
    core = import_module("verl.trainer.ppo.core_algos")
    array = import_module("numpy").arange

    def advantages(scored: Scored, outcome: Tensor, beta: float) -> Tensor:
        rewards = -beta * core.kl_penalty(scored.old_logp, scored.ref_logp, "k1")
        rewards[:, -1] += outcome
        groups = array(len(outcome)) // scored.group_size
        made: Tensor = core.compute_grpo_outcome_advantage(
            rewards, scored.mask.to(rewards), groups, norm_adv_by_std_in_grpo=False
        )[0]
        return made

    how = "core_algos.kl_penalty and compute_grpo_outcome_advantage, norm_adv_by_std_in_grpo=False"
    return [InReward(name="k1 in reward, GRPO's advantage", advantages=advantages, origin=how)]


def terms(framework: str, entries: list[hosts.Term]) -> list[tuple[str, known.Term]]:
    """What of a framework is trained: its defaults in the loss, and its KL in the reward down to the advantages."""
    if framework == "kl_plugins":
        return [("reverse_kl", PICKED)]
    in_reward = {"TRL": trl, "OpenRLHF": openrlhf, "verl": verl}.get(framework, list)()
    in_loss = [entry.subject for entry in entries if entry.default and entry.where == "loss"]
    return [(each.name, each) for each in (*in_loss, *in_reward)]


__all__ = ["BETAS", "PICKED", "REGIMES", "shares", "terms"]
