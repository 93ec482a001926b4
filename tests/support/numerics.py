"""What the float32, bfloat16 and float16 tests of the core share."""

from __future__ import annotations

import torch

from kl_plugins import KLSpec, kl_terms
from kl_plugins.core import registry

# Those that need no more than the sampled tokens' log-probs.
SAMPLED = [name for name, loss in registry.LOSSES.items() if not loss.exact]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def both_signs(magnitudes):
    return [sign * magnitude for magnitude in magnitudes for sign in (1.0, -1.0)]


def spec_of(name, **options):
    return KLSpec.from_name(name, allow_biased=True, **options)


def differentiate(spec, logp, ref_logp, mask=None, **more):
    """The terms, and the gradient of their summed loss with respect to `logp`."""
    logp = logp.clone().requires_grad_()
    terms = kl_terms(spec, logp=logp, ref_logp=ref_logp, mask=torch.ones(logp.shape) if mask is None else mask, **more)
    return terms, torch.autograd.grad(terms.loss.sum(), logp)[0]


def one_column(log_ratios, dtype):
    """(N, 1) inputs: every log-ratio once, from 0 against it, so that rounding leaves the difference what it is."""
    logp = torch.tensor(log_ratios)[:, None].to(dtype)
    return logp, torch.zeros_like(logp)


def largest(dtype):
    return torch.finfo(dtype).max
