"""Everything that must fail does so before a model is loaded, and says what to do; the options work from anywhere."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import json
import math
import pickle
import re
import shutil
import sys
import types
from contextlib import nullcontext

import pytest
import trl
from tiny_trl import micro_batch
from trl import TrlParser

import kl_plugins.patching.versions
from kl_plugins import ConfigError, PatchError, UnknownLossError
from kl_plugins.integration import rules_trl
from kl_plugins.integration.options import ALLOW_BIASED
from kl_plugins.patching import load_patches
from kl_plugins.patching.versions import installed_version
from kl_plugins.trl import GMPOConfig, GRPOConfig, GRPOTrainer, RLOOConfig
from kl_plugins.trl.vllm import require_processed_logprobs

QUIET = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none", "beta": 0.04}


def needs(part):
    """Not in releases of TRL that have no such `part` of `patches/trl.toml`."""
    tested = load_patches("trl", part).tested
    return pytest.mark.skipif(installed_version("trl") not in tested, reason=f"{part}: not in this TRL")


BOTH = pytest.mark.parametrize("config", [GRPOConfig, RLOOConfig])


def make(config, **options):
    return config(**(QUIET | options))


@BOTH
@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"kl": "k2_as_loss", "beta": 0.0}, ConfigError, "beta=0"),
        ({"kl": "k2_as_loss", "beta": -0.1}, ConfigError, "positive finite beta"),
        ({"kl": "k2_as_loss", "beta": math.nan}, ConfigError, "positive finite beta"),
        ({"kl": "k2_as_los"}, UnknownLossError, "did you mean 'k2_as_loss'"),
        ({"kl": "k1_as_loss"}, ConfigError, r"use k2_as_loss.*pass kl_allow_biased=True \(--kl-allow-biased\)"),
        ({"kl": "k2_as_loss", "kl_weight_clip": 5}, ConfigError, "kl_weight_clip=5: give"),
        ({"kl": "k2_in_reward"}, ConfigError, "use k1_in_reward"),
        ({"kl": "k3_in_reward"}, ConfigError, "use k1_in_reward"),
        ({"kl": "k2_as_loss", "kl_gamma": 0.9}, ConfigError, "gamma=0.9 is not used"),
        ({"kl": "k2_as_loss", "kl_credit": "to_go"}, ConfigError, "credit='to_go' is not offered"),
        ({"kl": "k2_as_loss", "kl_coefficient_bound": 10.0}, ConfigError, "coefficient_bound=10.0 is not used"),
        ({"kl": "k2_as_loss", "kl_off_policy": "none", "kl_weight_clip": [0.0, 2.0]}, ConfigError, "has no weights"),
        ({"kl": "k2_as_loss", "kl_off_policy": "tokens"}, ConfigError, "off_policy='tokens'"),
        ({"kl": "k2_as_loss", "kl_clip_epsilon": 0.1}, ConfigError, "clip_epsilon=0.1 is not used"),
        ({"kl": "k2_as_loss", "kl_weight_clip": [2.0, 3.0]}, ConfigError, "low <= 1"),
        ({"kl": "k2_as_loss", "top_p": 0.9}, ConfigError, "top_p=0.9"),
        ({"kl": "k2_as_loss", "top_k": 50}, ConfigError, "top_k=50"),
        ({"kl": "k2_as_loss", "generation_kwargs": {"min_p": 0.1}}, ConfigError, "min_p"),
        ({"kl": "k2_as_loss", "generation_kwargs": {"temperature": 0.3}}, ConfigError, "temperature"),
        ({"kl": "k2_as_loss", "generation_kwargs": {"presence_penalty": 1.0}}, ConfigError, "presence_penalty"),
        ({"kl": "k2_as_loss", "generation_kwargs": {"min_tokens": 1}}, ConfigError, "min_tokens"),
        ({"kl": "k2_as_loss", "repetition_penalty": 1.1}, ConfigError, "repetition_penalty=1.1"),
        ({"kl": "k2_as_loss", "vllm_structured_outputs_regex": "[0-9]+"}, ConfigError, "structured_outputs_regex"),
        (
            {"kl": "k2_as_loss", "kl_credit": "sequence", "kl_clip": "combined", "kl_weight_clip": [0.0, 2.0]},
            ConfigError,
            "TRL's own ratio",
        ),
        ({"kl_off_policy": "none"}, ConfigError, "kl is None"),
        ({"kl_allow_biased": True}, ConfigError, "kl is None"),
    ],
)
def test_what_cannot_be_right_is_refused(config, options, error, says):
    with pytest.raises(error, match=says):
        make(config, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kl": "k2_as_loss", "use_bias_correction_kl": False}, "use kl_off_policy"),
        ({"kl": "k2_as_loss", "kl_clip": "combined", "top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        ({"kl": "k2_as_loss", "kl_clip": "combined", "off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold"),
    ],
)
def test_contradictions_with_grpos_own_options(options, says):
    with pytest.raises(ConfigError, match=says):
        make(GRPOConfig, **options)


def test_rloo_has_one_advantage_a_sequence():
    with pytest.raises(ConfigError, match="kl_credit='sequence'"):
        make(RLOOConfig, kl="k1_in_reward", kl_credit="to_go", kl_clip="combined")
    assert make(RLOOConfig, kl="k1_in_reward", kl_clip="combined").kl_spec().credit == "sequence"


def test_every_problem_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        make(GRPOConfig, kl="k2_as_loss", kl_gamma=0.9, beta=0.0, top_p=0.5, use_bias_correction_kl=False)
    assert all(word in str(caught.value) for word in ("gamma", "beta=0", "top_p=0.5", "use_bias_correction_kl"))


@BOTH
def test_harmless_generation_options_pass(config):
    options = {"temperature": 0.7, "max_new_tokens": 5, "seed": 1, "top_p": 1.0, "stop": ["."]}
    make(config, kl="k2_as_loss", temperature=0.7, generation_kwargs=options)


@BOTH
def test_the_coefficient_of_k3_is_bounded_by_default(config):
    assert make(config, kl="k3_as_loss").kl_spec().coefficient_bound == 1e6
    assert make(config, kl="k3_as_loss", kl_coefficient_bound=50.0).kl_spec().coefficient_bound == 50
    assert make(config, kl="k2_as_loss").kl_spec().coefficient_bound is None


def test_the_models_own_generation_options_are_refused(make_trainer, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"typical_p": 0.2, "eos_token_id": 1}))
    with pytest.raises(ConfigError, match=r"generation_config\.typical_p=0\.2"):
        make_trainer(GRPOTrainer, kl="k2_as_loss", policy=str(tmp_path / "model"))


def test_a_vllm_server_must_report_the_sampled_distribution():
    def server(mode):
        return types.SimpleNamespace(get_server_info=lambda: {"model_config": {"logprobs_mode": mode}})

    require_processed_logprobs(server("processed_logprobs"))
    with pytest.raises(ConfigError, match=r"raw_logprobs.*--logprobs-mode processed_logprobs"):
        require_processed_logprobs(server("raw_logprobs"))


@BOTH
def test_an_untested_trl_is_refused(config, monkeypatch):
    monkeypatch.setattr(kl_plugins.patching.versions, "version", lambda host: "1.17.0")
    with pytest.raises(PatchError, match=r"1\.17\.0 was not tested, 1\.12\.0, .*trl==1\.16\.0.*KL_PLUGINS_ALLOW"):
        make(config, kl="k2_as_loss")
    with pytest.raises(PatchError, match=r"\(.*, vllm\) can't be hooked:\n- 1\.17\.0 was not tested, 1\.16\.0 was"):
        make(config, kl="k2_as_loss", use_vllm=True)
    make(config)  # without kl it is TRL's own trainer, whatever its version


def documented_defaults(text):
    """What a docstring in TRL's manner says of each `kl_*` field: its default."""
    found = re.findall(r"^ +(kl\w*) \(`[^`]+`, \*optional\*(?:, defaults to `(.+)`)?\):\n +\w.+$", text, re.MULTILINE)
    return {name: ast.literal_eval(default or "None") for name, default in found}


@pytest.mark.parametrize("config", [GRPOConfig, RLOOConfig, GMPOConfig])
def test_every_option_is_documented_with_its_default(config):
    made = make(config)
    ours = {f.name: getattr(made, f.name) for f in dataclasses.fields(config) if f.name.startswith("kl")}
    assert len(ours) > 20
    assert documented_defaults(inspect.getdoc(config)) == ours
    assert documented_defaults(inspect.getdoc(config).replace('"token"', '"prefix"')) != ours
    assert documented_defaults(inspect.getdoc(trl.GRPOConfig)) == {}


@BOTH
def test_biased_gradients_need_to_be_allowed(config):
    args = make(config, kl="k1_as_loss", kl_allow_biased=True)
    assert args.kl_spec().gradient_of == "zero"


@pytest.mark.parametrize(
    ("config", "baseline"), [(RLOOConfig, "leave_one_out"), (GRPOConfig, "group_mean"), (GMPOConfig, "group_mean")]
)
def test_a_kl_in_the_reward_is_treated_as_the_reward(config, baseline):
    spec = make(config, kl="k1_in_reward").kl_spec()
    assert (spec.credit, spec.baseline) == ("sequence", baseline)
    assert make(config, kl="k1_in_reward", kl_baseline=None).kl_spec().baseline is None
    assert make(config, kl="k1_in_reward", kl_credit="to_go").kl_spec().credit == "to_go"
    spec = make(config, kl="k2_as_loss").kl_spec()
    assert (spec.credit, spec.baseline) == ("token", None)


@needs("exact")
def test_an_exact_kl_in_the_reward_is_centred_as_the_reward():
    assert make(GRPOConfig, kl="exact_in_reward").kl_spec().baseline == "group_mean"
    assert make(RLOOConfig, kl="exact_in_reward").kl_spec().baseline == "leave_one_out"
    assert make(GRPOConfig, kl="exact_in_reward", kl_credit="token").kl_spec().baseline is None


@pytest.mark.parametrize("config", [RLOOConfig, GRPOConfig, GMPOConfig])
def test_reverse_kl_is_a_configuration_that_could_be_written_by_hand(config):
    """And the config's own dictionary, which goes to the logs, has it as it is trained."""
    picked = make(config, kl="reverse_kl")
    by_hand = make(config, kl="k1_in_reward")
    assert picked.kl_spec() == by_hand.kl_spec()
    assert picked.kl_spec().gradient_of == "reverse_kl"
    logged = picked.to_dict()
    assert {name: logged[name] for name in ("kl", "kl_credit", "kl_baseline")} == {
        "kl": "k1_in_reward",
        "kl_credit": "sequence",
        "kl_baseline": picked.kl_spec().baseline,
    }
    assert make(config, kl="reverse_kl", kl_off_policy="prefix", kl_baseline=None).kl_spec() == (
        make(config, kl="k1_in_reward", kl_off_policy="prefix", kl_baseline=None).kl_spec()
    )
    assert make(config, kl="reverse_kl", kl_credit="token").kl_spec().gradient_of == "local_reverse_kl"


@pytest.mark.parametrize(
    ("config", "options", "clip"),
    [
        (GRPOConfig, {}, None),
        (GRPOConfig, {"num_iterations": 4}, "combined"),
        (GRPOConfig, {"steps_per_generation": 4}, "combined"),
        # TRL drops some of vLLM's completions, and would drop their KL.
        pytest.param(GRPOConfig, {"use_vllm": True}, None, marks=needs("vllm")),
        pytest.param(GRPOConfig, {"use_vllm": True, "num_iterations": 4}, None, marks=needs("vllm")),
        (GRPOConfig, {"num_iterations": 4, "off_policy_mask_threshold": 0.1}, None),
        (GRPOConfig, {"num_iterations": 4, "top_entropy_quantile": 0.5}, None),
        (GRPOConfig, {"num_iterations": 4, "kl_weight_clip": [0.0, 2.0]}, None),
        (GRPOConfig, {"num_iterations": 4, "kl_clip": "separate"}, "separate"),
        (GRPOConfig, {"num_iterations": 4, "kl_clip": None}, None),
        (GRPOConfig, {"num_iterations": 4, "kl_clip": "none"}, None),
        (GRPOConfig, {"num_iterations": 4, "importance_sampling_level": "sequence"}, "combined"),
        (GRPOConfig, {"num_iterations": 4, "importance_sampling_level": "sequence", "kl_credit": "to_go"}, None),
        (RLOOConfig, {}, None),
        (RLOOConfig, {"num_iterations": 4}, "combined"),
        pytest.param(RLOOConfig, {"num_iterations": 4, "use_vllm": True}, None, marks=needs("vllm")),
        (RLOOConfig, {"num_iterations": 4, "kl_credit": "to_go"}, None),
        (RLOOConfig, {"num_iterations": 4, "kl_leave_out": ["eos"]}, None),
        (GMPOConfig, {"num_iterations": 4}, None),
    ],
)
def test_on_samples_of_an_older_policy_it_gets_the_rewards_own_ratio_and_clip_where_it_can(config, options, clip):
    chosen = make(config, kl="reverse_kl", **options)
    assert chosen.kl_spec().clip == clip
    assert make(config, kl="k1_in_reward", **options).kl_spec().clip == (clip if "kl_clip" in options else None)
    if "kl_clip" in options or "kl_weight_clip" in options or not options:
        said = "all tokens"
    else:
        said = "in the advantage, as its reward is" if clip else "by each token's own ratio"
    assert said in chosen.kl_choice().sentence


@BOTH
def test_from_yaml_and_the_command_line(config, tmp_path, monkeypatch):
    yaml = tmp_path / "run.yaml"
    yaml.write_text(
        "output_dir: unused\nuse_cpu: true\nbf16: false\nreport_to: none\nbeta: 0.04\n"
        "kl: k3_as_loss\nkl_weight_clip: [0.0, 5.0]\nkl_off_policy: prefix\n"
    )
    flags = ["--config", str(yaml), "--kl_weight_clip_mode", "mask", "--kl_coefficient_bound", "1e4"]
    monkeypatch.setattr(sys, "argv", ["run.py", *flags, "--kl_baseline", "none"])
    (args,) = TrlParser((config,)).parse_args_and_config()
    spec = args.kl_spec()
    assert (spec.name, spec.off_policy, spec.weight_clip) == ("k3_as_loss", "prefix", (0.0, 5.0))
    assert (spec.weight_clip_mode, spec.coefficient_bound, spec.baseline) == ("mask", 1e4, None)


def test_the_flag_that_messages_name_is_one_of_trls_command_line():
    flag = ALLOW_BIASED.split("(")[1].rstrip(")")
    flags = ["--output_dir", "unused", "--use_cpu", "true", "--bf16", "false", "--beta", "0.04", "--kl", "k1_as_loss"]
    (args,) = TrlParser(GRPOConfig).parse_args_and_config([*flags, flag])
    assert args.kl_allow_biased is True


@pytest.mark.parametrize(
    "passed_on", [lambda args: args, copy.deepcopy, lambda args: pickle.loads(pickle.dumps(args))]
)
def test_trls_own_trainer_does_not_ignore_our_config(make_trainer, passed_on):
    def config(**options):
        return passed_on(GRPOConfig(**options))

    trainer = make_trainer(trl.GRPOTrainer, config=config, kl="k2_as_loss")
    with pytest.raises(PatchError, match="use the trainer of the same name"):
        trainer.train()


def test_a_subclass_that_bypasses_ours_does_not_train_on_trls_kl(make_trainer):
    class Bypass(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return trl.GRPOTrainer._compute_loss(self, model, inputs)

    trainer = make_trainer(Bypass, config=GRPOConfig, kl="k2_as_loss")
    with pytest.raises(PatchError, match="must call its _compute_loss"):
        trainer.train()


def test_our_trainer_takes_trls_own_config(make_trainer):
    trainer = make_trainer(GRPOTrainer, config=trl.GRPOConfig, max_steps=1)
    trainer.train()
    assert trainer.kl_spec is None
    assert not any(name.startswith("kl/") for name in trainer.state.log_history[0])


@pytest.mark.parametrize("config", [GRPOConfig, GMPOConfig])
@pytest.mark.parametrize("version", [None, "1.12.0", "1.14.0.dev0"])
@pytest.mark.parametrize("has_its_kl", [True, False])
def test_ligers_kernel_is_refused_by_what_trl_has_whatever_its_version(config, version, has_its_kl, monkeypatch):
    monkeypatch.setattr(rules_trl, "installed_version", lambda host: version)
    if has_its_kl:
        monkeypatch.setattr(trl.GRPOTrainer, "compute_liger_loss", lambda *args: None, raising=False)
    else:
        monkeypatch.delattr(trl.GRPOTrainer, "compute_liger_loss", raising=False)
    make(config, kl="k2_as_loss", use_liger_kernel=False)
    with pytest.raises(ConfigError, match="use_liger_kernel=True") if has_its_kl else nullcontext():
        make(config, kl="k2_as_loss", use_liger_kernel=True)


def test_a_config_is_saved_and_copied_as_plain_numbers():
    args = make(GRPOConfig, kl="k2_as_loss")
    assert json.loads(args.to_json_string())["beta"] == 0.04
    assert type(args.to_dict()["beta"]) is float
    assert args.beta == 0.04
    assert args.beta * 2 == 0.08


def test_a_host_that_no_longer_multiplies_by_beta_is_noticed(make_trainer, monkeypatch):
    trainer = make_trainer(GRPOTrainer, kl="k2_as_loss")

    def without_kl(self, model, inputs):
        ids = inputs["prompt_ids"]
        logp, _, _ = self._get_per_token_logps_and_entropies(model, ids, inputs["prompt_mask"], 2)
        return logp.sum()

    batch = micro_batch(trainer, length=2)
    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", without_kl)
    with pytest.raises(PatchError, match="0 times"):
        trainer.compute_loss(trainer.model, batch)


@pytest.mark.skipif(installed_version("trl") in load_patches("trl", "ppo").tested, reason="this TRL has a PPOTrainer")
def test_a_trl_without_ppo_says_what_to_install():
    newest = load_patches("trl", "ppo").tested[-1]
    with pytest.raises(RuntimeError, match=f"TRL dropped it after {newest}; install trl=={newest}"):
        import kl_plugins.trl.ppo  # noqa: F401
