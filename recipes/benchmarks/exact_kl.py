"""What an exact KL costs: a training step of stock TRL (k3) against kl="exact_in_reward" and a naive implementation.

All trainers hold the same weights and get the same off-policy batch; their steps (loss and backward pass) take turns
in one process. Time is the median ratio of the steps of a round, on the clock and, without a GPU, in the process's own
CPU seconds, which other processes disturb less. Memory is the peak of one step; the gradient of the LM head's weight,
which every implementation holds, is part of it. The naive implementation writes out both models' logits and
differentiates through log_softmax; it is left out of shapes whose logits need more than --naive-gib. On a CPU, freed
memory is kept for reuse, as a GPU's allocator does: with glibc's default, page faults make the others' large tensors
slower yet.
The floor of a step is what its passes over the head must take, 4 of TRL's and 6 of ours: the greater of the FLOPs of
their products and the bytes of the head, at the rates of one large product and of a copy in the same process, and the
body's products.
The first of each of --vocabulary, --rows and --tokens is the shape that the others are varied from, one at a time.
Writes runs/benchmark_exact.json and runs/benchmark_exact.png.

Hardware: a CPU (16 GiB) or one GPU. Takes: 8 to 10 minutes on 2 cores.
Launch: python recipes/benchmarks/exact_kl.py [--vocabulary 150000] [--tokens 128 --tokens 512] [--rounds 3]
A body with three times the head's FLOPs: --vocabulary 32000 --hidden 512 --layers 12 --tokens 64
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import harness
import torch
import trl
import typer
from harness import CUDA, PROMPT, step
from rich.console import Console
from rich.table import Table
from transformers import set_seed

import kl_plugins.trl

STOCK, OURS, NAIVE = "stock TRL, k3", "exact_in_reward", "naive"
# With an LM head: its logits, twice, and two gradients; ours: also the reference's logits, twice.
PRODUCTS = {STOCK: 4, OURS: 6}
BETA = 0.04
TOKENS = (128, 8, 32, 512, 2048, 8192)
VOCABULARIES = (150_000, 50_000, 15_000)


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


def make_batch(trainer, rows: int, tokens: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Off-policy; the reference has been scored, as TRL does at rollout."""
    device = trainer.accelerator.device
    ids = torch.randint(3, vocabulary, (rows, tokens + PROMPT), device=device)
    mask = torch.ones_like(ids[:, PROMPT:])
    arguments = ids, torch.ones_like(ids), tokens
    with torch.no_grad():
        logp, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, *arguments)
        ref_logp, _, _ = trainer._get_per_token_logps_and_entropies(trainer.ref_model, *arguments)
    batch = {
        "prompt_ids": ids[:, :PROMPT],
        "prompt_mask": torch.ones_like(ids[:, :PROMPT]),
        "completion_ids": ids[:, PROMPT:],
        "completion_mask": mask,
        "advantages": torch.randn(rows, device=device),
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": logp + 0.1 * torch.randn_like(logp),
        "ref_per_token_logps": ref_logp,
    }
    trainer._exact.keep_reference(batch)
    return batch


def gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def fastest(call) -> float:
    """Seconds of the fastest of twenty."""
    return min(harness.seconds(call)[0] for _ in range(20))


def rates(hidden: int) -> dict[str, float]:
    """FLOPs a second of a large product with this inner dimension, in training's dtype; bytes a second of a copy."""
    kind = {"device": "cuda", "dtype": torch.bfloat16} if CUDA else {}
    a, b = torch.randn(2048, hidden, **kind), torch.randn(hidden, 4096, **kind)
    source = torch.randn(2**26, **kind)
    target = torch.empty_like(source)
    return {
        "flops_a_second": 2 * 2048 * hidden * 4096 / fastest(lambda: a @ b),
        "bytes_a_second": 2 * source.nbytes / fastest(lambda: target.copy_(source)),
    }


def floor_seconds(model, rows: int, tokens: int, rates: dict[str, float]) -> dict[str, float]:
    """Of a step, recomputation of logits included. Each product with a head also reads it, or adds to its gradient."""
    weight = model.lm_head.weight
    body = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    by_body = 6 * body * rows * (tokens + PROMPT) / rates["flops_a_second"]
    product = 2 * rows * tokens * weight.numel() / rates["flops_a_second"]
    return {name: by_body + n * max(product, weight.nbytes / rates["bytes_a_second"]) for name, n in PRODUCTS.items()}


def measure(trainers, rows: int, tokens: int, vocabulary: int, *, rounds: int, naive_gib: float, best: dict) -> dict:
    batch = make_batch(trainers[OURS], rows, tokens, vocabulary)
    shape = {"vocabulary": vocabulary, "rows": rows, "tokens": tokens}
    shape["reference_hidden_bytes"] = batch["kl_ref_hidden"].nbytes
    fits = rows * tokens * vocabulary * 4 / 2**30 <= naive_gib
    taking_part = {name: trainer for name, trainer in trainers.items() if fits or name != NAIVE}
    shape["peak_bytes"] = {
        name: harness.peak_bytes(lambda trainer=trainer: step(trainer, batch)) for name, trainer in taking_part.items()
    }
    if fits:  # they compute the same
        ours, naive = gradient(trainers[OURS].model), gradient(trainers[NAIVE].model)
        shape["gradient_error"] = ((ours - naive).norm() / naive.norm()).item()
    kinds = {name: lambda batch, trainer=trainer: step(trainer, batch) for name, trainer in taking_part.items()}
    steps = harness.turns(kinds, rounds, lambda: batch)
    for i, clock in enumerate(("seconds",) if CUDA else ("seconds", "cpu_seconds")):
        shape[clock] = {name: statistics.median(found[i] for found in steps[name]) for name in steps}
        shape["times_stock" if clock == "seconds" else "times_stock_cpu"] = {
            name: sorted(a[i] / b[i] for a, b in zip(found, steps[STOCK], strict=True))
            for name, found in steps.items()
        }
    shape["floor_seconds"] = floor_seconds(trainers[OURS].model, rows, tokens, best)
    return shape


def main(
    vocabulary: Annotated[list[int], typer.Option(help="Size of the vocabulary; may be given again.")] = VOCABULARIES,
    rows: Annotated[list[int], typer.Option(help="Completions in a batch; may be given again.")] = (1, 2, 4),
    tokens: Annotated[list[int], typer.Option(help="Tokens of a completion; may be given again.")] = TOKENS,
    hidden: Annotated[int, typer.Option(help="Width of the model.")] = 256,
    layers: Annotated[int, typer.Option(help="Its depth.")] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds of steps at the first shape; fewer at larger ones.")] = 5,
    naive_gib: Annotated[float, typer.Option(help="Largest logits (GiB) that the naive one is tried with.")] = 1.2,
    output: Annotated[Path, typer.Option(help="Where the numbers go, as JSON; the plot beside it.")] = Path(
        "runs/benchmark_exact.json"
    ),
) -> None:
    """Time and memory of a step with an exact KL, against stock TRL and a naive implementation."""
    set_seed(0)
    harness.keep_freed_memory()
    shapes, best = [], rates(hidden)
    for size in vocabulary:
        base = size == vocabulary[0]
        wanted = [(rows[0], length) for length in (tokens if base else tokens[:1])]
        wanted += [(number, tokens[0]) for number in rows[1:] if base]
        with tempfile.TemporaryDirectory() as folder:
            context, heads = max(tokens) + PROMPT, max(hidden // 64, 1)
            harness.save(harness.llama(size, hidden, context, layers=layers, heads=heads, widening=4), folder)
            trainers = {
                STOCK: harness.make_trainer(trl.GRPOTrainer, trl.GRPOConfig, folder, beta=BETA),
                OURS: harness.make_trainer(
                    kl_plugins.trl.GRPOTrainer,
                    kl_plugins.trl.GRPOConfig,
                    folder,
                    beta=BETA,
                    kl="exact_in_reward",
                    kl_baseline=None,  # which is made at the rollout; here the batch is made by hand
                ),
                NAIVE: harness.make_trainer(Naive, trl.GRPOConfig, folder, beta=BETA),
            }
            drift = [0.02 * torch.randn_like(p) for p in trainers[OURS].ref_model.parameters()]
            with torch.no_grad():
                for trainer in trainers.values():
                    for p, change in zip(trainer.ref_model.parameters(), drift, strict=True):
                        p.add_(change)
            for trainer in trainers.values():  # a first step sets up more than itself
                step(trainer, make_batch(trainers[OURS], 1, 8, size))
            for number, length in wanted:
                turns = min(rounds, max(2, rounds * rows[0] * tokens[0] // (number * length)))
                shapes.append(measure(trainers, number, length, size, rounds=turns, naive_gib=naive_gib, best=best))
                print(json.dumps(shapes[-1]))
    result = {
        "hidden": hidden,
        "layers": layers,
        "device": harness.DEVICE,
        **best,
        "versions": {"torch": torch.__version__, "trl": trl.__version__},
        "shapes": shapes,
    }
    harness.write(result, output)
    show(result)
    plot(result, output.with_suffix(".png"))


def show(result) -> None:
    title = f"width {result['hidden']}, {result['layers']} layers, {result['device']}"
    table = Table(title=title, title_justify="left")
    columns = ["vocabulary", "rows", "tokens", "KL", "seconds", "times stock", "of all rounds", "CPU times stock"]
    for column in (*columns, "times floor", "peak, MiB"):
        table.add_column(column, justify="right")
    for shape in result["shapes"]:
        for name, peak in shape["peak_bytes"].items():
            seconds, ratios = shape["seconds"][name], shape["times_stock"][name]
            of_cpu = shape.get("times_stock_cpu", {}).get(name)
            floor = shape["floor_seconds"].get(name)
            table.add_row(
                *(str(shape[key]) for key in ("vocabulary", "rows", "tokens")),
                name,
                f"{seconds:.2f}",
                f"{statistics.median(ratios):.2f}",
                f"{ratios[0]:.2f}-{ratios[-1]:.2f}",
                of_cpu and f"{statistics.median(of_cpu):.2f}",
                floor and f"{seconds / floor:.2f}",
                f"{peak / 2**20:.0f}",
            )
    Console(width=120).print(table)


def plot(result, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator

    base = result["shapes"][0]
    figure, axes = plt.subplots(2, 3, figsize=(12, 7))
    for column, varied in enumerate(("tokens", "vocabulary", "rows")):
        fixed = {"tokens", "vocabulary", "rows"} - {varied}
        along = sorted(
            (shape for shape in result["shapes"] if all(shape[key] == base[key] for key in fixed)),
            key=lambda shape: shape[varied],
        )
        for row, (key, unit, label) in enumerate(
            (("seconds", 1, "step, seconds"), ("peak_bytes", 2**20, "peak of a step, MiB"))
        ):
            for name in (STOCK, OURS, NAIVE):
                points = [(shape[varied], shape[key][name] / unit) for shape in along if name in shape.get(key, {})]
                axes[row][column].plot(*zip(*points, strict=True) if points else ([], []), "o-", label=name)
            if key == "seconds":
                points = [(shape[varied], shape["floor_seconds"][OURS]) for shape in along]
                axes[row][column].plot(*zip(*points, strict=True), ":", color="gray", label="floor of exact_in_reward")
            axes[row][column].set(xlabel=varied, ylabel=label, xscale="log", yscale="log")
            axes[row][column].set_xticks([shape[varied] for shape in along], [f"{shape[varied]:,}" for shape in along])
            axes[row][column].minorticks_off()
            axes[row][column].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes[row][column].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="upper center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    typer.run(main)
