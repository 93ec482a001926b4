"""KL configurations side by side: the same model, prompts and seeds, one picture and one table.

What:      runs recipes/grpo.py once per configuration and seed: no KL, TRL's own, k1, k2 and k3 as loss, k1 in reward;
           then measures all trained models alike: the probability of the right answer, and the exact per-token KLs.
Hardware:  2 CPU cores (two runs at a time, one thread each), no GPU, no network; transformers rollouts
How long:  2-4 min with one seed, 7 min with three
Launch:    python recipes/compare.py
           python recipes/compare.py --seeds 0 1 2 --beta 0.05
           python recipes/compare.py --arms "no KL" k2_as_loss k3_as_loss --max_steps 100 --num_iterations 4

Options it doesn't know go to recipes/grpo.py. Writes table.json, compare.png and a folder per run to --output_dir
(runs/compare). "No KL" runs with beta 1e-12 instead of 0: too little to matter, but TRL then loads the reference and
logs the distance to it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kl_plugins import KLSpec, report
from kl_plugins.report.plots import first_and_last, series

HERE = Path(__file__).parent
ARMS = {
    "no KL": ["--kl", "none", "--beta", "1e-12"],
    "stock TRL": ["--kl", "none"],
    "k1_as_loss": ["--kl", "k1_as_loss", "--kl_allow_biased", "true"],
    "k2_as_loss": ["--kl", "k2_as_loss"],
    "k3_as_loss": ["--kl", "k3_as_loss"],
    "k1_in_reward": ["--kl", "k1_in_reward"],
}


def gradient_of(arm):
    """The expected gradient of an arm's KL term, in words."""
    # TRL multiplies k3 with a ratio that it differentiates, which turns k3's forward KL into the reverse one.
    known = {"no KL": "none", "stock TRL": "local reverse KL"}
    return known.get(arm) or KLSpec.from_name(arm, allow_biased=True).gradient_of.replace("_kl", " KL").replace(
        "_", " "
    )


def run_all(commands, steps, jobs, console):
    """Run each command (folder -> arguments), `jobs` at a time, with a bar for each; the log is beside its metrics."""
    waiting, running = dict(commands), {}
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        total = progress.add_task(f"{len(commands)} runs", total=len(commands))
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    folder = next(iter(waiting))
                    command = waiting.pop(folder)
                    folder.mkdir(parents=True, exist_ok=True)
                    with (folder / "log.txt").open("w") as log:
                        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
                    bar = progress.add_task(f"  {folder.parent.name}, {folder.name}", total=steps)
                    running[folder] = process, bar
                time.sleep(0.3)
                for folder, (process, bar) in list(running.items()):
                    metrics = folder / "metrics.jsonl"
                    lines = metrics.read_bytes().count(b'"loss":') if metrics.is_file() else 0
                    progress.update(bar, completed=min(lines, steps))
                    if process.poll() is None:
                        continue
                    if process.returncode:
                        tail = "\n".join((folder / "log.txt").read_text().splitlines()[-25:])
                        sys.exit(f"{folder.parent.name} failed with exit status {process.returncode}:\n{tail}")
                    progress.remove_task(bar)
                    progress.advance(total)
                    del running[folder]
        finally:
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.wait()


def measure(folder, reference_folder):
    """What a trained model has become, on the math model's 512 unseen prompts.

    The probability of the right answer is exact. The KLs are those of whole completions, in nats: sampled prefixes,
    but at each of them the sum over the whole vocabulary (a Rao-Blackwellized estimate, Amini et al.,
    arXiv 2504.10637), so they are comparable whatever estimator a run trained with.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # the matrices are tiny
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(reference_folder)
    policy, reference = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (folder, reference_folder))
    rows = [json.loads(line) for line in (reference_folder / "eval.jsonl").read_text().splitlines()]
    prompts = tokenizer([row["prompt"] for row in rows], return_tensors="pt").input_ids  # all of one length
    width, eos = prompts.shape[1], tokenizer.eos_token_id

    def score(model, ids):
        return model(ids).logits[:, width - 1 : -1].log_softmax(-1)

    @torch.no_grad()
    def divergence(model, other):
        ids = model.generate(prompts.repeat(4, 1), do_sample=True, max_new_tokens=8, top_k=0, pad_token_id=0)
        logp, other_logp = score(model, ids), score(other, ids)
        ended = (ids[:, width:] == eos).cumsum(1)
        counted = (ended - (ids[:, width:] == eos).long() == 0).float()  # up to and with <eos>
        return ((logp.exp() * (logp - other_logp)).sum(-1) * counted).sum(1).mean().item()

    with torch.no_grad():
        answers = [[*tokenizer(row["answer"]).input_ids, eos] for row in rows]
        labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(a) for a in answers], batch_first=True)
        logp = score(policy, torch.cat([prompts, labels], 1)).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        right = logp.masked_fill(labels == tokenizer.pad_token_id, 0.0).sum(-1).exp().mean().item()
    return {
        "accuracy": right,
        "reverse_kl": divergence(policy, reference),
        "forward_kl": divergence(reference, policy),
    }


def mean_and_spread(values, form):
    """The mean, below it the standard deviation if there are several values; a dash if there is none."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    spread = f"\n±{format(statistics.stdev(values), form)}" if len(values) > 1 else ""
    return format(statistics.fmean(values), form) + spread


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="prompts' order and sampling; one run each")
    parser.add_argument("--beta", type=float, default=0.05, help="KL coefficient of every arm but 'no KL'")
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="runs at a time")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compare"))
    args, rest = parser.parse_known_args()
    console = Console()

    tiny = "--model_name_or_path" not in rest
    model = Path(os.environ.get("KL_PLUGINS_MATH_MODEL", ".cache/kl_plugins/math"))
    if tiny and not (model / "warmup.json").is_file():  # once, and not by all runs at once
        subprocess.run([sys.executable, str(HERE / "make_math_model.py"), "--out", str(model)], check=True)

    shared = ["--use_vllm", "false", "--beta", str(args.beta), "--max_steps", str(args.max_steps)]
    shared += ["--per_device_train_batch_size", "256"] if tiny else []
    folders = {
        arm: [args.output_dir / arm.replace(" ", "_") / f"seed{seed}" for seed in args.seeds] for arm in args.arms
    }
    commands = {}
    for arm, seeds in folders.items():
        for seed, folder in zip(args.seeds, seeds, strict=True):
            # The last of two equal options counts.
            options = [*shared, *ARMS[arm], "--seed", str(seed), "--output_dir", str(folder), *rest]
            commands[folder] = [sys.executable, str(HERE / "grpo.py"), *options]
            for left_over in ("metrics.jsonl", "config.json"):  # of an earlier comparison
                (folder / left_over).unlink(missing_ok=True)
    try:
        run_all(commands, args.max_steps, args.jobs, console)
    except KeyboardInterrupt:
        console.print("Interrupted: the runs that ended are in the table.")
    done = {arm: [f for f in seeds if (f / "config.json").is_file()] for arm, seeds in folders.items()}
    done = {arm: seeds for arm, seeds in done.items() if seeds}

    rows = {arm: [report.read_metrics(f / "metrics.jsonl") for f in seeds] for arm, seeds in done.items()}
    console.print("Measuring the trained models")
    measured = {arm: [measure(f, model) for f in seeds] if tiny else [] for arm, seeds in done.items()}
    table = Table(
        title=f"beta {args.beta:g}, {args.max_steps} steps, seeds {args.seeds}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    columns = ("KL", "its gradient", "reward", "accuracy", "pi||ref", "ref||pi", "ESS")
    for name in columns:
        table.add_column(name, justify="left" if name in columns[:2] else "right", no_wrap=name in columns[:2])
    if tiny:
        before = measure(model, model)
        table.add_row("(before)", "", "", *(format(before[k], ".3f") for k in before), "")
    for arm in done:
        ends = [first_and_last(r, "reward") for r in rows[arm]]
        sizes = [statistics.fmean(series(r, "kl/ess")[1] or [float("nan")]) for r in rows[arm]]
        table.add_row(
            arm,
            gradient_of(arm),
            mean_and_spread([pair[1] for pair in ends if pair], ".3f"),
            *(mean_and_spread([m[k] for m in measured[arm]], ".3f") for k in ("accuracy", "reverse_kl", "forward_kl")),
            mean_and_spread([s for s in sizes if s == s], ".1%"),
        )
    console.print(table)
    console.print(
        "reward: mean over the last tenth of the steps; accuracy: probability of the right answer on unseen prompts; "
        "pi||ref, ref||pi: KL in nats a completion, measured alike for all"
        + ("; ±: deviation over seeds" * (len(args.seeds) > 1))
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "table.json").write_text(json.dumps(measured, indent=2) + "\n")
    title = f"KL configurations, beta {args.beta:g}" + (f", {len(args.seeds)} seeds" if len(args.seeds) > 1 else "")
    picture = report.plot_runs(rows, args.output_dir / "compare.png", title)
    console.print(f"picture  {picture}\ntable    {args.output_dir / 'table.json'}", highlight=False)


if __name__ == "__main__":
    main()
