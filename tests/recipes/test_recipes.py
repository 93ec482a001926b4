"""Every recipe, started as a user starts it, cut down to seconds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from recipe_here import refusal

RECIPES = Path(__file__).parents[2] / "recipes"
pytestmark = pytest.mark.slow


def start(name, *arguments, folder):
    """Run a recipe in `folder`, which is not the repository; what it printed."""
    env = dict(os.environ, KL_PLUGINS_MATH_MODEL=str(folder / "math"), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    run = subprocess.run(
        [sys.executable, str(RECIPES / name), *map(str, arguments)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    return run.stdout + run.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a math model that was warmed up for a few steps only."""
    folder = tmp_path_factory.mktemp("recipes")
    start("make_math_model.py", "--max_steps", 20, folder=folder)
    return folder


def test_all_are_tested_here():
    """Every recipe, found recursively.

    Elsewhere: tests/openrlhf/test_run_*.py, tests/ppo, and here test_scoreboard.py and test_reward_hacking.py.
    """
    here = ["gradients.py", "grpo.py", "make_math_model.py", "openrlhf_math.py", "rloo.py"]
    here += ["real_model.py", "real_model_gpu.sh"]
    here += [f"benchmarks/{name}.py" for name in ("exact_kl", "monitor", "openrlhf_step", "trl_step")]
    elsewhere = ["known_optimum.py", "openrlhf.sh", "ppo.py", "reward_hacking.py", "scoreboard/scoreboard.py"]
    parts = ["benchmarks/harness.py", "openrlhf_cpu/shim.py", "openrlhf_cpu/sitecustomize.py"]
    parts += [f"evidence/{name}.py" for name in ("intervals", "runs", "tables")]
    parts += [f"evidence/openrlhf_{name}.py" for name in ("hack", "host", "trainer")]
    parts += ["evidence/real_task.py"]
    parts += [f"evidence/{name}.py" for name in ("markov_model", "optimum_pictures", "ppo_trainer")]
    parts += [f"evidence/{name}.py" for name in ("trl_regimes", "trl_trainers")]
    parts += [f"evidence/{name}.py" for name in ("hack_picture", "hack_runs", "hack_task")]
    parts += [f"evidence/{name}.py" for name in ("bare_loop", "fixed_points")]
    parts += [f"scoreboard/{name}.py" for name in ("frameworks", "language_model", "pages", "standings")]
    parts += [f"scoreboard/{name}.py" for name in ("trained", "worker")]
    found = [path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.[ps][yh]")]
    assert sorted(found) == sorted(here + elsewhere + parts)
    assert len(here + elsewhere) == 16
    assert [path.name for path in RECIPES.rglob("*.yaml")] == ["grpo.yaml"]


def test_openrlhf_math(folder):
    start("openrlhf_math.py", "openrlhf", folder=folder)
    row = json.loads((folder / "openrlhf" / "prompts.jsonl").open().readline())
    assert row.keys() == {"input", "label"}
    assert (folder / "openrlhf" / "model" / "config.json").is_file()
    code = "from openrlhf_math import reward_func as r; print(*(r([f'1+2={a}<eos>'], ['1+2='], ['3']) for a in '34'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=RECIPES, capture_output=True, text=True, check=True)
    assert done.stdout.count("'rewards': 1.0") == done.stdout.count("'rewards': 0.0") == 1


def test_benchmark_openrlhf(folder):
    shape = ["--vocabulary", 300, "--rows", 2, "--tokens", 16, "--steps", 2, "--hidden", 16]
    said = start("benchmarks/openrlhf_step.py", *shape, folder=folder)
    assert "2 paired steps" in said
    result = json.loads((folder / "runs" / "benchmark_openrlhf.json").read_text())
    assert result["memory_ratio"] > 0
    assert result["time_ratio"]["lowest"] <= result["time_ratio"]["median"] <= result["time_ratio"]["highest"]


def test_make_math_model_is_made_once(folder):
    made = (folder / "math" / "warmup.json").stat().st_mtime_ns
    start("make_math_model.py", folder=folder)
    assert (folder / "math" / "warmup.json").stat().st_mtime_ns == made
    assert json.loads((folder / "math" / "train.jsonl").open().readline()).keys() == {"prompt", "answer"}


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_training_recipes(folder, name):
    options = ["--use_vllm", "false", "--max_steps", 3, "--eval_examples", 16]
    said = start(f"{name}.py", *options, "--kl_off_policy", "prefix", folder=folder)
    assert f"runs/{name}/metrics.png" in said
    rows = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in rows if "kl/k1" in row]) == 3
    assert (folder / "runs" / name / "metrics.png").stat().st_size > 10_000


def test_grpo_from_yaml(folder):
    """The shipped file, with what needs a hub or time overridden on the command line."""
    math = ["--model_name_or_path", folder / "math", "--dataset", folder / "math" / "train.jsonl"]
    columns = ["--prompt_column", "prompt", "--eval_examples", 0, "--output_dir", "runs/yaml"]
    small = ["--max_steps", 1, "--max_completion_length", 8, "--gradient_accumulation_steps", 1, "--use_vllm", "false"]
    start("grpo.py", "--config", RECIPES / "grpo.yaml", *math, *columns, *small, folder=folder)
    row = json.loads((folder / "runs" / "yaml" / "metrics.jsonl").open().readline())
    assert row["kl/beta"] == 0.01


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--dataset", "nowhere.jsonl"], "no such file"),
        (["--prompt_column", "question"], "no column 'question'"),
        (["--kl", "k1_as_loss"], "use k2_as_loss"),
    ],
)
def test_mistakes_are_said_clearly(folder, monkeypatch, options, says):
    monkeypatch.setenv("KL_PLUGINS_MATH_MODEL", str(folder / "math"))
    assert says in refusal("grpo.py", "--use_vllm", "false", *options, folder=folder)


def test_reward_hacking_says_what_does_not_hold(folder):
    """Real runs that are too short to come to anything: a quick run of which no claim holds is an error."""
    options = ["--quick", "--seeds", "2", "--steps", "2"]
    env = dict(os.environ, KL_PLUGINS_MATH_MODEL=str(folder / "math"), OMP_NUM_THREADS="1")
    command = [sys.executable, str(RECIPES / "reward_hacking.py"), *options]
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert run.returncode == 1
    assert "of the claims above did not hold" in run.stderr
    out = folder / "runs" / "reward_hacking"
    rows = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all(len(row["norms"]) == 2 and 0 < row["right"] < 1 and row["kl"] > 0 for row in rows)
    assert (out / "reward_hacking.png").stat().st_size > 10_000


def test_gradients_measures_what_the_documents_say(folder):
    printed = start("gradients.py", folder=folder)
    theory = (RECIPES.parent / "docs" / "theory.md").read_text()
    rows = {
        "k1": "k1 (slime", "k2": "k2 (offered", "k3 (GRPO's paper)": "k3 (GRPO", "k3 * ratio (TRL 1.16)": "k3 times",
        "k3, value clamped at 10": "k3 with its", "kl_plugins k2_as_loss": "`kl_plugins` `k2",
        "kl_plugins k1_in_reward, prefix": "`kl_plugins` `k1",
    }  # fmt: skip
    for term, start_of_row in rows.items():
        found = next(line for line in printed.splitlines() if line.strip("│ ").startswith(f"{term} "))
        claimed = next(line for line in theory.splitlines() if line.startswith(f"| {start_of_row}"))
        assert [cell.strip() for cell in found.strip("│ ").split("│")][1:] == claimed.strip("| ").replace(
            " ", ""
        ).split("|")[1:]
    policies, more = re.search(r"Of (\d+) random policies, .* on (\d+);", printed).groups()
    document = (RECIPES.parent / "docs" / "exact_kls.md").read_text()
    assert f"Of {policies} random small policies {more} have *more* variance" in " ".join(document.split())


def test_benchmark_exact(folder):
    shape = ("--vocabulary", 3000, "--vocabulary", 2000, "--tokens", 40, "--tokens", 80, "--rows", 1, "--rows", 2)
    start("benchmarks/exact_kl.py", *shape, "--hidden", 64, "--rounds", 1, folder=folder)
    result = json.loads((folder / "runs" / "benchmark_exact.json").read_text())
    found = [(shape["vocabulary"], shape["rows"], shape["tokens"]) for shape in result["shapes"]]
    assert found == [(3000, 1, 40), (3000, 1, 80), (3000, 2, 40), (2000, 1, 40)]
    for shape in result["shapes"]:
        assert shape["gradient_error"] < 1e-4
        assert [len(shape[key]) for key in ("seconds", "peak_bytes", "floor_seconds")] == [3, 3, 2]
    assert (folder / "runs" / "benchmark_exact.png").is_file()


def test_benchmark_monitor(folder):
    start("benchmarks/monitor.py", "--vocabulary", 3000, "--rows", 2, "--tokens", 40, "--steps", 3, folder=folder)
    result = json.loads((folder / "runs" / "benchmark_monitor.json").read_text())
    assert len(result["steps"]) == 3
    for row in result["steps"].values():
        assert row["time_ratio"]["lowest"] <= row["time_ratio"]["median"] <= row["time_ratio"]["highest"]
        assert row["own_milliseconds"] > 0


def test_benchmark(folder):
    start("benchmarks/trl_step.py", "--vocabulary", 5000, "--rows", 4, "--tokens", 64, "--steps", 2, folder=folder)
    result = json.loads((folder / "runs" / "benchmark.json").read_text())
    assert result["time_ratio"]["lowest"] <= result["time_ratio"]["median"] <= result["time_ratio"]["highest"]


def in_the_place_of_smollm2(folder):
    math = ["--model_name_or_path", folder / "math", "--dataset", folder / "math" / "train.jsonl", "--hack", 2]
    return [*math, "--max_completion_length", 4, "--max_steps", 2, "--train_examples", 64, "--eval_examples", 8]


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_real_model_trains_and_audits(folder):
    options = ["--use_vllm", "false", "--lora", 4, "--output_dir", "runs/real"]
    said = start("real_model.py", *in_the_place_of_smollm2(folder), *options, folder=folder)
    assert "before" in said
    assert len([row for row in rows_of(folder / "runs/real/metrics.jsonl") if "kl/k1" in row]) == 2
    assert (folder / "runs/real/model/model.safetensors").is_file()  # merged: the audit loads it as any model
    assert json.loads((folder / "runs/real/audit/audit.json").read_text())["status"] == "complete"


def test_real_model_experiments(folder):
    options = [*in_the_place_of_smollm2(folder), "--experiments", "true", "--output_dir", "runs/arms"]
    arms = ["--arms", "k2 as loss", "k3 as loss"]
    start("real_model.py", *options, *arms, "--seeds", 0, folder=folder)
    first = rows_of(folder / "runs/arms/runs.jsonl")
    said = start("real_model.py", *options, *arms, "--seeds", 0, 1, "--resume", "true", "--minutes", 30, folder=folder)
    rows = rows_of(folder / "runs/arms/runs.jsonl")
    assert [(row["arm"], row["seed"]) for row in rows] == [(arm, seed) for seed in (0, 1) for arm in arms[1:]]
    assert rows[:2] == first  # kept, not run again
    for row in rows:
        assert row["J"] == pytest.approx(row["proxy"] - 0.1 * row["kl"], abs=1e-3)
    assert "k3 drifts further than k2" in said
    distances = json.loads((folder / "runs/arms/gradients.json").read_text())
    assert distances["k1 in reward, token"] < 1e-5 < 1e-3 < distances["k3 as loss"]


@pytest.mark.extra
def test_gpu_protocol(folder):
    """The whole script, on a CPU: one arm and seed of each part."""
    options = [*in_the_place_of_smollm2(folder), "--arms", "k2 as loss", "--seeds", 0, "--betas", 0.3, "--jobs", 1]
    path = os.pathsep.join(filter(None, sys.path))
    env = dict(os.environ, OUT=str(folder / "gpu"), HF_HUB_OFFLINE="1", PYTHONPATH=path)
    command = [RECIPES / "real_model_gpu.sh", "60", *options]
    run = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    for part in ("timing", "arms", "stale"):
        assert len(rows_of(folder / "gpu" / part / "runs.jsonl")) == 1
        assert "A step took" in (folder / "gpu" / f"{part}.txt").read_text()
