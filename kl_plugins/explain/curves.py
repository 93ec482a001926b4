"""What each KL term multiplies the score with, against the log-ratio.

The first figure of Liu et al., arXiv 2510.01555, computed by autograd from the functions themselves: ours, and those
of the hosts that can be imported.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kl_plugins.report.curves import Curve

if TYPE_CHECKING:
    from torch import Tensor

    Term = Callable[[Tensor], Tensor]
    """A KL term per token, as a function of (1, N) log-ratios that are the log-probs of a live policy, too."""

# Where the curves are computed: first and last log-ratio (nats), number of points.
AROUND_0, FAR_BELOW = (-8.0, 13.0, 2101), (-96.0, 0.0, 1921)
OURS = (("k1_as_loss", "token"), ("k2_as_loss", "token"), ("k1_in_reward", "token"), ("k3_as_loss", "token"))


def all_curves() -> tuple[list[Curve], list[str]]:
    """Every curve that can be computed here, and what was left out, with the reason."""
    import torch

    around, far = (torch.linspace(*where, dtype=torch.float64) for where in (AROUND_0, FAR_BELOW))
    found = [
        _curve("ours", name, f"kl_plugins.kl_terms, credit {credit}", our_term(name, credit), around)
        for name, credit in OURS
    ]
    trl, how = trl_term()
    plain, plain_how = trl_term(use_bias_correction_kl=False)
    found.append(_curve("hosts", "TRL GRPO", how, trl, around))
    found.append(_curve("hosts", "TRL GRPO, use_bias_correction_kl=False", plain_how, plain, around))
    estimators, left_out = openrlhf_terms()
    for name, term in estimators.items():
        found.append(_curve("hosts", f"OpenRLHF {name}", "openrlhf.models.utils.compute_approx_kl", term, around))
    ours = our_term("k2_as_loss", "token")
    found.append(_curve("float32", "TRL GRPO", how, trl, far.float()))
    found.append(_curve("float32", "k2_as_loss", "kl_plugins.kl_terms, credit token", ours, far.float()))
    return found, left_out


def our_term(name: str, credit: str) -> Term:
    """The term of `kl_terms`, every log-ratio a sequence of its own."""
    from kl_plugins.core.spec import KLSpec
    from kl_plugins.core.terms import kl_terms

    spec = KLSpec(name=name, credit=credit, allow_biased=True)

    def term(log_ratio: Tensor) -> Tensor:
        logp = log_ratio.T
        return kl_terms(spec, logp=logp, ref_logp=logp.new_zeros(logp.shape), mask=logp.new_ones(logp.shape)).loss

    return term


def trl_term(*, use_bias_correction_kl: bool = True) -> tuple[Term, str]:
    """TRL's, on-policy, and which: `GRPOTrainer._compute_loss` itself, run on a stub of a trainer, or its formula."""
    formula = "exp(-u) + u - 1" + (", times exp(logp - old logp)" if use_bias_correction_kl else "")

    def stated(log_ratio: Tensor) -> Tensor:
        k3 = (-log_ratio).exp() + log_ratio - 1
        return k3 * (log_ratio - log_ratio.detach()).exp() if use_bias_correction_kl else k3

    try:
        import torch
        import trl

        def term(log_ratio: Tensor) -> Tensor:
            return host_loss(trl.GRPOTrainer, log_ratio, use_bias_correction_kl=use_bias_correction_kl)

        term(torch.zeros(1, 1, requires_grad=True))
    except (ImportError, RuntimeError) as error:
        return stated, f"formula of TRL 1.16, not run: {formula} ({_first_line(error)})"
    except (AttributeError, KeyError, TypeError) as error:  # another TRL than the stub is a trainer of
        return stated, f"formula of TRL 1.16, not that of the installed {trl.__version__}: {formula} ({error!r})"
    return term, f"trl {trl.__version__}, GRPOTrainer._compute_loss, run"


def host_loss(
    trainer: type,
    logp: Tensor,
    *,
    ref_logp: Tensor | None = None,
    old_logp: Tensor | None = None,
    mask: Tensor | None = None,
    use_bias_correction_kl: bool = True,
    importance_sampling_level: str = "token",
    loss_type: str = "luspo",
    sampling_ratio: Tensor | None = None,
) -> Tensor:
    """The loss that `_compute_loss` of TRL's `GRPOTrainer` makes of (B, T) log-probs, with beta 1 and no advantages.

    With `loss_type="luspo"` it is the KL term summed over tokens and averaged over sequences. `ref_logp` defaults to
    0, `old_logp` to on-policy; `sampling_ratio` is that of the old policy to the vLLM engine. Everything around the
    loss (model, accelerator, logs) is a stub.
    """
    import torch

    ids = torch.zeros(logp.shape, dtype=torch.long)
    mask = torch.ones_like(ids) if mask is None else mask.long()
    same = {"gather": lambda x: x, "gather_for_metrics": lambda x: x, "reduce": lambda x, reduction: x}
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp.detach()), None),
        accelerator=SimpleNamespace(num_processes=1, **same),
        args=SimpleNamespace(use_bias_correction_kl=use_bias_correction_kl, delta=None, steps_per_generation=1),
        beta=1.0,
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        epsilon_low=0.2,
        epsilon_high=0.2,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=sampling_ratio is not None,
        vllm_importance_sampling_correction=sampling_ratio is not None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        entropy_coef=0.0,
        use_adaptive_entropy=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=1,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": logp.new_zeros(len(logp)),
        "ref_per_token_logps": torch.zeros_like(logp.detach()) if ref_logp is None else ref_logp,
    }
    if old_logp is not None:
        inputs["old_per_token_logps"] = old_logp
    if sampling_ratio is not None:
        inputs["importance_sampling_ratio"] = sampling_ratio
    loss: Tensor = trainer._compute_loss(stub, None, inputs)  # type: ignore[attr-defined]
    return loss


def openrlhf_terms() -> tuple[dict[str, Term], list[str]]:
    """OpenRLHF's own function, by what it is asked for; or none, and why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from openrlhf.models.utils import compute_approx_kl
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        where = " (without a GPU put recipes/openrlhf_cpu on PYTHONPATH)" if "flash_attn" in str(error) else ""
        return {}, [f"OpenRLHF's curves are left out: it can't be imported, {_first_line(error)}{where}"]

    def asked(estimator: str, unbiased: bool) -> Term:
        return lambda logp: compute_approx_kl(
            logp, logp.new_zeros(logp.shape), logp.detach(), kl_estimator=estimator, unbiased_gradient=unbiased
        )

    return {"k2": asked("k2", False), "k3": asked("k3", False), "unbiased_gradient": asked("k3", True)}, []


def coefficients(term: Term, u: Tensor) -> Tensor:
    """(N,) d term / d log policy at each of the (N,) log-ratios `u`, by autograd in their dtype."""
    import torch

    live = u.detach().clone()[None].requires_grad_()
    return torch.autograd.grad(term(live).sum(), live)[0][0]


def exact_zeros(term: Term, u: Tensor) -> list[tuple[float, float]]:
    """Intervals of the log-ratio in which the coefficient is exactly 0; their ends are bisected, or those of `u`."""
    dead = ((coefficients(term, u) == 0) & (u.abs() > 1e-6)).tolist()  # next to 0, float32 rounds to 0 as well
    edges = [i for i in range(1, len(dead)) if dead[i] != dead[i - 1]]
    ends = [_bisected(term, float(u[i - 1]), float(u[i]), u.dtype) for i in edges]
    ends = ([float(u[0])] if dead[0] else []) + ends + ([float(u[-1])] if dead[-1] else [])
    return list(zip(ends[::2], ends[1::2], strict=True))


def _bisected(term: Term, low: float, high: float, dtype: Any) -> float:
    import torch

    def is_dead(u: float) -> bool:
        return bool(coefficients(term, torch.tensor([u], dtype=dtype)) == 0)

    starts_dead = is_dead(low)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if is_dead(middle) == starts_dead else (low, middle)
    return low if starts_dead else high


def _curve(panel: str, name: str, how: str, term: Term, u: Tensor) -> Curve:
    return Curve(
        panel=panel,
        name=name,
        how=how,
        dtype=str(u.dtype).removeprefix("torch."),
        u=u.tolist(),
        coefficient=coefficients(term, u).tolist(),
        zeros=exact_zeros(term, u),
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
