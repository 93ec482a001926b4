"""What `kl_terms` checks before it computes: shapes, masks, finite log-probs, and which tokens are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kl_plugins.core.exact import ExactKL
from kl_plugins.core.spec import KLSpec
from kl_plugins.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Counted tokens whose own KL is left out, both (B, T) bool."""

    any: Tensor
    """Every token whose own KL is left out."""
    by_token: Tensor
    """Those that are left out because of which token they are, where another one would have had a cost."""

    def among(self, counted: Tensor) -> LeftOut:
        """Those of them that are `counted`, (B, T) bool."""
        return LeftOut(any=self.any & counted, by_token=self.by_token & counted)

    def without_reference(self, credit: str | None) -> Tensor:
        """(B, T) bool. Where the reference's log-prob is in no term, so that it need not be finite."""
        return self.any if credit == "token" else self.any & ~self.by_token


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The arguments of `kl_terms`, checked. All are (B, T); log-probs in float32 at least, in nats."""

    logp: Tensor
    """The current policy's, with its graph. 0 where a token doesn't count, as the next two."""
    ref_logp: Tensor
    """The reference's, detached; equal to `logp` at a left-out token that it could not score."""
    behavior_logp: Tensor
    """The sampling policy's, detached; `logp` if there was none. NaN where it wasn't scored."""
    counted: Tensor
    """bool. `mask` less what was dropped."""
    dropped: Tensor
    """bool. Counted tokens that `nonfinite="drop"` dropped."""
    left_out: LeftOut
    """Which counted tokens have no KL of their own."""


def checked(
    spec: KLSpec,
    *,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    behavior_logp: Tensor | None = None,
    left_out_tokens: Tensor | None = None,
    left_out_positions: Tensor | None = None,
    exact: ExactKL | None = None,
) -> Inputs:
    """The arguments of `kl_terms`, which documents them, in full precision and with 0 wherever nothing counts.

    A gradient that goes back into half-precision `logp` is bounded at the largest number of that precision.

    Raises:
        ValueError: shapes that differ, masks that aren't 0/1, or (unless `spec.nonfinite="drop"`) a counted token
            with a log-prob that isn't finite; NaN in `behavior_logp` means "not scored" and is no error.
        ConfigError: `exact` and `left_out_tokens` that don't fit the configuration.
    """
    _check_exact(spec, exact)
    behavior_logp = logp.detach() if behavior_logp is None else behavior_logp.detach()
    more = {} if exact is None else {"exact_kl": exact.value.detach()}
    check_shapes({"logp": logp, "ref_logp": ref_logp, "mask": mask, "behavior_logp": behavior_logp, **more})
    dtype = torch.promote_types(logp.dtype, torch.float32)
    narrow = torch.finfo(logp.dtype).max
    logp, ref_logp, behavior_logp = (x.to(dtype) for x in (logp, ref_logp.detach(), behavior_logp))
    if logp.requires_grad and narrow < torch.finfo(dtype).max:  # the gradient is cast back, and must not become inf
        logp.register_hook(lambda gradient: gradient.clamp(-narrow, narrow))
    counted = mask.bool()
    left_out = _left_out(spec, counted, tokens=left_out_tokens, positions=left_out_positions)
    unused = left_out.without_reference(spec.credit) & ~ref_logp.isfinite()
    ref_logp = torch.where(unused, logp.detach(), ref_logp)
    not_binary = (mask != 0) & (mask != 1)
    nonfinite = counted & ~(logp.isfinite() & ref_logp.isfinite() & ~behavior_logp.isinf())
    for kl in more.values():
        nonfinite |= counted & ~kl.isfinite()
    any_not_binary, any_nonfinite = torch.stack([not_binary.any(), nonfinite.any()]).tolist()  # one sync
    if any_not_binary:
        raise ValueError(f"mask must be 0 or 1, found {mask[not_binary][0].item()}: 1 counts a token, 0 leaves it out")
    if any_nonfinite and spec.nonfinite == "error":
        raise ValueError(
            _nonfinite_message(nonfinite, logp=logp, ref_logp=ref_logp, behavior_logp=behavior_logp, **more)
        )
    counted = counted & ~nonfinite
    logp, ref_logp, behavior_logp = (torch.where(counted, x, 0.0) for x in (logp, ref_logp, behavior_logp))
    return Inputs(
        logp=logp,
        ref_logp=ref_logp,
        behavior_logp=behavior_logp,
        counted=counted,
        dropped=nonfinite,
        left_out=left_out.among(counted),
    )


def check_shapes(tensors: Mapping[str, Tensor]) -> None:
    """Raise `ValueError`, naming every tensor's shape, unless all have one shape (B, T)."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"kl_terms needs (batch, tokens) tensors of one shape, found {found}")


def check_baseline(spec: KLSpec, baseline: Tensor | None, *, counted: Tensor, group_size: int | None) -> None:
    """Raise unless a given (B, T) `baseline` is asked for and finite where tokens are `counted`, (B, T) bool.

    `"group_mean"` shrinks by the `group_size`, whether or not the batch has whole groups.
    """
    if baseline is None:
        return
    if spec.baseline is None:
        raise ConfigError(
            "a baseline was passed, but the configuration has none: set baseline='leave_one_out' or 'group_mean'"
        )
    if spec.baseline == "group_mean" and (group_size is None or group_size < 2):
        raise ConfigError(
            f"a baseline was passed for baseline='group_mean' with group_size={group_size}: it shrinks by 1 - "
            "1/group_size; pass the number of completions per prompt, 2 or more"
        )
    check_shapes({"logp": counted, "baseline": baseline})
    if not (baseline.isfinite() | ~counted).all():
        raise ValueError("the baseline that was passed is not finite at a counted token: it must be everywhere")


def check_groups(baseline: str | None, group_size: int | None, *, rows: int) -> int:
    """`group_size`, if it divides a batch of that many rows into groups of at least 2; raises otherwise."""
    if group_size is None:
        raise ConfigError(f"baseline={baseline!r} was asked for without groups: pass group_size (or baseline)")
    if group_size < 2 or rows % group_size:
        raise ValueError(
            f"{baseline} with group_size={group_size} on a batch of {rows} rows: groups must have at least 2 "
            "members and divide the batch; pass the number of completions per prompt"
        )
    return group_size


def require_policy_scores(spec: KLSpec, *, logp: Tensor, mask: Tensor, host: str) -> None:
    """Raise `ValueError` if `nonfinite="drop"` would hide a NaN of the policy, which the host's own loss spreads.

    Args:
        spec: `nonfinite` is read.
        logp: (B, T), nats, the current policy's.
        mask: (B, T) of 0 and 1.
        host: Whose loss it is, for the message.
    """
    if spec.nonfinite == "drop" and (logp.isnan() & mask.bool()).any():
        raise ValueError(
            f"the policy's log-probs hold a NaN, which {host}'s own loss would spread to every parameter: "
            "nonfinite='drop' can only leave out tokens that the reference or the engine could not score"
        )


def _left_out(spec: KLSpec, counted: Tensor, *, tokens: Tensor | None, positions: Tensor | None) -> LeftOut:
    if tokens is not None and not spec.can_leave_tokens_out:
        raise ConfigError(
            f"left_out_tokens with {spec.name!r} and credit={spec.credit!r}: what a left-out token costs those "
            "before it is known for k1 only, and an exact KL sums over all tokens; use 'k1_in_reward', or a "
            "sampled KL with credit='token'"
        )
    given = {"left_out_tokens": tokens, "left_out_positions": positions}
    found = {name: tensor for name, tensor in given.items() if tensor is not None}
    check_shapes({"mask": counted} | found)
    for name, tensor in found.items():
        if ((tensor != 0) & (tensor != 1)).any():
            raise ValueError(f"{name} must be 0 or 1: 1 leaves the KL of a token out")
    nothing = torch.zeros_like(counted)
    by_position = nothing if positions is None else counted & positions.bool()
    by_token = nothing if tokens is None else counted & tokens.bool() & ~by_position
    return LeftOut(any=by_position | by_token, by_token=by_token)


def _check_exact(spec: KLSpec, exact: ExactKL | None) -> None:
    if exact is not None and spec.loss.exact:
        exact.check(spec)
    elif exact is not None:
        raise ConfigError(f"exact was passed for {spec.name}, which is sampled: leave it out, or use exact_in_reward")
    elif spec.loss.exact:
        raise ConfigError(
            f"{spec.name} sums over the vocabulary, but only the sampled tokens' log-probs were passed: pass "
            "exact=exact_kl(spec, logits=..., ref_logits=..., mask=...)"
        )


def _nonfinite_message(where: Tensor, **tensors: Tensor) -> str:
    row, column = where.nonzero()[0].tolist()
    found = ", ".join(f"{name}={tensor[row, column].item()}" for name, tensor in tensors.items())
    return (
        f"{int(where.sum())} counted tokens have a log-probability that is not finite, the first at row {row}, "
        f"position {column}: {found}; mask them, mend the model that gave them, or drop and count them with "
        "nonfinite='drop'"
    )
