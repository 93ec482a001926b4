"""Any function of TRL that is replaced or relied on, renamed, with another signature or body: nothing starts."""

from __future__ import annotations

import pytest
import trl
from drift import EDITS, change, nothing_starts
from tiny_trl import ARGUMENTS
from trl.experimental import gmpo as stock_gmpo

import kl_plugins
from kl_plugins import PatchError
from kl_plugins.patching import ALLOW_UNTESTED, load_patches
from kl_plugins.patching.versions import installed_version
from kl_plugins.trl import GMPOConfig, GRPOConfig, RLOOConfig

CONFIGS = {"grpo": (GRPOConfig, GMPOConfig), "rloo": (RLOOConfig,), "gmpo": (GMPOConfig,)}
BY_PART = {part: load_patches("trl", part).targets for part in ("grpo", "rloo", "gmpo", "apply_grpo", "apply_rloo")}
TARGETS = [target for targets in BY_PART.values() for target in targets]


def short(target):
    return target.name.partition(":")[2]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("target", TARGETS, ids=short)
def test_a_changed_function_keeps_everything_from_starting(target, edit, tmp_path, monkeypatch):
    change(target, edit, tmp_path, monkeypatch)
    before = [dict(vars(config)) for config in (trl.GRPOConfig, trl.RLOOConfig, stock_gmpo.GMPOConfig)]
    starts = [lambda: kl_plugins.apply_to_trl(kl="k2_as_loss")]
    for config in CONFIGS.get(target.part, ()):
        starts.append(lambda config=config: config(kl="k2_as_loss", **ARGUMENTS | {"output_dir": str(tmp_path)}))
    nothing_starts(starts, target, f"trl=={installed_version('trl')}")
    assert [dict(vars(config)) for config in (trl.GRPOConfig, trl.RLOOConfig, stock_gmpo.GMPOConfig)] == before


@pytest.mark.parametrize("config", [GRPOConfig, RLOOConfig, GMPOConfig])
@pytest.mark.skipif(installed_version("trl") != "1.16.0", reason="the version that was tested with vLLM")
def test_with_vllm_what_it_relies_on_is_checked_too(config, tmp_path, monkeypatch):
    def make():
        return config(kl="k2_as_loss", use_vllm=True, **ARGUMENTS | {"output_dir": str(tmp_path)})

    make()
    for target in load_patches("trl", "vllm").targets:
        with monkeypatch.context() as patch:
            change(target, "body", tmp_path, patch)
            with pytest.raises(PatchError, match=f"{short(target)}: its source has digest"):
                make()


def test_no_config_that_is_not_concerned_is_refused(tmp_path, monkeypatch):
    (target,) = BY_PART["gmpo"]
    change(target, "body", tmp_path, monkeypatch)
    GRPOConfig(kl="k2_as_loss", **ARGUMENTS | {"output_dir": str(tmp_path)})


def test_an_unknown_version_is_refused_unless_opted_in_and_unchanged(tmp_path, monkeypatch, caplog):
    def make(config):
        return config(kl="k2_as_loss", **ARGUMENTS | {"output_dir": str(tmp_path)})

    monkeypatch.setattr("kl_plugins.patching.inspection.installed_version", lambda host: "1.99.0")
    for config in (GRPOConfig, RLOOConfig, GMPOConfig):
        with pytest.raises(PatchError, match=r"1.99.0 was not tested, 1.12.0, .*1.16.0 was: install a tested version"):
            make(config)
    with pytest.raises(PatchError, match=r"1.99.0 was not tested"):
        kl_plugins.apply_to_trl(kl="k2_as_loss")

    monkeypatch.setenv(ALLOW_UNTESTED, "1")
    with caplog.at_level("WARNING"):
        assert make(GRPOConfig).kl == "k2_as_loss"
    assert "trl 1.99.0 was not tested" in caplog.text
    assert "GRPOTrainer._compute_loss" in caplog.text
    with kl_plugins.apply_to_trl(kl="k2_as_loss"):
        pass

    change(BY_PART["grpo"][0], "body", tmp_path, monkeypatch)
    with pytest.raises(PatchError, match=r"_compute_loss: its source has digest .*install a tested version"):
        make(GRPOConfig)
    make(RLOOConfig)
