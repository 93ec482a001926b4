"""`apply_to_trl`: TRL's own classes, whenever imported, with the KL that was named; and no trace when it is undone."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import trl
from tiny_trl import ARGUMENTS, parameters
from trl.experimental import gmpo as stock_gmpo

import kl_plugins
import kl_plugins.trl as ours
from kl_plugins import ConfigError, PatchError, UnknownLossError
from kl_plugins.trl import apply as module

SCHEDULE = {"max_steps": 3, "num_iterations": 2}
CLASSES = {
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, ours.GRPOTrainer, ours.GRPOConfig),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, ours.RLOOTrainer, ours.RLOOConfig),
    "gmpo": (stock_gmpo.GMPOTrainer, stock_gmpo.GMPOConfig, ours.GMPOTrainer, ours.GMPOConfig),
}
EACH = pytest.mark.parametrize(("stock", "stock_config", "our", "our_config"), CLASSES.values(), ids=CLASSES)


class Derived(trl.GRPOTrainer):
    """A user's own, from before."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.after = "its own"

    def compute_loss(self, *args, **kwargs):
        self.losses = getattr(self, "losses", 0) + 1
        return super().compute_loss(*args, **kwargs)


@dataclass
class DerivedConfig(trl.GRPOConfig):
    mine: int = 3


@pytest.fixture
def apply():
    """`kl_plugins.apply_to_trl`, undone when the test is over; it must leave no trace."""
    before = footprint()
    made = []

    def call(**options):
        made.append(kl_plugins.apply_to_trl(**options))
        return made[-1]

    yield call
    for each in made:
        each.undo()
    assert footprint() == before


def footprint():
    """What every class of TRL that is touched consists of, by identity."""
    classes = [cls for stock, config, *_ in CLASSES.values() for cls in (stock, config)]
    return [{k: id(v) for k, v in vars(cls).items() if k != "__slotnames__"} for cls in classes]  # copyreg's cache


def trained(make_trainer, cls, config, **options):
    trainer = make_trainer(cls, config=config, **SCHEDULE, **options)
    trainer.train()
    return trainer


@EACH
def test_trls_own_trainer_is_ours_bit_for_bit(make_trainer, apply, stock, stock_config, our, our_config):
    before = trained(make_trainer, stock, stock_config)
    wanted = trained(make_trainer, our, our_config, kl="k3_as_loss")
    applied = apply(kl="k3_as_loss")
    found = trained(make_trainer, stock, stock_config)
    assert torch.equal(parameters(found), parameters(wanted))
    assert not torch.equal(parameters(found), parameters(before))
    assert isinstance(found, stock)
    assert found.kl_spec.name == found.args.kl == "k3_as_loss"
    (bound,) = (each for each in applied.bindings() if each.bound and each.calls)
    assert bound.calls == 1

    named = trained(make_trainer, stock, stock_config, kl="k2_as_loss")
    assert named.kl_spec.name == "k2_as_loss"
    left_alone = trained(make_trainer, stock, stock_config, kl=None)
    assert type(left_alone) is stock
    assert torch.equal(parameters(left_alone), parameters(before))

    applied.undo()
    after = trained(make_trainer, stock, stock_config)
    assert (type(after), type(after.args)) == (stock, stock_config)
    assert torch.equal(parameters(after), parameters(before))
    with pytest.raises(TypeError, match="unexpected keyword argument 'kl'"):
        make_trainer(stock, config=stock_config, kl="k2_as_loss")


def test_a_class_that_derives_from_trls_has_our_methods_in_front_of_its_own(make_trainer, apply):
    wanted = trained(make_trainer, ours.GRPOTrainer, ours.GRPOConfig, kl="k3_as_loss")
    apply(kl="k3_as_loss")
    found = trained(make_trainer, Derived, trl.GRPOConfig)
    assert torch.equal(parameters(found), parameters(wanted))
    assert isinstance(found, Derived)
    assert type(found).__name__ == "Derived"
    assert (found.after, found.losses) == ("its own", 3)


@pytest.mark.parametrize("config", [trl.GRPOConfig, DerivedConfig])
def test_a_config_from_before_gets_the_options_in_a_copy_that_can_be_saved(
    make_trainer, apply, model, prompts, config, tmp_path
):
    args = config(**ARGUMENTS | {"output_dir": str(tmp_path)})
    apply(kl="k2_as_loss", kl_weight_clip=(0.0, 5.0))
    trainer = trl.GRPOTrainer(model=model, reward_funcs=lambda **_: [0.0] * 16, args=args, train_dataset=prompts)
    assert trainer.kl_spec.weight_clip == (0.0, 5.0)
    assert type(args) is config
    assert not hasattr(args, "kl")
    trainer.save_model(str(tmp_path / "saved"))
    saved = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
    assert isinstance(saved, config)
    assert (saved.kl, saved.kl_weight_clip, float(saved.beta)) == ("k2_as_loss", [0.0, 5.0], 0.1)
    assert copy.deepcopy(saved).to_dict() == trainer.args.to_dict()
    if config is DerivedConfig:
        assert saved.mine == 3


def test_a_config_from_before_is_checked_as_any_other(model, prompts, apply, tmp_path):
    args = trl.GRPOConfig(**ARGUMENTS | {"output_dir": str(tmp_path), "top_p": 0.9})
    apply(kl="k2_as_loss")
    with pytest.raises(ConfigError, match=r"top_p=0\.9"):
        trl.GRPOTrainer(model=model, reward_funcs=lambda **_: [0.0] * 16, args=args, train_dataset=prompts)


def test_a_config_as_trl_makes_its_default_one_is_checked(apply):
    apply(kl="k2_as_loss")
    with pytest.raises(ConfigError, match="kl='k2_as_loss' with beta=0: set a positive finite beta"):
        trl.GRPOConfig("positional", use_cpu=True, bf16=False)


@pytest.mark.parametrize("config", [trl.GRPOConfig, trl.RLOOConfig, stock_gmpo.GMPOConfig])
def test_from_yaml_and_the_command_line(apply, config, tmp_path):
    apply(kl="k2_as_loss", kl_weight_clip=[0.0, 5.0])
    parser = trl.TrlParser((config,))
    yaml = tmp_path / "run.yaml"
    yaml.write_text("kl: k3_as_loss\nkl_off_policy: sequence\n")
    fixed = ["--output_dir", str(tmp_path), "--beta", "0.1", "--use_cpu", "true", "--bf16", "false"]
    (from_flags,) = parser.parse_args_and_config([*fixed, "--kl_weight_clip", "0", "3"])
    assert (from_flags.kl, from_flags.kl_weight_clip) == ("k2_as_loss", [0.0, 3.0])
    (from_file,) = parser.parse_args_and_config([*fixed, "--config", str(yaml)])
    assert (from_file.kl, from_file.kl_off_policy, from_file.kl_weight_clip) == ("k3_as_loss", "sequence", [0.0, 5.0])
    with pytest.raises(ConfigError, match="k1_as_loss was asked for, but its expected gradient is zero"):
        parser.parse_args_and_config([*fixed, "--kl", "k1_as_loss"])


def test_twice_is_once_and_another_way_is_refused(apply):
    first = apply(kl="k2_as_loss")
    during = footprint()
    assert apply(kl="k2_as_loss") is first
    assert footprint() == during
    with pytest.raises(PatchError, match=r"'kl': 'k3_as_loss'.* is in force with .*'kl': 'k2_as_loss'.*undo\(\) that"):
        apply(kl="k3_as_loss")
    first.undo()
    first.undo()
    assert apply(kl="k3_as_loss") is not first


def test_it_says_what_it_does(apply, make_trainer, caplog):
    with caplog.at_level("WARNING"):
        apply(kl="k2_as_loss")
        make_trainer(trl.GRPOTrainer, config=trl.GRPOConfig)
    first, second = caplog.messages
    assert first.startswith(f"kl_plugins: TRL {trl.__version__}'s own GMPOTrainer, GRPOTrainer, ")
    assert first.endswith("RLOOTrainer and their configs take kl_* options, by default {'kl': 'k2_as_loss'}")
    assert "this GRPOTrainer trains with k2_as_loss; its expected on-policy gradient is local_reverse_kl" in second


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kl": "k2_in_los"}, UnknownLossError, "did you mean 'k2_as_loss'"),
        ({"kl": "k1_as_loss"}, ConfigError, "its expected gradient is zero"),
        ({"kl": "k2_as_loss", "kl_of_policy": "token"}, ConfigError, "kl_of_policy .*did you mean kl_off_policy"),
        ({"kl": "k2_as_loss", "kl_off_policy": "tokens"}, ConfigError, "token"),
        ({"trainers": ["grop"]}, ConfigError, "trainers='grop': this TRL has .*grpo"),
    ],
)
def test_what_can_not_be_is_refused_and_nothing_changed(options, error, message):
    before = footprint()
    with pytest.raises(error, match=message):
        kl_plugins.apply_to_trl(**options)
    assert footprint() == before
    assert module._applied is None


def test_nothing_stays_changed_after_a_failure_half_way(monkeypatch):
    before, seen = footprint(), []

    class Fails(module._ConfigWithFields):
        def __init__(self, *args):
            seen.append(footprint())
            if len(seen) == 3:
                raise RuntimeError("the third config")
            super().__init__(*args)

    monkeypatch.setattr(module, "_ConfigWithFields", Fails)
    with pytest.raises(RuntimeError, match="the third config"):
        kl_plugins.apply_to_trl(kl="k2_as_loss")
    assert before not in seen  # the trainers come first
    assert footprint() == before


@pytest.mark.parametrize("what", [trl.GRPOTrainer, trl.RLOOConfig])
def test_what_somebody_else_replaced_since_is_left_and_named(what):
    before = footprint()
    applied = kl_plugins.apply_to_trl(kl="k2_as_loss")
    mine = what.__init__

    def theirs(self, *args, **kwargs):
        mine(self, *args, **kwargs)

    what.__init__ = theirs
    with pytest.raises(PatchError, match=f"{what.__name__}.*undo that first"):
        applied.undo()
    assert what.__init__ is theirs
    what.__init__ = mine
    applied.undo()
    assert footprint() == before


def test_a_kl_can_be_required(apply, make_trainer):
    apply(require_kl=True)
    with pytest.raises(ConfigError, match="no KL was named"):
        trl.GRPOConfig(**ARGUMENTS | {"output_dir": "x"})


def test_only_the_trainers_that_were_asked_for(apply, make_trainer):
    apply(trainers=["rloo"], kl="k2_as_loss")
    assert type(make_trainer(trl.GRPOTrainer, config=trl.GRPOConfig)) is trl.GRPOTrainer
    assert type(make_trainer(trl.RLOOTrainer, config=trl.RLOOConfig)) is ours.RLOOTrainer
