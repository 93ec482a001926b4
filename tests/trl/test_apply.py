"""`apply_to_trl`: what is imported from TRL then has the KL; nothing slips through; undone without a trace."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from dataclasses import dataclass

import pytest
import torch
import trl
from tiny_trl import ARGUMENTS, parameters
from trl.experimental import gmpo as stock_gmpo

import kl_plugins
import kl_plugins.trl as ours
from kl_plugins import ConfigError, PatchError, UnknownLossError
from kl_plugins.patching import load_patches
from kl_plugins.patching.versions import installed_version
from kl_plugins.trl import apply as module

SCHEDULE = {"max_steps": 3, "num_iterations": 2}
STOCK = {
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
    "gmpo": (stock_gmpo.GMPOTrainer, stock_gmpo.GMPOConfig),
}
OURS = {
    "grpo": (ours.GRPOTrainer, ours.GRPOConfig),
    "rloo": (ours.RLOOTrainer, ours.RLOOConfig),
    "gmpo": (ours.GMPOTrainer, ours.GMPOConfig),
}
EACH = pytest.mark.parametrize("name", STOCK)
BEFORE = "not imported from trl, or derived from what was, after apply_to_trl: call that above"


def imported(name):
    """What `from trl import ...` gives now."""
    source = stock_gmpo if name == "gmpo" else trl
    return getattr(source, f"{name.upper()}Trainer"), getattr(source, f"{name.upper()}Config")


def footprint():
    """What the names of those classes in TRL's modules stand for, and what the classes consist of, by identity."""
    names = {
        (name, attribute): id(value)
        for name, found in sys.modules.items()
        if name.partition(".")[0] == "trl"
        for attribute, value in vars(found).items()
        if isinstance(value, type) and issubclass(value, tuple(cls for pair in STOCK.values() for cls in pair))
    }
    classes = [cls for pair in STOCK.values() for cls in pair]
    return names, [{k: id(v) for k, v in vars(cls).items() if k != "__slotnames__"} for cls in classes]  # copyreg's


@pytest.fixture
def apply():
    """`kl_plugins.apply_to_trl`, undone when the test is over; it must leave no trace."""
    for cls in (cls for pair in STOCK.values() for cls in pair):  # TRL resolves its names on first use
        getattr(trl.trainer, cls.__name__, getattr(trl, cls.__name__, None))
    before = footprint()

    def call(**options):
        return kl_plugins.apply_to_trl(**options)

    yield call
    while module.in_force():
        module.in_force().undo()
    assert footprint() == before


def made(make_trainer, cls, config, **options):
    return make_trainer(cls, config=config, **options)


def trained(make_trainer, cls, config, **options):
    trainer = made(make_trainer, cls, config, **SCHEDULE, **options)
    trainer.train()
    return trainer


@EACH
def test_what_is_imported_is_ours_bit_for_bit(make_trainer, apply, name):
    before = trained(make_trainer, *STOCK[name])
    wanted = trained(make_trainer, *OURS[name], kl="k3_as_loss")
    applied = apply(kl="k3_as_loss")
    found = trained(make_trainer, *imported(name))
    assert type(found) is OURS[name][0]
    assert isinstance(found.args, OURS[name][1])
    assert found.kl_spec.name == found.args.kl == "k3_as_loss"
    assert torch.equal(parameters(found), parameters(wanted))
    assert not torch.equal(parameters(found), parameters(before))
    assert {each.target.rpartition(":")[2]: each.calls for each in applied.bindings()} == {
        "GRPOTrainer.__init__": 0 if name == "rloo" else 1,
        "RLOOTrainer.__init__": 1 if name == "rloo" else 0,
    } | ({"PPOTrainer.__init__": 0} if "ppo" in applied.trainers else {})

    assert trained(make_trainer, *imported(name), kl="k2_as_loss").kl_spec.name == "k2_as_loss"
    left_alone = trained(make_trainer, *imported(name), kl=None)
    assert torch.equal(parameters(left_alone), parameters(before))

    applied.undo()
    after = trained(make_trainer, *imported(name))
    assert (type(after), type(after.args)) == STOCK[name]
    assert torch.equal(parameters(after), parameters(before))
    with pytest.raises(TypeError, match="unexpected keyword argument 'kl'"):
        trained(make_trainer, *imported(name), kl="k2_as_loss")


@EACH
@pytest.mark.parametrize("derived", [False, True])
def test_what_was_imported_before_is_refused(make_trainer, apply, name, derived):
    trainer, config = STOCK[name]
    if derived:
        trainer = type("Mine", (trainer,), {})
    apply(kl="k2_as_loss")
    with pytest.raises(PatchError, match=f"{trainer.__name__} was {BEFORE}"):
        make_trainer(trainer, config=imported(name)[1])
    for cls in (imported(name)[0], OURS[name][0]):
        with pytest.raises(PatchError, match=f"the {config.__name__} that {cls.__name__} was given was .*{BEFORE}"):
            make_trainer(cls, config=config)


def test_it_is_the_argument_args_that_is_looked_at(apply, model, prompts, tmp_path):
    before = trl.GRPOConfig(**ARGUMENTS | {"output_dir": str(tmp_path)})
    apply(kl="k2_as_loss")
    with pytest.raises(PatchError, match=BEFORE):
        trl.GRPOTrainer(model, lambda **_: [0.0] * 16, before, prompts)
    now = trl.GRPOConfig(str(tmp_path), **ARGUMENTS)
    assert trl.GRPOTrainer(model, lambda **_: [0.0] * 16, now, prompts).kl_spec.name == "k2_as_loss"
    with pytest.raises(ConfigError, match="kl='k2_as_loss' with beta=0: set a positive finite beta"):
        trl.GRPOConfig("as TRL makes its default one", use_cpu=True, bf16=False)


def test_what_is_derived_while_it_is_in_force_is_ours(make_trainer, apply, tmp_path):
    wanted = trained(make_trainer, *OURS["grpo"], kl="k3_as_loss")
    applied = apply(kl="k3_as_loss", kl_weight_clip=(0.0, 5.0))

    class Mine(trl.GRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.after = "its own"

    @dataclass
    class MyConfig(trl.GRPOConfig):
        mine: int = 3

    found = trained(make_trainer, Mine, MyConfig, kl_weight_clip=[0.0, 10.0])
    assert torch.equal(parameters(found), parameters(wanted))
    assert (found.after, found.args.mine) == ("its own", 3)

    def make(**options):
        return MyConfig(**ARGUMENTS | {"output_dir": str(tmp_path)} | options)

    assert make().kl_weight_clip == [0.0, 5.0]
    assert make().to_dict().keys() == wanted.args.to_dict().keys() | {"mine"}
    assert make(kl=None).kl is None  # the other defaults are no reason to complain
    assert type(copy.deepcopy(make())) is MyConfig
    with pytest.raises(UnknownLossError):
        make(kl="nonsense")
    applied.undo()
    assert make(kl="k2_as_loss").kl_spec().name == "k2_as_loss"


def test_a_config_can_be_saved_and_loaded_without_it(make_trainer, apply, tmp_path):
    applied = apply(kl="k2_as_loss", kl_weight_clip=(0.0, 5.0))
    trainer = made(make_trainer, *imported("grpo"))
    trainer.save_model(str(tmp_path / "saved"))
    copied = copy.deepcopy(trainer.args)
    applied.undo()
    saved = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
    for each in (saved, copied, pickle.loads(pickle.dumps(copied))):
        assert isinstance(each, ours.GRPOConfig)
        assert (each.kl, each.kl_weight_clip, float(each.beta)) == ("k2_as_loss", [0.0, 5.0], 0.1)
        assert each.to_dict() == trainer.args.to_dict()
    assert type(saved) is ours.GRPOConfig


@EACH
def test_from_yaml_and_the_command_line(apply, name, tmp_path):
    apply(kl="k2_as_loss", kl_weight_clip=[0.0, 5.0])
    parser = trl.TrlParser((imported(name)[1],))
    yaml = tmp_path / "run.yaml"
    yaml.write_text("kl: k3_as_loss\nkl_off_policy: sequence\n")
    fixed = ["--output_dir", str(tmp_path), "--beta", "0.1", "--use_cpu", "true", "--bf16", "false"]
    (from_flags,) = parser.parse_args_and_config([*fixed, "--kl_weight_clip", "0", "3"])
    assert (from_flags.kl, from_flags.kl_weight_clip) == ("k2_as_loss", [0.0, 3.0])
    (from_file,) = parser.parse_args_and_config([*fixed, "--config", str(yaml)])
    assert (from_file.kl, from_file.kl_off_policy, from_file.kl_weight_clip) == ("k3_as_loss", "sequence", [0.0, 5.0])
    with pytest.raises(ConfigError, match="k1_as_loss was asked for, but its expected gradient is zero"):
        parser.parse_args_and_config([*fixed, "--kl", "k1_as_loss"])


def test_the_same_again_is_no_more_and_another_way_is_refused(apply):
    first = apply(kl="k2_as_loss", kl_weight_clip=(0.0, 5.0))
    during = footprint()
    with apply(kl="k2_as_loss", kl_weight_clip=[0.0, 5.0]) as again:
        assert again is first
        assert footprint() == during
    assert footprint() == during  # the outer one still is
    with pytest.raises(PatchError, match=r"'kl': 'k3_as_loss'.* is in force with .*'kl': 'k2_as_loss'.*undo\(\) that"):
        apply(kl="k3_as_loss")
    first.undo()
    assert module.in_force() is None
    first.undo()
    with pytest.raises(PatchError, match="this apply_to_trl was undone: call it again"), first:
        pass
    assert apply(kl="k3_as_loss") is not first


def test_an_error_inside_of_a_with_undoes_it(apply):
    with pytest.raises(RuntimeError, match="of the user"), apply(kl="k2_as_loss"):
        raise RuntimeError("of the user")
    assert module.in_force() is None


def test_from_many_threads(apply):
    made = []
    threads = [threading.Thread(target=lambda: made.append(apply(kl="k2_as_loss"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len(set(map(id, made))) == 1


def test_it_says_what_it_does(apply, caplog):
    with caplog.at_level("WARNING"):
        apply(kl="k2_as_loss")
    (said,) = caplog.messages
    assert said.startswith(f"kl_plugins: the kl_* options of TRL {trl.__version__}'s GMPOTrainer, GRPOTrainer, ")
    assert said.endswith("RLOOTrainer work now, by default {'kl': 'k2_as_loss'}")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kl": "k2_in_los"}, UnknownLossError, "did you mean 'k2_as_loss'"),
        ({"kl": "k1_as_loss"}, ConfigError, "its expected gradient is zero"),
        ({"kl": "k2_as_loss", "kl_of_policy": "token"}, ConfigError, "kl_of_policy .*did you mean kl_off_policy"),
        ({"kl": "k2_as_loss", "kl_off_policy": "tokens"}, ConfigError, "token"),
        ({"trainers": ["grop"]}, ConfigError, "trainers='grop': this TRL has .*grpo"),
        ({"trainers": "grop"}, ConfigError, "trainers='grop': this TRL has .*grpo"),
        ({"trainers": []}, ConfigError, "leave it out for all"),
    ],
)
def test_what_can_not_be_is_refused_and_nothing_changed(apply, options, error, message):
    before = footprint()
    with pytest.raises(error, match=message):
        apply(**options)
    assert footprint() == before
    assert module.in_force() is None


def test_none_can_be_said_in_words(apply, tmp_path):
    apply(kl="none", kl_credit="None", kl_off_policy="none")
    args = trl.GRPOConfig(**ARGUMENTS | {"output_dir": str(tmp_path)})
    assert (args.kl, args.kl_credit, args.kl_off_policy) == (None, None, "none")


def test_nothing_stays_changed_after_a_failure_half_way(apply, monkeypatch):
    before, seen = footprint(), []

    def fails(self, hook):
        seen.append(footprint())
        if len(seen) == 2:
            raise RuntimeError("the second config")
        return object

    monkeypatch.setattr(module.AppliedToTRL, "_config_of", fails)
    with pytest.raises(RuntimeError, match="the second config"):
        apply(kl="k2_as_loss")
    assert before not in seen  # the trainers come first
    assert footprint() == before


def test_what_somebody_else_replaced_since_is_left_and_named(apply):
    applied = apply(kl="k2_as_loss")
    stock = STOCK["grpo"][0]
    mine = stock.__init__

    def theirs(self, *args, **kwargs):
        mine(self, *args, **kwargs)

    stock.__init__ = theirs
    with pytest.raises(PatchError, match=r"GRPOTrainer.__init__ is now .*undo that first"):
        applied.undo()
    assert stock.__init__ is theirs
    with pytest.raises(PatchError, match="half undone"):
        apply(kl="k2_as_loss")
    stock.__init__ = mine
    applied.undo()
    assert module.in_force() is None


def test_a_kl_can_be_required(apply, make_trainer):
    apply(require_kl=True)
    with pytest.raises(ConfigError, match="no KL was named"):
        trl.GRPOConfig(**ARGUMENTS | {"output_dir": "x"})
    with pytest.raises(ConfigError, match="no KL was named"):
        made(make_trainer, *OURS["grpo"])


def test_only_the_trainers_that_were_asked_for(apply, make_trainer):
    apply(trainers=["rloo"], kl="k2_as_loss")
    for name in ("grpo", "gmpo"):
        assert type(made(make_trainer, *imported(name))) is STOCK[name][0]
    assert type(made(make_trainer, *imported("rloo"))) is ours.RLOOTrainer
    module.in_force().undo()
    apply(trainers="grpo", kl="k2_as_loss")
    assert type(made(make_trainer, *imported("grpo"))) is ours.GRPOTrainer
    assert type(made(make_trainer, *STOCK["gmpo"])) is STOCK["gmpo"][0]


def test_where_some_were_not_tested_it_says_which_were(monkeypatch):
    only = load_patches("trl", "grpo").tested[-1]
    monkeypatch.setattr("kl_plugins.patching.inspection.installed_version", lambda host: "1.99.0")
    monkeypatch.setattr(module, "installed_version", lambda host: only)
    monkeypatch.setattr(
        module, "load_patches", lambda host, *parts: load_patches(host, *(parts if "rloo" not in parts else ("ppo",)))
    )
    with pytest.raises(PatchError) as refused:
        kl_plugins.apply_to_trl(trainers=["grpo", "rloo"], kl="k2_as_loss")
    assert refused.value.__notes__ == ["apply_to_trl(trainers=['grpo']) leaves out those that were not tested here"]


@pytest.mark.skipif(installed_version("trl") not in ("1.12.0", "1.13.0"), reason="no kernel of Liger's has a KL here")
def test_ligers_kernel_is_refused_where_it_has_a_kl_of_its_own(tmp_path):
    with pytest.raises(ConfigError, match="use_liger_kernel=True: this TRL then computes its loss with its own KL"):
        ours.GRPOConfig(kl="k2_as_loss", use_liger_kernel=True, **ARGUMENTS | {"output_dir": str(tmp_path)})


class TensorTimesBeta(ours.GRPOTrainer):
    def compute_loss(self, model, inputs, **_):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        return model(ids).logits.mean() * self.beta


class WithoutKL(ours.GRPOTrainer):
    def compute_loss(self, model, inputs, **_):
        return model(inputs["completion_ids"]).logits.mean()


def test_a_loss_without_our_term_never_reaches_the_optimizer(make_trainer):
    for cls, message in (
        (TensorTimesBeta, "TRL's own KL was about to be used"),
        (WithoutKL, "the loss of WithoutKL was computed without it"),
    ):
        trainer = make_trainer(cls, config=ours.GRPOConfig, kl="k2_as_loss")
        start = parameters(trainer).clone()
        with pytest.raises(PatchError, match=message):
            trainer.train()
        assert torch.equal(parameters(trainer), start)
    make_trainer(WithoutKL, config=ours.GRPOConfig).train()  # kl=None
