"""`import kl_plugins` loads neither torch nor a host; each claim with a proof that its test can fail."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HEAVY = ("torch", "numpy", "trl", "ray", "transformers", "accelerate", "datasets", "vllm", "openrlhf", "deepspeed")
ROOT = Path(__file__).parents[2]


def run(statement, path=ROOT):
    """Which of `HEAVY` a fresh interpreter has loaded after `statement`, and its seconds of CPU time."""
    program = f"""
        import sys, time
        start = time.process_time()  # of a busy machine the clock on the wall says more than of the import
        {statement}
        seconds = time.process_time() - start
        import json
        print(json.dumps([[name for name in {HEAVY!r} if name in sys.modules], seconds]))
    """
    found = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(path)!r})\n" + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded, seconds = json.loads(found.stdout)
    return set(loaded), seconds


@pytest.fixture
def probe(tmp_path):
    """Modules that do what ours must not."""
    for heavy in ("torch", "transformers"):
        (tmp_path / f"{heavy}.py").write_text("")
    (tmp_path / "probe.py").write_text("import torch\n")
    (tmp_path / "hooked.py").write_text("import transformers\n")
    (tmp_path / "slow.py").write_text("import time\nwhile time.process_time() < 0.2: pass\n")
    return tmp_path


def test_import_loads_neither_torch_nor_a_host():
    loaded, _ = run("import kl_plugins; kl_plugins.__version__; dir(kl_plugins)")
    assert loaded == set()


@pytest.mark.parametrize(
    "statement",
    [
        "from kl_plugins import KLSpec; KLSpec.from_name('k2_as_loss').gradient_of",
        "from kl_plugins import all_losses, register, KLLoss, ConfigError, PatchError, UnknownLossError; all_losses()",
    ],
)
def test_configuring_needs_no_torch(statement):
    """A configuration can be checked where nothing is installed, and refused before anything slow is loaded."""
    loaded, _ = run(statement)
    assert loaded == set()


def test_the_core_loads_torch_and_no_host():
    loaded, _ = run("import kl_plugins; kl_plugins.kl_terms; import kl_plugins.oracle")
    assert "torch" in loaded
    assert loaded <= {"torch", "numpy"}


def test_a_forbidden_import_is_noticed(probe):
    assert run("import probe", probe)[0] == {"torch"}
    assert run("import hooked", probe)[0] == {"transformers"}


def test_import_takes_under_50_ms():
    assert min(run("import kl_plugins")[1] for _ in range(5)) < 0.050


def test_a_slow_import_is_noticed(probe):
    assert min(run("import slow", probe)[1] for _ in range(2)) > 0.050
