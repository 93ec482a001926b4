"""RLOO with the KL you name, on any model and any dataset of prompts and answers.

What:      kl_plugins.trl.RLOOTrainer with a verifiable reward: 1 if the last number of a completion is the answer.
           Without arguments: a 0.3M-parameter model, made on the spot, learns two-digit additions with the reverse KL.
Hardware:  without arguments 2 CPU cores, no GPU, no network; a GPU or several are used where there are any
How long:  without arguments 70-80 s, of which 20-35 s start the vLLM engine; 20 s more the first time, for the model
Launch:    python recipes/rloo.py
           python recipes/rloo.py --kl k2_as_loss --kl_credit sequence --use_vllm false
           python recipes/rloo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k \
               --dataset_config main --prompt_column question --kl reverse_kl --beta 0.01
           accelerate launch --num_processes 8 recipes/rloo.py --model_name_or_path ... --dataset ...

Every field of kl_plugins.trl.RLOOConfig, and so of trl.RLOOConfig, is an option of the command line and of the YAML
file; `--help` lists them. Writes metrics.jsonl, metrics.png and the trained model to --output_dir (runs/rloo).
"""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

TINY = not {"--model_name_or_path", "--config"} & set(sys.argv)
# Read by the libraries when they are imported; a value from outside wins.
for variable, value in {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    # For matrices this small a second thread costs more than it brings, above all beside other work.
    **({"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} if TINY else {}),
}.items():
    os.environ.setdefault(variable, value)

console = Console(quiet=os.environ.get("RANK", "0") != "0")
with console.status("Importing torch and TRL"):
    import datasets
    import torch
    from transformers import AutoTokenizer, PrinterCallback
    from trl import TrlParser

    from kl_plugins import ConfigError, UnknownLossError, report
    from kl_plugins.trl import RLOOConfig, RLOOTrainer
    from kl_plugins.trl.callbacks import JsonlCallback, ProgressBarCallback


@dataclass
class ScriptArguments:
    """What to train on what, beside the fields of `RLOOConfig`."""

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
    chat: bool | None = field(
        default=None, metadata={"help": "Use the chat template on text prompts. Default: if the tokenizer has one."}
    )


CUDA, SINGLE_PROCESS = torch.cuda.is_available(), os.environ.get("WORLD_SIZE", "1") == "1"
DEFAULTS = {
    "output_dir": "runs/rloo",
    "kl": "reverse_kl",
    "beta": 0.04,
    "use_vllm": importlib.util.find_spec("vllm") is not None and (CUDA or SINGLE_PROCESS),
    "vllm_mode": "colocate",
    "use_cpu": not CUDA,
    "bf16": CUDA,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
# On top of these, for the tiny model only: its answers have at most four tokens, and it stands a large learning rate.
TINY_DEFAULTS = DEFAULTS | {
    "max_steps": 70,
    "beta": 0.02,
    "per_device_train_batch_size": 512,
    "per_device_eval_batch_size": 512,
    "num_generations": 8,
    "num_generations_eval": 1,
    "num_iterations": 2,  # the second update on the same completions is off-policy: the KL's weights have work to do
    "max_completion_length": 8,
    "vllm_max_model_length": 32,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "gradient_checkpointing": False,
}


def parse(defaults):
    parser = TrlParser((ScriptArguments, RLOOConfig))
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


def correct(completions, answer, **kwargs):
    """1 where the last number of the completion is that of the answer (or the texts are equal), else 0."""
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        number = final_number(text)
        same = number is not None and number == final_number(expected)
        rewards.append(float(same or text.strip() == expected.strip()))
    return rewards


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
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    chat = tokenizer.chat_template is not None if script_args.chat is None else script_args.chat
    if chat and isinstance(train[0]["prompt"], str):

        def as_messages(row):
            return {"prompt": [{"role": "user", "content": row["prompt"]}]}

        train = train.map(as_messages)
        held_out = held_out.map(as_messages) if held_out else None

    output = Path(training_args.output_dir)
    with console.status("Loading the model" + ", starting the vLLM engine" * training_args.use_vllm):
        trainer = RLOOTrainer(
            model=model,
            reward_funcs=correct,
            args=training_args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=[JsonlCallback(output / "metrics.jsonl"), ProgressBarCallback("RLOO")],
        )
    trainer.remove_callback(PrinterCallback)  # every row goes to metrics.jsonl; the bar shows the ones to watch
    if held_out:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if held_out:
        trainer.evaluate()
    trainer.save_model(training_args.output_dir)

    if trainer.accelerator.is_main_process:
        rows = report.read_metrics(output / "metrics.jsonl")
        title = f"RLOO, {training_args.kl or 'stock TRL'}, beta {training_args.beta:g}"
        console.print(report.summary_table(rows, title))
        print("wrote", report.plot_runs({title: rows}, output / "metrics.png", title))


if __name__ == "__main__":
    try:
        script_args, training_args = parse(DEFAULTS)
        if not script_args.model_name_or_path:
            script_args, training_args = parse(TINY_DEFAULTS)
    except (ConfigError, UnknownLossError) as error:
        sys.exit(f"error: {error}")
    main(script_args, training_args)
