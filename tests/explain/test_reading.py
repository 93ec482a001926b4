"""How `kl-plugins explain` reads configurations: files, flags, what it assumes and what it refuses."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import command_line
import pytest
from typer.testing import CliRunner

import kl_plugins.explain.run
from kl_plugins import UnknownLossError, all_losses
from kl_plugins.cli import app
from kl_plugins.explain import explain_words
from kl_plugins.explain.verdict import explain_run

invoke = partial(command_line.invoke, "explain")


def test_a_file_and_flags_that_override_it(tmp_path):
    file = tmp_path / "grpo.yaml"
    file.write_text("kl: k2_as_loss\nbeta: 4e-2\nnum_iterations: 2\nloss_type: grpo\nlearning_rate: 1.0e-6\n")
    found = json.loads(invoke("--json", str(file), code=1))
    assert found["configuration"]["beta"] == 0.04
    assert found["ignored"] == ["learning_rate"]
    assert found["assumed"] == ["--trainer grpo: only TRL GRPOTrainer has loss_type"]
    assert found["change"] == {"loss_type": "dapo"}
    assert found["instead"] == 'kl_plugins.trl.GRPOConfig(kl="k2_as_loss", beta=0.04, loss_type="dapo")'
    assert json.loads(invoke("--json", str(file), "--", "--loss_type=dr_grpo"))["verdict"] == "principled"
    assert json.loads(invoke("--json", "--", "--config", str(file), "--loss_type", "luspo"))["verdict"] == "principled"
    file = tmp_path / "grpo.json"
    file.write_text('{"beta": 0.04, "use_vllm": true}')
    assert json.loads(invoke("--json", str(file)))["configuration"]["use_vllm"] is True


@pytest.mark.parametrize("recipe", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")))
def test_our_own_recipes_are_principled(recipe):
    assert explain_words([str(recipe)]).verdict == "principled"


@pytest.mark.parametrize(
    ("words", "trainer"),
    [
        ("--beta 0.1", "grpo"),
        ("--scale_rewards none", "grpo"),
        ("--normalize_advantages true", "rloo"),
        ("--kl_coef 0.1", "ppo"),
        ("--algo.kl.init_coef 0.1", "openrlhf"),
    ],
)
def test_what_is_assumed_is_said(words, trainer):
    found = json.loads(CliRunner().invoke(app, ["explain", "--json", "--", *words.split()]).output)
    assert found["host"] == {"openrlhf": "OpenRLHF"}.get(trainer, f"TRL {trainer.upper()}Trainer")
    asked = "--host openrlhf" if trainer == "openrlhf" else f"--trainer {trainer}"
    assert any(line.startswith(asked) for line in found["assumed"])


def test_generation_batch_size_counts_rollouts_of_one_process():
    found = explain_run({"beta": 0.1, "generation_batch_size": 32, "per_device_train_batch_size": 8}, "grpo")
    assert "4 updates on each rollout" in found.samples
    assert any("one process" in line for line in found.assumed)
    aligned = {"beta": 0.1, "gradient_accumulation_steps": 8, "steps_per_generation": 4}
    assert "on-policy" in explain_run(aligned, "grpo").samples
    assert "don't coincide" in explain_run(aligned | {"steps_per_generation": 3}, "grpo").samples


def test_an_older_trl_has_another_default(monkeypatch):
    monkeypatch.setattr(kl_plugins.explain.run, "installed_version", lambda host: "1.9.2")
    found = explain_run({"beta": 0.04}, "grpo")
    assert (found.verdict, found.gradient_of) == ("another divergence", "local_forward_kl")
    assert any("1.9.2 is installed" in line for line in found.assumed)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("-- --kl_of_policy none --beta 0.1", "did you mean 'kl_off_policy'?"),
        ("-- --use_bias_correcton_kl false", "did you mean 'use_bias_correction_kl'?"),
        ("--host openrlhf -- --algo.kl.use_los", "did you mean 'algo.kl.use_loss'?"),
        ("--host openrlhf -- --kl-of-policy none", "did you mean 'kl_off_policy'?"),
        ("--trainer grpo -- --kl k2_as_los --beta 0.1", "did you mean 'k2_as_loss'?"),
        ("--trainer grpo -- --kl k2_as_loss --kl_off_policy tokens --beta 0.1", "off_policy='tokens'"),
        ("--trainer grpo -- --kl_off_policy none --beta 0.1", "kl is None"),
        ("--trainer grpo -- --kl_placement loss --kl k2_as_loss", "kl_placement (of TRL PPOTrainer)"),
        ("--trainer grpo -- --kl_coef 0.1", "options of one trainer were expected"),
        ("-- --kl_coef 0.1 --loss_type grpo", "options of one trainer were expected"),
        ("--trainer rloo -- --loss_type grpo", "--trainer rloo was asked for"),
        ("-- --beta much", "beta='much': a number was expected"),
        ("-- --beta nan", "a number was expected"),
        ("-- --beta", "beta=True: a number was expected"),
        ("-- --num_iterations 1.5", "a whole number was expected"),
        ("-- --num_iterations 0", "a positive number was expected"),
        ("-- --use_vllm perhaps", "true or false was expected"),
        ("-- --loss_type grop", "choose from grpo, bnpo"),
        ("-- --kl_weight_clip 1", "two numbers was expected"),
        ("-- --generation_kwargs {", "a mapping was expected"),
        ("--host openrlhf -- --algo.kl.use_loss true", "takes no value"),
        ("--host openrlhf -- --algo.kl.estimator k4", "choose from k1, k2, k3"),
        ("--host openrlhf --trainer grpo -- --kl k2_as_loss", "has none"),
        ("--host verl -- --kl k2_as_loss", "choose from trl, openrlhf"),
        ("--trainer dpo -- --beta 0.1", "choose from grpo, rloo, ppo, gmpo"),
        ("--trainer grpo beta 0.1", "stands before any flag"),
        ("missing.yaml", "can't be read"),
        ("k2_as_loss k3_as_loss", "one name was expected"),
    ],
)
def test_bad_input_is_refused_with_exit_code_2(words, says):
    assert says in invoke(*words.split(), code=2)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "beta: [", "is not YAML"),
        ("a.json", "{beta: 1}", "is not JSON"),
        ("a.yaml", "- beta", "holds a list"),
        ("a.yaml", "", "holds nothing"),
        ("a.yaml", "kl_of_policy: none", "did you mean 'kl_off_policy'?"),
        ("a.yaml", "beta: null", "a number was expected"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, name, text, says):
    file = tmp_path / name
    file.write_text(text)
    assert says in invoke(str(file), code=2)
    file.write_bytes(b"\xff\xfe\x00")
    assert "can't be read" in invoke(str(file), code=2)
    assert "can't be read" in invoke(str(tmp_path / "none.yaml"), code=2)


def test_yaml_without_pyyaml(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    file = tmp_path / "a.yaml"
    file.write_text("beta: 1")
    assert "pip install pyyaml" in invoke(str(file), code=2)
    assert "beta" in invoke("--", "--beta", "0.1")


@pytest.mark.parametrize("name", all_losses())
def test_a_bare_name_keeps_exit_code_0(name):
    found = json.loads(invoke(name, "--json"))
    assert found[name]["gradient_of"] == dict(all_losses()[name].gradient_of)
    assert set(json.loads(invoke("--json"))) == set(all_losses())
    with pytest.raises(UnknownLossError):
        explain_run({"kl": f"{name}x", "beta": 1.0}, "grpo")
