"""Each configuration through TRL's PPOTrainer: refused, or trained in the reward or the loss. And `apply_to_trl`."""

from __future__ import annotations

import math

import pytest
import torch
from drift import EDITS, change
from matrix import CONFIGURATIONS, REFUSED
from trl.experimental import ppo as stock

import kl_plugins
from kl_plugins import ConfigError, PatchError
from kl_plugins.patching import load_patches
from kl_plugins.trl import ppo
from kl_plugins.trl.ppo import PPOConfig, PPOTrainer


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_refused_or_trained(make_trainer, parameters, covers, name):
    covers("trl", "PPOTrainer", name)
    options = dict(CONFIGURATIONS[name])
    if name in REFUSED:
        with pytest.raises(ConfigError, match=r"expected gradient is (zero|biased)"):
            make_trainer(**options)
        return
    if name in ("k1_in_reward sequence", "k1_in_reward token"):  # a reward is summed from a token on: credit to_go
        with pytest.raises(ConfigError, match="kl_placement='loss'"):
            make_trainer(**options)
        options["kl_placement"] = "loss"
    trainer, without = make_trainer(**options, num_ppo_epochs=2), make_trainer(kl_coef=0.0, num_ppo_epochs=2)
    for each in (trainer, without):
        each.train()
    assert (parameters(trainer) - parameters(without)).abs().max() > 1e-4
    logs = [entry for entry in trainer.state.log_history if "kl/k1" in entry]
    assert len(logs) == 3
    assert all(math.isfinite(value) for entry in logs for key, value in entry.items() if key.startswith("kl/"))


@pytest.mark.parametrize("kl", ["k1_in_reward", "k2_as_loss"])
def test_apply_to_trl(make_trainer, parameters, kl):
    """What is imported from TRL then is ours, bit for bit; what was before is refused; and no trace when undone."""
    touched = (stock, stock.ppo_trainer, stock.ppo_config, stock.PPOTrainer, stock.PPOConfig)

    def footprint():
        names = ("PPOTrainer", "PPOConfig", "__init__", "train", "__post_init__")
        return [{k: id(v) for k, v in vars(each).items() if k in names} for each in touched]

    before = footprint()
    own, own_config = stock.PPOTrainer, stock.PPOConfig

    def train(*args, **options):
        trainer = make_trainer(*args, **options)
        trainer.train()
        return trainer

    wanted, plain = train(kl=kl), train(own, config=own_config)
    with kl_plugins.apply_to_trl(trainers=["ppo"], kl=kl):
        found = train(stock.PPOTrainer, config=stock.PPOConfig)
        assert type(found) is PPOTrainer
        assert isinstance(found.args, PPOConfig)
        for cls, config in ((own, stock.PPOConfig), (PPOTrainer, own_config)):
            with pytest.raises(PatchError, match=r"was not imported from trl, .*after apply_to_trl"):
                make_trainer(cls, config=config)
    assert torch.equal(parameters(found), parameters(wanted))
    assert torch.equal(parameters(found), parameters(plain)) == (kl == "k1_in_reward")  # with one update: TRL's own
    assert footprint() == before
    assert torch.equal(parameters(train(stock.PPOTrainer, config=stock.PPOConfig)), parameters(plain))


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("part", ["ppo", "apply_ppo"])
def test_a_changed_function_keeps_everything_from_starting(make_trainer, part, edit, tmp_path, monkeypatch):
    (target,) = load_patches("trl", part).targets
    ppo.train_with_kl.cache_clear()
    change(target, edit, tmp_path, monkeypatch)
    starts = [lambda: kl_plugins.apply_to_trl(trainers=["ppo"], kl="k1_in_reward")]
    if part == "ppo":
        starts.append(lambda: make_trainer(kl="k1_in_reward"))
    for start in starts:
        with pytest.raises(PatchError, match=rf"- {target.name}.*reinstall trl=="):
            start()
    monkeypatch.undo()
    ppo.train_with_kl.cache_clear()
    make_trainer(kl="k1_in_reward")
