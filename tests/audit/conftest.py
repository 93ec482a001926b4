"""A tiny policy, a reference and prompts, and the pair of models as the audit loads it."""

from __future__ import annotations

import json

import pytest
from audit_inputs import PROMPTS
from tiny_trl import make_model

from kl_plugins.audit.model import Pair


@pytest.fixture(scope="package")
def folders(tmp_path_factory):
    """A folder with a policy, a reference of the same vocabulary, and prompts."""
    root = tmp_path_factory.mktemp("audit")
    make_model(root / "policy", seed=0, spread=8.0)
    make_model(root / "reference", seed=1, spread=8.0)
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return root


@pytest.fixture(scope="package")
def pair(folders):
    return Pair(str(folders / "policy"), str(folders / "reference"), device="cpu")
