"""The wheel, in an environment that holds nothing else: no torch, no host. Works without the network."""

import importlib.metadata
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def closure(name, seen=None):
    """The distribution `name` and everything it needs, from this environment."""
    seen = {} if seen is None else seen
    if name not in seen:
        seen[name] = importlib.metadata.distribution(name)
        for line in seen[name].requires or ():
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                closure(need.name, seen)
    return seen


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "src", ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "dist", "build"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder / "src")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv/bin/python"
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "-qq", "--no-index", "--no-deps", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for distribution in {**closure("typer"), **closure("rich"), **closure("jinja2")}.values():
        for file in distribution.files:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), site / file)
    return python


def run(*command):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


IMPORT = """
import time, sys
start = time.process_time()
import kl_plugins
print((time.process_time() - start) * 1e3, *[name for name in ("torch", "trl", "ray", "vllm") if name in sys.modules])
"""


def test_import_is_fast_and_loads_no_host(python):
    found = [run(python, "-c", IMPORT).split() for _ in range(5)]
    assert all(len(words) == 1 for words in found), found
    assert min(float(words[0]) for words in found) < 50  # milliseconds of CPU time; the best of five


def test_torch_is_really_absent(python):
    run(python, "-c", "import importlib.util as u; assert not any(map(u.find_spec, ['torch', 'trl', 'ray']))")


def test_command_line(python):
    assert "forward" in run(python.with_name("kl-plugins"), "explain", "k3_as_loss")
    run(python.with_name("kl-plugins"), "doctor")
    said = run(python.with_name("kl-plugins"), "doctor", "--json")
    assert '"openrlhf is not installed; tested: ' in said


def test_the_patches_come_along(python):
    code = "from kl_plugins.patching import load_patches as l; print(*[t.name for t in l('openrlhf').targets])"
    assert "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer.training_step" in run(python, "-c", code).split()
