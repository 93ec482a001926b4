"""What the plugin costs in OpenRLHF: its real training step, as shipped and hooked, side by side in one process.

One `ActorPPOTrainer` takes the same prepared, off-policy micro-batches with OpenRLHF's own k2 and unbiased gradient,
and with kl="k2_as_loss" (both have the same gradient); the steps alternate, and hooks are set and undone in between.
Everything is OpenRLHF's but DeepSpeed, which is replaced by a plain backward pass, so that the step is as short, and
the plugin's share as large, as it can be. Memory is the peak of a step above what was held before it. Pairs are noisy
on a shared machine, so the seconds that the plugin's own code takes in a step are given, too (its forward part).
Writes runs/benchmark_openrlhf.json.

Hardware: a CPU (12 GiB) or one GPU. Takes: one to three minutes on 2 cores at the default shape.
Launch: python recipes/benchmarks/openrlhf_step.py [--vocabulary 150000] [--rows 4] [--tokens 256] [--steps 10]
"""

import contextlib
import ctypes
import importlib.util
import json
import runpy
import statistics
import sys
import time
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated
from unittest import mock

if importlib.util.find_spec("flash_attn") is None:  # a machine without a GPU: see there; before torch is imported
    sys.path.insert(0, str(Path(__file__).parents[1] / "openrlhf_cpu"))
    import shim

    shim.install()

import torch
import typer
from openrlhf.models import Actor
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from kl_plugins.integration.recorder import Recorder
from kl_plugins.openrlhf import OpenRLHFOptions, actor, plan_run
from kl_plugins.patching import Patching, load_patches

PROMPT = 16
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
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=context)  # fmt: skip
    model = Actor(LlamaForCausalLM(config).to(device))
    model.packing_samples = False
    with mock.patch("openrlhf.trainer.ray.ppo_actor.torch_dist_barrier_and_cuda_sync"):
        scheduler = SimpleNamespace(get_last_lr=lambda: [0.0])
        return ActorPPOTrainer(PlainStrategy(args), model, None, None, scheduler)


def make_batch(trainer, rows: int, tokens: int, vocabulary: int, device) -> Experience:
    """A ragged batch whose old policy, vLLM and reference differ from the policy, so that weights are exercised."""
    sequences = torch.randint(3, vocabulary, (rows, PROMPT + tokens), device=device)
    lengths = torch.randint(tokens // 2, tokens + 1, (rows, 1), device=device)
    position = torch.arange(1 - PROMPT, tokens, device=device)
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


def step(trainer, batch) -> float:
    """Seconds of one training step."""
    trainer.actor.zero_grad(set_to_none=False)
    batch.info = {}
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    trainer.training_step(batch, 0.04, 0, {"dp_size": 1, "batch_num_tokens": batch.action_mask.sum()})
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(trainer, batch) -> int:
    """The most that one step holds above what was held before it, by torch's allocator or (on a CPU) profiler."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(trainer, batch)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(trainer, batch)
    changes = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())))


@contextlib.contextmanager
def clocked(spent: list[float]):
    """Add the seconds of the plugin's own computation to `spent`."""

    def clock(function):
        def timed(*args):
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                spent[0] += time.perf_counter() - start

        return timed

    computed = mock.patch.object(actor, "terms_of", clock(actor.terms_of))
    recorded = mock.patch.object(Recorder, "add", clock(Recorder.add))
    with computed, recorded:
        yield


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning them: page faults would be half of a CPU step's time."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


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
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stock, ours = arguments(*STOCK), arguments()
    plan_run(OpenRLHFOptions(kl="k2_as_loss", kl_off_policy="token"), ours)
    trainer = make_trainer(stock, vocabulary, hidden, tokens + PROMPT, device)
    trainer.kl_plugins_recorder = actor.recorder_of(trainer)

    def as_shipped(measure, batch):
        trainer.args = stock
        return measure(trainer, batch)

    def hooked(measure, batch):
        trainer.args = ours
        with Patching(load_patches("openrlhf")), clocked(own):
            return measure(trainer, batch)

    own = [0.0]
    kinds = {"OpenRLHF": as_shipped, "kl_plugins": hooked}
    batch = make_batch(trainer, rows, tokens, vocabulary, device)
    memory = {name: kind(peak_bytes, batch) for name, kind in kinds.items()}  # this warms up, too
    own[0], seconds = 0.0, {name: [] for name in kinds}
    for pair in track(range(steps), description="pairs of steps"):
        batch = make_batch(trainer, rows, tokens, vocabulary, device)
        turns = list(kinds.items())
        for name, kind in turns if pair % 2 else reversed(turns):  # neither always goes first
            seconds[name].append(kind(step, batch))

    paired = sorted(a / b for a, b in zip(seconds["kl_plugins"], seconds["OpenRLHF"], strict=True))
    result = {
        "shape": {"vocabulary": vocabulary, "rows": rows, "tokens": tokens, "hidden": hidden},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "openrlhf": load_patches("openrlhf").tested[-1]},
        "step_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "time_ratio": {"median": statistics.median(paired), "lowest": paired[0], "highest": paired[-1]},
        "seconds_in_the_term_per_step": own[0] / steps,
        "peak_bytes": memory,
        "memory_ratio": memory["kl_plugins"] / memory["OpenRLHF"],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    table = Table(title=f"{rows} x {tokens} tokens, vocabulary {vocabulary}, {result['device']}", title_justify="left")
    for column in ("", *kinds, "ratio", "of all pairs"):
        table.add_column(column, justify="left" if not column else "right")
    median, lowest, highest = (f"{result['time_ratio'][key]:.3f}" for key in ("median", "lowest", "highest"))
    times = (f"{result['step_seconds'][name]:.3f}" for name in kinds)
    peaks = (f"{memory[name] / 2**20:.1f}" for name in kinds)
    table.add_row("step, seconds (median)", *times, median, f"{lowest} - {highest}")
    table.add_row("peak memory of a step, MiB", *peaks, f"{result['memory_ratio']:.4f}", "")
    table.add_row("of it computing the KL term", "", f"{own[0] / steps:.4f}", "", "")
    Console(width=100).print(table)
    print(f"{steps} paired steps; written to {output}")


if __name__ == "__main__":
    typer.run(main)
