"""`Recorder`: adds up what is logged about the KL, over micro-batches and ranks, for the logs and for a controller."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kl_plugins.core.metrics import SUMS, WEIGHT_METRICS, kl_metrics, kl_sums
from kl_plugins.core.terms import KLTerms


class Recorder:
    """Sums over the micro-batches since the last log and, independently of it, since the last update of beta.

    It keeps sums over tokens, not means of micro-batches, so that what is logged doesn't depend on how a batch is
    split into micro-batches and over ranks.

    Args:
        sum_over_ranks: The sum of a tensor over all ranks. By default there is one rank.
        max_over_ranks: The largest element of a tensor over all ranks.
        in_step: Whether either all ranks add a micro-batch or none does, so that a rank that added none needn't ask
            the others. With False every rank has to call `metrics` and `since_update`, whatever it added.
    """

    def __init__(
        self,
        *,
        sum_over_ranks: Callable[[Tensor], Tensor] = Tensor.clone,
        max_over_ranks: Callable[[Tensor], Tensor] = Tensor.max,
        in_step: bool = True,
    ) -> None:
        self._sum_over_ranks, self._max_over_ranks, self._in_step = sum_over_ranks, max_over_ranks, in_step
        self._sums: Tensor | None = None  # since the last log
        self._weight_max: Tensor | None = None
        self._since_update: Tensor | None = None
        self.added = 0
        """How many micro-batches were added so far."""

    def add(self, terms: KLTerms, beta: float | Tensor) -> None:
        """Add a micro-batch, in whose loss the KL has the coefficient `beta`, a number or (B, 1). No device sync."""
        sums, weight_max = kl_sums(terms, beta=beta), terms.weight.max()
        self.added += 1
        self._since_update = sums if self._since_update is None else sums + self._since_update
        self._sums = sums if self._sums is None else sums + self._sums
        self._weight_max = weight_max if self._weight_max is None else torch.maximum(weight_max, self._weight_max)

    def since_update(self) -> Tensor | None:
        """The `core.metrics.kl_sums` since the last call, over all ranks; None if no rank added a micro-batch."""
        sums, self._since_update = self._since_update, None
        return self._total(sums)

    def metrics(self, *, beta: float, own_weights: bool = True, leaves_out: bool = False) -> dict[str, float]:
        """The `kl/*` numbers since the last call, over all ranks; empty if no rank added a micro-batch.

        Args:
            beta: The coefficient in force now, logged as `kl/beta`.
            own_weights: Whether the term has importance weights and a clip of its own. If not, the host's ratio and
                clip apply to the KL, the host logs about them, and the numbers about weights are left out here.
            leaves_out: Whether tokens may be left out of the KL in this run; see `core.metrics.kl_metrics`.
        """
        sums, weight_max = self._total(self._sums), self._weight_max
        self._sums = self._weight_max = None
        if sums is None:
            return {}
        weight_max = self._max_over_ranks(torch.zeros(()) if weight_max is None else weight_max)
        metrics = kl_metrics(sums, weight_max=weight_max, beta=beta, leaves_out=leaves_out)
        return {name: value for name, value in metrics.items() if own_weights or name not in WEIGHT_METRICS}

    def _total(self, sums: Tensor | None) -> Tensor | None:
        """The sums of all ranks; None, on all of them, if there are none."""
        if self._in_step:
            return None if sums is None else self._sum_over_ranks(sums)
        total = self._sum_over_ranks(torch.zeros(len(SUMS)) if sums is None else sums)
        return total if total.any() else None
