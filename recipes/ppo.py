"""PPO with the KL you name, on any model and any dataset of prompts and answers.

What:      kl_plugins.trl.PPOTrainer, with a critic and a reward: a model's (--reward_model), or 1 if the last number
           of a completion is that of the answer. Without arguments: a 0.3M-parameter model, made on the spot, learns
           two-digit additions with kl="reverse_kl": k1 in reward, through GAE.
Hardware:  without arguments 2 CPU cores, no GPU, no network once TRL 1.12 is there
How long:  without arguments about two minutes; 20 s more the first time, for the model
Launch:    python -m pip install --no-deps --target .cache/trl-1.12.0 trl==1.12.0    # once: TRL dropped PPO after it
           PYTHONPATH=.cache/trl-1.12.0 python recipes/ppo.py
           PYTHONPATH=.cache/trl-1.12.0 python recipes/ppo.py --kl k2_as_loss --kl_coef 0.1 --num_ppo_epochs 4
           PYTHONPATH=.cache/trl-1.12.0 python recipes/ppo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
               --dataset openai/gsm8k --dataset_config main --prompt_column question --kl reverse_kl
           PYTHONPATH=.cache/trl-1.12.0 accelerate launch --num_processes 8 recipes/ppo.py --model_name_or_path ...

Every field of kl_plugins.trl.PPOConfig, and so of TRL's PPOConfig, is an option of the command line; `--help`
lists them, and `--config FILE.yaml` reads them. Writes metrics.jsonl, metrics.png and the trained model to
--output_dir (runs/ppo).
"""

import gc
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console

TINY = not {"--model_name_or_path", "--config"} & set(sys.argv)
# Read by the libraries when they are imported; a value from outside wins.
for variable, value in {
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    # For matrices this small a second thread costs more than it brings, above all beside other work.
    **({"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} if TINY else {}),
}.items():
    os.environ.setdefault(variable, value)
# TRL's PPO generates with transformers; beside the vLLM that newer TRL releases use, TRL 1.12 can't be imported.
sys.modules["vllm"] = None

console = Console(quiet=os.environ.get("RANK", "0") != "0")
with console.status("Importing torch and TRL"):
    import datasets
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        PrinterCallback,
        TrainerCallback,
    )
    from trl import TrlParser

    from kl_plugins import ConfigError, PatchError, UnknownLossError, report

    try:
        from kl_plugins.trl import PPOConfig, PPOTrainer
    except PatchError as error:
        sys.exit(f"error: {error}\nThe header of this recipe shows how, beside the TRL that is there.")
    from kl_plugins.trl.callbacks import JsonlCallback, ProgressBarCallback


@dataclass
class ScriptArguments:
    """What to train on what, beside the fields of `PPOConfig`."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder. Without it, the tiny math model is made and used."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "JSON lines, a folder or a hub id. Without it, the math model's own prompts."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset of the hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split of the same dataset to evaluate on before and after the training."}
    )
    eval_examples: int = field(default=512, metadata={"help": "Evaluate on so many examples of it; 0 for none."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column with the question (text or messages)."})
    answer_column: str = field(default="answer", metadata={"help": "Column with the reference answer."})
    reward_model: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of a sequence classifier. Without it, the rule: right or not."},
    )
    chat: bool | None = field(
        default=None, metadata={"help": "Use the chat template on text prompts. Default: if the tokenizer has one."}
    )


CUDA, SINGLE_PROCESS = torch.cuda.is_available(), os.environ.get("WORLD_SIZE", "1") == "1"
DEFAULTS = {
    "output_dir": "runs/ppo",
    "kl": "reverse_kl",
    "stop_token": "eos",
    "missing_eos_penalty": 1.0,
    "temperature": 1.0,
    "num_sample_generations": 0,
    "use_cpu": not CUDA,
    "bf16": CUDA,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
# On top of these, for the tiny model only: its answers have at most four tokens, and it stands a large learning rate.
TINY_DEFAULTS = DEFAULTS | {
    "total_episodes": 512 * 45,
    "kl_coef": 0.02,
    "per_device_train_batch_size": 512,
    "local_rollout_forward_batch_size": 512,
    "num_ppo_epochs": 2,  # before the second the KL in the advantages is brought up to date
    "response_length": 6,
    "learning_rate": 5e-4,
    "gradient_checkpointing": False,
}


def parse(defaults):
    parser = TrlParser((ScriptArguments, PPOConfig))
    parser.set_defaults_with_config(**defaults)
    return parser.parse_args_and_config()


def find_math_model():
    """The folder of the tiny model, which is made if it isn't there."""
    folder = Path(os.environ.get("KL_PLUGINS_MATH_MODEL", ".cache/kl_plugins/math"))
    if not (folder / "warmup.json").is_file():
        if not SINGLE_PROCESS:
            sys.exit("Several processes would make the math model at once: run recipes/make_math_model.py first.")
        maker = Path(__file__).with_name("make_math_model.py")
        subprocess.run([sys.executable, str(maker), "--out", str(folder)], check=True)
    return str(folder)


def load_examples(name, split, args):
    """A dataset with the columns prompt and answer, from JSON lines, a folder or the hub."""
    if name.endswith((".json", ".jsonl")):
        if not Path(name).is_file():
            sys.exit(f"--dataset {name}: there is no such file.")
        examples = datasets.load_dataset("json", data_files=name, split="train")
    else:
        examples = datasets.load_dataset(name, args.dataset_config, split=split)
    for option in ("prompt_column", "answer_column"):
        if getattr(args, option) not in examples.column_names:
            found = ", ".join(examples.column_names)
            sys.exit(f"--dataset {name} has no column {getattr(args, option)!r} (found: {found}): set --{option}.")
    columns = {"prompt": examples[args.prompt_column], "answer": [str(a) for a in examples[args.answer_column]]}
    return datasets.Dataset.from_dict(columns)


def final_number(text):
    """The last number of a text, as a float: it reads `42`, `#### 1,234`, `\\boxed{3.5}` and `... so it is 7.`"""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def correct(completion, answer):
    """1 where the last number of the completion is that of the answer (or the texts are equal), else 0."""
    number = final_number(completion)
    return float((number is not None and number == final_number(answer)) or completion.strip() == answer.strip())


class RuleReward(torch.nn.Module):
    """`correct`, in the shape of the sequence classifier that TRL's PPO asks for: a backbone, and a score on top.

    The answer is found by the prompt's tokens, which TRL passes together with the completion's.
    """

    base_model_prefix = "backbone"

    def __init__(self, tokenizer, prompts, answers):
        super().__init__()
        self.tokenizer, self.score = tokenizer, torch.nn.Identity()
        self.answers = {self.key(prompt): answer for prompt, answer in zip(prompts, answers, strict=True)}
        self.lengths = sorted({len(key) for key in self.answers}, reverse=True)

    def key(self, ids):
        """A prompt as it arrives: TRL's attention mask leaves out all padding tokens."""
        return tuple(token for token in ids if token != self.tokenizer.pad_token_id)

    def backbone(self, input_ids, attention_mask, **kwargs):
        """(B, T, 1) as the last hidden state: the reward of each row, at all positions."""
        rewards = [self.reward(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        everywhere = torch.tensor(rewards, device=input_ids.device)[:, None, None].expand(*input_ids.shape, 1)
        return SimpleNamespace(hidden_states=[everywhere])

    def reward(self, ids):
        """That of one prompt and its completion."""
        length = next(length for length in self.lengths if tuple(ids[:length]) in self.answers)
        completion = self.tokenizer.decode(ids[length:], skip_special_tokens=True)
        return correct(completion, self.answers[tuple(ids[:length])])


class PlainNames(TrainerCallback):
    """TRL's PPO logs the reward and the KL under names of its own; the bar and the report read these."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Runs before the callbacks that write and show the logs."""
        for name, own in (("reward", "objective/scores"), ("kl", "objective/kl"), ("entropy", "policy/entropy_avg")):
            if own in (logs or {}):
                logs[name] = logs[own]


@torch.no_grad()
def accuracy(model, tokenizer, ids, answers, length, batch=256):
    """Share of prompts answered correctly by greedy decoding."""
    right = 0.0
    for first in range(0, len(ids), batch):
        prompts = tokenizer.pad({"input_ids": ids[first : first + batch]}, return_tensors="pt").to(model.device)
        tokens = model.generate(**prompts, max_new_tokens=length, do_sample=False)
        texts = tokenizer.batch_decode(tokens[:, prompts["input_ids"].size(1) :], skip_special_tokens=True)
        right += sum(map(correct, texts, answers[first : first + batch]))
    return right / len(ids)


def main(script_args, training_args):
    datasets.disable_progress_bars()
    model, name, eval_split = script_args.model_name_or_path, script_args.dataset, script_args.eval_split
    held_out = None
    if model and not name:
        sys.exit("--model_name_or_path without --dataset: name the prompts to train on.")
    if name:  # first, since a wrong name or column shouldn't take a model to be noticed
        train = load_examples(name, script_args.dataset_split, script_args)
        held_out = load_examples(name, eval_split, script_args) if eval_split else None
    model = model or find_math_model()
    if not name:
        train = load_examples(f"{model}/train.jsonl", "train", script_args)
        held_out = load_examples(f"{model}/eval.jsonl", "train", script_args)
    if held_out:
        held_out = held_out.select(range(min(script_args.eval_examples, len(held_out)))) or None

    # Left padding: completions are generated from the end of the prompt.
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    if tokenizer.pad_token is None:
        sys.exit(f"{model} has no padding token, and TRL's PPO would take each <eos> for one: choose another model.")
    chat = tokenizer.chat_template is not None if script_args.chat is None else script_args.chat

    def tokens(prompt):
        if chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str):
            return tokenizer(prompt)["input_ids"]
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]

    prompts = [tokens(prompt) for prompt in train["prompt"]]
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    critic = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32, num_labels=1)
    torch.nn.init.zeros_(critic.score.weight)  # it begins by saying 0, not noise
    reward_model = RuleReward(tokenizer, prompts, train["answer"])
    if script_args.reward_model:  # it must read the policy's tokens
        classifier = AutoModelForSequenceClassification
        reward_model = classifier.from_pretrained(script_args.reward_model, dtype=torch.float32, num_labels=1)

    output = Path(training_args.output_dir)
    trainer = PPOTrainer(
        args=training_args,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,  # a copy of the policy
        reward_model=reward_model,
        value_model=critic,
        train_dataset=datasets.Dataset.from_dict({"input_ids": prompts}),
        callbacks=[PlainNames(), JsonlCallback(output / "metrics.jsonl"), ProgressBarCallback("PPO")],
    )
    trainer.remove_callback(PrinterCallback)  # every row goes to metrics.jsonl; the bar shows the ones to watch

    def evaluate(when):
        if held_out and trainer.accelerator.is_main_process:
            ids = [tokens(prompt) for prompt in held_out["prompt"]]
            share = accuracy(policy, tokenizer, ids, held_out["answer"], training_args.response_length)
            console.print(f"{when}: {share:.1%} of {len(ids)} unseen problems solved greedily", highlight=False)

    evaluate("before")
    gc.freeze()  # TRL collects garbage twice an update: spare it what was there before
    trainer.train()
    evaluate("after")
    trainer.save_model(training_args.output_dir)

    if trainer.accelerator.is_main_process:
        rows = report.read_metrics(output / "metrics.jsonl")
        title = f"PPO, {training_args.kl or 'stock TRL'}, kl_coef {training_args.kl_coef:g}"
        console.print(report.summary_table(rows, title))
        print("wrote", report.plot_runs({title: rows}, output / "metrics.png", title))


if __name__ == "__main__":
    try:
        script_args, training_args = parse(DEFAULTS)
        if not script_args.model_name_or_path:
            script_args, training_args = parse(TINY_DEFAULTS)
    except (ConfigError, PatchError, UnknownLossError) as error:
        sys.exit(f"error: {error}")
    main(script_args, training_args)
