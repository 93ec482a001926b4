"""Real training runs: the features of TRL's trainers that a KL term can get wrong."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig
from tiny_trl import loss_and_gradients, micro_batch, parameters
from transformers import TrainerCallback

from kl_plugins.core.terms import leave_one_out_baseline
from kl_plugins.trl import GRPOTrainer, RLOOTrainer

LOGGED = {f"kl/{name}" for name in ("k1", "k2", "k3", "loss", "ess", "weight_max", "clipped", "beta")}
BOTH = pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


@BOTH
@pytest.mark.parametrize(
    "options",
    [
        {"kl": "k2_as_loss", "num_iterations": 2},
        {"kl": "k2_as_loss", "kl_credit": "sequence", "kl_off_policy": "sequence"},
        {"kl": "k3_as_loss", "kl_coefficient_bound": 1e3, "kl_nonfinite": "drop"},
        {"kl": "k1_in_reward", "kl_baseline": "leave_one_out", "num_iterations": 2},
        {"kl": "k1_in_reward", "kl_off_policy": "prefix", "steps_per_generation": 2, "per_device_train_batch_size": 8},
        {"kl": "k2_as_loss", "kl_clip": "separate", "kl_weight_clip_mode": "mask"},
        {"kl": "k1_in_reward", "kl_credit": "sequence", "kl_clip": "combined"},
        {"kl": "k2_as_loss", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
        {"kl": "k1_as_loss", "kl_allow_biased": True},
        {"kl": "k3_in_reward", "kl_allow_biased": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_trains_and_logs_under_the_contracts_names(make_trainer, cls, options):
    trainer = make_trainer(cls, max_steps=3, **options)
    start = parameters(trainer)
    trainer.train()
    assert not torch.equal(parameters(trainer), start)
    assert parameters(trainer).isfinite().all()
    rows = [row for row in trainer.state.log_history if "kl/k1" in row]
    assert len(rows) == 3
    names = LOGGED if options.get("kl_clip") != "combined" else {"kl/k1", "kl/k2", "kl/k3", "kl/beta"}
    for row in rows:
        assert names <= set(row)
        assert all(math.isfinite(row[name]) for name in names)
        assert row["kl/beta"] == 0.1
        assert 0 < row.get("kl/ess", 1) <= 1 + 1e-6
    assert rows[0]["kl/k3"] == pytest.approx(0, abs=1e-6)  # the policy starts as its reference
    assert rows[-1]["kl/k3"] > 1e-3


def test_a_larger_beta_holds_the_policy_closer(make_trainer):
    """The term does what it is for: the same seed, 15 steps, k3 to the reference as TRL itself logs it."""
    kls = {}
    for beta in (1e-4, 3.0):
        trainer = make_trainer(GRPOTrainer, kl="k2_as_loss", beta=beta, max_steps=15)
        trainer.train()
        kls[beta] = sum(logged(trainer, "kl")[-5:]) / 5
    assert kls[3.0] < 0.5 * kls[1e-4]


def test_logged_values_are_right(make_trainer):
    """A constant log-ratio of 7 is logged as 7, with uneven lengths and a stale old policy."""
    trainer = make_trainer(GRPOTrainer, kl="k2_as_loss")
    batch = micro_batch(trainer)
    with torch.no_grad():
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        logp, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, 6)
    batch["ref_per_token_logps"] = logp - 7
    batch["old_per_token_logps"] = logp - torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 3.0])  # exp(3) > 10: truncated
    loss_and_gradients(trainer, batch)
    metrics = trainer.kl_metrics()
    mask = batch["completion_mask"]
    late = (mask[:, 5].sum() / mask.sum()).item()
    assert late > 0
    assert metrics["kl/k1"] == pytest.approx(7, rel=1e-5)
    assert metrics["kl/k2"] == pytest.approx(24.5, rel=1e-5)
    assert metrics["kl/k3"] == pytest.approx(math.exp(-7) + 6, rel=1e-5)
    assert metrics["kl/loss"] == pytest.approx(0.1 * 24.5, rel=1e-5)
    assert metrics["kl/weight_max"] == pytest.approx(10)
    assert metrics["kl/clipped"] == pytest.approx(late, rel=1e-5)
    weights = torch.where(torch.arange(6) == 5, 10.0, 1.0) * mask
    ess = weights.sum() ** 2 / weights.square().sum() / mask.sum()
    assert metrics["kl/ess"] == pytest.approx(ess.item(), rel=1e-5)


@pytest.mark.parametrize("off_policy", ["token", "prefix", "sequence"])
def test_micro_batches_are_logged_as_one(make_trainer, off_policy):
    """One row at a time, one of them fully masked: means, effective sample size and maximum are those of the whole."""
    trainer = make_trainer(GRPOTrainer, kl="k1_in_reward", kl_baseline=None, kl_off_policy=off_policy)
    batch = micro_batch(trainer)
    batch["completion_mask"][2] = 0
    loss_and_gradients(trainer, batch)
    whole = trainer.kl_metrics()
    for row in range(8):
        loss_and_gradients(trainer, {name: x[row : row + 1] if x.dim() else x for name, x in batch.items()})
    assert trainer.kl_metrics() == pytest.approx(whole, rel=1e-4)
    assert whole["kl/ess"] < 0.99
    assert trainer.kl_metrics() == {}


def test_combined_logs_no_weights_of_its_own(make_trainer):
    trainer = make_trainer(GRPOTrainer, kl="k1_in_reward", kl_baseline=None, kl_clip="combined")
    loss_and_gradients(trainer, micro_batch(trainer))
    assert set(trainer.kl_metrics()) == {"kl/k1", "kl/k2", "kl/k3", "kl/dropped", "kl/beta"}


@BOTH
def test_beta_annealed_to_zero_is_trl_without_kl(make_trainer, cls):
    class Anneal(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.beta = 0.0

    trainer = make_trainer(cls, kl="k1_in_reward", kl_baseline="leave_one_out", max_steps=3, callbacks=[Anneal()])
    trainer.train()
    assert ["kl/k1" in row for row in trainer.state.log_history[:3]] == [True, False, False]


@BOTH
def test_truncated_checkpointed_bf16_and_resumed(make_trainer, cls, tmp_path):
    options = {"kl": "k1_in_reward", "kl_baseline": "leave_one_out", "gradient_checkpointing": True, "save_steps": 2}
    options |= {"save_strategy": "steps", "num_iterations": 2, "model_init_kwargs": {"dtype": "bfloat16"}}
    if cls is GRPOTrainer:
        options["mask_truncated_completions"] = True
    make_trainer(cls, max_steps=2, **options).train()
    trainer = make_trainer(cls, max_steps=4, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert all(math.isfinite(value) for value in logged(trainer, "kl/k1") + logged(trainer, "kl/ess"))
    assert parameters(trainer).isfinite().all()


@BOTH
def test_what_can_be_dropped(make_trainer, cls):
    """A token that the reference can't score is left out; a NaN of the policy would reach TRL's own loss: it stops."""
    trainer = make_trainer(cls, kl="k2_as_loss", kl_nonfinite="drop")
    batch = micro_batch(trainer, ragged=False)
    batch["ref_per_token_logps"][1, 2] = torch.nan
    loss, gradients = loss_and_gradients(trainer, batch)
    assert loss.isfinite()
    assert gradients.isfinite().all()
    assert trainer.kl_metrics()["kl/dropped"] == 1
    with torch.no_grad():
        trainer.model.lm_head.weight[5] = torch.nan
    with pytest.raises(ValueError, match="the policy's log-probs hold a NaN"):
        loss_and_gradients(trainer, batch)


def test_a_token_far_below_the_reference_costs_neither_the_step_nor_a_nan(make_trainer):
    trainer = make_trainer(GRPOTrainer, kl="k3_as_loss")
    batch = micro_batch(trainer)
    batch["ref_per_token_logps"][0, 0] += 100
    _, gradients = loss_and_gradients(trainer, batch)
    assert gradients.norm().isfinite()
    assert gradients.norm() > 1


def test_accumulation_does_not_change_the_gradient(make_trainer):
    """Two micro-batches of 4 rows, each divided by 2 as TRL does, are one of 8 (loss_type grpo: a mean over rows)."""
    trainer = make_trainer(GRPOTrainer, kl="k1_in_reward", loss_type="grpo", kl_off_policy="prefix")
    batch = micro_batch(trainer)
    batch["kl_baseline"] = torch.randn(8, 6, generator=torch.Generator().manual_seed(7))  # of the rollout's groups
    _, whole = loss_and_gradients(trainer, batch)
    halves = []
    for rows in (slice(0, 4), slice(4, 8)):
        half = {name: x[rows] if x.dim() else x for name, x in batch.items()}
        halves.append(loss_and_gradients(trainer, half)[1])
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole, rtol=1e-4, atol=1e-6)


@BOTH
def test_evaluation(make_trainer, prompts, cls):
    options = {"per_device_eval_batch_size": 4, "num_generations_eval": 2, "kl_baseline": "leave_one_out"}
    trainer = make_trainer(cls, kl="k1_in_reward", eval_dataset=prompts.select(range(4)), **options)
    metrics = trainer.evaluate()
    assert {f"eval_{name}" for name in LOGGED} <= set(metrics | trainer.state.log_history[-1])


def test_evaluation_with_one_completion_a_prompt_has_no_baseline(make_trainer, prompts):
    trainer = make_trainer(
        GRPOTrainer,
        kl="k1_in_reward",
        kl_baseline="leave_one_out",
        eval_dataset=prompts.select(range(4)),
        num_generations_eval=1,
        per_device_eval_batch_size=4,
    )
    trainer.evaluate()


def test_a_synced_reference_is_the_one_that_is_used(make_trainer):
    sync = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    for cls in (GRPOTrainer, RLOOTrainer):
        for options, moves in ((sync, False), ({}, True)):
            trainer = make_trainer(cls, kl="k2_as_loss", max_steps=4, **options)
            trainer.train()
            assert (max(logged(trainer, "kl/k2")) > 1e-3) == moves  # synced: reference = policy after every step


@BOTH
def test_lora_takes_the_model_without_its_adapter_as_reference(make_trainer, cls):
    lora = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(cls, kl="k2_as_loss", peft_config=lora, max_steps=4, learning_rate=5e-2)
    trainer.train()
    assert trainer.ref_model is None
    assert logged(trainer, "kl/k2")[0] == pytest.approx(0, abs=1e-6)
    assert logged(trainer, "kl/k2")[-1] > 1e-3


@BOTH
def test_the_baseline_is_that_of_whole_groups_also_after_the_shuffle(make_trainer, cls):
    """TRL shuffles the rows of a rollout before it splits them: the baseline was computed before that."""
    trainer = make_trainer(
        cls, kl="k1_in_reward", kl_baseline="leave_one_out", steps_per_generation=2, per_device_train_batch_size=8
    )
    shift_reference(trainer)
    rollout = trainer._generate_and_score_completions([{"prompt": f"{a}+1="} for a in range(4) for _ in range(4)])
    logp = rollout.get("old_per_token_logps")
    if logp is None:  # on-policy GRPO keeps none
        logp = trainer._rollout_logp(rollout)
    wanted = leave_one_out_baseline(
        trainer.kl_spec,
        logp=logp,
        ref_logp=rollout["ref_per_token_logps"],
        mask=rollout["completion_mask"],
        group_size=4,
    )
    assert wanted.abs().max() > 0.05
    torch.testing.assert_close(rollout["kl_baseline"], wanted)

    trainer._step, trainer._buffered_inputs = 0, None
    trainer.model.train()
    first = trainer._prepare_inputs([{"prompt": f"{a}+1="} for a in range(4) for _ in range(4)])
    assert first["kl_baseline"].shape == first["completion_ids"].shape  # it was shuffled and split with the rows


def test_the_baseline_of_masked_and_unscored_tokens(make_trainer):
    """A tool's tokens are in nobody's baseline; one that the engine did not score has a log-ratio of 0 in it."""
    trainer = make_trainer(GRPOTrainer, kl="k1_in_reward", kl_baseline="leave_one_out", kl_leave_out=["id:5"])
    batch = micro_batch(trainer)
    batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
    batch["tool_mask"][1:3, 1:3] = 0
    logp, ref_logp = batch["old_per_token_logps"].clone(), batch["ref_per_token_logps"]
    logp[0, 0] = logp[5, 0] = torch.nan
    found = trainer._rollout_baseline(logp, batch)
    scored = logp.clone()
    scored[0, 0], scored[5, 0] = ref_logp[0, 0], ref_logp[5, 0]
    masks = {"mask": batch["completion_mask"] * batch["tool_mask"], "left_out_tokens": batch["completion_ids"] == 5}
    wanted = leave_one_out_baseline(trainer.kl_spec, logp=scored, ref_logp=ref_logp, group_size=4, **masks)
    torch.testing.assert_close(found, wanted)
    for name in masks:  # twins
        other = masks | {name: batch["completion_mask"] if name == "mask" else masks[name] & False}
        twin = leave_one_out_baseline(trainer.kl_spec, logp=scored, ref_logp=ref_logp, group_size=4, **other)
        assert (twin - wanted).abs().max() > 0.05


def test_groups_of_an_evaluation_have_its_own_size(make_trainer):
    trainer = make_trainer(GRPOTrainer, kl="k1_in_reward", kl_baseline="leave_one_out", num_generations_eval=2)
    batch = micro_batch(trainer)
    for training, size in ((True, 4), (False, 2)):
        trainer.model.train(training)
        found = trainer._rollout_baseline(batch["old_per_token_logps"], batch)
        wanted = leave_one_out_baseline(
            trainer.kl_spec,
            logp=batch["old_per_token_logps"],
            ref_logp=batch["ref_per_token_logps"],
            mask=batch["completion_mask"],
            group_size=size,
        )
        torch.testing.assert_close(found, wanted)


@BOTH
def test_the_policy_moves_on_but_the_baseline_stays(make_trainer, cls):
    """num_iterations > 1: u_t is recomputed with the current policy, the baseline of the rollout is kept."""
    trainer = make_trainer(cls, kl="k1_in_reward", kl_credit="to_go", kl_baseline="leave_one_out")
    batch = micro_batch(trainer)
    batch["kl_baseline"] = torch.full_like(batch["ref_per_token_logps"], 0.25)
    terms = []
    compute = trainer.compute_kl_terms

    def recorded(**tensors):
        terms.append(compute(**tensors))
        return terms[-1]

    trainer.compute_kl_terms = recorded
    for _ in range(2):
        loss_and_gradients(trainer, batch)
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.mul_(1.01)
    assert not torch.equal(terms[0].log_ratio, terms[1].log_ratio)
    to_go = terms[1].log_ratio.flip(-1).cumsum(-1).flip(-1) - 0.25
    torch.testing.assert_close(terms[1].coefficient, to_go * batch["completion_mask"])


def shift_reference(trainer):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in trainer.ref_model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
