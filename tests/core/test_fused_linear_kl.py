"""`fused_linear_kl` against logits that are written out, and that it never writes them out."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kl_plugins import ConfigError, KLSpec, exact_kl
from kl_plugins.core import fused_linear_kl as heads
from kl_plugins.core.fused_linear_kl import LMHead, fused_linear_kl, fused_linear_kl_and_logps

SPECS = [KLSpec.from_name("exact_as_loss"), KLSpec.from_name("exact_forward_as_loss")]
V, H = 37, 8


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(heads, "ROWS", 5)
    monkeypatch.setattr(heads, "COLUMNS", 10)


def case(dtype, *, bias=False, scale=3.0, **options):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def head():
        return LMHead(weight=draw(V, H), bias=draw(V) if bias else None, scale=scale, dtype=dtype, **options)

    hidden, ref_hidden = draw(3, 7, H), draw(3, 7, H)
    mask = torch.arange(7) < torch.tensor([[7], [3], [5]])
    policy = head()
    leaves = [x for x in (hidden, policy.weight, policy.bias) if x is not None]
    for x in leaves:
        x.requires_grad_()
    return {"hidden": hidden, "head": policy, "ref_hidden": ref_hidden, "ref_head": head(), "mask": mask}, leaves


def logits_of(hidden, head):
    y = hidden @ head.weight.t() + (0 if head.bias is None else head.bias)
    y = y * head.scale
    return (y if head.softcap is None else head.softcap * torch.tanh(y / head.softcap)) / head.temperature


def dense(spec, inputs):
    """Naive: all logits, and autograd through log_softmax."""
    p, r = (
        logits_of(inputs[hidden], inputs[head]).log_softmax(-1)
        for hidden, head in (("hidden", "head"), ("ref_hidden", "ref_head"))
    )
    kl = (p.exp() * (p - r)).sum(-1) if spec.loss.exact == "reverse_kl" else (r.exp() * (r - p)).sum(-1)
    return kl * inputs["mask"]


VARIANTS = [
    {},
    {"bias": True},
    {"softcap": 2.0},
    {"temperature": 0.7},
    {"bias": True, "softcap": 3.0, "temperature": 1.7, "scale": 0.5},
]
# Every variant in float64, and nothing or everything at once in float32.
PRECISE = [(options, torch.float64, 1e-12) for options in VARIANTS]
PRECISE += [(options, torch.float32, 2e-5) for options in (VARIANTS[0], VARIANTS[-1])]


@pytest.mark.parametrize(("options", "dtype", "tolerance"), PRECISE, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_values_and_gradients_are_the_dense_ones(spec, options, dtype, tolerance):
    inputs, leaves = case(dtype, **options)
    above = torch.randn(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    found, wanted = fused_linear_kl(spec, **inputs).value, dense(spec, inputs)
    assert found.dtype == dtype
    assert (found - wanted).norm() <= tolerance * wanted.norm()
    for a, b in zip(
        torch.autograd.grad((above * found).sum(), leaves),
        torch.autograd.grad((above * wanted).sum(), leaves),
        strict=True,
    ):
        assert (a - b).norm() <= tolerance * b.norm()
    for forgotten in ("softcap", "temperature", "bias"):  # the twin: each of them changes the divergence
        if forgotten in options:
            plain = replace(inputs["head"], **{forgotten: 1.0 if forgotten == "temperature" else None})
            assert (fused_linear_kl(spec, **inputs | {"head": plain}).value - wanted).norm() > 1e-2 * wanted.norm()


def scored(spec, inputs):
    """(3, 7) log-probs, entropies and divergences of `fused_linear_kl_and_logps`; the first two from dense logits."""
    counted = inputs["mask"]
    targets = torch.randint(0, V, counted.shape, generator=torch.Generator().manual_seed(2))
    kl, logp, entropy = fused_linear_kl_and_logps(
        spec.loss.exact,
        hidden=inputs["hidden"][counted],
        ref_hidden=inputs["ref_hidden"][counted],
        targets=targets[counted],
        **{name: inputs[name] for name in ("head", "ref_head")},
    )
    found = [torch.zeros(3, 7, dtype=kl.dtype).masked_scatter(counted, x) for x in (logp, entropy, kl)]
    log_p = logits_of(inputs["hidden"], inputs["head"]).log_softmax(-1)
    wanted = log_p.gather(-1, targets[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
    return found, [x * counted for x in wanted]


@pytest.mark.parametrize(("options", "dtype", "tolerance"), PRECISE, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_in_one_pass_with_the_log_probs(spec, options, dtype, tolerance):
    """All three outputs, and the gradient of any two or three of them, as by `fused_linear_kl` and dense logits."""
    inputs, leaves = case(dtype, **options)
    found, wanted = scored(spec, inputs)
    wanted = [*wanted, fused_linear_kl(spec, **inputs).value]
    above = torch.randn(3, 3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()

    def gradient(outputs, parts):
        loss = sum((above[i] * outputs[i]).sum() for i in parts)
        return torch.autograd.grad(loss, leaves, retain_graph=True)

    for parts in ((0, 2), (0, 1, 2), (1, 2), (0,)):
        expected = gradient(wanted, parts)
        for a, b in zip(gradient(found, parts), expected, strict=True):
            assert (a - b).norm() <= tolerance * b.norm()
        for less in range(len(parts) if len(parts) > 1 else 0):  # the twin: each of them has a part in it
            without = gradient(found, parts[:less] + parts[less + 1 :])
            assert all((a - b).norm() > 1e-2 * b.norm() for a, b in zip(without, expected, strict=True))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_log_probs_keep_their_gradient_where_tokens_are_excluded(spec):
    """Of the divergence, inf or not, nothing reaches what it isn't defined for."""
    inputs, leaves = case(torch.float64, bias=True)
    with torch.no_grad():
        inputs["ref_head"].bias[:12] = -math.inf  # more than a tile
    (logp, _, kl), (wanted, _) = scored(spec, inputs)
    assert kl[inputs["mask"]].isinf().all() == (spec.loss.exact == "reverse_kl")
    torch.testing.assert_close(logp, wanted, rtol=1e-12, atol=1e-12)
    finite = torch.where(kl.isfinite(), kl, 0.0).sum()
    alone = fused_linear_kl(spec, **inputs).value
    expected = torch.autograd.grad(wanted.sum() + torch.where(alone.isfinite(), alone, 0.0).sum(), leaves)
    for a, b in zip(torch.autograd.grad(logp.sum() + finite, leaves), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("part", [0, 1], ids=["log-probs", "entropies"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_log_probs_and_entropies_where_the_policy_excludes_tokens(spec, part):
    """In some rows only: a token of weight 0 or -inf."""
    inputs, leaves = case(torch.float64)
    weight, hidden = inputs["head"].weight, inputs["hidden"]
    with torch.no_grad():
        weight[:12, 0] = -1e200  # more than a tile
        hidden[..., 0] = 0.0
        hidden[0, :2, 0] = hidden[2, 3, 0] = 1e200
    generator = torch.Generator().manual_seed(2)
    counted, targets = inputs["mask"], torch.randint(12, V, (3, 7), generator=generator)
    kl, *found = fused_linear_kl_and_logps(
        spec.loss.exact,
        hidden=hidden[counted],
        ref_hidden=inputs["ref_hidden"][counted],
        targets=targets[counted],
        **{name: inputs[name] for name in ("head", "ref_head")},
    )
    log_p = (hidden[counted].detach() @ weight.detach().t() * inputs["head"].scale).log_softmax(-1)
    excluded = log_p.isinf()
    assert 0 < excluded.any(-1).sum() < len(log_p)
    assert torch.equal(kl.isinf(), excluded.any(-1) & (spec.loss.exact == "forward_kl"))
    log_p = log_p.masked_fill(excluded, -1e9)
    entropy = -(log_p.exp() * log_p).sum(-1)
    wanted = log_p.gather(-1, targets[counted][:, None]).squeeze(-1), entropy
    torch.testing.assert_close(found[part].detach(), wanted[part], rtol=1e-12, atol=1e-12)
    at_target = torch.nn.functional.one_hot(targets[counted], V) - log_p.exp()
    slope = at_target if part == 0 else -log_p.exp() * (log_p + entropy[:, None])
    gradient = torch.autograd.grad(found[part].sum(), leaves[0])[0][counted]
    expected = slope @ weight.detach() * inputs["head"].scale
    torch.testing.assert_close(gradient[:, 1:], expected[:, 1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_row_that_is_no_number_has_no_gradient(spec):
    """Of the reference in both passes, so that it can be dropped; of the policy in its own hidden state and a bias."""
    inputs, leaves = case(torch.float64, bias=True)
    with torch.no_grad():
        inputs["ref_hidden"][0, 2] = math.nan

    def gradients(kl, *more):
        return torch.autograd.grad(torch.where(kl.isfinite(), kl, 0.0).sum() + sum(more), leaves)

    (logp, _, kl), (wanted, _) = scored(spec, inputs)
    apart = fused_linear_kl(spec, **inputs).value
    assert kl.isnan().sum() == 1
    assert torch.equal(kl.isnan(), apart.isnan())
    for a, b in zip(gradients(kl, logp.sum()), gradients(apart, wanted.sum()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        inputs["ref_hidden"].nan_to_num_()
        inputs["hidden"][0, 2] = math.nan
    to_hidden, _, to_bias = gradients(fused_linear_kl(spec, **inputs).value)
    assert to_bias.isfinite().all()
    assert not to_hidden[0, 2].any()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_what_an_early_tile_held_is_forgotten_once_it_has_no_mass(spec):
    """Tokens that the reference excludes, and to which the policy gives e^-2000."""
    weight, ref_weight = torch.zeros(V, 1, dtype=torch.float64), torch.zeros(V, 1, dtype=torch.float64)
    weight[:12], ref_weight[:12] = -2000.0, -math.inf
    weight[12:, 0] = torch.linspace(-1, 1, V - 12, dtype=torch.float64)
    hidden, mask = torch.ones(1, 5, 1, dtype=torch.float64), torch.ones(1, 5)  # of fewer rows a tile is wider
    heads_ = {
        "head": LMHead(weight=weight, dtype=torch.float64),
        "ref_head": LMHead(weight=ref_weight, dtype=torch.float64),
    }
    found = fused_linear_kl(spec, hidden=hidden, ref_hidden=hidden, mask=mask, **heads_).value
    logits, ref_logits = (hidden @ w.t() for w in (weight, ref_weight))
    wanted = exact_kl(spec, logits=logits, ref_logits=ref_logits, mask=mask).value
    assert wanted.isfinite().all()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_autocast_outside_of_it_changes_nothing():
    """A head says by itself what it rounds to, forward and backward."""
    inputs, leaves = case(torch.float32)

    def gradients():
        found = fused_linear_kl(SPECS[0], **inputs).value
        return found, *torch.autograd.grad(found.sum(), leaves)

    plain = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, gradients(), plain))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_tied_weights_get_both_gradients(spec):
    """One parameter as embedding and head."""
    inputs, _ = case(torch.float64)
    weight = inputs["head"].weight
    tokens = torch.randint(0, V, (3, 7), generator=torch.Generator().manual_seed(2))

    def gradient(kl):
        tied = inputs | {"hidden": weight[tokens] + inputs["hidden"].detach()}
        return torch.autograd.grad(kl(tied).sum(), weight)[0]

    found, wanted = (
        gradient(lambda tied: fused_linear_kl(spec, **tied).value),
        gradient(lambda tied: dense(spec, tied)),
    )
    assert (found - wanted).norm() <= 1e-12 * wanted.norm()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_no_gradient_reaches_the_reference(spec):
    inputs, _ = case(torch.float64)
    inputs["ref_hidden"].requires_grad_()
    inputs["ref_head"].weight.requires_grad_()
    fused_linear_kl(spec, **inputs).value.sum().backward()
    assert inputs["ref_hidden"].grad is None
    assert inputs["ref_head"].weight.grad is None
    assert inputs["hidden"].grad.norm() > 0


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_masked_positions_contribute_exactly_nothing(spec):
    inputs, leaves = case(torch.float32)
    off = ~inputs["mask"]
    clean = torch.autograd.grad(fused_linear_kl(spec, **inputs).value.sum(), leaves)
    with torch.no_grad():
        inputs["hidden"][off] = inputs["ref_hidden"][off] = math.nan
    found = fused_linear_kl(spec, **inputs).value
    assert torch.equal(found[off], torch.zeros(int(off.sum())))
    for a, b in zip(torch.autograd.grad(found.sum(), leaves), clean, strict=True):
        assert torch.equal(a, b)
    nothing = fused_linear_kl(spec, **inputs | {"mask": torch.zeros(3, 7)}).value
    for x in torch.autograd.grad(nothing.sum(), leaves):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("where", ["both", "reference", "policy"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_excluded_tokens(spec, where):
    """As `exact_kl` has them: nothing where both exclude a token; inf, and no gradient, where one can't."""
    inputs, leaves = case(torch.float64, bias=True)
    with torch.no_grad():
        for name in {"both": ("head", "ref_head"), "reference": ("ref_head",), "policy": ("head",)}[where]:
            inputs[name].bias[:12] = -math.inf  # more than a tile

    def logits(hidden, head):
        return (hidden @ head.weight.t() + head.bias) * head.scale

    wanted = exact_kl(
        spec,
        logits=logits(inputs["hidden"], inputs["head"]),
        ref_logits=logits(inputs["ref_hidden"], inputs["ref_head"]),
        mask=inputs["mask"],
    ).value
    found = fused_linear_kl(spec, **inputs).value
    infinite = {"reference": "reverse_kl", "policy": "forward_kl"}.get(where) == spec.loss.exact
    assert found[inputs["mask"]].isinf().all() == infinite
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(found.sum(), leaves[:2])
    assert all(x.isfinite().all() for x in gradients)
    assert all((x == 0).all() for x in gradients) == infinite


def test_bfloat16_is_summed_in_float32():
    inputs, leaves = case(torch.bfloat16)
    bias = torch.linspace(-1, 1, V)  # which isn't rounded
    inputs |= {name: replace(inputs[name], bias=bias) for name in ("head", "ref_head")}
    inputs["ref_head"] = replace(inputs["ref_head"], bias=bias.flip(0))
    found = fused_linear_kl(SPECS[0], **inputs).value
    assert found.dtype == torch.float32
    exact = {k: x.detach().double() if k in ("hidden", "ref_hidden") else x for k, x in inputs.items()}
    for name in ("head", "ref_head"):
        exact[name] = replace(inputs[name], weight=inputs[name].weight.detach().double(), dtype=torch.float64)
    wanted = dense(SPECS[0], exact)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert all(x.dtype == torch.bfloat16 for x in torch.autograd.grad(found.sum(), leaves))


def test_a_small_divergence_survives_large_logits():
    """Of two log-sums near 60, float32 leaves 4e-6: the divergence of 1e-6 is summed apart from them."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 4, H, generator=generator), 6 * torch.randn(V, H, generator=generator)
    ref_weight = weight + 1e-3 * torch.randn(V, H, generator=generator)
    bias = torch.full((V,), 40.0)
    inputs = {"hidden": hidden, "head": LMHead(weight=weight, bias=bias), "mask": torch.ones(1, 4)}
    inputs |= {"ref_hidden": hidden, "ref_head": LMHead(weight=ref_weight, bias=bias)}
    found = fused_linear_kl(SPECS[0], **inputs).value
    wide = {k: x.double() if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
    for name in ("head", "ref_head"):
        wide[name] = LMHead(weight=inputs[name].weight.double(), bias=bias.double(), dtype=torch.float64)
    wanted = dense(SPECS[0], wide)
    assert wanted.max() < 1e-5
    assert (found - wanted).abs().max() < 2e-6


class Largest(TorchDispatchMode):
    """The most elements that a tensor had which an operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else [made]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return made


def test_logits_are_never_written_out():
    inputs, _ = case(torch.float32, bias=True, softcap=2.0)
    with Largest() as seen:
        fused_linear_kl(SPECS[0], **inputs).value.sum().backward()
    assert seen.elements == V * H  # the gradient of the weight
    with Largest() as naive:
        dense(SPECS[0], inputs)
    assert naive.elements == 3 * 7 * V > seen.elements


def test_what_is_refused():
    inputs, _ = case(torch.float32)
    for spec in (KLSpec.from_name("k2_as_loss"), KLSpec.from_name("exact_as_loss", top_k=3)):
        with pytest.raises(ConfigError, match="fused_linear_kl sums over the whole vocabulary"):
            fused_linear_kl(spec, **inputs)
    short = replace(inputs["ref_head"], weight=inputs["ref_head"].weight[:-1])
    with pytest.raises(ConfigError, match="has 37 tokens, the reference's 36"):
        fused_linear_kl(SPECS[0], **inputs | {"ref_head": short})
    with pytest.raises(ConfigError, match="has 37 tokens, the reference's 36"):
        scored(SPECS[0], inputs | {"ref_head": short})
