"""What is refused, before any model is loaded, and what the message says."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from trl import TrlParser
from trl.experimental import ppo as stock

from kl_plugins import ConfigError, PatchError, UnknownLossError
from kl_plugins.trl import ppo, term
from kl_plugins.trl.ppo import PPOConfig, PPOTrainer

QUIET = {"use_cpu": True, "bf16": False, "report_to": "none"}


def config(tmp_path, cls=PPOConfig, **options):
    return cls(output_dir=str(tmp_path), **QUIET, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kl": "k1_as_loss"}, "use k2_as_loss"),
        (
            {"kl": "exact_as_loss"},
            "^exact_as_loss needs the full next-token distributions.*TRL's PPOTrainer.*use reverse_kl",
        ),
        ({"kl": "exact_in_reward"}, "^exact_in_reward needs the full next-token distributions.*use reverse_kl"),
        ({"kl": "k2_in_reward"}, "biased"),
        ({"kl": "k3_in_reward"}, "biased"),
        ({"kl": "k2_as_loss", "kl_coef": 0.0}, "set a positive finite kl_coef"),
        ({"kl": "k2_as_loss", "kl_coef": -1.0}, "set a positive finite kl_coef"),
        ({"kl": "k1_in_reward", "kl_estimator": "k3"}, "kl_estimator='k3' names TRL's own KL"),
        ({"kl": "k1_in_reward", "whiten_rewards": True}, "whiten_rewards=True divides the KL"),
        ({"kl": "k1_in_reward", "kl_off_policy": "prefix"}, "kl_off_policy='prefix' is not used in the reward"),
        ({"kl": "k1_in_reward", "kl_weight_clip": [0.0, 5.0]}, "kl_weight_clip=.* is not used in the reward"),
        ({"kl": "k1_in_reward", "kl_credit": "token"}, "use kl_placement='loss'"),
        ({"kl": "k1_in_reward", "kl_baseline": "leave_one_out"}, "critic is the baseline"),
        ({"kl": "k1_in_reward", "gamma": 0.9}, "neither the local nor the sequence KL; use gamma=1 "),
        ({"kl": "k2_as_loss", "kl_placement": "reward"}, "is a term of the loss"),
        ({"kl": "k2_as_loss", "kl_placement": "critic"}, "choose from auto, loss, reward"),
        ({"kl": "k2_as_loss", "kl_clip": "combined"}, "use kl_placement='reward'"),
        ({"kl": "k2_as_loss", "kl_gamma": 0.9}, "only kl_credit='to_go' discounts"),
        ({"kl": "k1_in_reward", "kl_leave_out": ["eos"]}, "use kl_placement='loss'"),
        ({"kl": "k2_as_loss", "kl_leave_out_equal_rewards": True}, "PPO generates one"),
        ({"kl_off_policy": "none"}, "but kl is None"),
        ({"kl_placement": "loss"}, "kl_placement set, but kl is None"),
    ],
)
def test_refused(tmp_path, options, says):
    with pytest.raises(ConfigError, match=says):
        config(tmp_path, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"kl": "k1_as_loss", "kl_allow_biased": True},
        {"kl": "k3_in_reward", "kl_allow_biased": True},
        {"kl": "k1_in_reward", "gamma": 0.9, "kl_allow_biased": True},
        {"kl": "k2_as_loss", "whiten_rewards": True},
        {"kl": "k1_in_reward", "kl_placement": "loss", "kl_off_policy": "prefix", "whiten_rewards": True},
        {"kl": "k1_in_reward", "kl_placement": "loss", "kl_credit": "token", "gamma": 0.9},
        {"kl": "none"},
        {"kl_estimator": "k3", "whiten_rewards": True},
    ],
)
def test_accepted(tmp_path, options):
    config(tmp_path, **options)


def test_all_problems_at_once_and_unknown_names(tmp_path):
    with pytest.raises(ConfigError) as found:
        config(tmp_path, kl="k1_in_reward", kl_coef=0.0, kl_estimator="k3", whiten_rewards=True, kl_credit="token")
    assert len(found.value.args) == 4
    with pytest.raises(UnknownLossError, match="k2_as_loss"):
        config(tmp_path, kl="k2_as_los")


def test_trls_own_trainer_does_not_train_on_another_kl(make_trainer):
    with pytest.raises(PatchError, match=r"use kl_plugins\.trl\.ppo\.PPOTrainer"):
        make_trainer(stock.PPOTrainer, kl="k2_as_loss").train()


def test_kl_coef_is_a_number_everywhere_else(tmp_path):
    args = config(tmp_path, kl="k2_as_loss", kl_coef=0.25)
    assert type(args.to_dict()["kl_coef"]) is float
    assert json.loads(args.to_json_string())["kl_coef"] == 0.25
    for same in (copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert same.kl_coef == 0.25
        with pytest.raises(PatchError):
            _ = -same.kl_coef


def test_options_from_the_command_line(tmp_path):
    line = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    line += ["--kl", "k2_as_loss", "--kl_coef", "0.2", "--kl_weight_clip", "0", "5", "--kl_estimator", "k1"]
    (args,) = TrlParser((PPOConfig,)).parse_args_and_config(line)
    assert args.kl_spec().weight_clip == (0.0, 5.0)
    assert args.kl_coef == 0.2


@pytest.mark.parametrize("name", ["repetition_penalty", "min_p", "typical_p", "no_repeat_ngram_size"])
def test_sampling_from_something_else_is_refused(make_trainer, name):
    value = 2 if name == "no_repeat_ngram_size" else 0.5

    def spoil(policy):
        setattr(policy.generation_config, name, value)

    with pytest.raises(ConfigError, match=rf"generation_config\.{name}={value}"):
        make_trainer(kl="k2_as_loss", edit=spoil)
    make_trainer(kl="k2_as_loss", edit=spoil, kl_allow_biased=True)
    make_trainer(edit=spoil)


def test_an_untested_trl_is_refused_before_any_model(tmp_path, monkeypatch):
    ppo.train_with_kl.cache_clear()
    monkeypatch.setattr("kl_plugins.patching.inspection.installed_version", lambda host: "1.12.9")
    with pytest.raises(PatchError, match=r"1\.12\.9 was not tested"):
        config(tmp_path, kl="k2_as_loss")
    config(tmp_path)  # without kl nothing is asked for
    monkeypatch.setenv("KL_PLUGINS_ALLOW_UNTESTED", "1")  # as the message says: the method itself is unchanged
    config(tmp_path, kl="k2_as_loss")
    monkeypatch.undo()
    ppo.train_with_kl.cache_clear()
    ppo.train_with_kl()


def test_a_train_that_somebody_replaced_is_refused(tmp_path, monkeypatch):
    ppo.train_with_kl.cache_clear()
    original = stock.PPOTrainer.train
    monkeypatch.setattr(stock.PPOTrainer, "train", lambda self: original(self))
    with pytest.raises(PatchError, match=r"PPOTrainer\.train"):
        config(tmp_path, kl="k2_as_loss")
    monkeypatch.undo()
    ppo.train_with_kl()


def test_what_is_trained_is_said(make_trainer, monkeypatch):
    said = []
    monkeypatch.setattr(term.logger, "info", said.append)
    monkeypatch.setattr(term.logger, "warning", said.append)
    trainer = make_trainer(PPOTrainer, kl="k3_as_loss")
    assert trainer.kl_spec.gradient_of == "local_forward_kl"
    assert "local_forward_kl" in said[-1]


def test_reverse_kl_is_k1_in_reward_through_gae(tmp_path):
    picked = config(tmp_path, kl="reverse_kl")
    assert picked.kl_in_reward
    assert picked.kl_spec() == config(tmp_path, kl="k1_in_reward").kl_spec()
    assert (picked.kl_spec().credit, picked.kl_spec().baseline) == ("to_go", None)
    assert picked.to_dict()["kl"] == "k1_in_reward"
    assert not config(tmp_path, kl="reverse_kl", kl_placement="loss").kl_in_reward
