"""The rules about our options that several hosts share; `rules_trl` and `rules_openrlhf` add each host's own.

The configs refuse by them, before a model is loaded, and `kl-plugins explain` says by them what would be refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

from kl_plugins.core.registry import REVERSE_KL
from kl_plugins.core.spec import KLSpec
from kl_plugins.errors import ConfigError
from kl_plugins.integration.choice import PICKED
from kl_plugins.integration.options import (
    CONTROLLER_OPTIONS,
    LEAVE_OUT_OPTIONS,
    UNUSED_IN_REWARD,
    KLOptions,
    PlacementOptions,
    ReferenceOptions,
)
from kl_plugins.integration.problem import Problem, with_remedies

PLACEMENTS = ("auto", "loss", "reward")


def unnamed_problems(options: KLOptions) -> Iterator[Problem]:
    """What is wrong without a `kl`: options of ours that were changed, here and from the defaults of the class."""
    defaults = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(options)}
    changed = [name for name in options.changed_kl_options() if getattr(options, name) != defaults[name]]
    if changed:
        yield Problem(
            f"{', '.join(changed)} set, but kl is None: name a configuration with kl=...", dict.fromkeys(changed)
        )


def spec_problems(options: Any, *flags: Any, discount: str = "") -> Iterator[Problem]:
    """What `options.kl_spec(*flags)` refuses, then what is wrong with `kl_leave_out` before there is a tokenizer.

    `discount` is the name of the host's own discount, if the KL is in the reward and so discounted with it.
    """

    def messages(options: Any) -> Sequence[str]:
        try:
            options.kl_spec(*flags)
        except ConfigError as error:
            return error.args
        return ()

    changed = [name for name in options.changed_kl_options() if name in SPEC_OPTIONS]
    changes = [*({name: None} for name in changed), dict.fromkeys(changed)]
    otherwise = {discount: 1.0} if discount and options.kl_loss.name == PICKED else {"kl": REVERSE_KL}
    for problem in with_remedies(options, messages, changes):
        yield problem if problem.change else replace(problem, change=otherwise)
    if not messages(options):
        yield from left_out_problems(options, options.kl_spec(*flags))


def left_out_problems(options: KLOptions, spec: KLSpec | None) -> Iterator[Problem]:
    """What is wrong with `kl_leave_out`, before there is a tokenizer."""
    if spec is None or spec.can_leave_tokens_out or not set(options.kl_leave_out) - {"first"}:
        return
    asked = f"kl_leave_out={options.kl_leave_out} with {spec.name} and credit {spec.credit!r}: "
    if spec.loss.exact:
        yield Problem(
            asked + "an exact KL sums over all tokens, so that no kind of them can be left out; use 'first', "
            "kl_leave_out_equal_rewards, or kl='k1_in_reward' or 'k2_as_loss'",
            {"kl_leave_out": None},
        )
    else:
        yield Problem(
            asked + "what a left-out token costs those before it is known for k1 only; use kl_credit='token' or "
            "kl='k1_in_reward'",
            {"kl_leave_out": None},
        )


def beta_problems(options: KLOptions, name: str, beta: float, *, suggested: float) -> Iterator[Problem]:
    """What is wrong with the coefficient, the host's option `name`, or with the controller that starts at it."""
    if not 0 < beta < math.inf:
        yield Problem(
            f"kl={options.kl!r} with {name}={beta:g}: set a positive finite {name}, or kl=None", {name: suggested}
        )
    else:
        yield from controller_problems(options, beta)


def controller_problems(options: KLOptions, beta: float) -> Iterator[Problem]:
    """What is wrong with the controller of a coefficient that starts at `beta`."""

    def messages(options: KLOptions) -> Sequence[str]:
        try:
            options.controller(float(beta))
        except ConfigError as error:
            return error.args
        return ()

    changed = [name for name in options.changed_kl_options() if name in CONTROLLER_OPTIONS]
    yield from with_remedies(options, messages, [*({name: None} for name in changed), dict.fromkeys(changed)])


def distribution_problems(options: KLOptions, host: str) -> Iterator[Problem]:
    """What is wrong with an exact KL in a `host` that hands out no full next-token distributions."""
    loss = options.kl_loss
    if loss.exact:
        instead = "k3_as_loss" if loss.exact == "forward_kl" else REVERSE_KL
        yield Problem(
            f"{loss.name} needs the full next-token distributions of both models, but {host} only gives the "
            f"log-probs of the sampled tokens: use {instead}, or TRL's GRPOTrainer or RLOOTrainer",
            {"kl": instead},
        )


def placement_problems(
    options: PlacementOptions, *, host: str, applies: str, credits: Sequence[str] = ("to_go",)
) -> Iterator[Problem]:
    """What is wrong with the place of the term in `host`, of whose own things `applies` to a KL in the reward.

    `credits` are those that the host's returns can give it there.
    """
    if options.kl_placement not in PLACEMENTS:
        yield Problem(
            f"kl_placement={options.kl_placement!r}: choose from {', '.join(PLACEMENTS)}", {"kl_placement": None}
        )
        return
    if not options.kl_in_reward:
        if options.kl_clip == "combined":
            yield Problem(
                "kl_clip='combined' puts the KL into the advantage: use kl_placement='reward' instead",
                {"kl_clip": None},
            )
        return
    if not options.kl_loss.in_reward:
        yield Problem(
            f"{options.kl} is a term of the loss: leave kl_placement out, or use kl={REVERSE_KL!r}",
            {"kl_placement": None},
        )
    if options.kl_credit not in (None, *credits):
        yield Problem(
            f"kl_credit={options.kl_credit!r}: {host} sums rewards from a token on, which gives them credit "
            f"{' or '.join(map(repr, credits))}; use kl_placement='loss' for others",
            {"kl_placement": "loss"},
        )
    for name in options.changed_kl_options():
        if name in UNUSED_IN_REWARD:
            yield Problem(
                f"{name}={getattr(options, name)!r} is not used in the reward, where {applies} apply to the KL: leave "
                "it out, or use kl_placement='loss'",
                {name: None},
            )
        elif name in LEAVE_OUT_OPTIONS:
            yield Problem(
                f"{name}={getattr(options, name)!r}: in the reward {host}'s returns would charge a left-out token "
                "with what only those before it owe; use kl_placement='loss'",
                {"kl_placement": "loss"},
            )


def reference_problems(options: ReferenceOptions) -> Iterator[Problem]:
    """What is wrong with the reference that was asked for, before there is a model."""
    every: Any = options.kl_reference_every
    decay: Any = options.kl_reference_decay
    reference: Any = options.kl_reference
    if reference is not None and not isinstance(reference, str):
        yield Problem(
            f"kl_reference={reference!r}: a path, a hub id, 'base' or 'adapter:NAME' was expected",
            {"kl_reference": None},
        )
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        yield Problem(
            f"kl_reference_every={every!r}: a number of optimizer steps, at least 1", {"kl_reference_every": None}
        )
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
        yield Problem(
            f"kl_reference_decay={decay!r}: what remains of the reference at an update is in [0, 1)",
            {"kl_reference_decay": None},
        )
    elif decay and every is None:
        yield Problem(
            f"kl_reference_decay={decay} moves nothing by itself: set kl_reference_every, 1 for all steps",
            {"kl_reference_decay": None},
        )
    if reference == "adapter:ref":
        yield Problem(
            "kl_reference='adapter:ref', TRL's name for its own: save that adapter under another name",
            {"kl_reference": None},
        )
    if every is not None and reference == "base":
        yield Problem(
            "kl_reference='base' with kl_reference_every: the base model is no adapter to move; leave one out",
            {"kl_reference_every": None},
        )


SPEC_OPTIONS = {f.name for f in fields(KLOptions)} - {*CONTROLLER_OPTIONS, *LEAVE_OUT_OPTIONS, "kl"}
