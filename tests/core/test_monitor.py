"""The monitor's numbers against plain loops, its standard errors against simulation, and wrong twins of both."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from plain_monitor import mean_and_error, plain_metrics

from kl_plugins.core.monitor import merged, monitor_metrics, monitor_sums, nothing_seen, squared_gradient_norms


def made_up(rows=9, length=70, seed=0, dtype=torch.float32):
    """A ragged batch: NaN where nothing counts, tokens that somebody couldn't score, a completion without tokens."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        return scale * torch.randn(rows, length, generator=generator)

    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    lengths[:3] = torch.tensor([length, 0, 2])
    mask = (torch.arange(length) < lengths[:, None]).long()
    mask[0, 5:9] = 0  # a tool's
    logp = -noise(1.0).abs() - 0.1
    ref, old, engine = logp + noise(1.5), logp + noise(0.7), logp + noise(1.0)
    classes = torch.randint(0, 3, (rows, length), generator=generator)
    ref[0, 3], ref[4, 0], engine[0, 1], engine[5, 0] = -math.inf, math.nan, math.nan, -math.inf
    batch = {"logp": logp, "ref_logp": ref, "old_logp": old, "engine_logp": engine}
    for x in batch.values():
        x[mask == 0] = math.nan
    return {name: x.to(dtype) for name, x in batch.items()} | {"mask": mask, "classes": classes}


@pytest.mark.parametrize(
    "without",
    [(), ("engine_logp",), ("old_logp",), ("engine_logp", "old_logp"), ("ref_logp", "classes"), ("classes",)],
    ids=lambda names: "-".join(names) or "all",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_number_against_plain_loops(without, dtype):
    batch = {name: x for name, x in made_up(dtype=dtype).items() if name not in without}
    found, wanted = monitor_metrics(monitor_sums(**batch)), plain_metrics(**batch)
    if "classes" in without and "ref_logp" not in without:  # all text, then
        assert not any(name.startswith("kl/class/") for name in found)
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    if "ref_logp" not in without:
        assert found["kl/nonfinite"] == 2
        assert found["kl/position/0"] != found["kl/k1"]
    if "engine_logp" not in without:
        assert found["kl/engine_unscored"] == found["kl/ratio_unscored"] == 2


def test_left_out_tokens_are_in_no_kl_but_in_the_weights():
    batch = made_up() | {"coefficient": torch.ones(9, 70)}
    batch["coefficient"][:, ::3] = 0
    left_out = batch["classes"] == 1
    left_out[0, 3] = True  # not finite
    found = monitor_metrics(monitor_sums(**batch, left_out=left_out))
    whole = monitor_metrics(monitor_sums(**batch))
    kept = monitor_metrics(monitor_sums(**batch | {"mask": batch["mask"] * ~left_out}))
    of_policy = {name for name in whole if name.startswith(("kl/ratio", "kl/engine"))}
    assert found == pytest.approx(kept | {name: whole[name] for name in of_policy}, rel=1e-12)
    assert found["kl/nonfinite"] < whole["kl/nonfinite"]
    assert found["kl/ratio_ess"] != kept["kl/ratio_ess"]


def test_an_unmasked_mean_is_another_number():
    batch = made_up()
    ref_logp = batch["ref_logp"].nan_to_num(0.0, neginf=-1.0)
    filled = batch | {"logp": batch["logp"].nan_to_num(-3.0), "ref_logp": ref_logp}
    right = monitor_metrics(monitor_sums(**filled))
    twin = monitor_metrics(monitor_sums(**filled | {"mask": torch.ones_like(batch["mask"])}))
    assert abs(right["kl/k1"] - twin["kl/k1"]) > 5 * right["kl/k1_se"]


def test_micro_batches_and_ranks_add_up():
    """One row at a time, padded further, merged in two steps with a rank that saw nothing: the same numbers."""
    batch = made_up()
    whole = monitor_sums(**batch, gradient=torch.tensor([3.0, 5.0]).double())
    parts = []
    for row in range(9):
        padded = {name: torch.nn.functional.pad(x[row : row + 1], (0, 11)) for name, x in batch.items()}
        parts.append(monitor_sums(**padded, gradient=torch.tensor([3.0, 5.0]).double() / 9))
    ranks = [merged(torch.stack(parts[:4])), nothing_seen("cpu"), merged(torch.stack(parts[4:]))]
    assert monitor_metrics(merged(torch.stack(ranks))) == pytest.approx(monitor_metrics(whole), rel=1e-9)
    assert monitor_metrics(whole)["kl/gradient_ratio"] == pytest.approx(math.sqrt(0.6))


def test_what_the_data_does_not_determine_is_left_out():
    assert monitor_metrics(nothing_seen("cpu")) == {}
    nothing = {"logp": torch.zeros(2, 3), "mask": torch.zeros(2, 3)}
    assert monitor_metrics(monitor_sums(**nothing, ref_logp=torch.ones(2, 3), old_logp=torch.ones(2, 3))) == {}
    one = monitor_metrics(monitor_sums(logp=torch.zeros(1, 3), mask=torch.ones(1, 3), ref_logp=-torch.ones(1, 3)))
    assert one["kl/k1"] == one["kl/position/0"] == 1
    assert one["kl/sequence"] == 3
    assert not any(name.endswith("_se") or name.startswith("kl/position/4") for name in one)
    unscored = torch.full((1, 3), math.nan)
    lost = monitor_metrics(monitor_sums(logp=torch.zeros(1, 3), mask=torch.ones(1, 3), ref_logp=unscored))
    assert lost == {"kl/nonfinite": 3}
    gap = monitor_metrics(monitor_sums(logp=torch.zeros(1, 3), mask=torch.ones(1, 3), engine_logp=unscored))
    assert gap == {"kl/ratio_unscored": 3, "kl/engine_unscored": 3}


def test_numbers_too_large_for_floats_stay_numbers():
    logp = torch.tensor([[-1e4, -1.0, -3e38], [-2.0, -500.0, -1.0]])
    ref, old = torch.tensor([[-1.0, -1e4, -1.0], [-2.0, -1.0, -1.0]]), torch.tensor([[-1.0, -1e4, -1.0]]).repeat(2, 1)
    found = monitor_metrics(monitor_sums(logp=logp, ref_logp=ref, old_logp=old, mask=torch.ones(2, 3)))
    assert all(math.isfinite(value) for value in found.values())
    assert found["kl/k3"] > 1e100
    assert found["kl/ratio_max"] > 1e100
    assert found["kl/dead_at_10/k3"] == pytest.approx(4 / 6)


def replicates(count, *, completions=40, seed=0):
    """u of many batches: lengths vary with the completion's own level, tokens of one completion share that level."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        level = rng.normal(size=completions)
        lengths = 5 + rng.poisson(np.exp(1.5 + 0.7 * level))
        yield [0.3 + 0.5 * x + 0.3 * rng.normal(size=n) for x, n in zip(level, lengths, strict=True)]


def padded(rows):
    u = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.float64)
    mask = torch.zeros(u.shape)
    for i, row in enumerate(rows):
        u[i, : len(row)], mask[i, : len(row)] = torch.from_numpy(row), 1
    return {"logp": u, "ref_logp": torch.zeros_like(u), "mask": mask}


def test_standard_errors_are_the_scatter_of_repeated_batches():
    """1,000 batches: the errors that they report, squared and averaged, are the variance of what they report."""
    found = [monitor_metrics(monitor_sums(**padded(rows))) for rows in replicates(1000)]
    for name in ("kl/k1", "kl/k2", "kl/k3", "kl/sequence", "kl/position/0", "kl/position/4-15"):
        scatter = np.std([batch[name] for batch in found], ddof=1)
        reported = math.sqrt(np.mean([batch[f"{name}_se"] ** 2 for batch in found]))
        assert reported == pytest.approx(scatter, rel=0.1), name


def test_unclustered_standard_errors_are_not():
    """The twin that takes tokens for independent: its error is a third of the scatter."""
    batches = list(replicates(500))
    scatter = np.std([np.concatenate(rows).mean() for rows in batches], ddof=1)
    tokens = [np.concatenate(rows) for rows in batches]
    twin = math.sqrt(np.mean([x.var(ddof=1) / len(x) for x in tokens]))
    assert twin < 0.4 * scatter


def test_standard_errors_are_those_of_a_bootstrap_over_completions():
    rows = next(replicates(1, completions=300, seed=3))
    rng = np.random.default_rng(0)
    means = []
    for _ in range(4000):
        drawn = [rows[i] for i in rng.integers(len(rows), size=len(rows))]
        means.append(np.concatenate(drawn).mean())
    found = monitor_metrics(monitor_sums(**padded(rows)))
    assert found["kl/k1_se"] == pytest.approx(np.std(means, ddof=1), rel=0.05)
    assert found["kl/k1_se"] == pytest.approx(mean_and_error(rows)[1], rel=1e-9)


def trl_coefficient(logp, ref_logp, old_logp=None):
    """d/dlogp of k3 (times the ratio) as TRL writes it down, in the dtype of its tensors."""
    logp = logp.clone().requires_grad_()
    kl = torch.exp(ref_logp - logp) - (ref_logp - logp) - 1
    if old_logp is not None:
        kl = kl * torch.exp(logp - old_logp)
    return torch.autograd.grad(kl.sum(), logp)[0]


def test_tokens_whose_gradient_trls_floats_have_killed():
    u = torch.tensor([[-0.5, 3.0, -20.0, -40.0, -95.0, 1e-8, 0.0, 1e-4]])
    ref = torch.zeros_like(u)
    coefficient = trl_coefficient(u, ref, u)
    assert coefficient[0, 2] == -32  # wrong, but not dead
    assert coefficient[0, 3] == 0
    assert coefficient[0, 4].isnan()
    assert coefficient[0, 5] == 0  # rounding, nothing lost
    batch = {"logp": u, "ref_logp": ref, "mask": torch.ones_like(u)}
    assert monitor_metrics(monitor_sums(**batch, coefficient=coefficient))["kl/dead"] == 2 / 8
    assert monitor_metrics(monitor_sums(**batch, coefficient=coefficient.double().fill_(1)))["kl/dead"] == 0
    assert monitor_metrics(monitor_sums(**batch, coefficient=torch.zeros_like(u)))["kl/dead"] == 6 / 8
    assert "kl/dead" not in monitor_metrics(monitor_sums(**batch))
    batch["mask"] = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1]])
    assert monitor_metrics(monitor_sums(**batch, coefficient=coefficient))["kl/dead"] == 1 / 7


@pytest.mark.parametrize(("name", "estimate"), [("k2", lambda u: u * u / 2), ("k3", lambda u: (-u).expm1() + u)])
def test_tokens_that_a_clamp_at_10_kills(name, estimate):
    """The share is the one whose gradient autograd finds to be 0 behind such a clamp."""
    u = torch.linspace(-8, 12, 300, dtype=torch.float64).view(3, 100).requires_grad_()
    (gradient,) = torch.autograd.grad(estimate(u).clamp(-10, 10).sum(), u)
    dead = ((gradient == 0) & (u.abs() > 1e-9)).double().mean().item()
    assert 0 < dead < 1
    found = monitor_metrics(monitor_sums(logp=u, ref_logp=torch.zeros_like(u), mask=torch.ones_like(u)))
    assert found[f"kl/dead_at_10/{name}"] == pytest.approx(dead)


def test_the_norms_are_those_of_the_two_parts_of_the_loss():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, 4, generator=generator, requires_grad=True) for _ in range(2)]
    unused = torch.zeros(3, requires_grad=True)
    hidden = torch.tanh(torch.randn(5, 4, generator=generator) @ weights[0]) @ weights[1]
    term = hidden.square()
    policy = (hidden.exp() * torch.randn(5, 4, generator=generator)).sum()
    loss = policy + 0.3 * (term * torch.rand(5, 4, generator=generator)).sum()
    found = squared_gradient_norms(loss, term, [*weights, unused])
    assert [*weights, unused][0].grad is None
    kl_gradient = torch.autograd.grad(loss - policy, weights, retain_graph=True)
    wanted = [
        sum(g.square().sum() for g in gradient)
        for gradient in (kl_gradient, torch.autograd.grad(policy, weights, retain_graph=True))
    ]
    torch.testing.assert_close(found.float(), torch.stack(wanted), rtol=1e-5, atol=0)
    assert squared_gradient_norms(policy, term, weights) is None
    loss.backward()  # the graph is still there


def test_nothing_waits_for_the_device():
    """Tensors of the device "meta" have no values: whatever asked for one would raise."""
    batch = {name: x.to("meta") for name, x in made_up().items()}
    sums = monitor_sums(**batch, coefficient=batch["logp"], gradient=torch.zeros(2, device="meta"))
    merged(torch.stack([sums, nothing_seen("meta")]))
    with pytest.raises((RuntimeError, NotImplementedError)):
        monitor_metrics(sums)  # the twin: it does ask
