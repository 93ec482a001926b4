"""Real runs of OpenRLHF on a CPU, the way a user starts them: Ray, DeepSpeed, vLLM, a model of 16 characters."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
RECIPE = REPOSITORY / "recipes" / "openrlhf.sh"
# A handful of steps. Two updates on each rollout: the second is off-policy.
FLAGS = (
    *("--data.max_samples", "16", "--rollout.batch_size", "8", "--rollout.n_samples_per_prompt", "4"),
    *("--rollout.micro_batch_size", "8", "--train.batch_size", "16", "--train.micro_batch_size", "4"),
    *("--train.max_epochs", "1", "--actor.adam.lr", "1e-3", "--algo.kl.init_coef", "0.05"),
)
REWARD = """
def reward_func(queries, prompts, labels, **kwargs):
    rewards = [sum(c.isdigit() for c in q[len(p):]) / 8 for q, p in zip(queries, prompts)]
    return {"rewards": rewards[0], "scores": rewards[0], "extra_logs": {}}
"""


@dataclass
class Run:
    returncode: int
    output: str
    folder: Path

    @property
    def steps(self) -> list[dict]:
        """What OpenRLHF logged for each global step."""
        found = re.findall(r"Global step \d+: (\{.*?\})\s*$", self.output, re.MULTILINE)
        return [ast.literal_eval(re.sub(r"\bnan\b", "None", text)) for text in found]

    @property
    def tensorboard(self) -> dict[str, list[float]]:
        """What it wrote for TensorBoard."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (path,) = {file.parent for file in self.folder.rglob("events.out.tfevents*")}
        events = EventAccumulator(str(path))
        events.Reload()
        return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    def proof(self) -> list[dict[str, str]]:
        """The rows of the table that is printed after the first step."""
        names = ("process", "node", "pid", "role", "target", "host", "digest", "calls")
        lines = (line for line in self.output.splitlines() if "| openrlhf " in line)
        rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
        return [dict(zip(names, row, strict=True)) for row in rows]


def environment(folder: Path, model: str, **more: str) -> dict[str, str]:
    """What the recipe needs: model, prompts and reward in `folder`, and a Ray of its own."""
    prompts = [{"input": f"{a}+{b}=", "label": str(a + b)} for a in range(4, 9) for b in range(4, 9)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)) + "\n")
    (folder / "reward.py").write_text(REWARD)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("KL_PLUGINS", "RAY_"))}
    return inherited | {
        "MODEL": model,
        "PROMPTS": str(folder / "prompts.jsonl"),
        "REWARD": str(folder / "reward.py"),
        "OUT": str(folder),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_DEDUP_LOGS": "0",
        "TQDM_DISABLE": "1",
        **more,
    }


@contextmanager
def ray_folder():
    """Ray puts sockets there, whose paths must be short; and two runs must not find each other's Ray."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def start(command: Sequence[str], folder: Path, env: dict[str, str], timeout: float = 800) -> Run:
    """Run `command` in a session of its own, which is killed with everything in it when it is over."""
    with ray_folder() as temporary, (folder / "output.log").open("w+") as log:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=env | {"RAY_TMPDIR": temporary},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            returncode = process.wait(timeout)
        except subprocess.TimeoutExpired:
            returncode = -1
        finally:
            end(process)
        log.seek(0)
        return Run(returncode, log.read(), folder)


def end(process: subprocess.Popen) -> None:
    """Nothing of its session goes on."""
    for which in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, which)
            process.wait(20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


def run(folder: Path, model: str, algorithm: str, *kl: str, flags: Sequence[str] = (), **env: str) -> Run:
    """`recipes/openrlhf.sh ALGORITHM cpu KL -- FLAGS`."""
    command = ["bash", str(RECIPE), algorithm, "cpu", *kl, "--", *FLAGS, *flags]
    return start(command, folder, environment(folder, model, **env))


def run_stock(
    folder: Path, model: str, algorithm: str, *, flags: Sequence[str] = (), only_print: bool = False, **env: str
) -> Run:
    """The same with OpenRLHF's own command line: a `kl-plugins` that is none starts it with what follows `--`.

    `only_print`: it prints that instead, each word ended by a NUL.
    """
    programs = folder / "bin"
    programs.mkdir()
    plain = programs / "kl-plugins"
    plain.write_text(
        '#!/bin/bash\nwhile [ "$1" != -- ]; do shift; done; shift\n'
        + ('printf "%s\\0" "$@"\n' if only_print else f'exec {sys.executable} -m openrlhf.cli.train_ppo_ray "$@"\n')
    )
    plain.chmod(0o755)
    prepared = environment(folder, model, **env)
    prepared["PATH"] = f"{programs}{os.pathsep}{prepared['PATH']}"
    return start(["bash", str(RECIPE), algorithm, "cpu", "--", *FLAGS, *flags], folder, prepared)
