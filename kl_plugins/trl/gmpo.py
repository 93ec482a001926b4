"""`GMPOConfig` and `GMPOTrainer` for `trl.experimental.gmpo`, whose own loss has another KL than GRPO's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from trl.experimental import gmpo as host

from kl_plugins.integration.options import GMPOOptions
from kl_plugins.integration.problem import Problem, refuse_problems
from kl_plugins.integration.rules_trl import gmpo_clip_problems, gmpo_problems
from kl_plugins.trl.config import GRPOFields, TrainerPair, check_trl, documented
from kl_plugins.trl.grpo import KLInGRPO
from kl_plugins.trl.trainer import completion_mask


@dataclass
class GMPOFields(GMPOOptions, GRPOFields):
    """`OnlineFields` for `trl.experimental.gmpo.GMPOConfig`."""

    kl_part = "grpo gmpo"

    def _problems(self) -> Iterator[Problem]:
        return gmpo_problems(self, kl_in_liger_loss=self._kl_in_liger_loss())


@documented
@dataclass
class GMPOConfig(GMPOFields, host.GMPOConfig):
    """[`trl.experimental.gmpo.GMPOConfig`] with the KL that `kl` names; without one it is TRL's own."""


class KLInGMPO(KLInGRPO):
    """The methods of our `GMPOTrainer`, to be mixed into TRL's own or into a class that derives from it."""

    length_normalized = "gmpo"

    def start_kl(self) -> None:
        """As `KLTrainer.start_kl`; and check for GMPO what a `GRPOConfig`, which it may be given, has not checked."""
        super().start_kl()
        if self.kl_spec is not None:
            check_trl(*GMPOFields.kl_part.split())
            refuse_problems(gmpo_clip_problems(self.args), allow_biased=False)

    def _reduced(self, term: Tensor, inputs: dict[str, Any]) -> Tensor:
        mask = completion_mask(inputs)
        return (term * mask).sum(-1) / mask.sum(-1).clamp(min=1)


class GMPOTrainer(KLInGMPO, host.GMPOTrainer):
    """[`trl.experimental.gmpo.GMPOTrainer`] whose KL-to-reference term is the one that `GMPOConfig(kl=...)` names.

    GMPO adds beta times each completion's mean of plain k3 (no correction, whatever `use_bias_correction_kl` says).
    Here it is beta times the completion's mean of `kl_terms(...)`: GMPO's own reduction, which divides every
    completion's KL by its own length.
    """


PAIR = TrainerPair(
    trainer=host.GMPOTrainer,
    config=host.GMPOConfig,
    our_trainer=GMPOTrainer,
    our_config=GMPOConfig,
    methods=KLInGMPO,
    fields=GMPOFields,
)
