"""What mypy is told about TRL's trainers (`kl_plugins.trl.host`) is true of the installed ones."""

from __future__ import annotations

from typing import Protocol

import pytest
import trl
from trl.experimental import gmpo

from kl_plugins.trl.host import HostTrainer, OnlineTrainer


def promised(protocol):
    return {name for cls in protocol.__mro__ for name in vars(cls).get("__annotations__", {})}


def missing(trainer, protocol):
    return {name for name in promised(protocol) if not hasattr(trainer, name)}


class Wrong(OnlineTrainer, Protocol):
    """The twin."""

    _compute_the_loss: object


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (trl.GRPOTrainer, trl.GRPOConfig),
        (trl.RLOOTrainer, trl.RLOOConfig),
        (gmpo.GMPOTrainer, gmpo.GMPOConfig),
    ],
    ids=lambda x: x.__name__,
)
def test_a_trainer_of_trl_has_what_is_promised(make_trainer, cls, config):
    trainer = make_trainer(cls, config=config)
    assert promised(HostTrainer) < promised(OnlineTrainer)
    assert missing(trainer, OnlineTrainer) == {"vllm_generation"}  # which is there with `use_vllm` only
    assert missing(trainer, Wrong) == {"vllm_generation", "_compute_the_loss"}
