"""Controllers of beta in real trainings: the terms that they scale, what they measure, and checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
import trl
from tiny_trl import BETA, parameters

from kl_plugins import ConfigError
from kl_plugins.core.controllers import ControllerSpec
from kl_plugins.trl import GMPOTrainer, GRPOConfig, GRPOTrainer, RLOOTrainer
from kl_plugins.trl.controller import logger

ALL = pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer, GMPOTrainer])
PI = {"kl_controller": "pi", "kl_target": 0.05, "kl_target_per": "sequence", "kl_horizon": 5.0}


class Recording:
    """Mixed into a trainer: the beta of each micro-batch, and the sums that its terms came with."""

    def compute_kl_terms(self, **tensors):
        terms = super().compute_kl_terms(**tensors)
        u = torch.where(terms.mask, terms.log_ratio, 0.0)
        sums = {"kl_sum": u.sum().item(), "tokens": terms.mask.sum().item(), "sequences": len(u)}
        vars(self).setdefault("seen", []).append((float(self.beta), sums))
        return terms


def recording(cls):
    return type(cls.__name__, (Recording, cls), {})


def logged(trainer, key="kl/beta"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@ALL
def test_a_schedule_scales_the_term_of_each_update(make_trainer, config_of, cls):
    options = {"kl": "k2_as_loss", "max_steps": 4, "num_iterations": 4, "learning_rate": 1e-2}
    schedule = {"kl_controller": "linear", "kl_beta_end": 0.0, "kl_beta_steps": 3}
    trainer = make_trainer(recording(cls), config=config_of(cls), **options, **schedule)
    trainer.train()
    wanted = [BETA, BETA * 2 / 3, BETA / 3, 0.0]
    assert [beta for beta, _ in trainer.seen] == pytest.approx(wanted[:3])  # at 0 there is no term, and no number
    assert logged(trainer) == pytest.approx(wanted[1:], abs=1e-12)  # after the update
    values = [beta * k2 for beta, k2 in zip(wanted[:3], logged(trainer, "kl/k2"), strict=True)]
    assert logged(trainer, "kl/loss") == pytest.approx(values, rel=1e-5)
    assert logged(trainer, "kl/loss")[2] > 0
    fixed = make_trainer(cls, **options)
    fixed.train()
    assert not torch.equal(parameters(fixed), parameters(trainer))  # beta reached the gradient


@ALL
@pytest.mark.parametrize("per", ["token", "sequence"])
def test_feedback_is_on_the_kl_of_all_micro_batches_of_an_update(make_trainer, config_of, cls, per):
    options = {"kl": "k1_in_reward", "max_steps": 5, "learning_rate": 1e-2, **PI, "kl_target_per": per}
    halves = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_iterations": 2}
    trainer = make_trainer(recording(cls), config=config_of(cls), **options, **halves)
    trainer.train()
    assert len(trainer.seen) == 10
    spec = ControllerSpec(kl_controller="pi", kl_target=0.05, kl_target_per=per, kl_horizon=5.0)
    plain, betas = spec.start(BETA), []
    for (beta, first), (again, second) in zip(trainer.seen[::2], trainer.seen[1::2], strict=True):
        assert beta == again == pytest.approx(plain.beta, rel=1e-5)
        betas.append(plain.update(**{name: first[name] + second[name] for name in first}))
    assert logged(trainer) == pytest.approx(betas, rel=1e-5)
    assert len(set(betas)) > 2


def test_an_evaluation_does_not_move_it(make_trainer, prompts):
    trainer = make_trainer(
        GRPOTrainer, kl="k2_as_loss", eval_dataset=prompts.select(range(4)), per_device_eval_batch_size=4, **PI
    )
    trainer.evaluate()
    assert trainer._kl_recorder.since_update() is None
    assert trainer._kl_eval_recorder.since_update() is not None
    assert (trainer.kl_controller.beta, float(trainer.beta)) == (BETA, BETA)


@pytest.mark.slow
def test_it_holds_a_kl_that_the_reward_drives_away(make_trainer):
    """A real run: the mean KL over the second half is within 10% of its target, from a beta ten times too low."""
    options = {"max_steps": 150, "beta": 0.05, "lr_scheduler_type": "constant"}
    target = {"kl_controller": "pi", "kl_target": 2.0, "kl_target_per": "sequence", "kl_horizon": 10.0}
    held = make_trainer(GRPOTrainer, kl="k2_as_loss", **options, **target)
    free = make_trainer(GRPOTrainer, kl="k2_as_loss", **options)

    def per_sequence(trainer):
        trainer.train()
        tail = trainer.state.log_history[75:150]
        return sum(entry["kl/k1"] * entry["completions/mean_length"] for entry in tail) / len(tail)

    assert per_sequence(held) == pytest.approx(2.0, rel=0.1)
    assert per_sequence(free) > 2 * 2.0  # the twin
    assert all(beta > 0 for beta in logged(held))


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
def test_a_resumed_run_has_the_betas_of_one_that_was_not_interrupted(make_trainer, cls, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logger, "warning", said.append)
    options = {"kl": "k2_as_loss", "max_steps": 6, "save_strategy": "steps", "save_steps": 3, **PI}
    whole = make_trainer(cls, **options)
    whole.train()
    checkpoint = tmp_path / "checkpoint-3"
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["kl_controller"]
    assert saved["beta"] == logged(whole)[2]
    resumed = make_trainer(cls, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed) == logged(whole)
    assert resumed.kl_controller.state_dict() == whole.kl_controller.state_dict()
    assert torch.equal(parameters(resumed), parameters(whole))
    assert not said
    anew = make_trainer(cls, **{name: value for name, value in options.items() if name not in PI})
    anew.train(resume_from_checkpoint=str(checkpoint))
    assert logged(anew)[3:] == [BETA] * 3
    assert len(said) == 1
    assert "is of a run with kl_controller='pi'; this one has none" in said[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_controller": "pid"}, "did you mean 'pi'"),
        ({"kl_controller": "pi"}, "needs kl_target"),
        ({"kl_target": 0.1}, "kl_target=0.1 is not used by kl_controller='fixed'"),
        ({"kl_controller": "proportional", "kl_target": 0.1, "kl_beta_max": 0.01}, "beta=0.1 can't start"),
        ({"kl_controller": "cosine", "kl_beta_end": 0.0}, "needs kl_beta_steps"),
    ],
)
def test_what_can_not_be_is_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        GRPOConfig(str(tmp_path), kl="k2_as_loss", beta=BETA, use_cpu=True, bf16=False, **options)


def test_from_the_command_line(tmp_path):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--beta", "0.1", "--kl"]
    words += ["k2_as_loss", "--kl_controller", "pi", "--kl_target", "0.05", "--kl_horizon", "7"]
    (args,) = trl.TrlParser((GRPOConfig,)).parse_args_and_config(words)
    assert args.controller(0.1).spec == ControllerSpec(kl_controller="pi", kl_target=0.05, kl_horizon=7.0)
    with pytest.raises(ConfigError, match="kl_controller set, but kl is None"):
        GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, kl_controller="linear")
