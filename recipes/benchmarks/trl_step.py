"""What the plugin costs: a training step of stock TRL against one with kl="k2_as_loss", side by side in one process.

Both trainers hold the same weights and get the same prepared, off-policy batches; their steps (loss and backward pass)
alternate, so that whatever else the machine does hits both. Time is the median ratio of paired steps; memory is the
ratio of the peaks of one step above what was held before it, as torch's allocator (GPU) or profiler (CPU) counts it.
Pairs are noisy on a shared machine, so the seconds that the plugin's own code takes in a step are given, too (its
forward part; on a GPU without waiting for kernels).
Writes runs/benchmark.json.

Hardware: a CPU (12 GiB) or one GPU. Takes: 5 to 10 minutes on 2 cores at the default shape.
Launch: python recipes/benchmarks/trl_step.py [--vocabulary 150000] [--rows 8] [--tokens 512] [--steps 10]
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

import kl_plugins.trl


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


def make_trainer(cls, config, folder: str, **options):
    args = config(
        output_dir=folder,
        beta=0.04,
        num_generations=2,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        **options,
    )
    prompts = Dataset.from_list([{"prompt": "a"}] * 8)
    trainer = cls(model=folder, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
                  train_dataset=prompts)  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1  # set by Trainer.train otherwise
    trainer.model.train()
    return trainer


def make_batch(trainer, rows: int, tokens: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """A ragged batch whose old policy and reference differ from the policy, so that weights are exercised."""
    device = trainer.accelerator.device
    ids = torch.randint(3, vocabulary, (rows, tokens + 16), device=device)
    lengths = torch.randint(tokens // 2, tokens + 1, (rows, 1), device=device)
    mask = (torch.arange(tokens, device=device) < lengths).long()
    prompt_mask = torch.ones_like(ids[:, :16])
    with torch.no_grad():
        logp, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.cat([prompt_mask, mask], dim=1), tokens
        )
    return {
        "prompt_ids": ids[:, :16],
        "prompt_mask": prompt_mask,
        "completion_ids": ids[:, 16:],
        "completion_mask": mask,
        "advantages": torch.randn(rows, device=device),
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": logp + 0.1 * torch.randn_like(logp),
        "ref_per_token_logps": logp + 0.3 * torch.randn_like(logp),
    }


def step(trainer, batch) -> float:
    """Seconds of one loss and backward pass."""
    trainer.model.zero_grad(set_to_none=False)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    trainer.compute_loss(trainer.model, batch).backward()
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


def clocked(trainer, *names: str) -> list[float]:
    """Let the named methods of `trainer` add up their own seconds in the list that is returned."""
    spent = [0.0]

    def clock(method):
        def timed(*args):
            start = time.perf_counter()
            try:
                return method(*args)
            finally:
                spent[0] += time.perf_counter() - start

        return timed

    for name in names:
        setattr(trainer, name, clock(getattr(trainer, name)))
    return spent


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning them: page faults would be half of a CPU step's time."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def main(
    vocabulary: Annotated[int, typer.Option(help="Size of the vocabulary.")] = 150_000,
    rows: Annotated[int, typer.Option(help="Completions in a batch.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of the longest completion.")] = 512,
    hidden: Annotated[int, typer.Option(help="Width of the two-layer trunk.")] = 64,
    steps: Annotated[int, typer.Option(help="Measured pairs of steps.")] = 10,
    output: Annotated[Path, typer.Option(help="Where the numbers go, as JSON.")] = Path("runs/benchmark.json"),
) -> None:
    """Time and memory of a training step, stock TRL against the plugin."""
    set_seed(0)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, vocabulary, hidden, tokens + 16)
        trainers = {
            "stock TRL": make_trainer(trl.GRPOTrainer, trl.GRPOConfig, folder),
            "kl_plugins": make_trainer(
                kl_plugins.trl.GRPOTrainer, kl_plugins.trl.GRPOConfig, folder, kl="k2_as_loss", kl_off_policy="token"
            ),
        }
        batch = make_batch(trainers["stock TRL"], rows, tokens, vocabulary)
        memory = {name: peak_bytes(trainer, batch) for name, trainer in trainers.items()}  # this warms up, too
        seconds = {name: [] for name in trainers}
        own = clocked(trainers["kl_plugins"], "compute_kl_terms", "_log_kl")
        for pair in track(range(steps), description="pairs of steps"):
            batch = make_batch(trainers["stock TRL"], rows, tokens, vocabulary)
            turns = list(trainers.items())
            for name, trainer in turns if pair % 2 else reversed(turns):  # neither always goes first
                seconds[name].append(step(trainer, batch))

    paired = sorted(a / b for a, b in zip(seconds["kl_plugins"], seconds["stock TRL"], strict=True))
    result = {
        "shape": {"vocabulary": vocabulary, "rows": rows, "tokens": tokens, "hidden": hidden},
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "trl": trl.__version__},
        "step_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "time_ratio": {"median": statistics.median(paired), "lowest": paired[0], "highest": paired[-1]},
        "seconds_in_the_term_per_step": own[0] / steps,
        "peak_bytes": memory,
        "memory_ratio": memory["kl_plugins"] / memory["stock TRL"],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")

    table = Table(title=f"{rows} x {tokens} tokens, vocabulary {vocabulary}, {result['device']}", title_justify="left")
    for column in ("", "stock TRL", "kl_plugins", "ratio", "of all pairs"):
        table.add_column(column, justify="left" if not column else "right")
    median, lowest, highest = (f"{result['time_ratio'][key]:.3f}" for key in ("median", "lowest", "highest"))
    times = (f"{result['step_seconds'][name]:.3f}" for name in trainers)
    peaks = (f"{memory[name] / 2**20:.1f}" for name in trainers)
    table.add_row("step, seconds (median)", *times, median, f"{lowest} - {highest}")
    table.add_row("peak memory of a step, MiB", *peaks, f"{result['memory_ratio']:.4f}", "")
    table.add_row("of it computing the KL term", "", f"{own[0] / steps:.4f}", "", "")
    Console(width=100).print(table)
    print(f"{steps} paired steps; written to {output}")


if __name__ == "__main__":
    typer.run(main)
