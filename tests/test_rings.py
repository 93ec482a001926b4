"""The rings of the package: imports point inward only, also inside functions, and importing loads no host.

Each claim comes with a proof that its test can fail.
"""

import ast
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HEAVY = ("torch", "numpy", "trl", "ray", "transformers", "accelerate", "datasets", "vllm", "openrlhf", "deepspeed")
ROOT = Path(__file__).parents[1]

HOSTS = {
    "trl",
    "openrlhf",
    "transformers",
    "accelerate",
    "peft",
    "ray",
    "vllm",
    "safetensors",
    "deepspeed",
    "datasets",
}
# Room of the package, or file with a row of its own -> ring, rooms it may import, third parties. Rooms of one ring
# don't know each other.
RINGS = {
    "errors": (1, set(), set()),
    "_version": (1, set(), set()),
    "core": (2, {"errors"}, {"torch"}),
    "patching": (2, {"errors"}, set()),
    "oracle": (2.5, {"errors", "core"}, {"torch"}),
    "pytest_plugin": (2.5, set(), set()),
    "integration": (3, {"errors", "_version", "core", "patching"}, {"torch", "transformers", "typer"}),
    "report": (3, {"errors", "patching"}, {"jinja2", "markupsafe", "matplotlib", "rich", "tensorboard"}),
    "trl": (4, {"errors", "_version", "core", "patching", "integration"}, {"torch", "rich", *HOSTS} - {"openrlhf"}),
    "openrlhf": (4, {"errors", "_version", "core", "patching", "integration"}, {"torch", "rich", *HOSTS} - {"trl"}),
    "conformance": (4, {"errors", "core", "oracle"}, {"torch", "pytest"}),
    "conformance/hosts.py": (4, {"patching"}, {"torch", "trl", "openrlhf", "verl", "flash_attn", "transformers"}),
    "explain": (
        5,
        {"errors", "core", "patching", "integration", "report", "openrlhf", "conformance"},
        {"torch", "yaml"},
    ),
    "audit": (
        5,
        {"errors", "core", "patching", "integration", "report", "conformance"},
        {"torch", "transformers", "vllm"},
    ),
    "cli": (
        6,
        {
            "errors",
            "_version",
            "core",
            "patching",
            "integration",
            "report",
            "trl",
            "openrlhf",
            "conformance",
            "explain",
            "audit",
        },
        {"matplotlib", "rich", "typer"},
    ),
    "__init__": (7, {"errors", "_version", "core", "trl"}, set()),  # names only, resolved on first use
}


def imports(path):
    """Every module that a file imports, anywhere in it, by its full name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they point to"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
        ):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def forbidden(package):
    """Every import that the table doesn't allow, as `file -> module`."""
    found = []
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package)
        room = inside.parts[0].removesuffix(".py")
        _, rooms, third_parties = RINGS.get(str(inside), RINGS[room])
        for module in imports(path):
            top, *rest = module.split(".")
            if top == package.name:
                other = rest[0] if rest else "__init__"
                allowed = other == room or other in rooms
            else:
                allowed = top in third_parties or top in sys.stdlib_module_names
            if not allowed:
                found.append(f"{inside} -> {module}")
    return found


def test_imports_point_inward_only():
    assert forbidden(ROOT / "kl_plugins") == []


def test_the_table_itself_points_inward():
    assert all(RINGS[room][0] < ring for ring, rooms, _ in RINGS.values() for room in rooms)


@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        ("core/terms.py", "from kl_plugins.patching import check", "kl_plugins.patching.check"),
        ("core/spec.py", "import transformers", "transformers"),
        ("integration/options.py", "from kl_plugins.cli.commands import app", "kl_plugins.cli.commands.app"),
        ("openrlhf/plan.py", "from kl_plugins.trl import config", "kl_plugins.trl.config"),
        ("report/page.py", "import_module('kl_plugins.core.terms')", "kl_plugins.core.terms"),
        ("explain/run.py", "import ray", "ray"),
        ("errors.py", "import torch", "torch"),
    ],
)
def test_a_forbidden_import_in_a_function_is_noticed(file, line, says, tmp_path):
    package = tmp_path / "kl_plugins"
    shutil.copytree(ROOT / "kl_plugins", package, ignore=shutil.ignore_patterns("__pycache__"))
    before = forbidden(package)
    with (package / file).open("a") as changed:
        changed.write(f"\n\ndef late():\n    {line}\n")
    assert [each for each in forbidden(package) if each not in before] == [f"{file} -> {says}"]


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


def test_the_core_and_the_conformance_kit_load_torch_and_no_host():
    loaded, _ = run("import kl_plugins; kl_plugins.kl_terms; import kl_plugins.oracle, kl_plugins.conformance.hosts")
    assert "torch" in loaded
    assert loaded <= {"torch", "numpy"}


def test_a_forbidden_import_is_noticed(probe):
    assert run("import probe", probe)[0] == {"torch"}
    assert run("import hooked", probe)[0] == {"transformers"}


def test_import_takes_under_50_ms():
    assert min(run("import kl_plugins")[1] for _ in range(5)) < 0.050


def test_a_slow_import_is_noticed(probe):
    assert min(run("import slow", probe)[1] for _ in range(2)) > 0.050
