"""Tokens and groups left out of the KL by real trainers, and what is refused before training."""

from __future__ import annotations

import pytest
import torch
from tiny_trl import loss_and_gradients, micro_batch
from transformers import AddedToken

from kl_plugins.errors import ConfigError
from kl_plugins.integration.leave_out import LeaveOut, equal_reward_rows, resolve_leave_out
from kl_plugins.integration.tokenizers import token_classes
from kl_plugins.trl import GMPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

TRAINERS = pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer, GMPOTrainer])

BOTH = pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])


def lines(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


@TRAINERS
def test_a_run_says_what_is_left_out(make_trainer, cls):
    seen = []

    class Watched(cls):
        def _compute_loss(self, model, inputs):
            self.micro_batch = inputs
            return super()._compute_loss(model, inputs)

        def compute_kl_terms(self, **tensors):
            terms = super().compute_kl_terms(**tensors)
            ends = (self.micro_batch["completion_ids"] == 1) & self.micro_batch["completion_mask"].bool()
            assert torch.equal(terms.left_out, ends)
            seen.append((int(ends.sum()), int(terms.mask.sum())))
            return terms

    trainer = make_trainer(Watched, config=type(make_trainer(cls).args), kl="k1_in_reward", kl_leave_out=["eos"])
    trainer.train()
    assert sum(ends for ends, _ in seen) > 0
    shares = lines(trainer, "kl/left_out")
    assert shares == pytest.approx([ends / tokens for ends, tokens in seen])
    assert all(torch.isfinite(torch.tensor(lines(trainer, "kl/left_out_k1"))))


@TRAINERS
def test_everything_left_out_is_no_gradient(make_trainer, cls):
    """All tokens but the KL's value stay in the policy loss; with advantages of 0 nothing is left to learn."""
    trainer = make_trainer(cls, kl="k2_as_loss", kl_leave_out=[f"id:{index}" for index in range(16)])
    batch = micro_batch(trainer)
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    assert loss_and_gradients(trainer, batch)[1].abs().max() == 0
    with_kl = make_trainer(cls, kl="k2_as_loss")
    assert loss_and_gradients(with_kl, batch)[1].abs().max() > 0


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
@pytest.mark.parametrize("baseline", [None, "leave_one_out"])
def test_groups_of_equal_rewards(make_trainer, cls, baseline):
    """Groups are told apart before TRL shuffles the rows; where rewards differ the KL is what it was."""
    seen = []

    def by_group(completions, prompts, **kwargs):
        return [float(prompt[0] in "0123") * (index % 3) for index, prompt in enumerate(prompts)]

    class Watched(cls):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            prompts = [self.processing_class.decode(ids) for ids in output["prompt_ids"]]
            expected = [not any(digit in prompt[: prompt.index("+")] for digit in "0123") for prompt in prompts]
            assert output["kl_equal_rewards"].tolist() == expected
            return output

        def _compute_loss(self, model, inputs):
            self.micro_batch = inputs
            return super()._compute_loss(model, inputs)

        def compute_kl_terms(self, **tensors):
            terms = super().compute_kl_terms(**tensors)
            equal = self.micro_batch["kl_equal_rewards"]
            assert torch.equal(terms.left_out, terms.mask & equal[:, None])
            assert terms.score_coefficient[equal].abs().max() == 0 if equal.any() else True
            seen.append(equal.float().mean().item())
            return terms

    trainer = make_trainer(
        Watched,
        config=type(make_trainer(cls).args),
        kl="k1_in_reward",
        kl_baseline=baseline,
        kl_leave_out_equal_rewards=True,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        max_steps=3,
    )
    trainer.reward_funcs = [by_group]
    trainer.train()
    assert 0 < sum(seen) / len(seen) < 1
    assert any(lines(trainer, "kl/left_out"))


def test_the_first_token(make_trainer):
    trainer = make_trainer(GRPOTrainer, kl="k1_in_reward", kl_baseline=None, kl_leave_out=["first", "eos"])
    batch = micro_batch(trainer)
    terms = trainer._terms_of(batch["old_per_token_logps"].clone().requires_grad_(), batch)
    assert terms.left_out[:, 0].all()
    assert terms.coefficient[:, 0].abs().max() > 0  # it answers for what follows


def test_the_first_token_is_the_first_that_the_policy_drew(make_trainer):
    trainer = make_trainer(GRPOTrainer, kl="k1_in_reward", kl_baseline=None, kl_leave_out=["first"])
    batch = micro_batch(trainer, ragged=False)
    tool = batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
    tool[0, :2] = tool[1, 1:3] = tool[2] = 0
    terms = trainer._terms_of(batch["old_per_token_logps"], batch)
    assert torch.equal(terms.mask, tool.bool())
    assert terms.left_out.nonzero().tolist() == [[0, 2], [1, 0], *([row, 0] for row in range(3, 8))]


@BOTH
def test_a_left_out_token_that_the_reference_cannot_score(make_trainer, cls):
    trainer = make_trainer(cls, kl="k1_in_reward", kl_baseline=None, kl_leave_out=["first"])
    batch = micro_batch(trainer)
    wanted = loss_and_gradients(trainer, batch)
    batch["ref_per_token_logps"][:, 0] = -torch.inf
    found = loss_and_gradients(trainer, batch)
    assert torch.equal(found[1], wanted[1])
    batch["ref_per_token_logps"][:, 1] = -torch.inf
    with pytest.raises(ValueError, match="not finite"):
        loss_and_gradients(trainer, batch)


def test_special_tokens_are_also_those_added_as_such(make_trainer):
    tokenizer = make_trainer(GRPOTrainer).processing_class
    tokenizer.add_tokens([AddedToken("<turn>", special=True), AddedToken("<word>", special=False)])
    turn, word = tokenizer.convert_tokens_to_ids(["<turn>", "<word>"])
    assert turn not in tokenizer.all_special_ids
    assert resolve_leave_out(["special"], tokenizer=tokenizer, eos_token_id=None).token_ids == (0, 1, turn)
    assert token_classes(tokenizer, None) == [2, 1, *[0] * 14, 2, 0]
    assert word == turn + 1


def test_masks_of_the_resolved_words(make_trainer):
    tokenizer = make_trainer(GRPOTrainer).processing_class
    found = resolve_leave_out(
        ["eos", "special", "first", "12", "-", "text:5", "id:9"], tokenizer=tokenizer, eos_token_id=[1, 5]
    )
    assert found == LeaveOut(token_ids=(0, 1, 5, 7, 9, 12, 13), first=True)
    ids = torch.tensor([[2, 12, 1, 0], [3, 3, 3, 3]])
    masks = found.masks(ids, torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]), rows=torch.tensor([False, True]))
    assert masks["left_out_tokens"].tolist() == [[False, True, True, True], [False] * 4]
    assert masks["left_out_positions"].tolist() == [[True, False, False, False], [True] * 4]
    first = LeaveOut(first=True).masks(ids, torch.tensor([[0, 1, 0, 1], [0] * 4]))["left_out_positions"]
    assert first.nonzero().tolist() == [[0, 1]]
    assert LeaveOut().masks(ids, ids) == {}


def test_equal_rewards():
    nan = float("nan")
    rewards = torch.tensor([[0.1, nan], [0.1, nan], [0.1, 0.0], [0.1 + 1e-4, 0.0], [nan, 1.0], [0.0, 1.0]])
    assert equal_reward_rows(rewards, 2).tolist() == [True, True, False, False, False, False]
    assert equal_reward_rows(rewards[:, 0], 3).tolist() == [True] * 3 + [False] * 3
    assert equal_reward_rows(torch.tensor([0.1 + 0.7, 0.8, 1.0, -1.0]), 2).tolist() == [True, True, False, False]
    assert equal_reward_rows(torch.tensor([-1e6, -1e6 + 0.0625, 0.0, 1e-7]), 2).all()
    assert not equal_reward_rows(rewards, 1).any()  # a group of one says nothing


def half(completions, **kwargs):
    return [0.25 + 0.1 * (index % 3) for index in range(len(completions))]


def rest(completions, **kwargs):
    return [0.75 - 0.1 * (index % 3) for index in range(len(completions))]


@pytest.mark.parametrize(("weights", "equal"), [([1.0, 1.0], True), ([1.0, 0.0], False), ([1.0, 0.5], False)], ids=str)
@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
def test_the_reward_is_the_sum_that_is_trained_on(make_trainer, cls, weights, equal):
    """Two functions that differ, but whose sum doesn't; or whose weight is 0."""
    trainer = make_trainer(cls, kl="k2_as_loss", kl_leave_out_equal_rewards=True, max_steps=1)
    trainer.reward_funcs, trainer.reward_weights = [half, rest], torch.tensor(weights)
    trainer.reward_processing_classes, trainer.reward_func_names = [None, None], ["half", "rest"]
    trainer.train()
    zero = lines(trainer, "frac_reward_zero_std")
    assert zero == [1.0 if equal else 0.0]
    assert lines(trainer, "kl/left_out") == ([1.0] if equal else [0.0])


def test_a_single_completion_in_evaluation_is_no_group(make_trainer, prompts):
    trainer = make_trainer(
        GRPOTrainer,
        kl="k2_as_loss",
        kl_leave_out_equal_rewards=True,
        num_generations_eval=1,
        eval_dataset=prompts.select(range(8)),
        per_device_eval_batch_size=8,
        learning_rate=1e-2,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_kl/k2"] > 0
    assert metrics["eval_kl/left_out"] == 0


@pytest.mark.parametrize("words", [["<nothing>"], ["99"], ["-1"], ["1+1"], ["5"], ["id:16"], ["id:x"]])
def test_what_is_no_token_is_refused(make_trainer, words):
    with pytest.raises(ConfigError, match="kl_leave_out has"):
        make_trainer(GRPOTrainer, kl="k2_as_loss", kl_leave_out=words)


def test_refused_before_a_model_is_loaded(tmp_path):
    def config(**options):
        return GRPOConfig(output_dir=str(tmp_path), beta=0.1, use_cpu=True, bf16=False, **options)

    with pytest.raises(ConfigError, match="known for k1 only; use kl_credit='token'"):
        config(kl="k2_in_reward", kl_allow_biased=True, kl_leave_out=["eos"])
    with pytest.raises(ConfigError, match=r"sums over all tokens, .*; use 'first', kl_leave_out_equal_rewards"):
        config(kl="exact_as_loss", kl_leave_out=["eos"])
    with pytest.raises(ConfigError, match="kl_leave_out set, but kl is None"):
        config(kl_leave_out=["eos"])
    assert config(kl="k3_as_loss", kl_leave_out="eos").kl_leave_out == ["eos"]
    assert config(kl="k3_as_loss", kl_leave_out=None).kl_leave_out == []
    assert config(kl="k1_in_reward", kl_leave_out=["eos"]).kl_spec().left_out_bound == 1e6
    combined = {"kl": "k1_in_reward", "kl_credit": "sequence", "kl_clip": "combined", "kl_leave_out": ["eos"]}
    with pytest.raises(ConfigError, match="a left-out token has a coefficient of its own"):
        RLOOConfig(output_dir=str(tmp_path), beta=0.1, use_cpu=True, bf16=False, **combined)
    assert config(**combined).kl_clip == "combined"
    assert config(kl="k2_in_reward", kl_allow_biased=True, kl_leave_out=["first"]).kl_leave_out == ["first"]
