"""Fixtures: a tiny model, OpenRLHF's arguments, and its functions replaced by ours for the length of a test."""

from __future__ import annotations

import pytest
import torch
from tiny_openrlhf import FLAGS, actor_trainer, import_openrlhf, on_cpu, parse
from tiny_trl import make_model
from transformers import AutoModelForCausalLM

from kl_plugins.openrlhf.plan import OpenRLHFOptions, plan_run
from kl_plugins.patching import Patching, load_patches


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), seed=0, spread=20.0)


@pytest.fixture(scope="module")
def cpu():
    import_openrlhf()
    with on_cpu():
        yield


@pytest.fixture
def hooked():
    import_openrlhf()
    with Patching(load_patches("openrlhf")) as patching:
        yield patching


@pytest.fixture
def planned():
    """OpenRLHF's arguments with our plan in them: `planned("--flag", ..., kl="k2_as_loss")`."""

    def make(*flags, **options):
        args = parse(*FLAGS, *flags)
        plan_run(OpenRLHFOptions(**options), args)
        return args

    return make


@pytest.fixture
def make_actor(cpu, model_folder):
    def make(args, dtype=torch.float32):
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
        return actor_trainer(args, model)

    return make
