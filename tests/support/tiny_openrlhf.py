"""OpenRLHF's own parser, actor and experience maker in one process, without Ray and without CUDA.

Real: the command line, `ActorPPOTrainer`, `Actor`, `PolicyLoss`, the replay buffer, `RemoteExperienceMaker`. Made up:
the DeepSpeed strategy (here `loss.backward()`), and who answers `make_experience`'s remote calls.
"""

from __future__ import annotations

import os
import runpy
import sys
import types
import warnings
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import torch

from kl_plugins import kl_terms
from kl_plugins.openrlhf.actor import recorder_of


def import_openrlhf():
    """OpenRLHF imports flash-attn, which needs CUDA; nothing here calls it."""
    names = ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed")
    stubs = {name: types.ModuleType(name) for name in names}
    for name in ("index_first_axis", "pad_input", "rearrange", "unpad_input"):
        setattr(stubs["flash_attn.bert_padding"], name, None)
    stubs["flash_attn.utils.distributed"].all_gather = None
    if "openrlhf.models.ring_attn_utils" not in sys.modules:
        sys.modules.update(stubs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import openrlhf.models.ring_attn_utils
        for name in names:  # transformers and vLLM look for it too
            del sys.modules[name]
    import openrlhf.trainer.ppo_trainer
    import openrlhf.trainer.ray.ppo_actor  # noqa: F401


class _RayStarted(Exception):
    """OpenRLHF has parsed and checked its command line, and calls `ray.init`."""


def parse(*flags: str, at_ray_init=None):
    """The arguments that OpenRLHF's own command line makes of `flags`, at the moment when it starts Ray."""
    import_openrlhf()

    def ray_init(**options):
        if at_ray_init is not None:
            at_ray_init(options)
        raise _RayStarted(sys.modules["__main__"].args)

    words = ["train_ppo_ray", "--actor.model_name_or_path", "m", *flags]
    with mock.patch("ray.init", ray_init), mock.patch.object(sys, "argv", words), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)
        except _RayStarted as started:
            return started.args[0]
    raise AssertionError("OpenRLHF ended without starting Ray")


# What every run of the tests is started with, unless a test says otherwise; later flags win.
FLAGS = (
    *("--actor.num_gpus_per_node", "1", "--ref.num_gpus_per_node", "1"),
    *("--vllm.num_engines", "1", "--reward.remote_url", "reward.py"),
    *("--rollout.n_samples_per_prompt", "4", "--rollout.batch_size", "8", "--rollout.micro_batch_size", "4"),
    *("--train.batch_size", "32", "--train.micro_batch_size", "4", "--algo.kl.init_coef", "0.1"),
)


class Cpu(str):
    """As a device it is the CPU; in `f"cuda:{device}"`, which the replay buffer asks for, it is 0."""

    def __format__(self, spec):
        return "0"


@contextmanager
def on_cpu():
    """OpenRLHF's unconditional calls into `torch.cuda`, and one process group of one rank."""
    nothing = dict.fromkeys(("synchronize", "empty_cache"), mock.DEFAULT)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with mock.patch.multiple(torch.cuda, current_device=lambda: Cpu("cpu"), **nothing):
            yield
    finally:
        torch.distributed.destroy_process_group()


class Strategy:
    """What `ActorPPOTrainer` and `RemoteExperienceMaker` ask of DeepSpeed, on one rank."""

    ring_attn_group, world_size, accumulated_gradient = None, 1, 1
    ds_device_mesh: dict = {"dp": SimpleNamespace(get_group=lambda: None)}  # noqa: RUF012

    def __init__(self, args):
        self.args = args

    def backward(self, loss, model, optimizer):
        loss.backward()

    def optimizer_step(self, optimizer, model, scheduler, name):
        pass

    def all_reduce(self, data, op="mean"):
        return data

    def get_grad_norm(self, model):
        return 0.0

    def is_rank_0(self):
        return False


def actor_trainer(args, model):
    """A real `ActorPPOTrainer` around `model`, within `on_cpu()`."""
    from openrlhf.models import Actor
    from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer

    actor = Actor(model)
    actor.packing_samples = False
    return ActorPPOTrainer(
        Strategy(args),
        actor,
        ema_model=None,
        actor_optim=None,
        actor_scheduler=SimpleNamespace(get_last_lr=lambda: [0.0]),
        micro_train_batch_size=args.train.micro_batch_size,
        dataloader_pin_memory=False,
    )


def experience(args, sequences, action_mask, **fields):
    """A real `Experience` of unpadded `sequences` (B, T) whose actions are `action_mask` (B, T - 1)."""
    from openrlhf.trainer.ppo_utils.experience import Experience

    rows, length = sequences.shape
    zeros = torch.zeros(rows, length - 1)
    return Experience(
        sequences=sequences,
        attention_mask=torch.ones_like(sequences),
        action_mask=action_mask,
        **{"advantages": zeros, "action_log_probs": zeros, "base_action_log_probs": zeros} | fields,
    )


def gradients(trainer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.actor.parameters() if p.grad is not None])


def step(trainer, batch, *, beta=0.1, tokens=None) -> tuple[dict, torch.Tensor]:
    """One real `training_step` and the gradient that it leaves. `tokens` is what OpenRLHF divides the loss by."""
    trainer.actor.zero_grad()
    info = None
    if tokens is not None:
        info = {"dp_size": 1, "batch_num_tokens": tokens, "global_batch_size": 1.0}
    trainer.kl_plugins_recorder = recorder_of(trainer)
    status = trainer.training_step(batch, beta, 0, info)
    return status, gradients(trainer)


class Group:
    """Ray actors that have already answered: one result for each batch of samples."""

    def __init__(self, results):
        self.results = results

    def async_run_method_batch(self, method_name, **batches):
        return [self.results]


@contextmanager
def experience_maker(args, *, logp, ref_logp, values=None, kl_coef=0.1):
    """A real `RemoteExperienceMaker` whose actors score each batch of samples with what is given."""
    from openrlhf.trainer.ppo_utils import experience_maker as module
    from openrlhf.trainer.ppo_utils.kl_controller import FixedKLController

    ray = SimpleNamespace(get=lambda refs: refs, put=lambda x: x)
    with mock.patch.object(module, "ray", ray):
        yield module.RemoteExperienceMaker(
            Group(logp),
            None if values is None else Group(values),
            None,
            Group(ref_logp),
            FixedKLController(kl_coef),
            Strategy(args),
            SimpleNamespace(pad_token_id=0),
        )


ROWS, PROMPT, LENGTH = 8, 4, 6  # of `made_up`


def made_up(args, trainer, *, seed=0, **fields):
    """A ragged off-policy micro-batch, scored by the trainer's own actor plus noise."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        return scale * torch.randn(ROWS, PROMPT + LENGTH - 1, generator=generator)

    sequences = torch.randint(2, 12, (ROWS, PROMPT + LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (ROWS, 1), generator=generator)
    mask = (torch.arange(1 - PROMPT, LENGTH) < lengths) & (torch.arange(1 - PROMPT, LENGTH) >= 0)
    with torch.no_grad():
        logp = trainer.actor(sequences, mask, attention_mask=torch.ones_like(sequences))
    scored = {
        "action_log_probs": (logp + noise(0.3)) * mask,
        "base_action_log_probs": (logp + noise(0.5)) * mask,
        "advantages": noise(1.0) * mask,
    }
    return experience(args, sequences, mask.long(), **(scored | fields)), logp


def expected_kl_gradient(trainer, batch, spec, beta=0.1):
    """beta times the token mean of `kl_terms`, differentiated without OpenRLHF's step."""
    trainer.actor.zero_grad()
    logp = trainer.actor(batch.sequences, batch.action_mask, attention_mask=batch.attention_mask)
    behavior = batch.action_log_probs if batch.rollout_log_probs is None else batch.rollout_log_probs
    terms = kl_terms(
        spec,
        logp=logp,
        ref_logp=batch.base_action_log_probs,
        mask=batch.action_mask,
        behavior_logp=behavior,
        baseline=batch.kl if spec.baseline else None,
    )
    (beta * terms.loss.sum() / batch.action_mask.sum()).backward()
    return gradients(trainer)


def train(trainer, args, batch):
    """A real `ppo_train` on the rows of `batch`."""
    batch.total_length = batch.attention_mask.sum(-1)
    args.rollout.batch_size = ROWS // 4
    trainer.replay_buffer.clear()
    trainer.replay_buffer.packing_samples = False
    trainer.replay_buffer.append(batch)
    return trainer.ppo_train(0.1)
