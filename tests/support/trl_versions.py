"""Another TRL on top of this environment: a folder that goes first on PYTHONPATH, made once and kept in `.cache`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("KL_PLUGINS_CACHE", ROOT / ".cache"))
# TRL refuses to import its trainers beside a vLLM that is too new for it. A module that is None can't be found.
HIDE_VLLM = 'import sys\n\nsys.modules["vllm"] = None\n'

# 1.15.0 scores with a Triton kernel and nothing else; without a GPU it can be run by Triton's interpreter.
NEEDS = {"1.15.0": () if find_spec("triton") else ("triton==3.9.0",)}


def trl_folder(version: str) -> Path:
    """The folder with that TRL and nothing else: no dependencies, those are this environment's."""
    folder = CACHE / f"trl-{version}"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".trl-{version}-", dir=CACHE))
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-qq"]
        try:
            done = subprocess.run(
                [*pip, "install", "--no-deps", "--target", str(scratch), f"trl=={version}", *NEEDS.get(version, ())],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(f"pip could not install trl=={version} into {folder}:\n{done.stdout}{done.stderr}")
            (scratch / "sitecustomize.py").write_text(HIDE_VLLM)
            scratch.chmod(0o755)
            try:
                scratch.rename(folder)
            except OSError:  # another process was first
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def environment(version: str) -> dict[str, str]:
    """The variables of a subprocess of this interpreter that finds that version of TRL, and no vLLM."""
    paths = [str(trl_folder(version)), *filter(None, [os.environ.get("PYTHONPATH")])]
    # What pytest-xdist sets for its workers isn't meant for a pytest inside of one.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    settings = {"OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    if NEEDS.get(version):
        settings["TRITON_INTERPRET"] = "1"
    return inherited | settings | {"PYTHONPATH": os.pathsep.join(paths)}
