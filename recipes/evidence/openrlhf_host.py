"""OpenRLHF's own command line, models, trainers and experience maker in one process, without Ray and without CUDA.

Real: `train_ppo_ray`'s parser, `Actor` and `ActorPPOTrainer`, `CriticPPOTrainer`, the replay buffer, `PolicyLoss`,
`RemoteExperienceMaker` with its advantage estimators, and the methods of the Ray actors that answer it. Made up: the
DeepSpeed strategy (torch's AdamW and clip on one rank), and Ray: a call is made at once, in this process.
"""

import math
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


def import_openrlhf():
    """OpenRLHF imports flash-attn, which needs CUDA; nothing here calls it."""
    import transformers.modeling_flash_attention_utils  # noqa: F401  before the stubs, which it would take for real

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


def parse(*flags, at_ray_init=None):
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
    """What OpenRLHF's trainers and its experience maker ask of DeepSpeed, on one rank."""

    ring_attn_group, world_size, accumulated_gradient = None, 1, 1
    ds_device_mesh: dict = {"dp": SimpleNamespace(get_group=lambda: None)}  # noqa: RUF012

    def __init__(self, args):
        self.args, self.grad_norm = args, 0.0

    def backward(self, loss, model, optimizer):
        """Gradients."""
        loss.backward()

    def optimizer_step(self, optimizer, model, scheduler, name):
        """Clip and step, as DeepSpeed would; without an optimizer the gradients stay where they are."""
        if optimizer is None:
            return
        self.grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), getattr(self.args, name).max_norm).item()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    def all_reduce(self, data, op="mean"):
        """Of a single rank."""
        return data

    def get_grad_norm(self, model):
        """That of the step before, as it was before clipping."""
        return self.grad_norm

    def is_rank_0(self):
        """No: it would draw progress bars."""
        return False


def optimization(options, model, steps):
    """The optimizer and scheduler that OpenRLHF has DeepSpeed make of `args.actor` or `args.critic`."""
    from transformers import get_scheduler

    optimizer = torch.optim.AdamW(model.parameters(), **vars(options.adam))
    warmup = math.ceil(steps * options.lr_warmup_ratio)
    return optimizer, get_scheduler(options.lr_scheduler, optimizer, warmup, steps)


def actor_trainer(args, model, steps=None):
    """A real `ActorPPOTrainer` around a causal language model, within `on_cpu()`, for `steps` rollouts.

    Without `steps` it has no optimizer.
    """
    from openrlhf.models import Actor
    from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer

    actor = Actor(model)
    actor.packing_samples = False
    optimizer, scheduler = None, SimpleNamespace(get_last_lr=lambda: [0.0])
    if steps is not None:
        optimizer, scheduler = optimization(args.actor, actor, steps * args.train.max_epochs)
    return ActorPPOTrainer(
        Strategy(args),
        actor,
        ema_model=None,
        actor_optim=optimizer,
        actor_scheduler=scheduler,
        micro_train_batch_size=args.train.micro_batch_size,
        dataloader_pin_memory=False,
    )


def critic_trainer(args, critic, steps):
    """A real `CriticPPOTrainer` around a module that is called as OpenRLHF's critics are, within `on_cpu()`."""
    from openrlhf.trainer.ray.ppo_critic import CriticPPOTrainer

    optimizer, scheduler = optimization(args.critic, critic, steps * args.train.max_epochs)
    return CriticPPOTrainer(
        Strategy(args),
        critic,
        critic_optim=optimizer,
        critic_scheduler=scheduler,
        micro_train_batch_size=args.train.micro_batch_size,
        value_clip=args.critic.value_clip,
        dataloader_pin_memory=False,
    )


class Group:
    """One of OpenRLHF's Ray actors, with its own methods, in this process; called as its `RayActorGroup` is."""

    def __init__(self, ray_actor, **attributes):
        self.actor = object.__new__(ray_actor.__ray_metadata__.modified_class)  # its start would load a model
        vars(self.actor).update(attributes)

    def async_run_method(self, method_name, **arguments):
        """The answer of the only actor."""
        return [getattr(self.actor, method_name)(**arguments)]

    def async_run_method_batch(self, method_name, **rows):
        """Its answers to one call for each of the rows."""
        return [self.actor.execute_batch(method_name, rows, 0, len(next(iter(rows.values()))))]


def ppo_trainer(args, model, reference, tokenizer, steps, critic=None):
    """OpenRLHF's `BasePPOTrainer` around these models, within `on_cpu()` and `ray_at_once()`.

    Its `train_step(samples, step)` is one of `steps`: it makes experiences of a rollout, and trains critic and actor.
    """
    from openrlhf.models import Actor
    from openrlhf.trainer import ppo_trainer as trainers
    from openrlhf.trainer.ppo_utils import experience_maker
    from openrlhf.trainer.ray.launcher import ReferenceModelActor
    from openrlhf.trainer.ray.ppo_actor import PolicyModelActor
    from openrlhf.trainer.ray.ppo_critic import CriticModelActor

    for module in (trainers, experience_maker):  # which say three lines a step
        module.logger.setLevel("WARNING")
    trained = actor_trainer(args, model, steps)
    strategy = trained.strategy
    policies = Group(PolicyModelActor, strategy=strategy, trainer=trained, actor=trained.actor)
    critics = references = None
    if critic is not None:
        trained = critic_trainer(args, critic, steps)
        critics = Group(CriticModelActor, strategy=strategy, trainer=trained, critic=critic)
    if args.algo.kl.init_coef > 0:  # as `train_ppo_ray` decides
        frozen = Actor(reference)
        frozen.packing_samples = False
        references = Group(ReferenceModelActor, strategy=strategy, model=frozen.eval())
    trainer = trainers.BasePPOTrainer(strategy, policies, critics, None, references, None, tokenizer)
    trainer.kl_plugins_proven = True  # the proof is collected from Ray's processes, of which there are none
    return trainer


@contextmanager
def ray_at_once():
    """The calls that OpenRLHF's training makes through Ray have been made when they return."""
    from openrlhf.trainer import ppo_trainer
    from openrlhf.trainer.ppo_utils import experience_maker

    ray = SimpleNamespace(get=lambda refs: refs, put=lambda x: x)
    with mock.patch.object(ppo_trainer, "ray", ray), mock.patch.object(experience_maker, "ray", ray):
        yield
