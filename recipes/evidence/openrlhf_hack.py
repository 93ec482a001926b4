"""The hackable reward of `hack_task` through OpenRLHF's own trainers; `openrlhf_trainer` says what is real in that."""

import json
import statistics

import torch
from evidence.hack_runs import ADAM_BETA2, BATCH, PARTS, WARMUP, load_task
from evidence.hack_task import MOST_TOKENS, evaluate
from evidence.openrlhf_trainer import GROUP, arguments, samples, train
from transformers import AutoModelForCausalLM, AutoTokenizer


def work(job):
    """Train the math model on the proxy, under OpenRLHF's estimator rloo: one arm, from one seed.

    What `evaluate` found afterwards, and the gradient norms as `hack_runs.work` gives them.
    """
    torch.manual_seed(job["seed"])
    part, task = PARTS[job["part"]], load_task(job["part"])
    policy, tokenizer = (auto.from_pretrained(task.folder) for auto in (AutoModelForCausalLM, AutoTokenizer))
    problems = [json.loads(line) for line in (task.folder / "train.jsonl").read_text().splitlines()]
    adam = ("--actor.adam.lr", str(part.learning_rate), "--actor.adam.betas", "0.9", str(ADAM_BETA2))
    warmup = str(WARMUP / job["steps"])
    schedule = ("--actor.lr_scheduler", "linear", "--actor.lr_warmup_ratio", warmup)
    args = arguments(job["arm"], "rloo", job["beta"], BATCH, *adam, *schedule)

    def draw():
        chosen = [problems[i] for i in torch.randint(len(problems), (BATCH // GROUP,)) for _ in range(GROUP)]
        prompts = tokenizer([problem["prompt"] for problem in chosen], return_tensors="pt").input_ids

        def pays(completions):
            texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
            answers = [problem["answer"] for problem in chosen]
            return torch.tensor([task.proxy(text, right) for text, right in zip(texts, answers, strict=True)])

        return samples(args, policy, prompts, MOST_TOKENS, pays)

    norms = train(args, policy, task.reference, tokenizer, draw, job["steps"])
    return {
        **evaluate(task, policy.eval(), job["beta"]),
        "median_norm": statistics.median(norms),
        "largest_norm": max(norms),
        "norms": [round(norm, 3) for norm in norms],
    }
