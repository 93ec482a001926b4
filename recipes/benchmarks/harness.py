"""What the benchmarks share: a small model with a large vocabulary, turns of steps, their ratios, and peaks of memory.

Steps take turns in one process, so that whatever else the machine does hits all of them. Memory is the peak of one
step above what was held before it, as torch's allocator (GPU) or profiler (CPU) counts it.
"""

import contextlib
import ctypes
import json
import os
import statistics
import time
from itertools import accumulate

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CUDA = torch.cuda.is_available()
DEVICE = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
PROMPT = 16  # tokens


def llama(vocabulary, hidden, context, *, layers=2, heads=2, widening=2):
    """A Llama with a large vocabulary, as the language models have whose KL this is about."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=widening * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
    )
    return LlamaForCausalLM(config)


def save(model, folder):
    """The model with a tokenizer of three words."""
    model.save_pretrained(folder)
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def make_trainer(cls, config, folder, **options):
    """A GRPO trainer of the saved model, ready for `compute_loss`."""
    args = config(
        output_dir=folder,
        num_generations=2,
        report_to="none",
        use_cpu=not CUDA,
        bf16=CUDA,
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


def make_batch(trainer, rows, tokens, vocabulary):
    """A ragged batch whose old policy and reference differ from the policy, so that weights are exercised."""
    device = trainer.accelerator.device
    ids = torch.randint(3, vocabulary, (rows, tokens + PROMPT), device=device)
    lengths = torch.randint(tokens // 2, tokens + 1, (rows, 1), device=device)
    mask = (torch.arange(tokens, device=device) < lengths).long()
    prompt_mask = torch.ones_like(ids[:, :PROMPT])
    with torch.no_grad():
        logp, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.cat([prompt_mask, mask], dim=1), tokens
        )
    return {
        "prompt_ids": ids[:, :PROMPT],
        "prompt_mask": prompt_mask,
        "completion_ids": ids[:, PROMPT:],
        "completion_mask": mask,
        "advantages": torch.randn(rows, device=device),
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": logp + 0.1 * torch.randn_like(logp),
        "ref_per_token_logps": logp + 0.3 * torch.randn_like(logp),
    }


def seconds(call):
    """Seconds that `call` takes, with all that it started on a GPU: on the clock, and of CPU."""
    if CUDA:
        torch.cuda.synchronize()
    start, cpu_start = time.perf_counter(), time.process_time()
    call()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu_start


def step(trainer, batch):
    """Seconds of one loss and backward pass: on the clock, and of CPU."""
    trainer.model.zero_grad(set_to_none=False)
    return seconds(lambda: trainer.compute_loss(trainer.model, batch).backward())


def peak_bytes(call):
    """The most that `call` holds above what was held before it."""
    if CUDA:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    changes = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())))


def turns(steps, rounds, prepare, what=""):
    """Name -> what each of `steps` (name -> function of a batch) returned in each round; none always goes first."""
    found = {name: [] for name in steps}
    for turn in track(range(rounds), description=what, disable=not what):
        batch = prepare()
        for name in steps if turn % 2 else reversed(steps):
            found[name].append(steps[name](batch))
    return found


def ratio(ours, stock):
    """Of paired steps: the median ratio, and the extremes."""
    paired = sorted(a / b for a, b in zip(ours, stock, strict=True))
    return {"median": statistics.median(paired), "lowest": paired[0], "highest": paired[-1]}


def clocked(*places, clock=time.perf_counter):
    """The seconds of every call from now on of the functions at `places`, (owner, name) each, in a list that grows."""
    spent = []

    def timed(function):
        def call(*args, **kwargs):
            start = clock()
            try:
                return function(*args, **kwargs)
            finally:
                spent.append(clock() - start)

        return call

    for owner, name in places:
        setattr(owner, name, timed(getattr(owner, name)))
    return spent


def keep_freed_memory():
    """Let glibc reuse large blocks instead of returning them: page faults would be half of a CPU step's time."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def write(result, output):
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


def compare(shape, steps, rounds, prepare, own, versions, output):
    """Measure a stock step against kl_plugins' (the first and the second of `steps`), write the numbers, show them.

    `own` is the list of `clocked`: what the plugin's own code takes. Memory is measured first, which warms up, too.
    """
    stock, ours = steps
    batch = prepare()
    memory = {name: peak_bytes(lambda run=run: run(batch)) for name, run in steps.items()}
    own.clear()
    found = turns(steps, rounds, prepare, "pairs of steps")
    clock = {name: [wall for wall, _ in each] for name, each in found.items()}
    result = {
        "shape": shape,
        "device": DEVICE,
        "versions": {"torch": torch.__version__, **versions},
        "step_seconds": {name: statistics.median(values) for name, values in clock.items()},
        "time_ratio": ratio(clock[ours], clock[stock]),
        "seconds_in_the_term_per_step": sum(own) / rounds,
        "peak_bytes": memory,
        "memory_ratio": memory[ours] / memory[stock],
    }
    write(result, output)
    title = f"{shape['rows']} x {shape['tokens']} tokens, vocabulary {shape['vocabulary']}, {DEVICE}"
    table = Table(title=title, title_justify="left")
    for column in ("", stock, ours, "ratio", "of all pairs"):
        table.add_column(column, justify="left" if not column else "right")
    median, lowest, highest = (f"{result['time_ratio'][key]:.3f}" for key in ("median", "lowest", "highest"))
    times = (f"{result['step_seconds'][name]:.3f}" for name in steps)
    peaks = (f"{memory[name] / 2**20:.1f}" for name in steps)
    table.add_row("step, seconds (median)", *times, median, f"{lowest} - {highest}")
    table.add_row("peak memory of a step, MiB", *peaks, f"{result['memory_ratio']:.4f}", "")
    table.add_row("of it computing the KL term", "", f"{result['seconds_in_the_term_per_step']:.4f}", "", "")
    Console(width=100).print(table)
    print(f"{rounds} paired steps; written to {output}")
