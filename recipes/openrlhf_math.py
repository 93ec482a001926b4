"""A model, prompts and a reward for OpenRLHF: two-digit additions for a tiny model, made on the spot.

What:      writes a folder that `recipes/openrlhf.sh ... cpu` trains on: `model/`, a copy of the tiny math model of
           make_math_model.py (made if there is none yet), and `prompts.jsonl` with the keys input and label. The same
           file is OpenRLHF's reward file (`--reward.remote_url recipes/openrlhf_math.py`), for any data whose answers
           are numbers: 1 if the last number of a completion is that of the label, as in the other recipes.
Hardware:  2 CPU cores, no GPU, no network
How long:  15-45 s the first time, then nothing
Launch:    python recipes/openrlhf_math.py [runs/openrlhf_math]
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# OpenRLHF imports this file in each rollout process, and calls `reward_func` for one sample at a time.


def final_number(text):
    """The last number of a text, as a float: it reads `42`, `#### 1,234`, `\\boxed{3.5}` and `... so it is 7.`"""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def correct(completion, expected):
    """1 where the last number of the completion is that of the answer (or the texts are equal), else 0."""
    number = final_number(completion)
    return float((number is not None and number == final_number(expected)) or completion.strip() == expected.strip())


def reward_func(queries, prompts, labels, **kwargs):
    """OpenRLHF's reward of one sample: a query is the prompt and the completion, special tokens included."""
    (query,), (prompt,), (label,) = queries, prompts, labels
    completion = re.sub(r"(<[^<>]*>\s*)+$", "", query.removeprefix(prompt))  # without <eos> and the like
    reward = correct(completion, str(label))
    return {"rewards": reward, "scores": reward, "extra_logs": {}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/openrlhf_math"), help="the folder to write")
    out = parser.parse_args().out
    if (out / "prompts.jsonl").is_file():  # written last
        return
    model = Path(os.environ.get("KL_PLUGINS_MATH_MODEL", ".cache/kl_plugins/math"))
    if not (model / "warmup.json").is_file():
        maker = Path(__file__).with_name("make_math_model.py")
        subprocess.run([sys.executable, str(maker), "--out", str(model)], check=True)
    shutil.copytree(model, out / "model", ignore=shutil.ignore_patterns("*.jsonl"), dirs_exist_ok=True)
    problems = [json.loads(line) for line in (model / "train.jsonl").read_text().splitlines()]
    lines = [json.dumps({"input": problem["prompt"], "label": problem["answer"]}) for problem in problems]
    (out / "prompts.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
