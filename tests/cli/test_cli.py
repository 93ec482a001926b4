"""`kl-plugins` as a user starts it: explaining a name, `doctor`, `openrlhf`, and what starting it loads."""

from __future__ import annotations

import json
import pkgutil
import runpy
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import trl
from command_line import invoke
from tiny_openrlhf import import_openrlhf
from typer.testing import CliRunner

import kl_plugins.patching.versions
from kl_plugins import __version__, all_losses, cli
from kl_plugins.cli import app, doctor, host_imports
from kl_plugins.core import registry
from kl_plugins.openrlhf import driver
from kl_plugins.patching import ALLOW_UNTESTED, HostPatches, Patching, Target, load_patches
from kl_plugins.patching.inspection import source_digest


@pytest.mark.parametrize("name", all_losses())
def test_explain_says_every_declared_gradient_and_the_alternative(name):
    loss = all_losses()[name]
    said = invoke("explain", name)
    assert all(gradient in said and credit in said for credit, gradient in loss.gradient_of.items())
    assert f"use instead: {loss.instead}" in " ".join(said.split()) if loss.instead else "use instead" not in said
    assert ("kl_allow_biased=True" in said) == bool({"zero", "biased"} & set(loss.gradient_of.values()))


def test_explain_without_a_name_lists_all():
    said = invoke("explain")
    assert all(name in said for name in all_losses())


def test_an_unknown_name_gets_the_closest_and_exit_code_2():
    assert "did you mean 'k3_as_loss'" in invoke("explain", "k3_in_los", code=2)


def test_doctor(monkeypatch):
    monkeypatch.setitem(host_imports.NEEDED, "openrlhf", {"json": "nothing"})
    found = json.loads(invoke("doctor", "--json"))
    trainers = found["trainers"]
    assert found["installed"]["trl"] in trainers["grpo"]["tested"]
    assert {name: state["can_be_hooked"] for name, state in trainers.items()} == {
        "grpo": True,
        "rloo": True,
        "gmpo": True,
        "ppo": False,  # this TRL has none
        "apply": True,
        "openrlhf": True,
    }
    assert "0.29.0" in trainers["ppo"]["why_not"]
    assert not any(state["hooked"] for state in trainers.values())
    assert set(all_losses()) <= set(found["losses"])
    assert "kl_plugins.trl.GRPOTrainer" in invoke("doctor")

    monkeypatch.setattr(kl_plugins.patching.versions, "version", lambda host: "1.99.0")
    why_not = json.loads(invoke("doctor", "--json"))["trainers"]["rloo"]["why_not"]
    assert why_not.startswith("trl 1.99.0 is not a tested version; tested: 1.12.0")


def test_doctor_does_not_say_yes_to_a_host_that_may_not_be_importable(monkeypatch):
    monkeypatch.setitem(host_imports.NEEDED, "openrlhf", {"no_such_module": "install it"})
    state = json.loads(invoke("doctor", "--json"))["trainers"]["openrlhf"]
    assert (state["can_be_hooked"], state["checked"]) == (None, False)
    says = "not checked: no_such_module, which openrlhf imports, is not installed; `kl-plugins doctor openrlhf` tries"
    assert state["why_not"].startswith(says)
    said = " ".join(invoke("doctor").split())
    assert f"openrlhf: {says}" in said
    assert "grpo: can be hooked (by its version)" in said
    assert "openrlhf: can be hooked" not in said


BROKEN = {
    "needs.py": "import no_such_module.part",
    "lazily.py": "try:\n    import no_such_module\nexcept ImportError as e:\n    raise OSError('see above') from e",
    "gpu.py": "raise OSError('libcuda.so is missing')",
    "whole.py": "def loss():\n    pass",
}


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("needs", "brokenhost can't be imported: it needs the module no_such_module, which isn't installed; "),
        ("lazily", "brokenhost can't be imported: it needs the module no_such_module, which isn't installed; "),
        ("gpu", "brokenhost can't be imported: OSError: libcuda.so is missing; make that import work"),
        ("gone", "brokenhost 1 can't be hooked"),
        ("whole", ""),
    ],
)
def test_doctor_follows_a_failed_import_to_its_cause(monkeypatch, tmp_path, module, says):
    (tmp_path / "brokenhost").mkdir()
    for name, text in BROKEN.items():
        (tmp_path / "brokenhost" / name).write_text(text + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "brokenhost", raising=False)
    for place in (doctor, kl_plugins.patching.inspection):
        monkeypatch.setattr(place, "installed_version", lambda host: "1")
    whole = source_digest(runpy.run_path(str(tmp_path / "brokenhost/whole.py"))["loss"])
    target = Target(
        name=f"brokenhost.{module}:loss", role="check", signatures=("()",), reason="it is", digests={"1": whole}
    )
    can, why_not = doctor._checked(HostPatches(host="brokenhost", tested=("1",), targets=(target,)))
    assert can == (module == "whole")
    assert why_not.startswith(says)
    assert bool(why_not) == (not can)


def test_openrlhf_refuses_a_configuration_before_it_imports_anything(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    said = invoke("openrlhf", "--kl", "k1_as_loss", "--", "--rollout.top_p", "0.9", code=2)
    assert "k1_as_loss was asked for, but its expected gradient is zero" in said
    assert "did you mean 'k2_as_loss'" in invoke("openrlhf", "--kl", "k2_as_los", code=2)
    said = invoke("openrlhf", "--kl", "k2_as_loss", code=2)  # so that the order can be told
    assert said == (
        "error: openrlhf can't be imported: it needs the module ray, which isn't installed; "
        "pip install 'kl_plugins[openrlhf]'\n"
    )


def test_an_import_that_failed_in_a_worker_is_not_said_to_be_the_drivers(monkeypatch):
    def launch(*arguments, **options):
        raise ModuleNotFoundError("No module named 'kl_plugins'")  # as Ray raises it: without a name

    monkeypatch.setattr(driver, "launch", launch)
    result = CliRunner().invoke(app, ["openrlhf", "--kl", "k2_as_loss"])
    assert isinstance(result.exception, ModuleNotFoundError)


def test_doctor_refuses_what_the_environment_asks_for(monkeypatch):
    monkeypatch.setenv(driver.OPTIONS, "--kl k1_as_loss")
    monkeypatch.setenv(driver.RAY_HOOK, driver.HOOK)
    state = json.loads(invoke("doctor", "--json", code=1))["trainers"]["openrlhf"]
    assert state["can_be_hooked"] is False
    assert state["why_not"].startswith("KL_PLUGINS_OPENRLHF='--kl k1_as_loss' is refused: k1_as_loss was asked for")
    assert not state["hooked"]


def test_doctor_fails_if_what_was_asked_for_can_not_be_hooked(monkeypatch, tmp_path):
    assert json.loads(invoke("doctor", "grpo", "rloo", "--json"))["trainers"]["grpo"]["asked"]
    assert "ppo" in invoke("doctor", "grpo", "ppo", code=1)
    assert "choose from grpo" in invoke("doctor", "grop", code=2)
    monkeypatch.setattr(trl.RLOOTrainer, "log", lambda self, logs: None)
    invoke("doctor", "grpo")
    invoke("doctor")  # by its version alone
    why_not = json.loads(invoke("doctor", "rloo", "--json", code=1))["trainers"]["rloo"]["why_not"]
    assert "trl.trainer.rloo_trainer:RLOOTrainer.log" in why_not
    invoke("doctor", "apply", code=1)


def test_doctor_says_yes_to_an_untested_version_only_where_it_was_checked(monkeypatch):
    monkeypatch.setattr(kl_plugins.patching.versions, "version", lambda host: "1.99.0")
    invoke("doctor", "grpo", code=1)
    monkeypatch.setenv(ALLOW_UNTESTED, "1")
    trainers = json.loads(invoke("doctor", "gmpo", "--json"))["trainers"]
    assert trainers["gmpo"]["can_be_hooked"]
    assert "ask for it by name to check it" in trainers["grpo"]["why_not"]
    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", lambda self, model, inputs: None)
    invoke("doctor", "gmpo", code=1)


def test_doctor_shows_what_is_hooked_in_this_process():
    with kl_plugins.apply_to_trl(kl="k2_as_loss", trainers=["grpo"]):
        trainers = json.loads(invoke("doctor", "apply", "--json"))["trainers"]
    assert {name for name, state in trainers.items() if state["hooked"]} == {"grpo", "apply"}
    assert trainers["grpo"]["how"].startswith("in this process, by apply_to_trl: ")
    import_openrlhf()
    with Patching(load_patches("openrlhf")):
        how = json.loads(invoke("doctor", "--json"))["trainers"]["openrlhf"]["how"]
    assert how.startswith("in this process: ")
    assert "ActorPPOTrainer.training_step" in how


def test_doctor_shows_what_the_environment_hooks_and_fails_if_it_can_not(monkeypatch):
    monkeypatch.setenv(driver.OPTIONS, "--kl k2_as_loss")
    monkeypatch.setenv(driver.RAY_HOOK, driver.HOOK)
    trainers = json.loads(invoke("doctor", "--json"))["trainers"]
    assert trainers["openrlhf"]["hooked"]
    assert trainers["openrlhf"]["how"] == "in what is started from here: --kl k2_as_loss"
    monkeypatch.delenv(driver.RAY_HOOK)
    trainers = json.loads(invoke("doctor", "--json", code=1))["trainers"]
    assert "RAY_RUNTIME_ENV_HOOK=kl_plugins.openrlhf.driver.runtime_env_hook is not" in trainers["openrlhf"]["why_not"]


def test_doctor_shows_a_broken_third_party_loss_and_fails(monkeypatch):
    broken = EntryPoint("theirs", "their_package:loss", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "_third_party", lambda path: EntryPoints([broken]))
    said = " ".join(invoke("doctor", code=1).split())
    assert "theirs cannot be used: ConfigError" in said
    assert "No module named 'their_package'" in said


def test_the_entry_point_is_no_module_of_its_package():
    """`kl_plugins.cli:main` would be whichever of the two was imported last."""
    assert not {module.name for module in pkgutil.iter_modules(cli.__path__)} & set(cli.__all__)


def test_the_version():
    assert invoke("--version") == f"kl_plugins {__version__}\n"


PROBE = """
import sys
from kl_plugins.cli import main

def loaded():
    return [name for name in NAMES if name in sys.modules]

def call(*words):
    sys.argv = ["kl-plugins", *words]
    try:
        main()
    except SystemExit as end:
        return end.code or 0

for words in CALLS:
    print(call(*words), loaded(), *words, file=sys.stderr)
import torch
print(call(*CALLS[0]), loaded(), file=sys.stderr)
"""


def test_the_command_line_loads_no_torch_and_no_host(tmp_path):
    file = tmp_path / "grpo.yaml"
    file.write_text("kl: k2_as_loss\nbeta: 0.04\n")
    calls = {
        "--help": 0,
        "doctor --json": 0,
        "explain": 0,
        "explain k2_as_loss": 0,
        f"explain {file}": 0,
        "explain --host openrlhf -- --kl k2_as_loss": 0,
        "explain --host openrlhf -- --algo.kl.use_loss": 1,
        "openrlhf --kl k1_as_loss": 2,
        "audit --model a": 2,
        f"report {tmp_path}": 2,
    }
    names = ("torch", "trl", "vllm", "ray", "transformers", "openrlhf", "deepspeed", "matplotlib")
    program = f"NAMES, CALLS = {names}, {[call.split() for call in calls]}\n{PROBE}"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = [line for line in run.stderr.splitlines() if line[:1].isdigit()]
    assert lines[:-1] == [f"{code} [] {words}" for words, code in calls.items()]
    assert lines[-1] == "0 ['torch']"  # so that the check can fail


def test_explain_says_what_reverse_kl_picks():
    shown = invoke("explain", "reverse_kl")
    for host in ("TRL GRPO, GMPO", "TRL RLOO", "TRL PPO", "OpenRLHF, gae"):
        assert host in shown
    picks = {pick["trainer"]: pick for pick in json.loads(invoke("explain", "reverse_kl", "--json"))}
    assert picks["TRL GRPO, GMPO"]["kl_baseline"] == "group_mean"
    assert {pick["kl"] for pick in picks.values()} == {"k1_in_reward"}
