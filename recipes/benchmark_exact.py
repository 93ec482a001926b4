"""What an exact KL costs: a training step of stock TRL (k3) against kl="exact_in_reward" and a naive implementation.

All trainers hold the same weights and get the same off-policy batch; their steps (loss and backward pass) take turns
in one process. Time is the median ratio of steps of one round. Memory is the peak of one step above what was held
before it, as torch's allocator (GPU) or profiler (CPU) counts it. The naive implementation writes out both models'
logits and differentiates through log_softmax; it is left out of shapes whose logits need more than --naive-gib.
Writes runs/benchmark_exact.json and runs/benchmark_exact.png.

Hardware: a CPU (12 GiB) or one GPU. Takes: about 10 minutes on one core.
Launch: python recipes/benchmark_exact.py [--vocabulary 150000] [--tokens 128 --tokens 512] [--hidden 64] [--rounds 3]
"""

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
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

import kl_plugins.trl

STOCK, OURS, NAIVE = "stock TRL, k3", "exact_in_reward", "naive exact_in_reward"
BETA = 0.04


class Naive(trl.GRPOTrainer):
    """GRPO with the same term, from logits that are written out."""

    def _compute_loss(self, model, inputs):
        beta, self.beta = self.beta, 0.0
        loss = super()._compute_loss(model, inputs)
        self.beta = beta
        mask = inputs["completion_mask"]

        def log_softmax(model):
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            attention = torch.cat([inputs["prompt_mask"], mask], dim=1)
            hidden = model.model(ids, attention_mask=attention).last_hidden_state[:, -mask.size(1) - 1 : -1]
            return model.lm_head(hidden).float().log_softmax(-1)

        with torch.no_grad():
            r = log_softmax(self.ref_model)
        p = log_softmax(model)
        kl = (p.exp() * (p - r)).sum(-1) * mask
        logp = p.gather(-1, inputs["completion_ids"][..., None]).squeeze(-1)
        later = kl.detach().flip(-1).cumsum(-1).flip(-1) - kl.detach()
        rho = (logp.detach() - inputs["old_per_token_logps"]).exp().clamp(max=10)
        return loss + beta * ((kl + rho * later * (logp - logp.detach())) * mask).sum() / mask.sum()


def make_model(folder: str, vocabulary: int, hidden: int, layers: int, context: int) -> None:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 1),
        num_key_value_heads=max(hidden // 64, 1),
        max_position_embeddings=context,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def make_trainer(cls, config, folder: str, **options):
    args = config(
        output_dir=folder,
        beta=BETA,
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
    """Off-policy; the reference has been scored, as TRL does at rollout."""
    device = trainer.accelerator.device
    ids = torch.randint(3, vocabulary, (rows, tokens + 16), device=device)
    mask = torch.ones_like(ids[:, 16:])
    arguments = ids, torch.ones_like(ids), tokens
    trainer._scored = ()
    with torch.no_grad():
        logp, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, *arguments)
        ref_logp, _, _ = trainer._get_per_token_logps_and_entropies(trainer.ref_model, *arguments)
    batch = {
        "prompt_ids": ids[:, :16],
        "prompt_mask": torch.ones_like(ids[:, :16]),
        "completion_ids": ids[:, 16:],
        "completion_mask": mask,
        "advantages": torch.randn(rows, device=device),
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": logp + 0.1 * torch.randn_like(logp),
        "ref_per_token_logps": ref_logp,
    }
    trainer._keep_reference(batch)
    return batch


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
    """The most that one step holds above what was held before it."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(trainer, batch)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(trainer, batch)
    changes = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())))


def gradients(trainer, batch) -> torch.Tensor:
    step(trainer, batch)
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def main(
    vocabulary: Annotated[int, typer.Option(help="Size of the vocabulary.")] = 150_000,
    rows: Annotated[int, typer.Option(help="Completions in a batch.")] = 1,
    tokens: Annotated[list[int], typer.Option(help="Tokens of a completion; may be given again.")] = (128, 512, 2048),
    hidden: Annotated[int, typer.Option(help="Width of the model.")] = 256,
    layers: Annotated[int, typer.Option(help="Its depth.")] = 2,
    rounds: Annotated[int, typer.Option(help="Measured rounds of steps.")] = 3,
    naive_gib: Annotated[float, typer.Option(help="Largest logits (GiB) that the naive one is tried with.")] = 0.5,
    output: Annotated[Path, typer.Option(help="Where the numbers go, as JSON; the plot beside it.")] = Path(
        "runs/benchmark_exact.json"
    ),
) -> None:
    """Time and memory of a step with an exact KL, against stock TRL and a naive implementation."""
    set_seed(0)
    shapes = []
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, vocabulary, hidden, layers, max(tokens) + 16)
        trainers = {
            STOCK: make_trainer(trl.GRPOTrainer, trl.GRPOConfig, folder),
            OURS: make_trainer(kl_plugins.trl.GRPOTrainer, kl_plugins.trl.GRPOConfig, folder, kl="exact_in_reward"),
            NAIVE: make_trainer(Naive, trl.GRPOConfig, folder),
        }
        drift = [0.02 * torch.randn_like(p) for p in trainers[OURS].ref_model.parameters()]
        with torch.no_grad():
            for trainer in trainers.values():
                for p, change in zip(trainer.ref_model.parameters(), drift, strict=True):
                    p.add_(change)
        for length in tokens:
            batch = make_batch(trainers[OURS], rows, length, vocabulary)
            fits = rows * length * vocabulary * 4 / 2**30 <= naive_gib
            taking_part = {name: trainer for name, trainer in trainers.items() if fits or name != NAIVE}
            shape = {"tokens": length, "reference_hidden_bytes": batch["kl_ref_hidden"].nbytes}
            if fits:  # they compute the same
                naive = gradients(trainers[NAIVE], batch)
                shape["gradient_error"] = ((gradients(trainers[OURS], batch) - naive).norm() / naive.norm()).item()
            shape["peak_bytes"] = {name: peak_bytes(trainer, batch) for name, trainer in taking_part.items()}
            seconds = {name: [] for name in taking_part}
            for turn in range(rounds):
                turns = list(taking_part.items())
                for name, trainer in turns if turn % 2 else reversed(turns):
                    seconds[name].append(step(trainer, batch))
            shape["seconds"] = {name: statistics.median(found) for name, found in seconds.items()}
            shape["times_stock"] = {
                name: statistics.median(a / b for a, b in zip(found, seconds[STOCK], strict=True))
                for name, found in seconds.items()
            }
            shapes.append(shape)
            print(json.dumps(shape))
    result = {
        "vocabulary": vocabulary,
        "rows": rows,
        "hidden": hidden,
        "layers": layers,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "trl": trl.__version__},
        "shapes": shapes,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    show(result)
    plot(result, output.with_suffix(".png"))


def show(result) -> None:
    title = (
        f"vocabulary {result['vocabulary']}, width {result['hidden']}, {result['layers']} layers, {result['device']}"
    )
    table = Table(title=title, title_justify="left")
    for column in ("tokens", "KL", "step, seconds", "times stock", "peak, MiB"):
        table.add_column(column, justify="right")
    for shape in result["shapes"]:
        for name, seconds in shape["seconds"].items():
            peak = f"{shape['peak_bytes'][name] / 2**20:.0f}"
            table.add_row(str(shape["tokens"]), name, f"{seconds:.2f}", f"{shape['times_stock'][name]:.2f}", peak)
    Console(width=110).print(table)


def plot(result, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for name in (STOCK, OURS, NAIVE):
        shapes = [shape for shape in result["shapes"] if name in shape["seconds"]]
        lengths = [shape["tokens"] for shape in shapes]
        axes[0].plot(lengths, [shape["seconds"][name] for shape in shapes], "o-", label=name)
        axes[1].plot(lengths, [shape["peak_bytes"][name] / 2**20 for shape in shapes], "o-", label=name)
    for axis, label in zip(axes, ("step, seconds", "peak of a step, MiB"), strict=True):
        axis.set(xlabel="tokens", ylabel=label, xscale="log", yscale="log")
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    typer.run(main)
