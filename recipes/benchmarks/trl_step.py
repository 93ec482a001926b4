"""What the plugin costs: a training step of stock TRL against one with kl="k2_as_loss", side by side in one process.

Both trainers hold the same weights and get the same prepared, off-policy batches; their steps (loss and backward pass)
take turns. Time is the median ratio of paired steps; memory is the ratio of the peaks of one step.
Pairs are noisy on a shared machine, so the seconds that the plugin's own code takes in a step are given, too (its
forward part; on a GPU without waiting for kernels).
Writes runs/benchmark.json.

Hardware: a CPU (12 GiB) or one GPU. Takes: 5 to 10 minutes on 2 cores at the default shape.
Launch: python recipes/benchmarks/trl_step.py [--vocabulary 150000] [--rows 8] [--tokens 512] [--steps 10]
"""

import tempfile
from pathlib import Path
from typing import Annotated

import harness
import trl
import typer
from transformers import set_seed

import kl_plugins.trl


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
    harness.keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        harness.save(harness.llama(vocabulary, hidden, tokens + harness.PROMPT), folder)
        stock = harness.make_trainer(trl.GRPOTrainer, trl.GRPOConfig, folder, beta=0.04)
        ours = harness.make_trainer(
            kl_plugins.trl.GRPOTrainer,
            kl_plugins.trl.GRPOConfig,
            folder,
            beta=0.04,
            kl="k2_as_loss",
            kl_off_policy="token",
        )
        harness.compare(
            {"vocabulary": vocabulary, "rows": rows, "tokens": tokens, "hidden": hidden},
            {
                "stock TRL": lambda batch: harness.step(stock, batch),
                "kl_plugins": lambda batch: harness.step(ours, batch),
            },
            rounds=steps,
            prepare=lambda: harness.make_batch(stock, rows, tokens, vocabulary),
            own=harness.clocked((ours, "_terms_of")),
            versions={"trl": trl.__version__},
            output=output,
        )


if __name__ == "__main__":
    typer.run(main)
