"""`KLMonitorCallback` on real trainers: its numbers, where they arrive, what training notices, what is refused."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import trl
from peft import LoraConfig
from plain_monitor import plain_metrics
from tiny_trl import loss_and_gradients, make_model, micro_batch, parameters
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

import kl_plugins.trl as ours
from kl_plugins.errors import ConfigError, PatchError
from kl_plugins.trl.callbacks import JsonlCallback
from kl_plugins.trl.monitor import KLMonitorCallback

LORA = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")

GRPO = (trl.GRPOTrainer, {"config": trl.GRPOConfig})
RLOO = (trl.RLOOTrainer, {"config": trl.RLOOConfig})
GMPO = (GMPOTrainer, {"config": GMPOConfig})
OUR_GRPO = (ours.GRPOTrainer, {"kl": "k2_as_loss"})
OUR_RLOO = (ours.RLOOTrainer, {"kl": "k1_in_reward"})
NAMES = ["GRPO", "RLOO", "GMPO", "our GRPO", "our RLOO"]
ALL = pytest.mark.parametrize(("cls", "options"), [GRPO, RLOO, GMPO, OUR_GRPO, OUR_RLOO], ids=NAMES)
STOCK = pytest.mark.parametrize(("cls", "options"), [GRPO, RLOO, GMPO], ids=NAMES[:3])

KL = {f"kl/{name}{end}" for name in ("k1", "k2", "k3", "sequence") for end in ("", "_se")}
RATIOS = {f"kl/ratio_{name}" for name in ("ess", "max", "above_2", "above_10", "below_0.1", "unscored")}


@pytest.fixture(scope="session")
def other_model(tmp_path_factory) -> str:
    """Another policy than the one that is trained."""
    return make_model(tmp_path_factory.mktemp("other"), seed=1, spread=10.0)


@pytest.fixture
def warnings_of(monkeypatch):
    """The warnings of transformers' loggers."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = transformers_logging.get_logger("kl_plugins.trl.monitor")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def rows_of(trainer, name="kl/sequence"):
    return [row for row in trainer.state.log_history if name in row]


def numbers(trainer, batch):
    """What the monitor reports of one micro-batch of an attached trainer."""
    result = loss_and_gradients(trainer, batch)
    trainer.log({})
    return {name: value for name, value in trainer.state.log_history[-1].items() if name.startswith("kl/")}, result


@STOCK
def test_every_number_is_that_of_the_batch(make_trainer, cls, options):
    """A made-up batch with an engine, NaN where nothing counts and a token it couldn't score, against plain loops."""
    trainer, monitor = make_trainer(cls, **options), KLMonitorCallback()
    batch = micro_batch(trainer)
    with torch.no_grad():
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        logp, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, 6)
    batch["completion_ids"][:, 2] = 1  # <eos>
    batch["completion_ids"][3, 1] = 0  # <pad>, as a token of the policy
    batch["ref_per_token_logps"] = batch["ref_per_token_logps"].masked_fill(batch["completion_mask"] == 0, math.nan)
    batch["sampling_per_token_logps"] = batch["old_per_token_logps"] + torch.randn(8, 6)
    batch["sampling_per_token_logps"][0, 0] = math.nan
    batch["importance_sampling_ratio"] = torch.ones(8, 6)
    seen = {}

    def see(model, *args, **kwargs):
        scored = type(trainer)._get_per_token_logps_and_entropies(trainer, model, *args, **kwargs)
        seen["logp"] = scored[0].detach()
        return scored

    trainer._get_per_token_logps_and_entropies = see
    monitor.attach(trainer)
    found, _ = numbers(trainer, batch)
    dead = found.pop("kl/dead", None)
    assert (dead is None) if cls is trl.RLOOTrainer else (dead == 0)
    wanted = plain_metrics(
        logp=seen["logp"],
        mask=batch["completion_mask"],
        ref_logp=batch["ref_per_token_logps"],
        old_logp=batch["old_per_token_logps"],
        engine_logp=batch["sampling_per_token_logps"],
        classes=torch.where(batch["completion_ids"] == 1, 1, torch.where(batch["completion_ids"] == 0, 2, 0)),
    )
    assert found == pytest.approx(wanted, rel=1e-9)
    assert found["kl/engine_unscored"] == 1
    assert {"kl/class/eos", "kl/class/special", "kl/class/text_se"} <= found.keys()
    assert not torch.allclose(seen["logp"], logp)  # the tokens were changed above
    monitor.detach()
    assert trainer._get_per_token_logps_and_entropies is see  # what the instance had before is there again


@STOCK
def test_agrees_with_what_trl_logs_itself(make_trainer, cls, options):
    """On-policy, TRL's own `kl` is the token mean of k3 (GRPO, GMPO) or k1 (RLOO)."""
    trainer = make_trainer(cls, **options, max_steps=3, callbacks=[KLMonitorCallback()])
    trainer.train()
    rows = rows_of(trainer)
    assert len(rows) == 3
    for row in rows:
        assert row["kl/k1" if cls is trl.RLOOTrainer else "kl/k3"] == pytest.approx(row["kl"], rel=1e-4, abs=1e-6)
    assert rows[-1]["kl/k3"] > 1e-2
    names = set(rows[-1])
    assert KL | {"kl/position/0", "kl/position/1-3_se", "kl/class/text", "kl/nonfinite"} <= names
    assert (names >= RATIOS) == (cls is trl.RLOOTrainer)  # on-policy GRPO has no other policy to weigh against
    assert not any(name.startswith("kl/engine") for name in names)


@ALL
@pytest.mark.parametrize(
    "training",
    [
        {"num_iterations": 2},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, "logging_steps": 2},
        {"gradient_checkpointing": True, "model_init_kwargs": {"dtype": "float32", "attention_dropout": 0.3}},
        {"bf16": True},
    ],
    ids=["stale", "accumulated", "dropout and checkpointing", "bf16"],
)
def test_training_does_not_notice(make_trainer, cls, options, training):
    """Parameters, logs of the trainer's own and the state of the random numbers, bit for bit, all measured or not."""
    ratio = 0 if cls is trl.RLOOTrainer else 1
    found = []
    for monitors in ([], [KLMonitorCallback(gradient_ratio_every=ratio)]):
        trainer = make_trainer(cls, **options, **training, max_steps=4, callbacks=monitors)
        start = parameters(trainer)
        trainer.train()
        assert not torch.equal(parameters(trainer), start)
        logs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        found.append((parameters(trainer), torch.get_rng_state(), torch.tensor(logs), float(trainer.beta)))
    assert rows_of(trainer)
    assert ("kl/gradient_ratio" in rows_of(trainer)[-1]) == bool(ratio)
    without, monitored = found
    for one, other in zip(without[:3], monitored[:3], strict=True):
        assert torch.equal(one, other)
    assert without[3] == monitored[3]


@pytest.mark.parametrize("lora", [False, True], ids=["loaded", "lora"])
@pytest.mark.parametrize(("cls", "options"), [GRPO, RLOO], ids=NAMES[:2])
def test_training_does_not_notice_a_scored_reference(make_trainer, cls, options, lora):
    found = []
    dropout = {"model_init_kwargs": {"dtype": "float32", "attention_dropout": 0.3}}
    config = {"peft_config": LORA, "learning_rate": 5e-2} if lora else {}
    for monitors in ([], [KLMonitorCallback(reference="base", every=2)]):
        trainer = make_trainer(cls, **options, **config, **dropout, beta=0.0, max_steps=4, callbacks=monitors)
        trainer.train()
        found.append((parameters(trainer), torch.get_rng_state()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert ["kl/k1" in row for row in trainer.state.log_history[:4]] == [True, False, True, False]
    assert rows_of(trainer)[-1]["kl/k2"] > 1e-3
    assert trainer.ref_model is None


def test_no_further_pass_through_the_model(make_trainer, other_model):
    """Forward passes of the policy, and of a reference that is scored every second step."""
    for options, monitors in [
        ({}, []),
        ({}, [KLMonitorCallback()]),
        ({"beta": 0.0}, [KLMonitorCallback(reference=AutoModelForCausalLM.from_pretrained(other_model), every=2)]),
    ]:
        trainer = make_trainer(*GRPO[:1], **GRPO[1], **options, max_steps=4, callbacks=monitors)
        scored = []
        own = trainer._get_per_token_logps_and_entropies
        trainer._get_per_token_logps_and_entropies = lambda model, *a, own=own, to=scored, **k: (
            to.append(model) or own(model, *a, **k)
        )
        trainer.train()
        policy = sum(model is trainer.model for model in scored)
        assert policy == 4
        assert len(scored) - policy == (2 if options else 4)


@pytest.mark.parametrize("lora", [False, True], ids=["loaded", "lora"])
def test_the_reference_is_the_one_that_was_named(make_trainer, other_model, model, lora):
    """Against log-probs by hand: a path, a model, and "base", for LoRA the policy without its adapters."""
    loaded = AutoModelForCausalLM.from_pretrained(other_model, dtype=torch.float32)
    by_name = {"base": model, other_model: other_model}
    for reference in ["base"] if lora else ["base", other_model, loaded]:
        trainer = make_trainer(
            trl.GRPOTrainer, config=trl.GRPOConfig, beta=0.0, peft_config=LORA if lora else None, temperature=0.7
        )
        batch = micro_batch(trainer)
        del batch["ref_per_token_logps"]
        with torch.no_grad():  # away from the model it was loaded from
            for name, weight in trainer.model.named_parameters():
                if "lora_B" in name or not lora:
                    weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        wanted_model = AutoModelForCausalLM.from_pretrained(
            by_name.get(reference, other_model) if isinstance(reference, str) else other_model, dtype=torch.float32
        )
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        with torch.no_grad():
            logits = [m(ids, attention_mask=attention).logits[:, 3:-1] / 0.7 for m in (trainer.model, wanted_model)]
        logp, ref_logp = (x.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0] for x in logits)
        monitor = KLMonitorCallback(reference=reference, every=1)
        monitor.attach(trainer)
        monitor.on_step_begin(trainer.args, trainer.state, trainer.control)
        found, _ = numbers(trainer, batch)
        wanted = plain_metrics(logp=logp, ref_logp=ref_logp, mask=batch["completion_mask"])
        assert found["kl/k1"] == pytest.approx(wanted["kl/k1"], rel=1e-4)
        assert found["kl/k3_se"] == pytest.approx(wanted["kl/k3_se"], rel=1e-3)
        assert wanted["kl/k2"] > 1e-2
        assert trainer.model.training
        monitor.detach()
        assert len([m for m in trainer.accelerator._models if m is not trainer.model]) == 0


def gradients_of_the_parts(trainer, batch):
    """As one would do it by hand: the trainer's own loss with its beta, and with none."""
    _, whole = loss_and_gradients(trainer, batch)
    beta, spec = trainer.beta, getattr(trainer, "kl_spec", None)
    trainer.beta, trainer.kl_spec = 0.0, None
    _, rest = loss_and_gradients(trainer, batch)
    trainer.beta, trainer.kl_spec = beta, spec
    return whole - rest, rest


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        GRPO,
        (trl.GRPOTrainer, {"config": trl.GRPOConfig, "loss_type": "grpo", "use_bias_correction_kl": False}),
        (trl.GRPOTrainer, {"config": trl.GRPOConfig, "importance_sampling_level": "sequence"}),
        GMPO,
        OUR_GRPO,
        (ours.RLOOTrainer, {"kl": "k2_as_loss"}),
    ],
    ids=["dapo", "grpo without correction", "sequence ratio", "GMPO", "our GRPO", "our RLOO"],
)
def test_gradient_ratio_is_that_of_two_losses(make_trainer, cls, options):
    trainer = make_trainer(cls, **options)
    batch = micro_batch(trainer)
    kl, rest = gradients_of_the_parts(trainer, batch)
    _, unwatched = loss_and_gradients(trainer, batch)
    monitor = KLMonitorCallback(gradient_ratio_every=5)
    monitor.attach(trainer)
    for step, due in ((0, True), (1, False), (4, False), (5, True)):
        trainer.state.global_step = step
        monitor.on_step_begin(trainer.args, trainer.state, trainer.control)
        found, (_, watched) = numbers(trainer, batch)
        assert ("kl/gradient_ratio" in found) == due
        if due:
            assert found["kl/gradient_ratio"] == pytest.approx((kl.norm() / rest.norm()).item(), rel=1e-3)
        assert torch.equal(watched, unwatched)
    assert kl.norm() > 1e-3


def test_dead_tokens_are_those_of_the_trainers_own_floats(make_trainer):
    """A token 40 nats below the reference has no gradient in TRL's term; in ours it has."""
    share = {}
    for cls, options in (GRPO, OUR_GRPO):
        trainer, monitor = make_trainer(cls, **options), KLMonitorCallback()
        batch = micro_batch(trainer, ragged=False)
        batch["ref_per_token_logps"][0, 0] += 40
        batch["ref_per_token_logps"][1, 2] += 20  # wrong by half in TRL's floats, but alive
        monitor.attach(trainer)
        found, _ = numbers(trainer, batch)
        share[cls] = found["kl/dead"]
        assert found["kl/dead_at_10/k2"] == found["kl/dead_at_10/k3"] == pytest.approx(2 / 48)
    assert share == {trl.GRPOTrainer: pytest.approx(1 / 48), ours.GRPOTrainer: 0}


def test_stale_policies_show_in_the_ratios(make_trainer):
    monitor = KLMonitorCallback()
    trainer = make_trainer(
        *GRPO[:1], **GRPO[1], num_iterations=2, max_steps=4, learning_rate=1e-2, callbacks=[monitor]
    )
    trainer.train()
    rows = rows_of(trainer)
    assert [row["kl/ratio_ess"] for row in rows[::2]] == pytest.approx([1, 1], abs=1e-4)
    assert all(row["kl/ratio_ess"] < 0.99 < 1.01 < row["kl/ratio_max"] for row in rows[1::2])


class Recorder(TrainerCallback):
    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append(dict(logs))


@STOCK
def test_reaches_whatever_the_trainer_reports_to(make_trainer, tmp_path, cls, options):
    """JSON lines and a callback before it in the list, one after it, the history, and TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    before, after = Recorder(), Recorder()
    callbacks = [JsonlCallback(tmp_path / "log.jsonl"), before, KLMonitorCallback(), after]
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "tensorboard")
    try:
        trainer = make_trainer(cls, **options, max_steps=3, report_to="tensorboard", callbacks=callbacks)
        trainer.train()
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    wanted = [row["kl/k1_se"] for row in rows_of(trainer)]
    assert len(wanted) == 3
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for rows in (lines, before.rows, after.rows):
        assert [row["kl/k1_se"] for row in rows if "kl/k1_se" in row] == wanted
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("train/kl/k1_se")] == pytest.approx(wanted)
    assert "train/kl/position/1-3" in events.Tags()["scalars"]


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        GRPO,
        RLOO,
        GMPO,
        OUR_GRPO,
        OUR_RLOO,
        (ours.GRPOTrainer, {"kl": None}),
        (ours.GRPOTrainer, {"kl": "k1_in_reward", "kl_clip": "combined"}),
        (ours.GMPOTrainer, {"kl": "k2_as_loss"}),
    ],
)
def test_no_name_is_logged_twice(make_trainer, monkeypatch, cls, options):
    """What the trainer logs itself under a name, the monitor leaves to it: TRL would average the two."""
    counts = []
    log = Trainer.log

    def spy(self, logs, *args, **kwargs):
        counts.append({name: len(values) for name, values in self._metrics["train"].items()})
        return log(self, logs, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "log", spy)
    trainer = make_trainer(cls, **options, max_steps=2, callbacks=[KLMonitorCallback()])
    trainer.train()
    logged = {name: count for each in counts for name, count in each.items() if name.startswith("kl/")}
    assert KL <= logged.keys()
    assert set(logged.values()) == {1}


@ALL
def test_evaluation_has_sums_of_its_own(make_trainer, prompts, cls, options):
    """Within training, with a reference of its own, and by itself once attached."""
    evaluation = {"eval_dataset": prompts.select(range(8)), "per_device_eval_batch_size": 8, "eval_strategy": "steps"}
    evaluation |= {"eval_steps": 1, "logging_steps": 2, "num_generations_eval": 2, "max_steps": 2}
    trainer = make_trainer(cls, **options, **evaluation, callbacks=[KLMonitorCallback()])
    trainer.train()
    history = trainer.state.log_history
    assert [name for row in history for name in ("kl/sequence", "eval_kl/sequence") if name in row] == [
        "eval_kl/sequence",
        "kl/sequence",
        "eval_kl/sequence",
    ]
    train, second = history[-3], history[-2]
    assert train["kl/k1"] != second["eval_kl/k1"]
    assert "eval_kl/k1_se" in second
    assert not any(name.startswith("eval_kl/dead") and "at_10" not in name for name in second)
    assert not any("kl/sequence" in name for name in trainer.evaluate())  # detached
    monitor = KLMonitorCallback()
    monitor.attach(trainer)
    trainer.evaluate()
    assert "eval_kl/sequence" in trainer.state.log_history[-1]
    monitor.detach()


def test_evaluation_is_always_scored(make_trainer, prompts):
    evaluation = {"eval_dataset": prompts.select(range(8)), "per_device_eval_batch_size": 8, "num_generations_eval": 2}
    trainer = make_trainer(trl.GRPOTrainer, config=trl.GRPOConfig, beta=0.0, **evaluation)
    monitor = KLMonitorCallback(reference="base", every=1000)
    monitor.attach(trainer)
    trainer.evaluate()
    assert trainer.state.log_history[-1]["eval_kl/k2"] == pytest.approx(0, abs=1e-9)
    monitor.detach()


@ALL
def test_leaves_the_trainer_as_it_was(make_trainer, cls, options):
    trainer = make_trainer(cls, **options, callbacks=[KLMonitorCallback()])
    before = dict(vars(trainer))
    trainer.train()
    assert type(trainer.beta) is type(before["beta"])
    assert {name for name, value in vars(trainer).items() if callable(value)} == {
        name for name, value in before.items() if callable(value)
    }
    trainer.train()  # and once more
    assert len(rows_of(trainer)) == 2


def test_what_somebody_else_put_on_top_stays(make_trainer, warnings_of):
    trainer, monitor = make_trainer(*GRPO[:1], **GRPO[1]), KLMonitorCallback()
    monitor.attach(trainer)
    inner = trainer.log

    def theirs(logs, *args, **kwargs):
        return inner(logs, *args, **kwargs)

    trainer.log = theirs
    monitor.detach()
    assert trainer.log is theirs
    assert any("log of the trainer was replaced after" in text for text in warnings_of)
    loss_and_gradients(trainer, micro_batch(trainer))
    trainer.log({})  # ours, below theirs, hands everything on
    assert not any(name.startswith("kl/") for name in trainer.state.log_history[-1])


def test_an_interrupted_run_can_be_taken_up(make_trainer):
    class Stop(TrainerCallback):
        stopped = False

        def on_step_end(self, args, state, control, **kwargs):
            if not self.stopped:
                self.stopped = True
                raise KeyboardInterrupt

    trainer = make_trainer(*GRPO[:1], **GRPO[1], max_steps=2, callbacks=[KLMonitorCallback(), Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert len(rows_of(trainer)) == 2
    assert "log" not in vars(trainer)


def test_a_token_that_nobody_can_score_is_counted(make_trainer):
    trainer, monitor = make_trainer(*RLOO[:1], **RLOO[1]), KLMonitorCallback()
    batch = micro_batch(trainer, ragged=False)
    batch["ref_per_token_logps"][2, 3] = -math.inf
    monitor.attach(trainer)
    found, _ = numbers(trainer, batch)
    assert found["kl/nonfinite"] == 1
    assert all(math.isfinite(value) for value in found.values())


def test_what_is_not_available_is_said_once(make_trainer, warnings_of):
    trainer = make_trainer(*GRPO[:1], **GRPO[1], beta=0.0, max_steps=3, callbacks=[KLMonitorCallback()])
    trainer.train()
    assert sum("reference='base'" in text for text in warnings_of) == 1
    assert not rows_of(trainer)
    trainer = make_trainer(*RLOO[:1], **RLOO[1], max_steps=3, callbacks=[KLMonitorCallback()])
    trainer.train()
    assert sum("not available: kl/dead" in text for text in warnings_of) == 1


def test_a_loss_that_scores_something_else_gives_no_numbers(make_trainer, warnings_of):
    """Another model than the loss's own, or none at all: said once, nothing logged."""

    class Other(trl.GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(copy.deepcopy(model), inputs) + 0 * sum(p.sum() for p in model.parameters())

    trainer = make_trainer(Other, config=trl.GRPOConfig, max_steps=3, callbacks=[KLMonitorCallback()])
    trainer.train()
    assert sum("didn't score the completions" in text for text in warnings_of) == 1
    assert not rows_of(trainer)


@pytest.mark.parametrize(
    ("cls", "options", "monitor", "said"),
    [
        (*GRPO, {"reference": "base"}, "with beta=0.1: the trainer scores a reference of its own"),
        (*RLOO, {"gradient_ratio_every": 5}, "gradient_ratio_every=5 with TRL's RLOO, whose KL is in the reward"),
        (GRPO[0], GRPO[1] | {"beta": 0.0}, {"gradient_ratio_every": 5}, "with beta=0: there is no KL gradient"),
        (
            GRPO[0],
            GRPO[1] | {"beta": 0.0, "cast_lm_head_to_fp32": True},
            {"reference": "base"},
            "without which it would be scored",
        ),
        (
            GRPO[0],
            GRPO[1] | {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            {"gradient_ratio_every": 1},
            "reentrant gradient checkpointing",
        ),
    ],
)
def test_refused_when_training_begins(make_trainer, cls, options, monitor, said):
    trainer = make_trainer(cls, **options, callbacks=[KLMonitorCallback(**monitor)])
    with pytest.raises(ConfigError, match=said):
        trainer.train()
    assert trainer.state.global_step == 0
    assert "log" not in vars(trainer)


def test_sharded_models_are_refused_what_was_not_tried(make_trainer, monkeypatch):
    """DeepSpeed isn't started here: the trainer only says that it is."""
    for options, monitor, said in [
        ({"beta": 0.0}, {"reference": "base"}, "reference='base' with DeepSpeed or FSDP"),
        ({}, {"gradient_ratio_every": 1}, "gradient_ratio_every=1 with DeepSpeed or FSDP"),
    ]:
        trainer = make_trainer(*GRPO[:1], **GRPO[1], **options)
        monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
        with pytest.raises(ConfigError, match=said):
            KLMonitorCallback(**monitor).attach(trainer)
        KLMonitorCallback().attach(trainer)


def test_two_monitors_are_refused(make_trainer):
    trainer = make_trainer(*GRPO[:1], **GRPO[1], callbacks=[KLMonitorCallback(), KLMonitorCallback()])
    with pytest.raises(ConfigError, match="has a KLMonitorCallback already"):
        trainer.train()


def test_other_trainers_are_refused(model, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(AutoModelForCausalLM.from_pretrained(model), args, train_dataset=[{"input_ids": [1, 2]}])
    trainer.add_callback(KLMonitorCallback())
    with pytest.raises(PatchError, match="found a Trainer"):
        trainer.train()


def test_an_untested_trl_is_refused(make_trainer, monkeypatch):
    trainer = make_trainer(*GRPO[:1], **GRPO[1], callbacks=[KLMonitorCallback()])
    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", lambda self, model, inputs: None)
    with pytest.raises(PatchError):
        trainer.train()


def test_an_event_of_no_trainer_is_refused():
    with pytest.raises(PatchError, match="attach"):
        KLMonitorCallback().on_train_begin(object(), None, None)


def test_options_that_make_no_sense():
    with pytest.raises(ConfigError, match=r"(?s)every=0.*gradient_ratio_every=-1"):
        KLMonitorCallback(every=0, gradient_ratio_every=-1)


def run_script(name, *arguments, launcher=()):
    """A script of tests/support in a process of its own."""
    script = Path(__file__).parents[1] / "support" / name
    paths = os.pathsep.join([str(script.parent), *filter(None, sys.path)])
    run = subprocess.run(
        [sys.executable, *launcher, str(script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]


@pytest.fixture(scope="module")
def ranks(model, tmp_path_factory):
    """What each of two ranks saved."""
    out = tmp_path_factory.mktemp("ranks")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run_script("two_ranks_monitor.py", model, out / "two", launcher=launcher)
    return [torch.load(out / f"two.{rank}") for rank in range(2)]


@pytest.mark.slow
def test_two_processes_report_the_numbers_of_one(ranks, make_trainer):
    trainer, monitor = make_trainer(*GRPO[:1], **GRPO[1]), KLMonitorCallback()
    batch = micro_batch(trainer)
    batch["ref_per_token_logps"][1, 0] = torch.nan
    monitor.attach(trainer)
    one, _ = numbers(trainer, batch)
    first, second = ranks
    assert first["numbers"] == second["numbers"]
    assert first["numbers"] == pytest.approx(one, rel=1e-5, abs=1e-7)
    assert KL | RATIOS | {"kl/dead"} <= first["numbers"].keys()
    assert first["one rank had nothing"] == second["one rank had nothing"] != {}
    assert first["one rank had nothing"] != first["numbers"]


@pytest.mark.slow
def test_two_processes_train_as_without_it(ranks):
    for each in ranks:
        assert torch.equal(each["trained"], each["trained unwatched"])
        assert each["trained rows"] == 3
        assert each["gradient ratio"] > 0
