"""What KLMonitorCallback costs: training steps of stock TRL with and without it, in one process.

One trainer, one model, the same prepared off-policy batches; the callback is attached for every other step (loss and
backward pass; a real step also generates and updates, so that its share there is smaller). Time is the median ratio of
paired steps, on a CPU in seconds of CPU time, which other processes disturb less. Pairs are noisy all the same, so
the milliseconds that the callback's own code takes in a step and in a log are given, too (on a GPU without waiting for
kernels). The two options that take further passes through the model are measured the same way: a step with
gradient_ratio_every, and one with reference= at beta=0.
Writes runs/benchmark_monitor.json.

Hardware: a CPU (12 GiB) or one GPU. Takes: 10 to 15 minutes on 2 cores at the default shape.
Launch: python recipes/benchmarks/monitor.py [--vocabulary 150000] [--rows 8] [--tokens 512] [--steps 20]
"""

import contextlib
import ctypes
import json
import os
import statistics
import tempfile
import time
from itertools import accumulate
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import trl
import typer
from datasets import Dataset
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from kl_plugins.core.monitor import merged, monitor_metrics
from kl_plugins.trl.monitor import KLMonitorCallback

CUDA = torch.cuda.is_available()
clock = time.perf_counter if CUDA else time.process_time


def make_model(folder: str, vocabulary: int, hidden: int, context: int) -> None:
    """A two-layer Llama with a large vocabulary, as the language models have whose KL this is about."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1, "a": 2}
    core = Tokenizer(models.WordLevel(words, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def make_trainer(folder: str, beta: float):
    args = trl.GRPOConfig(
        output_dir=folder,
        beta=beta,
        num_generations=2,
        report_to="none",
        use_cpu=not CUDA,
        bf16=CUDA,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
    )
    prompts = Dataset.from_list([{"prompt": "a"}] * 8)
    trainer = trl.GRPOTrainer(model=folder, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
                              train_dataset=prompts)  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1  # set by Trainer.train otherwise
    trainer.model.train()
    return trainer


def make_batch(trainer, rows: int, tokens: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """A ragged batch of vLLM's kind: the engine, the old policy and the reference differ from the policy."""
    device = trainer.accelerator.device
    ids = torch.randint(3, vocabulary, (rows, tokens + 16), device=device)
    lengths = torch.randint(tokens // 2, tokens + 1, (rows, 1), device=device)
    mask = (torch.arange(tokens, device=device) < lengths).long()
    prompt_mask = torch.ones_like(ids[:, :16])
    with torch.no_grad():
        logp, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.cat([prompt_mask, mask], dim=1), tokens
        )
    batch = {
        "prompt_ids": ids[:, :16],
        "prompt_mask": prompt_mask,
        "completion_ids": ids[:, 16:],
        "completion_mask": mask,
        "advantages": torch.randn(rows, device=device),
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": logp + 0.1 * torch.randn_like(logp),
        "sampling_per_token_logps": logp + 0.1 * torch.randn_like(logp),
    }
    return batch | ({"ref_per_token_logps": logp + 0.3 * torch.randn_like(logp)} if trainer.beta else {})


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def step(trainer, batch, monitor=None) -> float:
    """Seconds of one loss and backward pass, with the callback attached if there is one."""
    trainer.model.zero_grad(set_to_none=False)
    if monitor is not None:
        monitor.on_step_begin(trainer.args, trainer.state, trainer.control)
    wait()
    start = clock()
    trainer.compute_loss(trainer.model, batch).backward()
    wait()
    return clock() - start


def peak_bytes(trainer, batch, monitor=None) -> int:
    """The most that one step holds above what was held before it, by torch's allocator or (on a CPU) profiler."""
    if CUDA:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(trainer, batch, monitor)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(trainer, batch, monitor)
    changes = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())))


def clocked(owner, name: str) -> list[float]:
    """The seconds of every call of a method from now on."""
    spent, method = [], getattr(owner, name)

    def timed(*args, **kwargs):
        start = clock()
        try:
            return method(*args, **kwargs)
        finally:
            spent.append(clock() - start)

    setattr(owner, name, timed)
    return spent


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning them: page faults would be half of a CPU step's time."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def measure(trainer, monitor, steps: int, shape: tuple[int, int, int], what: str) -> dict:
    """Pairs of steps without and with the callback, the milliseconds of its own code, and the peaks of memory."""
    own = clocked(monitor, "_observe")
    batch = make_batch(trainer, *shape)
    memory = [peak_bytes(trainer, batch)]  # this warms up, too
    monitor.attach(trainer)
    memory.append(peak_bytes(trainer, batch, monitor))
    monitor.detach()
    own.clear()
    seconds = {False: [], True: []}
    for pair in track(range(steps), description=what):
        batch = make_batch(trainer, *shape)
        for watched in (pair % 2 == 0, pair % 2 == 1):  # neither always goes first
            if watched:
                monitor.attach(trainer)
            seconds[watched].append(step(trainer, batch, monitor if watched else None))
            if watched:
                monitor.detach()
    paired = sorted(a / b for a, b in zip(seconds[True], seconds[False], strict=True))
    return {
        "seconds": statistics.median(seconds[False]),
        "seconds_with": statistics.median(seconds[True]),
        "time_ratio": {"median": statistics.median(paired), "lowest": paired[0], "highest": paired[-1]},
        "own_milliseconds": 1000 * statistics.median(own),
        "memory_ratio": memory[1] / memory[0],
        "memory_bytes_more": memory[1] - memory[0],
    }


def log_milliseconds(trainer, batch) -> float:
    """What the callback adds to a log: merging, the one device sync, and the numbers."""
    monitor = KLMonitorCallback()
    monitor.attach(trainer)
    trainer.compute_loss(trainer.model, batch)
    sums = monitor._sums["train"]
    monitor.detach()
    wait()
    start = clock()
    monitor_metrics(merged(sums[None]))
    return 1000 * (clock() - start)


def main(
    vocabulary: Annotated[int, typer.Option(help="Size of the vocabulary.")] = 150_000,
    rows: Annotated[int, typer.Option(help="Completions in a batch.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of the longest completion.")] = 512,
    hidden: Annotated[int, typer.Option(help="Width of the two-layer trunk.")] = 64,
    steps: Annotated[int, typer.Option(help="Measured pairs of steps at default settings; a third of it else.")] = 20,
    output: Annotated[Path, typer.Option(help="Where the numbers go, as JSON.")] = Path("runs/benchmark_monitor.json"),
) -> None:
    """Time and memory of a training step of stock TRL, with and without KLMonitorCallback."""
    set_seed(0)
    keep_freed_memory()
    shape, few = (rows, tokens, vocabulary), max(steps // 3, 1)
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, vocabulary, hidden, tokens + 16)
        trainer = make_trainer(folder, beta=0.04)
        of_a_log = log_milliseconds(trainer, make_batch(trainer, *shape))
        found = {
            "default settings": measure(trainer, KLMonitorCallback(), steps, shape, "default settings"),
            "a step with the gradient ratio": measure(
                trainer, KLMonitorCallback(gradient_ratio_every=1), few, shape, "gradient ratio"
            ),
        }
        trainer = make_trainer(folder, beta=0.0)
        reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found["a step with reference="] = measure(
            trainer, KLMonitorCallback(reference=reference, every=1), few, shape, "reference"
        )
    result = {
        "shape": {"vocabulary": vocabulary, "rows": rows, "tokens": tokens, "hidden": hidden},
        "device": torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "trl": trl.__version__},
        "log_milliseconds": of_a_log,
        "steps": found,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")

    title = f"{rows} x {tokens} tokens, vocabulary {vocabulary}, {result['device']}"
    table = Table(title=title, title_justify="left")
    for column in ("", "without, s", "with, s", "ratio", "of all pairs", "own, ms", "memory"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in found.items():
        ratio = row["time_ratio"]
        spread = f"{ratio['lowest']:.2f} - {ratio['highest']:.2f}"
        numbers = (f"{row['seconds']:.3f}", f"{row['seconds_with']:.3f}", f"{ratio['median']:.3f}", spread)
        table.add_row(name, *numbers, f"{row['own_milliseconds']:.1f}", f"{row['memory_ratio']:.4f}")
    Console(width=110).print(table)
    print(f"{steps} paired steps, a log takes {of_a_log:.1f} ms more; written to {output}")


if __name__ == "__main__":
    typer.run(main)
