"""The hosts' own KL functions in the audit, and what is counted of their tokens."""

from __future__ import annotations

import math
import re
import sys
import types

import pytest
import torch
from tiny_openrlhf import import_openrlhf

from kl_plugins.audit.collect import TokenCounts
from kl_plugins.audit.configurations import Tokens, host_configurations, own_configurations
from kl_plugins.conformance import hosts


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    logp, ref_logp, old_logp = -3 * torch.rand(3, 4, 6, generator=generator)
    mask = torch.arange(6) < torch.tensor([6, 4, 1, 3])[:, None]
    return Tokens(
        logp=logp, ref_logp=ref_logp, mask=mask, behavior_logp=old_logp, host_behavior_logp=old_logp, kl=logp * 0
    )


def host_rows():
    import_openrlhf()
    found, left_out = host_configurations()
    return {row.name: row for row in found}, left_out


def test_hosts_own_functions_are_run(drawn):
    rows, left_out = host_rows()
    assert left_out == ["verl is not installed"]
    corrected, plain = "TRL GRPO (k3, bias correction)", "TRL GRPO (k3)"
    assert re.fullmatch(r"trl [\d.]+: GRPOTrainer._compute_loss, run on .*", rows[corrected].origin)
    assert re.fullmatch(r"openrlhf [\d.]+: compute_approx_kl, run", rows["OpenRLHF k2"].origin)
    u, rho = drawn.logp - drawn.ref_logp, (drawn.logp - drawn.behavior_logp).exp()
    expected = {
        corrected: rho * u,
        plain: -torch.expm1(-u),
        "OpenRLHF k1": torch.ones_like(u),
        "OpenRLHF k2": u,
        "OpenRLHF k3": -torch.expm1(-u),
        "OpenRLHF unbiased_gradient": rho.clamp(max=10) * u,
    }
    for name, coefficient in expected.items():
        found = rows[name].coefficients(drawn).score
        torch.testing.assert_close(found, coefficient * drawn.mask, rtol=1e-4, atol=1e-5)
        on_policy = {corrected: u, "OpenRLHF unbiased_gradient": u}.get(name, coefficient)
        torch.testing.assert_close(rows[name].pointwise(drawn.logp, drawn.ref_logp), on_policy, rtol=1e-4, atol=1e-5)
    frozen = torch.where(drawn.mask, drawn.behavior_logp - drawn.ref_logp, 0.0)
    to_go = frozen.flip(-1).cumsum(-1).flip(-1)
    found = rows["OpenRLHF k1 in reward"].coefficients(drawn).score
    torch.testing.assert_close(found, to_go * rho * drawn.mask, rtol=1e-4, atol=1e-5)


def test_where_trl_can_not_be_run_its_formula_says_so_and_is_the_same(drawn, monkeypatch):
    rows, _ = host_rows()
    monkeypatch.setitem(sys.modules, "trl", None)
    stated, (problem, _) = host_configurations()
    assert "its formula stands for it" in problem
    stated = [row for row in stated if row.name.startswith("TRL")]
    assert len(stated) == 2
    for row in stated:
        assert row.origin.startswith("formula of TRL 1.16, not run")
        found = row.coefficients(drawn).score
        torch.testing.assert_close(found, rows[row.name].coefficients(drawn).score, rtol=1e-4, atol=1e-5)


def test_a_host_that_is_missing_or_broken_is_said_to_be(monkeypatch):
    monkeypatch.setitem(sys.modules, "openrlhf.models.utils", None)
    assert "OpenRLHF is installed, but can't be imported" in hosts.installed("OpenRLHF")[1]
    monkeypatch.setattr(hosts, "installed_version", lambda host: None)
    assert hosts.installed("OpenRLHF") == ([], "OpenRLHF is not installed")


def test_verls_own_function_is_run_where_there_is_one(drawn, monkeypatch):
    def kl_penalty(logp, ref_logp, name):
        if name.endswith("+"):
            raise NotImplementedError
        return {"k1": lambda u: u, "k2": lambda u: u.square() / 2}.get(name, torch.exp)(logp - ref_logp)

    module = types.ModuleType("verl.trainer.ppo.core_algos")
    module.kl_penalty = kl_penalty
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo.core_algos", module)
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    rows, _ = host_rows()
    names = [name.removeprefix("verl ") for name in rows if name.startswith("verl ")]
    assert names == ["k1", "abs", "k2", "k3 (low_var_kl)", "k1 in reward"]
    u = drawn.logp - drawn.ref_logp
    torch.testing.assert_close(rows["verl k2"].coefficients(drawn).score, u * drawn.mask)


def test_tokens_whose_gradient_a_clamp_has_switched_off_are_counted():
    rows, _ = host_rows()
    ours = next(c for c in own_configurations(off_policy=False) if c.label == "k2_as_loss token")
    logp = torch.tensor([[-9.0, -1.0, -1.0, -1.0]])
    ref_logp = torch.tensor([[-1.0, -1.5, -1.0, -9.0]])
    mask = torch.tensor([[True, True, True, False]])
    tokens = Tokens(logp=logp, ref_logp=ref_logp, mask=mask, behavior_logp=None, host_behavior_logp=None, kl=logp * 0)
    dead = {}
    for row in (ours, *rows.values()):
        counts = TokenCounts()
        counts.add(row.coefficients(tokens), tokens, (1.0, 0.0, 3.0, 0.0))
        dead[row.name] = counts.shares()["dead"]
    assert dead["OpenRLHF k2"] == dead["OpenRLHF k3"] == pytest.approx(1 / 3)
    assert dead["k2_as_loss"] == dead["OpenRLHF unbiased_gradient"] == dead["TRL GRPO (k3, bias correction)"] == 0


def test_weights_tail_and_effective_sample_size():
    own = own_configurations(off_policy=True)
    row = next(c for c in own if c.label == "k2_as_loss token, token")
    logp = torch.zeros(1, 200)
    behavior = torch.cat([torch.full((1, 2), -math.log(50.0)), torch.zeros(1, 198)], dim=1)
    tokens = Tokens(
        logp=logp - 1,
        ref_logp=logp - 2,
        mask=torch.ones_like(logp, dtype=torch.bool),
        behavior_logp=behavior - 1,
        host_behavior_logp=behavior - 1,
        kl=logp,
    )
    counts = TokenCounts()
    counts.add(row.coefficients(tokens), tokens, (2.0, 1.0, 200.0, 40.0))
    found = counts.shares()
    assert found["unseen"] == pytest.approx((0.5 - 0.2) / 0.8)
    weights = [10.0] * 2 + [1.0] * 198  # cut at 10
    assert found["weights"] == pytest.approx(
        {
            "ess": sum(weights) ** 2 / sum(w * w for w in weights) / 200,
            "max": 10.0,
            "top_percent": 20 / sum(weights),
            "cut": 0.01,
        }
    )
