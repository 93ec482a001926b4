"""The reference that was asked for is the one that rollouts are scored with, also once it moves and after a resume."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_trl import make_model, parameters
from transformers import AutoModelForCausalLM

from kl_plugins.errors import ConfigError
from kl_plugins.trl import GMPOTrainer, GRPOConfig, GRPOTrainer, RLOOTrainer

ALL = pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer, GMPOTrainer])
BOTH = pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
LORA = LoraConfig(
    r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
)
FRESH = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
FAST = {"kl": "k2_as_loss", "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("other"), seed=5, spread=10.0)


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """A model with two adapters, "default" and "sft", and where they are saved."""
    torch.manual_seed(3)
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), LORA)
    policy.add_adapter("sft", LORA)
    folder = tmp_path_factory.mktemp("adapters")
    policy.save_pretrained(folder)
    return policy, folder / "sft"


def logp_of(model, inputs):
    """(B, T) by a plain forward pass: all prompts have the same length here."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    length = inputs["completion_ids"].size(1)
    with torch.no_grad():
        logits = model(ids).logits[:, -length - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, inputs["completion_ids"][..., None]).squeeze(-1)


def recording(cls):
    """The same trainer; `seen` gets each micro-batch, `policies` the policy that the optimizer left."""

    class Recording(cls):
        def _compute_loss(self, model, inputs):
            vars(self).setdefault("seen", []).append(dict(inputs))
            return super()._compute_loss(model, inputs)

    Recording.__name__ = cls.__name__
    return Recording


def assert_scored_by(model, inputs):
    mask = inputs["completion_mask"].bool()
    found, wanted = inputs["ref_per_token_logps"], logp_of(model, inputs)
    torch.testing.assert_close(found[mask], wanted[mask], rtol=1e-4, atol=1e-4)


def differs(model, inputs):
    mask = inputs["completion_mask"].bool()
    return (inputs["ref_per_token_logps"] - logp_of(model, inputs))[mask].abs().max() > 1e-2


@ALL
@pytest.mark.parametrize("lora", [False, True])
def test_a_second_model(make_trainer, config_of, model, other, cls, lora):
    options = {"peft_config": FRESH} if lora else {}
    trainer = make_trainer(recording(cls), config=config_of(cls), kl_reference=other, **FAST, **options)
    trainer.train()
    reference = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for inputs in trainer.seen:
        assert_scored_by(reference, inputs)
        assert differs(policy, inputs)
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())


@BOTH
@pytest.mark.parametrize("asked", [None, "base", "adapter:sft", "adapter:default", "folder"])
def test_adapters(make_trainer, config_of, adapters, cls, asked):
    policy, folder = adapters
    asked = f"adapter:{folder}" if asked == "folder" else asked
    trainer = make_trainer(
        recording(cls), config=config_of(cls), policy=copy.deepcopy(policy), kl_reference=asked, max_steps=3, **FAST
    )
    trainer.train()
    assert not torch.equal(
        trainer.model.get_parameter(NAME.format("default")), policy.get_parameter(NAME.format("default"))
    )
    expected = copy.deepcopy(policy)
    others = copy.deepcopy(policy)
    if asked == "base":
        expected = expected.unload()
    elif asked in (None, "adapter:default"):
        others.set_adapter("sft")
    else:
        expected.set_adapter("sft")
    for inputs in trainer.seen:
        assert_scored_by(expected, inputs)
        assert differs(others, inputs)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("default" in name for name in trained)


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.{}.weight"


@BOTH
@pytest.mark.parametrize("lora", [None, FRESH], ids=["full", "lora"])
@pytest.mark.parametrize(("every", "decay"), [(2, 0.0), (1, 0.5)], ids=["refresh", "average"])
def test_it_moves(make_trainer, config_of, model, cls, lora, every, decay):
    """By hand: the policies that the optimizer left, and what a reference makes of them."""
    trainer = make_trainer(
        recording(cls),
        config=config_of(cls),
        kl_reference_every=every,
        kl_reference_decay=decay,
        max_steps=4,
        peft_config=lora,
        **FAST,
    )

    def current():
        parameters = trainer.model.named_parameters()
        return {n: p.detach().clone() for n, p in parameters if lora is None or ".default." in n}

    reference, expected = current(), []
    move = trainer.kl_reference.on_step_end

    def on_step_end(args, state, control, **kwargs):
        nonlocal reference
        if state.global_step % every == 0:
            reference = {n: decay * reference[n] + (1 - decay) * p for n, p in current().items()}
        expected.append(reference)
        return move(args, state, control, **kwargs)

    trainer.kl_reference.on_step_end = on_step_end
    start = reference

    def with_parameters(found):
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        plain = plain if lora is None else get_peft_model(plain, lora)
        assert not plain.load_state_dict(found, strict=False).unexpected_keys
        return plain

    trainer.train()
    assert len(trainer.seen) == 4
    for step, inputs in enumerate(trainer.seen):
        assert_scored_by(with_parameters(expected[step - 1] if step else start), inputs)
    assert differs(with_parameters(start), trainer.seen[-1])


def test_decay_is_exact_in_half_precision(make_trainer):
    """In bfloat16 a thousandth of a small change would round to nothing, for ever."""
    trainer = make_trainer(
        GRPOTrainer,
        kl_reference_every=1,
        kl_reference_decay=0.999,
        model_init_kwargs={"dtype": "bfloat16"},
        **FAST,
    )
    moving = trainer.kl_reference
    name, (reference, policy) = next(iter(moving._pairs.items()))
    assert reference.dtype == torch.bfloat16
    before = reference.detach().clone()
    with torch.no_grad():
        policy.add_(0.01)
    target = policy.detach().float()
    for _ in range(1000):
        moving.move()
    wanted = before.float() * 0.999**1000 + target * (1 - 0.999**1000)
    torch.testing.assert_close(moving._exact[name], wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(reference.float(), wanted, rtol=1e-2, atol=1e-3)
    stalled = before.clone()
    for _ in range(1000):
        stalled.lerp_(policy.detach(), 0.001)
    assert (stalled.float() - wanted).abs().max() > 10 * (reference.float() - wanted).abs().max()


@BOTH
@pytest.mark.parametrize("lora", [None, FRESH], ids=["full", "lora"])
def test_a_resumed_run_goes_on_with_the_reference_it_had(make_trainer, tmp_path, cls, lora):
    options = {"kl_reference_every": 1, "kl_reference_decay": 0.5, "max_steps": 4, "peft_config": lora, **FAST}
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(cls, **options, **saving)
    whole.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert load_file(checkpoint / "kl_reference.safetensors")
    resumed = make_trainer(cls, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(parameters(resumed), parameters(whole))
    for name, tensor in whole.kl_reference._exact.items():
        assert torch.equal(resumed.kl_reference._exact[name], tensor)
    lost = tmp_path / "lost"
    shutil.copytree(checkpoint, lost)
    (lost / "kl_reference.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"holds no kl_reference\.safetensors"):
        make_trainer(cls, **options).train(resume_from_checkpoint=str(lost))


def test_a_resumed_run_goes_on_with_the_adapter_it_trained(make_trainer, adapters, tmp_path):
    """Beside the adapter that is the reference transformers doesn't load it."""
    options = {"kl_reference": "adapter:sft", "max_steps": 4, **FAST}
    whole = make_trainer(
        GRPOTrainer, policy=copy.deepcopy(adapters[0]), save_strategy="steps", save_steps=2, **options
    )
    whole.train()
    resumed = make_trainer(GRPOTrainer, policy=copy.deepcopy(adapters[0]), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(parameters(resumed), parameters(whole))


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"kl_reference": "base"}),
        ({"kl_reference": "adapter:sft"}, {"kl_reference": "adapter:default"}),
        ({"kl_reference_every": 1}, {}),
        ({"kl_reference_every": 1}, {"kl_reference_every": 2}),
    ],
    ids=str,
)
def test_a_run_is_not_resumed_with_another_reference(make_trainer, adapters, tmp_path, cls, first, second):
    common = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **FAST}
    make_trainer(cls, policy=copy.deepcopy(adapters[0]), **common, **first).train()
    resumed = make_trainer(cls, policy=copy.deepcopy(adapters[0]), **common, **second)
    with pytest.raises(ConfigError, match="resume with the reference that it had"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_checkpoint_of_trl_brings_no_reference_of_its_own(make_trainer, adapters, tmp_path):
    """TRL's copy of the trained adapter is in it, and is what TRL would score with."""
    common = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    make_trainer(GRPOTrainer, config=trl.GRPOConfig, policy=copy.deepcopy(adapters[0]), **common).train()
    assert (tmp_path / "checkpoint-1" / "ref").is_dir()
    resumed = make_trainer(
        recording(GRPOTrainer),
        config=GRPOConfig,
        policy=copy.deepcopy(adapters[0]),
        kl="k2_as_loss",
        kl_reference="base",
        **common,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for inputs in resumed.seen:
        assert_scored_by(copy.deepcopy(adapters[0]).unload(), inputs)


def test_half_precision_is_resumed_as_it_was(make_trainer, tmp_path):
    options = {"kl_reference_every": 2, "kl_reference_decay": 0.5, "model_init_kwargs": {"dtype": "bfloat16"}, **FAST}
    whole = make_trainer(GRPOTrainer, max_steps=2, save_strategy="steps", save_steps=2, **options)
    whole.train()
    resumed = make_trainer(GRPOTrainer, max_steps=3, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))  # step 3 moves nothing
    start = make_trainer(GRPOTrainer, **options)
    for name, (reference, _) in resumed.kl_reference._pairs.items():
        assert torch.equal(reference, whole.kl_reference._pairs[name][0])
    assert any(
        not torch.equal(reference, start.kl_reference._pairs[name][0])
        for name, (reference, _) in resumed.kl_reference._pairs.items()
    )


def test_as_trls_own_average(make_trainer, config_of):
    """TRL's sync_ref_model, which PEFT has not, is the same reference."""
    common = {"max_steps": 4, "learning_rate": 1e-2}
    theirs = make_trainer(
        GRPOTrainer,
        kl="k2_as_loss",
        sync_ref_model=True,
        ref_model_mixup_alpha=0.25,
        ref_model_sync_steps=2,
        **common,
    )
    theirs.train()
    ours = make_trainer(GRPOTrainer, kl="k2_as_loss", kl_reference_every=2, kl_reference_decay=0.75, **common)
    ours.train()
    torch.testing.assert_close(parameters(ours), parameters(theirs), rtol=1e-4, atol=1e-6)
    fixed = make_trainer(GRPOTrainer, kl="k2_as_loss", **common)
    fixed.train()
    assert (parameters(fixed) - parameters(theirs)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_reference_every": 0}, "at least 1"),
        ({"kl_reference_every": 1.5}, "at least 1"),
        ({"kl_reference_decay": "0.9"}, r"in \[0, 1\)"),
        ({"kl_reference": ["a"]}, "was expected"),
        ({"kl_reference_every": 1, "kl_reference_decay": 1.0}, r"in \[0, 1\)"),
        ({"kl_reference_decay": 0.9}, "set kl_reference_every"),
        ({"kl_reference_every": 1, "sync_ref_model": True}, "sync_ref_model"),
        ({"kl_reference": "base", "kl_reference_every": 1}, "leave one out"),
        ({"kl": None, "kl_reference": "base"}, "kl_reference set, but kl is None"),
    ],
)
def test_refused_before_a_model_is_loaded(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        GRPOConfig(**{"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "beta": 0.1, **FAST, **options})


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, other):
    """A model whose tokenizer has two words exchanged."""
    folder = tmp_path_factory.mktemp("foreign") / "model"
    shutil.copytree(other, folder)
    path = folder / "tokenizer.json"
    text = path.read_text().replace('"7"', '"x"').replace('"8"', '"7"').replace('"x"', '"8"')
    path.write_text(text)
    return str(folder)


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        ("base", {}, "this model has none"),
        ("adapter:sft", {}, "this model has none"),
        ("adapter:nothing", {"peft_config": FRESH}, "none can be loaded"),
        ("adapter:ref", {"peft_config": FRESH}, "save that adapter under another"),
        ("nowhere/at-all", {}, "can't be loaded"),
        ("other", {"peft_config": FRESH, "kl_reference_every": 1}, "an adapter moves"),
        ("other", {"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32"),
        ("foreign", {}, "differ in 2 tokens"),
    ],
)
def test_refused_before_training(make_trainer, other, foreign, asked, options, message):
    asked = {"other": other, "foreign": foreign}.get(asked, asked)
    with pytest.raises(ConfigError, match=message):
        make_trainer(GRPOTrainer, kl_reference=asked, **FAST, **options)


def test_an_adapter_in_the_place_of_trls_reference_is_refused(make_trainer, adapters):
    policy = copy.deepcopy(adapters[0])
    policy.add_adapter("ref", LORA)
    with pytest.raises(ConfigError, match="save that adapter under another name"):
        make_trainer(GRPOTrainer, policy=policy, kl_reference="adapter:sft", **FAST)


def test_trls_own_trainer_is_untouched(make_trainer):
    trainer = make_trainer(GRPOTrainer, config=trl.GRPOConfig)
    assert trainer.ref_model is not None
    assert trainer.kl_reference is None
