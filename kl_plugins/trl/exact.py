"""Exact KLs inside TRL: what its fused LM head is called with, policy and reference, without a pass more.

TRL scores completions from hidden states and the LM head's weight, in tiles (`add_fused_lm_head`). Its kernel is
called with all that the next-token distributions are made of, as TRL itself reads it off the model: hidden states,
weight and bias, temperature, softcapping and scale. `recorded` keeps these arguments of the passes that TRL makes
anyway; `core.fused_linear_kl` makes the KL of them. Where the reference's hidden states are there before the pass, it
makes the log-probs in the kernel's stead as well, and the KL with them. A KL that needs a pass of its own is computed
by TRL's kernel for divergences where that is a Triton kernel, on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from trl.trainer import utils as host

from kl_plugins.core.exact import ExactKL
from kl_plugins.core.fused_linear_kl import LMHead, fused_linear_kl, fused_linear_kl_and_logps
from kl_plugins.core.spec import KLSpec
from kl_plugins.errors import PatchError

KERNEL = "_ChunkedLogProbFunction"
# Where a parameter's gradient may have two sources, and its weight is whole outside of the model's forward.
DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
# Where TRL's kernel doesn't round logits: its log-probs at rollout and ours in training must not differ by that.
FUSED = torch.float32
OUTPUTS = (("log_probs", "entropy"),)  # what TRL asks of a policy
TRITON = ("cuda", "xpu")  # where TRL's kernels are Triton's
BETAS = {"reverse_kl": 1.0, "forward_kl": 0.0}  # what TRL's kernel for divergences calls them


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoringPass:
    """What a model was seen to score completions from: hidden states and its LM head."""

    hidden: Tensor
    """(B, T, H): what each completion token was predicted from, with its graph if it has one; junk at padding."""
    head: LMHead
    kl: Tensor | None = None
    """(B, T) divergences from the `Reference` that the scoring was given, with their graph; 0 at padding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """What the reference scored the same completions from, so that a pass of the policy can make the KL to it."""

    hidden: Tensor
    """(B, T, H): what the reference predicted each completion token from."""
    head: LMHead
    of: str
    """Which divergence: `"reverse_kl"` is KL(policy || reference), `"forward_kl"` KL(reference || policy)."""


@dataclass(eq=False)
class Passes:
    """Stands where TRL looks for its fused LM head (`kernel`), and keeps the calls of one scoring."""

    kernel: Any
    attention_mask: Tensor  # (B, prompt + T)
    length: int  # T
    batch_size: int
    reference: Reference | None = None
    calls: list[tuple[Tensor, LMHead, Tensor | None]] = field(default_factory=list)

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        *outputs: Any,
    ) -> Any:
        """Keep the arguments and answer as TRL's kernel does, whose signature this is.

        TRL's own kernel is called, unless there is a reference and the kernel would round no logits: then ours makes
        the log-probs together with the KL.
        """
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        head = LMHead(
            weight=weight,
            bias=bias,
            scale=logit_scale,
            softcap=final_logit_softcapping,
            temperature=temperature,
            dtype=dtype,
        )
        if self.reference is not None and dtype == FUSED and outputs == OUTPUTS:
            kl, logp, entropy = self._fused(hidden, head, targets, self.reference)
            self.calls.append((hidden, head, kl))
            return logp, entropy, None, None, None
        self.calls.append((hidden, head, None))
        return self.kernel.apply(
            hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, *outputs
        )

    def _fused(self, hidden: Tensor, head: LMHead, targets: Tensor, reference: Reference) -> tuple[Tensor, ...]:
        """(b, T) divergences, and (N,) log-probs and entropies in TRL's dtype: of completions, 0 elsewhere."""
        first = len(self.calls) * self.batch_size
        batch = slice(first, first + self.batch_size)
        counted = self.attention_mask[batch, -self.length :].bool()
        ref_hidden = reference.hidden[batch].to(hidden.device)[counted]
        if len(hidden) == len(ref_hidden):  # as `_by_position` has it
            rows = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        else:
            rows = torch.nn.functional.pad(counted, (len(hidden) // len(counted) - self.length, 0)).flatten()
        kl, logp, entropy = fused_linear_kl_and_logps(
            reference.of,
            hidden=hidden[rows],
            head=head,
            ref_hidden=ref_hidden,
            ref_head=reference.head,
            targets=targets[rows],
        )
        zeros = torch.zeros(len(hidden), device=hidden.device)
        logp, entropy = (zeros.masked_scatter(rows, x.float()) for x in (logp, entropy))
        return kl.new_zeros(counted.shape).masked_scatter(counted, kl), logp, entropy

    def together(self) -> ScoringPass:
        """The calls of all micro-batches of the scoring as one. `PatchError` if there were too many or too few."""
        rows = self.attention_mask[:, -self.length :].bool().split(self.batch_size)
        if len(rows) != len(self.calls):
            raise PatchError(
                f"TRL was expected to score {len(rows)} times through its fused LM head, found {len(self.calls)}: "
                "install a tested version, or use a KL that is not exact"
            )
        hidden = [_by_position(found, counted) for (found, _, _), counted in zip(self.calls, rows, strict=True)]
        kl = [found for _, _, found in self.calls if found is not None]
        return ScoringPass(
            hidden=torch.cat(hidden), head=self.calls[-1][1], kl=torch.cat(kl) if len(kl) == len(rows) else None
        )


def _by_position(hidden: Tensor, counted: Tensor) -> Tensor:
    """(b, T, H) of the (N, H) rows that TRL scored: with Triton those of the completion, else those of all tokens."""
    batch, length = counted.shape
    if len(hidden) != counted.sum():
        return hidden.view(batch, -1, hidden.size(-1))[:, -length:]
    return hidden.new_zeros(batch, length, hidden.size(-1)).index_put((counted,), hidden)


def exact_kl_of(spec: KLSpec, scored: ScoringPass, *, ref_hidden: Tensor, ref_head: LMHead, mask: Tensor) -> ExactKL:
    """(B, T), nats: the KL of a scoring to the reference, whose hidden states are (B, T, H).

    It is the one that was made in the same pass if there is one; else it takes a pass through both heads of its own.
    """
    head, value = scored.head, scored.kl
    if value is None and mask.device.type in TRITON and head.dtype != torch.float64:
        value = _by_host(spec.loss.exact, scored, ref_hidden, ref_head, mask.bool())
    if value is None:
        return fused_linear_kl(
            spec, hidden=scored.hidden, head=head, ref_hidden=ref_hidden, ref_head=ref_head, mask=mask
        )
    counted = mask.bool()
    return ExactKL(value=torch.where(counted, value, 0.0), outside=torch.zeros_like(counted), of=spec.loss.exact)


def _by_host(of: str, scored: ScoringPass, ref_hidden: Tensor, ref_head: LMHead, counted: Tensor) -> Tensor | None:
    """(B, T) by TRL's kernel; None where a model excludes a token, for which it has no defined result."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # not in TRL below 1.16

    head = scored.head
    arguments = [
        scored.hidden[counted].to(head.dtype),
        head.weight,
        head.bias,
        ref_hidden[counted].to(ref_head.dtype),
        ref_head.weight,
        ref_head.bias,
        BETAS[of],
        head.temperature,
        *(head.scale, head.softcap, ref_head.scale, ref_head.softcap),
    ]
    with torch.autocast(counted.device.type, enabled=False):
        found, _ = ChunkedDivergenceFunction.apply(*arguments)
    return found.new_zeros(counted.shape).masked_scatter(counted, found) if found.isfinite().all() else None


class ExactScoring:
    """The scoring passes of a trainer with an exact KL, and the KL that is made of them."""

    def __init__(self, spec: KLSpec) -> None:
        self.spec = spec
        self.scored: tuple[ScoringPass, ...] = ()
        """The passes that no KL was made of yet, the last one last."""
        self.reference_head: LMHead | None = None
        """What the hidden states in `kl_ref_hidden` become logits with."""
        self._compared_with: Reference | None = None

    @contextmanager
    def recording(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Keep what TRL scores with while this is active; the arguments are those of its scoring method."""
        with recorded(self._compared_with, *args, **kwargs) as passes:
            yield
        self.scored += (passes.together(),)

    def forget(self) -> None:
        """Let go of the passes that no KL was made of, and of their graphs."""
        self.scored = ()

    @contextmanager
    def compared(self, inputs: dict[str, Any] | None) -> Iterator[None]:
        """While active, a pass makes the KL to the reference, too, if the micro-batch has its hidden states."""
        self.forget()
        if inputs is not None and "kl_ref_hidden" in inputs:
            assert self.reference_head is not None
            self._compared_with = Reference(
                hidden=inputs["kl_ref_hidden"], head=self.reference_head, of=self.spec.loss.exact
            )
        try:
            yield
        finally:
            self._compared_with = None

    def keep_reference(self, output: dict[str, Any]) -> None:
        """Put the reference's hidden states, its pass at rollout being the last, into the batch as `kl_ref_hidden`.

        (B, T, H) numbers in the reference's dtype for every token that waits to be trained on. They are shuffled and
        split as all that TRL keeps of a rollout, and save the reference's second pass.
        """
        *policy, reference = self.scored
        self.scored = tuple(policy) if self.spec.baseline is not None else ()
        self.reference_head = reference.head
        output["kl_ref_hidden"] = reference.hidden

    def kl(self, mask: Tensor, ref_hidden: Tensor) -> ExactKL:
        """(B, T), nats: the KL of the policy, whose scoring was the last, to the reference with these hidden states.

        The gradient flows into the policy's hidden states and its head. The passes are forgotten.
        """
        scored, self.scored = self.scored[-1], ()
        assert self.reference_head is not None
        return exact_kl_of(self.spec, scored, ref_hidden=ref_hidden, ref_head=self.reference_head, mask=mask)


@contextmanager
def recorded(
    reference: Reference | None,
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    *args: Any,
    **kwargs: Any,
) -> Iterator[Passes]:
    """What the fused LM head is called with while TRL scores completions; the arguments are those of its method.

    With a `reference`, the KL to it is made in the same pass if it can be.
    """
    batch_size = (args[0] if args else kwargs.get("batch_size")) or len(input_ids)
    kernel = getattr(host, KERNEL)
    passes = Passes(kernel, attention_mask, logits_to_keep, batch_size, reference)
    setattr(host, KERNEL, passes)
    try:
        yield passes
    finally:
        setattr(host, KERNEL, kernel)


def distribution_problems(spec: KLSpec, accelerator: Any) -> list[str]:
    """Where the head's weight can't be read, or given a gradient, outside of the model's forward pass."""
    kind = accelerator.distributed_type
    if kind in DISTRIBUTED:
        return []
    return [
        f"kl={spec.name!r} with {kind.value}: the LM head is sharded where an exact KL reads it, which was "
        "not tested; train with plain data parallelism, or use k1_in_reward or k2_as_loss"
    ]
