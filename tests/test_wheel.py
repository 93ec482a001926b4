"""The wheel, built from the sdist, in an environment that holds nothing else: no torch, no host, and no network."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import venv
import zipfile
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
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "src", ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "dist", "build"))
    # Asked for neither, it makes the sdist, and the wheel out of that.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "src")
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    assert sdist.name.removesuffix(".tar.gz") == wheel.name.partition("-py3")[0]
    return wheel


@pytest.fixture(scope="module")
def python(wheel):
    folder = wheel.parent
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-qq", "--no-index", "--no-deps", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for distribution in {**closure("typer"), **closure("rich"), **closure("jinja2")}.values():
        for file in distribution.files:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), site / file)
    return python


def run(*command, code=0):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd="/")
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_only_the_package_and_its_patches_are_inside(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"kl_plugins", wheel.name.partition("-py3")[0] + ".dist-info"}
    rooms = {name.split("/")[1] for name in names if name.count("/") > 1 and name.startswith("kl_plugins/")}
    there = {path.name for path in (ROOT / "kl_plugins").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == there | {"_patches"}
    assert not [name for name in names if "scoreboard" in name]
    assert {"kl_plugins/_patches/trl.toml", "kl_plugins/_patches/openrlhf.toml", "kl_plugins/py.typed"} <= set(names)


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
    command = python.with_name("kl-plugins")
    assert run(command, "--version") == f"kl_plugins {importlib.metadata.version('kl_plugins')}\n"
    assert "local_forward_kl" in run(python, "-m", "kl_plugins.cli", "explain", "k3_as_loss")
    found = json.loads(run(command, "doctor", "--json"))
    assert found["trainers"]["openrlhf"]["why_not"].startswith("openrlhf is not installed; tested: ")
    assert not any(state["can_be_hooked"] for state in found["trainers"].values())
    assert "expected gradient is zero" in run(command, "openrlhf", "--kl", "k1_as_loss", code=2)
    assert "pip install 'kl_plugins[trl]'" in run(command, "trl", "grpo", "--kl", "k2_as_loss", code=2)
    assert "pip install 'kl_plugins[openrlhf]'" in run(command, "openrlhf", "--kl", "k2_as_loss", code=2)


LOADED = """
from importlib.metadata import entry_points
from pkgutil import resolve_name
from kl_plugins.patching import load_patches
print(*(e.load().__name__ for e in entry_points(group="pytest11") if e.name.startswith("kl_plugins")))
print(resolve_name("kl_plugins.openrlhf.driver.runtime_env_hook").__name__)
print(*(target.name for target in load_patches("openrlhf").targets))
"""


def test_what_others_find_by_name_is_there(python):
    """By pytest, by Ray (`RAY_RUNTIME_ENV_HOOK`, which users have in shell scripts), and by the patching engine."""
    plugin, hook, targets = run(python, "-c", LOADED).splitlines()
    assert (plugin, hook) == ("kl_plugins.pytest_plugin", "runtime_env_hook")
    assert "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer.training_step" in targets.split()
