"""Exact KLs through TRL's real trainers, against all logits written out and autograd."""

from __future__ import annotations

import math

import pytest
import torch
import trl
from accelerate.utils import DistributedType
from peft import LoraConfig
from tiny_trl import BETA, kl_part, loss_and_gradients, micro_batch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from trl.kernels import chunked_logprob
from trl.trainer import utils as host

from kl_plugins import ConfigError, PatchError, leave_one_out_baseline
from kl_plugins.core import fused_linear_kl as heads
from kl_plugins.core.exact import ExactKL
from kl_plugins.patching import versions as hosts
from kl_plugins.trl import GMPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, exact
from kl_plugins.trl.trainer import KLTrainer

KERNEL = host._ChunkedLogProbFunction
REDUCED = {
    GRPOTrainer: lambda loss, mask: (loss * mask).sum() / mask.sum(),
    RLOOTrainer: lambda loss, mask: (loss * mask).sum(-1).mean(),
    GMPOTrainer: lambda loss, mask: ((loss * mask).sum(-1) / mask.sum(-1)).mean(),
}


def logits_of(model, batch, softcap=None, temperature=1.0, fp32=False):
    """(B, T, V), with the graph: the model's own backbone, its head multiplied out."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.base_model(ids, attention_mask=attention).last_hidden_state
    hidden = hidden[:, -batch["completion_ids"].size(1) - 1 : -1]
    head = base.get_output_embeddings()
    logits = (hidden.float() if fp32 else hidden) @ head.weight.t()
    logits = logits if head.bias is None else logits + head.bias
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature


def moved(parameters, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.dtype))


def rollout(trainer, prompts):
    """A real batch of the trainer's own, with another reference than the policy, off-policy by some noise."""
    if trainer.ref_model is None:  # PEFT: the adapters move instead
        moved((p for p in trainer.model.parameters() if p.requires_grad), 0.1, 1)
    else:
        moved(trainer.ref_model.parameters(), 0.05, 1)
    trainer.model.train()
    rows = [dict(row) for row in prompts.select(range(4)) for _ in range(4)]
    batch = trainer._generate_and_score_completions(rows)
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    with torch.no_grad():
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        logp, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, attention, batch["completion_ids"].size(1)
        )
    noise = torch.randn(logp.shape, generator=torch.Generator().manual_seed(3))
    batch["old_per_token_logps"] = logp + 0.3 * noise
    batch["old_logps"] = (batch["old_per_token_logps"] * batch["completion_mask"]).sum(-1)
    return batch


def reference_logits(trainer, batch, **how):
    with torch.no_grad():
        if trainer.ref_model is not None:
            return logits_of(trainer.ref_model, batch, **how)
        with trainer.model.disable_adapter():
            return logits_of(trainer.model, batch, **how)


def dense(trainer, batch, *, in_reward=True, forward=False, **how):
    """The gradient of the naive term in every trainable parameter, with token weights and the batch's baseline.

    With GRPO's treatment of rewards, 1 - 1/G of it.
    """
    trainer.model.zero_grad()
    mask = batch["completion_mask"].bool()
    p = logits_of(trainer.model, batch, **how).log_softmax(-1)
    r = reference_logits(trainer, batch, **how).log_softmax(-1)
    kl = (r.exp() * (r - p)).sum(-1) if forward else (p.exp() * (p - r)).sum(-1)
    kl = torch.where(mask, kl, 0.0)
    logp = p.gather(-1, batch["completion_ids"][..., None]).squeeze(-1)
    loss = kl
    if in_reward:
        c = kl.detach().flip(-1).cumsum(-1).flip(-1) - kl.detach() - batch.get("kl_baseline", 0)
        rho = (logp.detach() - batch["old_per_token_logps"]).exp().clamp(max=10)
        loss = loss + rho * c * (logp - logp.detach())
        loss = loss * (1 - 1 / trainer.num_generations if trainer.kl_spec.baseline == "group_mean" else 1)
    (BETA * REDUCED[type(trainer)](loss, mask)).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def assert_close(found, wanted, tolerance=1e-4):
    assert wanted.norm() > 1e-3
    assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(heads, "ROWS", 7)
    monkeypatch.setattr(heads, "COLUMNS", 5)
    yield
    assert host._ChunkedLogProbFunction is KERNEL  # what TRL is called through is put back


NAMES = {
    "exact_as_loss": {"in_reward": False},
    "exact_in_reward": {},
    "exact_forward_as_loss": {"in_reward": False, "forward": True},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cls", REDUCED)
def test_the_term_is_the_naive_one_and_trains(make_trainer, prompts, covers, cls, name):
    covers("trl", cls.__name__, f"{name} {'to_go' if 'reward' in name else 'token'}")
    trainer = make_trainer(cls, kl=name, num_iterations=2, max_steps=4)
    batch = rollout(trainer, prompts)
    assert ("kl_baseline" in batch) == (name == "exact_in_reward")
    _, found = kl_part(trainer, batch)
    assert_close(found, dense(trainer, batch, **NAMES[name]))
    for other, how in NAMES.items():  # the twin
        wanted = dense(trainer, batch, **how)
        assert other == name or (found - wanted).norm() > 1e-2 * wanted.norm()

    trainer = make_trainer(cls, kl=name, num_iterations=2, max_steps=4, steps_per_generation=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "kl/loss" in entry]
    assert len(logs) == 4
    assert all(math.isfinite(value) for entry in logs for key, value in entry.items() if key.startswith("kl/"))
    assert logs[-1]["kl/loss"] > 0  # an exact divergence is never negative
    assert trainer._exact.scored == ()  # nothing of a forward pass is kept


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
def test_nothing_is_kept_once_beta_is_0(make_trainer, cls):
    schedule = {"kl_controller": "linear", "kl_beta_end": 0.0, "kl_beta_steps": 1}
    trainer = make_trainer(cls, kl="exact_in_reward", num_iterations=2, max_steps=4, **schedule)
    trainer.train()
    assert trainer.beta == 0
    assert trainer._exact.scored == ()


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
def test_in_float64_it_is_exact(make_trainer, prompts, cls):
    trainer = make_trainer(cls, kl="exact_as_loss")
    trainer.model.double()
    trainer.ref_model.double()
    batch = rollout(trainer, prompts)
    _, found = kl_part(trainer, batch)
    error = (found - (wanted := dense(trainer, batch, in_reward=False))).norm() / wanted.norm()
    assert error < 1e-6  # what Llama's norms, which are in float32, leave of it


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
def test_the_temperature_is_that_of_the_sampling(make_trainer, prompts, cls):
    trainer = make_trainer(cls, kl="exact_in_reward", temperature=0.6)
    batch = rollout(trainer, prompts)
    _, found = kl_part(trainer, batch)
    assert_close(found, dense(trainer, batch, temperature=0.6))
    wrong = dense(trainer, batch)
    assert (found - wrong).norm() > 1e-2 * wrong.norm()


@pytest.fixture(scope="module")
def variant(model, tmp_path_factory):
    """The tiny model with another configuration, saved."""

    def make(dtype=torch.float32, **config):
        folder = str(tmp_path_factory.mktemp("variant"))
        made = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        for name, value in config.items():
            setattr(made.config, name, value)
        if config.get("tie_word_embeddings"):
            made.tie_weights()
        made.save_pretrained(folder)
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
def test_logit_softcapping(make_trainer, prompts, variant, cls):
    trainer = make_trainer(cls, policy=variant(final_logit_softcapping=1.5), kl="exact_in_reward")
    batch = rollout(trainer, prompts)
    _, found = kl_part(trainer, batch)
    assert_close(found, dense(trainer, batch, softcap=1.5))
    wrong = dense(trainer, batch)
    assert (found - wrong).norm() > 1e-2 * wrong.norm()


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
def test_tied_embeddings(make_trainer, prompts, variant, cls):
    trainer = make_trainer(cls, policy=variant(tie_word_embeddings=True), kl="exact_in_reward")
    assert trainer.model.lm_head.weight is trainer.model.model.embed_tokens.weight
    batch = rollout(trainer, prompts)
    _, found = kl_part(trainer, batch)
    assert_close(found, dense(trainer, batch))


def test_a_head_in_float32_on_a_model_in_bfloat16(make_trainer, prompts):
    trainer = make_trainer(
        GRPOTrainer, kl="exact_as_loss", cast_lm_head_to_fp32=True, model_init_kwargs={"dtype": "bfloat16"}
    )
    batch = rollout(trainer, prompts)
    _, found = kl_part(trainer, batch)
    wanted = dense(trainer, batch, in_reward=False, fp32=True)
    assert_close(found.float(), wanted.float(), 8e-2)  # the body's gradients are in bfloat16
    head = trainer.model.lm_head.weight
    trainer.model.zero_grad()
    trainer.kl_spec, spec = None, trainer.kl_spec
    trainer.beta = 0.0
    loss_and_gradients(trainer, batch)
    without = head.grad.clone()
    trainer.kl_spec, trainer.beta = spec, BETA
    loss_and_gradients(trainer, batch)
    ours = head.grad - without
    dense(trainer, batch, in_reward=False, fp32=True)
    assert head.grad.dtype == torch.float32
    assert_close(ours, head.grad, 1e-4)


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
def test_under_autocast_heads_round_as_trls_kernel(make_trainer, prompts, cls):
    trainer = make_trainer(cls, kl="exact_in_reward", bf16=True)
    batch = rollout(trainer, prompts)
    assert trainer._exact.reference_head.dtype == torch.bfloat16
    assert trainer._exact.reference_head.weight.dtype == torch.float32
    _, found = kl_part(trainer, batch)
    assert_close(found, dense(trainer, batch), 5e-2)


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}], ids=["body", "a head of its own"])
def test_peft(make_trainer, prompts, cls, more):
    """The reference is the model without its adapters, and without a head that is trained."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_alpha=16, task_type="CAUSAL_LM", **more)
    trainer = make_trainer(cls, kl="exact_in_reward", peft_config=lora)
    assert trainer.ref_model is None
    batch = rollout(trainer, prompts)
    _, found = kl_part(trainer, batch)
    assert_close(found, dense(trainer, batch))
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    assert frozen
    assert all(p.grad is None for p in frozen)


def test_no_gradient_reaches_the_reference(make_trainer, prompts):
    trainer = make_trainer(GRPOTrainer, kl="exact_in_reward")
    for p in trainer.ref_model.parameters():
        p.requires_grad_()
    batch = rollout(trainer, prompts)
    loss_and_gradients(trainer, batch)
    assert all(p.grad is None for p in trainer.ref_model.parameters())
    assert not batch["kl_ref_hidden"].requires_grad


@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
def test_the_rollout_baseline_is_that_of_the_exact_coefficients(make_trainer, prompts, cls, num_iterations):
    """GRPO scores with the old policy only if it will need it: else the baseline takes one scoring more."""
    trainer = make_trainer(cls, kl="exact_in_reward", kl_baseline="leave_one_out", num_iterations=num_iterations)
    batch = rollout(trainer, prompts)
    p = logits_of(trainer.model, batch).log_softmax(-1)
    r = reference_logits(trainer, batch).log_softmax(-1)
    mask = batch["completion_mask"]
    kl = ((p.exp() * (p - r)).sum(-1) * mask).detach()
    none = torch.zeros_like(kl)
    wanted = leave_one_out_baseline(
        trainer.kl_spec,
        logp=none,
        ref_logp=none,
        mask=mask,
        group_size=4,
        exact=ExactKL(value=kl, outside=none.bool(), of="reverse_kl"),
    )
    torch.testing.assert_close(batch["kl_baseline"], wanted, rtol=1e-4, atol=1e-6)
    assert wanted.abs().sum() > 0
    _, found = kl_part(trainer, batch)
    assert_close(found, dense(trainer, batch))


def test_micro_batches_of_a_rollout_add_up(make_trainer, prompts):
    """Shuffled and split by TRL itself."""
    trainer = make_trainer(RLOOTrainer, kl="exact_in_reward")
    batch = rollout(trainer, prompts)
    _, whole = kl_part(trainer, batch)
    parts = host.split_tensor_dict(host.shuffle_sequence_dict(batch), 4)
    assert parts[0]["kl_ref_hidden"].shape == (4, *batch["kl_ref_hidden"].shape[1:])
    split = sum(kl_part(trainer, part)[1] for part in parts) / 4
    assert_close(split, whole)


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"temperature": 0.6}], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
def test_one_pass_makes_what_two_make(make_trainer, prompts, variant, monkeypatch, cls, name, options):
    """TRL's log-probs, entropies and loss, and the whole gradient, with the KL made apart and in the same pass."""
    config = {"final_logit_softcapping": options["softcap"]} if "softcap" in options else {}
    more = {"temperature": options["temperature"]} if "temperature" in options else {}
    trainer = make_trainer(cls, policy=variant(**config), kl=name, **more)
    batch = rollout(trainer, prompts)
    mask = batch["completion_mask"]
    shown, own = [], KLTrainer._get_per_token_logps_and_entropies

    def see(self, *args, **kwargs):
        shown.append(own(self, *args, **kwargs)[:2])
        return *shown[-1], None

    monkeypatch.setattr(KLTrainer, "_get_per_token_logps_and_entropies", see)
    loss, gradient = loss_and_gradients(trainer, batch)
    calls = []
    with monkeypatch.context() as unfused:
        unfused.setattr(exact, "OUTPUTS", ())
        unfused.setattr(KERNEL, "apply", lambda *args, apply=KERNEL.apply: calls.append(args) or apply(*args))
        apart_loss, apart = loss_and_gradients(trainer, batch)
    assert len(calls) == 1  # the twin: only then was it TRL's kernel that scored
    for a, b in zip(*shown, strict=True):
        torch.testing.assert_close(a * mask, b * mask, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, apart_loss, rtol=1e-5, atol=1e-6)
    assert_close(gradient, apart, 1e-5)


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"temperature": 0.6}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_hosts_kernel_of_gpus(make_trainer, prompts, variant, monkeypatch, name, options):
    """Where TRL's kernels are Triton's, a KL in a pass of its own is TRL's; here as its kernel does it in torch."""
    config = {"final_logit_softcapping": options["softcap"]} if "softcap" in options else {}
    more = {"temperature": options["temperature"]} if "temperature" in options else {}
    trainer = make_trainer(GRPOTrainer, policy=variant(**config), kl=name, **more)
    monkeypatch.setattr(exact, "OUTPUTS", ())
    batch = rollout(trainer, prompts)
    _, ours = kl_part(trainer, batch)
    monkeypatch.setattr(exact, "TRITON", ("cpu",))
    monkeypatch.setattr(exact, "fused_linear_kl", None)
    _, theirs = kl_part(trainer, batch)
    assert_close(theirs, ours, 1e-5)
    assert_close(theirs, dense(trainer, batch, **NAMES[name], **options))
    monkeypatch.setitem(exact.BETAS, "reverse_kl", 0.0)  # the twin
    monkeypatch.setitem(exact.BETAS, "forward_kl", 1.0)
    _, wrong = kl_part(trainer, batch)
    assert (wrong - theirs).norm() > 1e-2 * theirs.norm()


@pytest.mark.parametrize("fallback", [False, True])
def test_the_hosts_kernel_of_gpus_in_half_precision(make_trainer, prompts, monkeypatch, fallback):
    """Under autocast, what GPUs train with; where a token is excluded, ours makes the KL."""
    trainer = make_trainer(GRPOTrainer, kl="exact_as_loss", bf16=True)
    if fallback:
        for model in (trainer.model, trainer.ref_model):
            model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)))
            with torch.no_grad():
                model.lm_head.bias[-1] = -math.inf
    batch = rollout(trainer, prompts)
    _, ours = kl_part(trainer, batch)
    calls, own = [], exact.fused_linear_kl
    monkeypatch.setattr(exact, "TRITON", ("cpu",))
    monkeypatch.setattr(exact, "fused_linear_kl", lambda *args, **more: calls.append(args) or own(*args, **more))
    _, theirs = kl_part(trainer, batch)
    assert bool(calls) == fallback
    assert_close(theirs, ours, 1e-6 if fallback else 3e-2)  # the gradient without the term is taken off in bfloat16


def test_an_entropy_bonus_reaches_the_gradient_of_one_pass(make_trainer, prompts, monkeypatch):
    found = {}
    for coefficient in (0.0, 0.5):
        trainer = make_trainer(GRPOTrainer, kl="exact_in_reward", entropy_coef=coefficient)
        batch = rollout(trainer, prompts)
        _, found[coefficient] = loss_and_gradients(trainer, batch)
        with monkeypatch.context() as unfused:
            unfused.setattr(exact, "OUTPUTS", ())
            _, apart = loss_and_gradients(trainer, batch)
        assert_close(found[coefficient], apart, 1e-5)
    assert (found[0.0] - found[0.5]).norm() > 1e-2 * found[0.0].norm()


def test_scoring_in_smaller_batches(make_trainer, prompts, monkeypatch):
    """A subclass may score a micro-batch by parts: each part is compared with its own rows of the reference."""
    trainer = make_trainer(GRPOTrainer, kl="exact_in_reward")
    batch = rollout(trainer, prompts)
    _, whole = loss_and_gradients(trainer, batch)
    own = KLTrainer._get_per_token_logps_and_entropies

    def by_parts(self, *args, **kwargs):
        return own(self, *args, **kwargs, batch_size=3)

    monkeypatch.setattr(KLTrainer, "_get_per_token_logps_and_entropies", by_parts)
    assert_close(loss_and_gradients(trainer, batch)[1], whole, 1e-5)
    monkeypatch.setattr(KLTrainer, "_get_per_token_logps_and_entropies", own)
    batch["kl_ref_hidden"] = batch["kl_ref_hidden"].roll(1, 0)  # the twin
    wrong = loss_and_gradients(trainer, batch)[1]
    assert (wrong - whole).norm() > 1e-3 * whole.norm()


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
def test_rows_of_completions_only(make_trainer, prompts, monkeypatch, cls):
    """As TRL has the hidden states where it has Triton."""
    trainer = make_trainer(cls, kl="exact_in_reward")
    batch = rollout(trainer, prompts)
    assert 0 < batch["completion_mask"].sum() < batch["completion_mask"].numel()
    _, wanted = loss_and_gradients(trainer, batch)
    monkeypatch.setattr(host, "_use_triton", lambda device: True)
    assert_close(loss_and_gradients(trainer, batch)[1], wanted, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_token_that_the_reference_could_not_score_is_dropped(make_trainer, prompts, name):
    trainer = make_trainer(GRPOTrainer, kl=name, kl_nonfinite="drop")
    batch = rollout(trainer, prompts)
    batch["kl_ref_hidden"][0, 0] = batch["ref_per_token_logps"][0, 0] = math.nan
    loss, gradient = loss_and_gradients(trainer, batch)
    assert loss.isfinite()
    assert gradient.isfinite().all()


class Largest(TorchDispatchMode):
    """The most elements that a tensor had which an operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else [made]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return made


def test_logits_are_never_written_out(make_trainer, variant, monkeypatch):
    vocabulary = 3000
    trainer = make_trainer(GRPOTrainer, kl="exact_in_reward", kl_baseline=None)
    for model in (trainer.model, trainer.ref_model):
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    monkeypatch.setattr(host, "_CHUNKED_LOGPROB_CHUNK_SIZE", 256)  # TRL's own tiles
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 64)
    monkeypatch.setattr(heads, "ROWS", 64)
    monkeypatch.setattr(heads, "COLUMNS", 256)
    batch = micro_batch(trainer, length=40, ragged=False)
    with torch.no_grad():
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        trainer._get_per_token_logps_and_entropies(trainer.ref_model, ids, torch.ones_like(ids), 40)
    trainer._exact.keep_reference(batch)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    with Largest() as seen:
        trainer.compute_loss(trainer.model, batch).backward()
    assert seen.elements < 8 * 40 * vocabulary / 5
    with Largest() as naive:
        dense(trainer, batch)
    assert naive.elements >= 8 * 40 * vocabulary


# What is refused, before training.


def test_options_that_are_refused(tmp_path):
    for options, says in (
        ({"sync_ref_model": True}, "sync_ref_model=True changes the reference between"),
        (
            {"kl_clip": "combined"},
            "clip='combined' was asked for, but a part of exact_in_reward's gradient is analytic",
        ),
        ({"kl_credit": "sequence"}, "credit='sequence' is not offered by exact_in_reward"),
    ):
        for config in (GRPOConfig, RLOOConfig):
            with pytest.raises(ConfigError, match=says):
                config(output_dir=str(tmp_path), use_cpu=True, bf16=False, beta=0.1, kl="exact_in_reward", **options)


@pytest.mark.parametrize("config", [GRPOConfig, RLOOConfig])
def test_other_versions_of_trl_are_refused(tmp_path, monkeypatch, config):
    monkeypatch.setattr(hosts, "version", lambda host: "1.15.0")
    with pytest.raises(
        PatchError, match=r"(?s)trl 1\.15\.0 .*exact.* can't be hooked.*1\.15\.0 was not tested, 1\.16\.0 was"
    ):
        config(output_dir=str(tmp_path), use_cpu=True, bf16=False, beta=0.1, kl="exact_in_reward")


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_heads_are_refused(make_trainer, kind):
    trainer = make_trainer(GRPOTrainer, kl="exact_in_reward")
    trainer.accelerator.state._shared_state["distributed_type"], before = (
        kind,
        trainer.accelerator.state._shared_state["distributed_type"],
    )
    try:
        with pytest.raises(ConfigError, match=f"with {kind.value}: the LM head is sharded"):
            trainer.start_kl()
    finally:
        trainer.accelerator.state._shared_state["distributed_type"] = before


def test_a_scoring_that_bypasses_the_fused_head_is_noticed(make_trainer, prompts, monkeypatch):
    trainer = make_trainer(GRPOTrainer, kl="exact_in_reward")
    batch = rollout(trainer, prompts)

    def another(self, model, ids, attention, length, *args, **kwargs):
        return logits_of(model, batch).log_softmax(-1)[..., 0], None, None

    monkeypatch.setattr(trl.GRPOTrainer, "_get_per_token_logps_and_entropies", another)
    with pytest.raises(PatchError, match="expected to score 1 times through its fused LM head, found 0"):
        loss_and_gradients(trainer, batch)
