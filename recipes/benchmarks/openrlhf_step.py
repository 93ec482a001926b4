"""What the plugin costs in OpenRLHF: its real training step, as shipped and hooked, side by side in one process.

One `ActorPPOTrainer` takes the same prepared, off-policy micro-batches with OpenRLHF's own k2 and unbiased gradient,
and with kl="k2_as_loss" (both have the same gradient); the steps alternate, and hooks are set and undone in between.
Everything is OpenRLHF's but DeepSpeed, which is replaced by a plain backward pass, so that the step is as short, and
the plugin's share as large, as it can be. Memory is the peak of a step. Pairs are noisy on a shared machine, so the
seconds that the plugin's own code takes in a step are given, too (its forward part).
Writes runs/benchmark_openrlhf.json.

Hardware: a CPU (12 GiB) or one GPU. Takes: one to three minutes on 2 cores at the default shape.
Launch: python recipes/benchmarks/openrlhf_step.py [--vocabulary 150000] [--rows 4] [--tokens 256] [--steps 10]
"""

import importlib.util
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated
from unittest import mock

if importlib.util.find_spec("flash_attn") is None:  # a machine without a GPU: see there; before torch is imported
    sys.path.insert(0, str(Path(__file__).parents[1] / "openrlhf_cpu"))
    import shim

    shim.install()

import harness
import torch
import typer
from openrlhf.models import Actor
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer
from transformers import set_seed

from kl_plugins.integration.recorder import Recorder
from kl_plugins.openrlhf import OpenRLHFOptions, actor, plan_run
from kl_plugins.patching import Patching, load_patches

STOCK = ("--algo.kl.use_loss", "--algo.kl.estimator", "k2", "--algo.kl.unbiased_gradient")


def arguments(*flags: str):
    """OpenRLHF's own parsed arguments, taken where it would start Ray."""

    def stop(**_):
        raise InterruptedError(sys.modules["__main__"].args)

    words = ["train_ppo_ray", "--actor.model_name_or_path", "m", "--vllm.num_engines", "1", "--reward.remote_url", "r",
             "--algo.advantage.estimator", "group_norm", "--rollout.n_samples_per_prompt", "2", *flags]  # fmt: skip
    with mock.patch("ray.init", stop), mock.patch.object(sys, "argv", words):
        try:
            runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)
        except InterruptedError as stopped:
            return stopped.args[0]


class PlainStrategy:
    """What a training step asks of DeepSpeed, without it."""

    ring_attn_group = None

    def __init__(self, args):
        self.args = args
        self.backward = lambda loss, model, optimizer: loss.backward()
        self.optimizer_step = lambda *_, **__: None
        self.get_grad_norm = lambda model: 0.0


def make_trainer(args, vocabulary: int, hidden: int, context: int, device):
    model = Actor(harness.llama(vocabulary, hidden, context).to(device))
    model.packing_samples = False
    with mock.patch("openrlhf.trainer.ray.ppo_actor.torch_dist_barrier_and_cuda_sync"):
        scheduler = SimpleNamespace(get_last_lr=lambda: [0.0])
        return ActorPPOTrainer(PlainStrategy(args), model, None, None, scheduler)


def make_batch(trainer, rows: int, tokens: int, vocabulary: int, device) -> Experience:
    """A ragged batch whose old policy, vLLM and reference differ from the policy, so that weights are exercised."""
    sequences = torch.randint(3, vocabulary, (rows, harness.PROMPT + tokens), device=device)
    lengths = torch.randint(tokens // 2, tokens + 1, (rows, 1), device=device)
    position = torch.arange(1 - harness.PROMPT, tokens, device=device)
    mask = ((position >= 0) & (position < lengths)).long()
    with torch.no_grad():
        logp = trainer.actor(sequences, mask, attention_mask=torch.ones_like(sequences))

    def noisy(scale):
        return (logp + scale * torch.randn_like(logp)) * mask

    return Experience(
        sequences=sequences,
        attention_mask=torch.ones_like(sequences),
        action_mask=mask,
        action_log_probs=noisy(0.1),
        base_action_log_probs=noisy(0.3),
        advantages=torch.randn_like(logp) * mask,
    )


def step(trainer, batch) -> tuple[float, float]:
    """Seconds of one training step."""
    trainer.actor.zero_grad(set_to_none=False)
    batch.info = {}
    status = {"dp_size": 1, "batch_num_tokens": batch.action_mask.sum()}
    return harness.seconds(lambda: trainer.training_step(batch, 0.04, 0, status))


def main(
    vocabulary: Annotated[int, typer.Option(help="Size of the vocabulary.")] = 150_000,
    rows: Annotated[int, typer.Option(help="Completions in a micro-batch.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of the longest completion.")] = 256,
    hidden: Annotated[int, typer.Option(help="Width of the two-layer trunk.")] = 64,
    steps: Annotated[int, typer.Option(help="Measured pairs of steps.")] = 10,
    output: Annotated[Path, typer.Option(help="For the numbers, as JSON.")] = Path("runs/benchmark_openrlhf.json"),
) -> None:
    """Time and memory of OpenRLHF's training step, as shipped and hooked."""
    set_seed(0)
    harness.keep_freed_memory()
    device = torch.device("cuda" if harness.CUDA else "cpu")
    stock, ours = arguments(*STOCK), arguments()
    plan_run(OpenRLHFOptions(kl="k2_as_loss", kl_off_policy="token"), ours)
    trainer = make_trainer(stock, vocabulary, hidden, tokens + harness.PROMPT, device)
    trainer.kl_plugins_recorder = actor.recorder_of(trainer)

    own = harness.clocked((actor, "terms_of"), (Recorder, "add"))

    def as_shipped(batch):
        trainer.args = stock
        return step(trainer, batch)

    def hooked(batch):
        trainer.args = ours
        with Patching(load_patches("openrlhf")):
            return step(trainer, batch)

    harness.compare(
        {"vocabulary": vocabulary, "rows": rows, "tokens": tokens, "hidden": hidden},
        {"OpenRLHF": as_shipped, "kl_plugins": hooked},
        rounds=steps,
        prepare=lambda: make_batch(trainer, rows, tokens, vocabulary, device),
        own=own,
        versions={"openrlhf": load_patches("openrlhf").tested[-1]},
        output=output,
    )


if __name__ == "__main__":
    typer.run(main)
