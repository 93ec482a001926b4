"""`kl-plugins explain` and `kl-plugins doctor`, as a user starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import trl
from tiny_openrlhf import import_openrlhf
from typer.testing import CliRunner

import kl_plugins.patching.versions
from kl_plugins import all_losses
from kl_plugins.cli import app
from kl_plugins.core import registry
from kl_plugins.openrlhf import driver
from kl_plugins.patching import ALLOW_UNTESTED, Patching, load_patches


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("name", all_losses())
def test_explain_says_every_declared_gradient_and_the_alternative(name):
    loss = all_losses()[name]
    said = invoke("explain", name)
    assert all(gradient in said and credit in said for credit, gradient in loss.gradient_of.items())
    assert f"use instead: {loss.instead}" in said if loss.instead else "use instead" not in said
    assert ("kl_allow_biased=True" in said) == bool({"zero", "biased"} & set(loss.gradient_of.values()))


def test_explain_without_a_name_lists_all():
    said = invoke("explain")
    assert all(name in said for name in all_losses())


def test_an_unknown_name_gets_the_closest_and_exit_code_2():
    assert "did you mean 'k3_as_loss'" in invoke("explain", "k3_in_los", code=2)


def test_doctor(monkeypatch):
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


def test_the_console_script_loads_no_torch_and_no_host():
    probe = (
        "import sys; sys.argv = ['kl-plugins', 'doctor', '--json']\n"
        "from kl_plugins.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print([name for name in ('torch', 'trl', 'vllm', 'ray', 'transformers') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
