"""Make a tiny character-level math model, on the spot and without a network.

What:      a tokenizer with one token per character, a 0.3M-parameter Llama, and a supervised warm-up on additions of
           two-digit numbers (`17+25=` -> `42`) that stops as soon as half of unseen problems are solved greedily: good
           enough to earn rewards, bad enough for reinforcement learning to have something to do.
Hardware:  2 CPU cores, no GPU, no network
How long:  15-45 s, depending on luck and other work; a second call finds the folder and returns at once
Launch:    python recipes/make_math_model.py [--out DIR] [--seed 2] [--force]

The folder holds the model and tokenizer (`from_pretrained` loads them), `train.jsonl` and `eval.jsonl` with the keys
prompt and answer, and `warmup.json` with what was measured. Its place is --out, else $KL_PLUGINS_MATH_MODEL, else
.cache/kl_plugins/math under the current directory.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "0123456789+="
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
BATCH_SIZE = 96
LEARNING_RATE = 3e-3
EVAL_PROBLEMS = 512
TRAIN_PROMPTS = 4096


def make_tokenizer():
    """One token per character. <bos> exists but isn't prepended, as in Qwen."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=64,
    )


def make_model(tokenizer):
    # Heads of 32 are the smallest that vLLM's CPU attention has a kernel for.
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def make_problem(rng):
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return f"{a}+{b}=", str(a + b)


def make_batch(problems, tokenizer, device):
    """Token ids, and labels which count the answer and its <eos> only; right-padded, so causality is mask enough."""
    ids, labels = [], []
    for prompt, answer in problems:
        prompt_ids = tokenizer.convert_tokens_to_ids(list(prompt))
        answer_ids = tokenizer.convert_tokens_to_ids([*answer, tokenizer.eos_token])
        ids.append(torch.tensor(prompt_ids + answer_ids))
        labels.append(torch.tensor([-100] * len(prompt_ids) + answer_ids))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    return ids.to(device), pad(labels, batch_first=True, padding_value=-100).to(device)


@torch.no_grad()
def measure(model, batch):
    """Share of problems solved greedily, and the expected share when sampling at temperature 1."""
    ids, labels = batch
    logp = model(ids).logits[:, :-1].log_softmax(-1)
    labels = labels[:, 1:]
    ignored = labels == -100
    # Greedy decoding solves a problem exactly when every teacher-forced argmax is right, so nothing is generated here.
    greedy = ((logp.argmax(-1) == labels) | ignored).all(-1).float().mean().item()
    answer_logp = logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(ignored, 0.0).sum(-1)
    return greedy, answer_logp.exp().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder to make")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--target", type=float, default=0.5, help="stop at this greedy accuracy on unseen problems")
    parser.add_argument("--max_steps", type=int, default=1500, help="stop here at the latest")
    parser.add_argument("--force", action="store_true", help="make it again although it is there")
    args = parser.parse_args()
    console = Console()
    out = args.out or Path(os.environ.get("KL_PLUGINS_MATH_MODEL", ".cache/kl_plugins/math"))
    if (out / "warmup.json").is_file() and not args.force:
        console.print(f"The math model is already in {out} (--force makes it again).")
        return
    if out.exists() and any(out.iterdir()) and not (out / "warmup.json").is_file():
        sys.exit(f"{out} exists and is not a math model: give another folder with --out, or empty this one.")

    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)  # these matrices are too small for a second thread to pay, least of all on a busy machine
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer).to(device)
    parameters = sum(p.numel() for p in model.parameters())

    held_out = {}
    while len(held_out) < EVAL_PROBLEMS:
        held_out.update([make_problem(rng)])
    eval_batch = make_batch(held_out.items(), tokenizer, device)

    def training_problem():
        while (problem := make_problem(rng))[0] in held_out:
            pass
        return problem

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    greedy, sampled = measure(model, eval_batch)
    columns = (
        TextColumn(f"Warming up a math model ({parameters / 1e6:.1f}M)"),
        BarColumn(bar_width=20),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"accuracy {greedy:.0%}", total=args.target)
        for step in range(1, args.max_steps + 1):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, step / 50)
            ids, labels = make_batch([training_problem() for _ in range(BATCH_SIZE)], tokenizer, device)
            logits = model(ids).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 10 == 0:
                greedy, sampled = measure(model, eval_batch)
                text = f"step {step}, accuracy {greedy:.0%} of {args.target:.0%}"
                progress.update(bar, completed=min(greedy, args.target), description=text)
                if greedy >= args.target:
                    break

    # A folder that is there is complete: write beside it, then rename.
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        model.cpu().save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        train = dict(training_problem() for _ in range(TRAIN_PROMPTS))
        for name, problems in (("train", train), ("eval", held_out)):
            lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in problems.items()]
            (scratch / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        seconds = time.perf_counter() - started
        measured = {"seed": args.seed, "steps": step, "seconds": round(seconds, 1), "parameters": parameters}
        measured |= {"greedy_accuracy": round(greedy, 4), "sampled_accuracy": round(sampled, 4)}
        (scratch / "warmup.json").write_text(json.dumps(measured, indent=2) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        scratch.chmod(0o755)
        scratch.rename(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    console.print(
        f"Math model in {out}: {step} steps, {seconds:.0f} s; solves {greedy:.1%} of {EVAL_PROBLEMS} unseen problems "
        f"greedily, {sampled:.1%} when sampling."
    )


if __name__ == "__main__":
    main()
