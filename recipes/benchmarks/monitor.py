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

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import harness
import torch
import trl
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM, set_seed

from kl_plugins.core.monitor import merged, monitor_metrics
from kl_plugins.trl.monitor import KLMonitorCallback

# On a CPU the seconds of CPU time: which of the two of `harness.seconds`, and what counts them.
CLOCK, clock = (0, time.perf_counter) if harness.CUDA else (1, time.process_time)


def make_batch(trainer, rows: int, tokens: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """A batch of vLLM's kind: the engine differs from the old policy, too."""
    batch = harness.make_batch(trainer, rows, tokens, vocabulary)
    old = batch["old_per_token_logps"]
    batch["sampling_per_token_logps"] = old + 0.1 * torch.randn_like(old)
    if not trainer.beta:
        del batch["ref_per_token_logps"]
    return batch


def measure(trainer, monitor, steps: int, shape: tuple[int, int, int], what: str) -> dict:
    """Pairs of steps without and with the callback, the milliseconds of its own code, and the peaks of memory."""
    own = harness.clocked((monitor, "_observe"), clock=clock)

    def without(batch):
        return harness.step(trainer, batch)[CLOCK]

    def watched(batch):
        monitor.attach(trainer)
        monitor.on_step_begin(trainer.args, trainer.state, trainer.control)
        found = harness.step(trainer, batch)[CLOCK]
        monitor.detach()
        return found

    batch = make_batch(trainer, *shape)
    memory = [harness.peak_bytes(lambda step=step: step(batch)) for step in (without, watched)]  # this warms up, too
    own.clear()
    found = harness.turns({"without": without, "with": watched}, steps, lambda: make_batch(trainer, *shape), what)
    return {
        "seconds": statistics.median(found["without"]),
        "seconds_with": statistics.median(found["with"]),
        "time_ratio": harness.ratio(found["with"], found["without"]),
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
    return 1000 * harness.seconds(lambda: monitor_metrics(merged(sums[None])))[CLOCK]


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
    harness.keep_freed_memory()
    shape, few = (rows, tokens, vocabulary), max(steps // 3, 1)
    with tempfile.TemporaryDirectory() as folder:
        harness.save(harness.llama(vocabulary, hidden, tokens + harness.PROMPT), folder)
        trainer = harness.make_trainer(trl.GRPOTrainer, trl.GRPOConfig, folder, beta=0.04)
        of_a_log = log_milliseconds(trainer, make_batch(trainer, *shape))
        found = {
            "default settings": measure(trainer, KLMonitorCallback(), steps, shape, "default settings"),
            "a step with the gradient ratio": measure(
                trainer, KLMonitorCallback(gradient_ratio_every=1), few, shape, "gradient ratio"
            ),
        }
        trainer = harness.make_trainer(trl.GRPOTrainer, trl.GRPOConfig, folder, beta=0.0)
        reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found["a step with reference="] = measure(
            trainer, KLMonitorCallback(reference=reference, every=1), few, shape, "reference"
        )
    result = {
        "shape": {"vocabulary": vocabulary, "rows": rows, "tokens": tokens, "hidden": hidden},
        "device": harness.DEVICE,
        "versions": {"torch": torch.__version__, "trl": trl.__version__},
        "log_milliseconds": of_a_log,
        "steps": found,
    }
    harness.write(result, output)

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
