"""Tokens left out of the KL: whose gradient remains, by enumeration, and the slips that look alike."""

import math

import pytest
import torch

from kl_plugins import KLSpec, kl_terms
from kl_plugins.core.controllers import ControllerSpec
from kl_plugins.core.exact import ExactKL
from kl_plugins.core.metrics import SUMS, kl_metrics, kl_sums, next_beta
from kl_plugins.core.terms import leave_one_out_baseline
from kl_plugins.errors import ConfigError
from kl_plugins.oracle import RTOL, enumerate_sequences, expected_gradient, relative_error, structured_policies

UNBOUNDED = (0.0, math.inf)
TOKENS = pytest.mark.parametrize("tokens", [(0,), (0, 2)], ids=str)
SEQUENCE = [("k1_in_reward", "to_go"), ("k1_in_reward", "sequence"), ("k2_as_loss", "sequence")]
LOCAL = [("k1_in_reward", "reverse"), ("k2_as_loss", "reverse"), ("k3_as_loss", "forward")]


def left_out(case, tokens=(), positions=()):
    """The (N, T) arguments of `kl_terms`."""
    by_token = torch.isin(case.sequences.tokens, torch.tensor(tokens, dtype=torch.long))
    by_position = torch.zeros_like(by_token)
    by_position[:, list(positions)] = True
    masks = {"left_out_tokens": by_token} if tokens else {}
    return masks | ({"left_out_positions": by_position} if positions else {})


def prefix_lengths(sequences):
    lengths = torch.zeros(sequences.prefixes, dtype=torch.long)
    for t in range(sequences.tokens.size(1)):
        lengths[sequences.prefix[sequences.mask[:, t], t]] = t
    return lengths


def true_gradient(case, exact, of, tokens=(), positions=(), prefixes_of=None):
    """(S, V): of the generalized KL over the tokens that are kept, by differentiating it.

    `of` is "sequence" (what states are visited depends on the policy), "reverse" or "forward" (states held fixed).
    """
    theta = case.policy.clone().requires_grad_()
    p, r = theta.softmax(-1), case.reference.softmax(-1)
    kept = torch.ones_like(p)
    kept[:, list(tokens)] = 0
    for position in positions:
        kept[prefix_lengths(case.sequences) == position] = 0
    whole = torch.tensor([tuple(row) == (1,) * p.size(1) for row in kept.tolist()])
    rest = torch.where(whole, 0.0, (kept * (r - p)).sum(-1))
    forward, reverse = (kept * r * (r / p).log()).sum(-1) - rest, (kept * p * (p / r).log()).sum(-1) + rest
    local = forward if of == "forward" else reverse
    if of != "sequence":
        visits = exact.visits(case.policy if prefixes_of is None else prefixes_of, case).detach()
        return torch.autograd.grad((visits * local).sum(), theta)[0]
    sequences = case.sequences
    step = torch.where(sequences.mask, p[sequences.prefix, sequences.tokens], 1.0)
    if case.environment is not None:
        drawn = case.environment.softmax(-1)[sequences.prefix, sequences.tokens]
        step = step * torch.where(sequences.environment, drawn, 1.0)
    total = (local[sequences.prefix] * sequences.mask).sum(-1)
    return torch.autograd.grad((step.prod(-1) * total).sum(), theta)[0]


def found(case, name, masks, behavior=None, **options):
    spec = KLSpec.from_name(name, **options)
    return expected_gradient(
        spec, case.sequences, case.policy, case.reference, behavior=behavior, environment=case.environment, **masks
    )


@TOKENS
@pytest.mark.parametrize(("name", "credit"), SEQUENCE)
def test_sequence_gradient_of_the_kept_tokens(name, credit, tokens, case, exact):
    expected = true_gradient(case, exact, "sequence", tokens)
    assert relative_error(found(case, name, left_out(case, tokens), credit=credit), expected) <= RTOL


@TOKENS
@pytest.mark.parametrize(("name", "of"), LOCAL)
def test_local_gradient_of_the_kept_tokens(name, of, tokens, case, exact):
    expected = true_gradient(case, exact, of, tokens)
    assert relative_error(found(case, name, left_out(case, tokens), credit="token"), expected) <= RTOL


@pytest.mark.parametrize("positions", [(0,), (1, 3)], ids=str)
@pytest.mark.parametrize(("name", "credit"), SEQUENCE)
def test_positions_cost_nothing_and_answer_for_later_ones(name, credit, positions, case, exact):
    expected = true_gradient(case, exact, "sequence", positions=positions)
    assert relative_error(found(case, name, left_out(case, (), positions), credit=credit), expected) <= RTOL


@pytest.mark.parametrize(("name", "credit"), SEQUENCE)
def test_both_at_once(name, credit, case, exact):
    expected = true_gradient(case, exact, "sequence", (0,), (0, 2))
    assert relative_error(found(case, name, left_out(case, (0,), (0, 2)), credit=credit), expected) <= RTOL


@pytest.mark.parametrize("positions", [(0,), (1, 3)], ids=str)
def test_positions_without_an_exact_kl(positions, case, exact):
    masks, prefix = left_out(case, (), positions), {"off_policy": "prefix", "weight_clip": UNBOUNDED}
    expected = true_gradient(case, exact, "sequence", positions=positions)
    assert relative_error(found(case, "exact_in_reward", masks), expected) <= RTOL
    assert relative_error(found(case, "exact_in_reward", masks, case.behavior, **prefix), expected) <= RTOL
    local = true_gradient(case, exact, "reverse", positions=positions)
    assert relative_error(found(case, "exact_as_loss", masks), local) <= RTOL
    if (masks["left_out_positions"] & case.sequences.mask).any():
        assert relative_error(found(case, "exact_as_loss", {}), local) > 1e-3


@pytest.mark.parametrize("off", ["prefix", "sequence"])
@pytest.mark.parametrize(("name", "credit"), SEQUENCE)
def test_off_policy(name, credit, off, case, exact):
    masks = left_out(case, (0,), (1,))
    options = {"credit": credit, "off_policy": off, "weight_clip": UNBOUNDED}
    expected = true_gradient(case, exact, "sequence", (0,), (1,))
    assert relative_error(found(case, name, masks, case.behavior, **options), expected) <= RTOL


@pytest.mark.parametrize(("name", "of"), LOCAL)
def test_off_policy_local(name, of, case, exact):
    masks, options = left_out(case, (0,)), {"credit": "token", "weight_clip": UNBOUNDED}
    expected = true_gradient(case, exact, of, (0,), prefixes_of=case.behavior)
    assert relative_error(found(case, name, masks, case.behavior, **options), expected) <= RTOL


def test_discounted(case):
    """gamma < 1: each later cost is an estimate of the divergence at its state, whatever it is multiplied with."""
    options = {"gamma": 0.5, "allow_biased": True}
    whole = found(case, "k1_in_reward", left_out(case, (0,)), **options)
    prefix = options | {"off_policy": "prefix", "weight_clip": UNBOUNDED}
    assert relative_error(found(case, "k1_in_reward", left_out(case, (0,)), case.behavior, **prefix), whole) <= RTOL


def test_leave_one_out_keeps_the_gradient():
    sequences = enumerate_sequences(3, 3)
    policy, reference, _ = structured_policies(sequences, seed=1)
    masks = {"left_out_tokens": sequences.tokens == 0}
    plain = expected_gradient(KLSpec.from_name("k1_in_reward"), sequences, policy, reference, **masks)
    spec = KLSpec.from_name("k1_in_reward", baseline="leave_one_out")
    grouped = expected_gradient(spec, sequences, policy, reference, group_size=2, **masks)
    assert relative_error(grouped, plain) <= RTOL


@pytest.mark.parametrize("name", ["k1_in_reward", "exact_in_reward"])
def test_a_baseline_made_beforehand_is_that_of_the_batch(name):
    generator = torch.Generator().manual_seed(0)
    logp, ref_logp = (torch.randn(4, 5, generator=generator) - 3 for _ in range(2))
    spec = KLSpec.from_name(name, baseline="leave_one_out")
    inputs = {"logp": logp, "ref_logp": ref_logp, "mask": torch.tensor([[1] * 5, [1] * 5, [1] * 3 + [0] * 2, [1] * 5])}
    masks = {"left_out_positions": torch.tensor([[1, 0, 0, 0, 0], [1] * 5, [0] * 5, [0, 1, 0, 0, 0]])}
    if spec.loss.exact:
        outside = torch.zeros(4, 5, dtype=torch.bool)
        inputs["exact"] = ExactKL(value=(logp - ref_logp).square(), outside=outside, of=spec.loss.exact)
    else:
        masks["left_out_tokens"] = torch.tensor([[0, 0, 0, 1, 0], [0] * 5, [1, 0, 0, 0, 0], [0, 0, 1, 0, 0]])
    found = kl_terms(spec, baseline=leave_one_out_baseline(spec, group_size=2, **inputs, **masks), **inputs, **masks)
    wanted = kl_terms(spec, group_size=2, **inputs, **masks)
    torch.testing.assert_close(found.coefficient, wanted.coefficient)
    for name in masks:  # twins
        twin = leave_one_out_baseline(spec, group_size=2, **inputs, **{n: m for n, m in masks.items() if n != name})
        other = kl_terms(spec, baseline=twin, **inputs, **masks)
        assert (other.coefficient - wanted.coefficient).abs().max() > 0.1


@TOKENS
def test_wrong_ways_to_leave_tokens_out(tokens, steered, exact):
    """Twins: a masked token, a zeroed log-ratio, and a cost of 1 - exp(-u) to the token itself, too."""
    expected = true_gradient(steered, exact, "sequence", tokens)
    out = left_out(steered, tokens)["left_out_tokens"] & steered.sequences.mask
    u = steered.log_ratio
    zeroed = torch.where(out, 0.0, u)
    replaced = torch.where(out, -torch.expm1(-u), u)

    def to_go(x):
        return x.flip(-1).cumsum(-1).flip(-1)

    right = to_go(replaced) - torch.where(out, replaced, 0.0)
    assert relative_error(exact.by_score(right, steered), expected) <= RTOL
    for wrong in (to_go(zeroed), to_go(replaced), torch.where(out, 0.0, to_go(zeroed)), to_go(u)):
        assert relative_error(exact.by_score(wrong, steered), expected) > 1e-2


def test_equal_on_the_kept_tokens_is_no_gradient():
    """Where policy and reference agree on what is kept, nothing pulls: the masked coefficient's fixed point."""
    ref_logp = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64)
    logp = (ref_logp + torch.tensor([0.0, 0.0, 3.0])).requires_grad_()
    terms = kl_terms(
        KLSpec.from_name("k2_as_loss"),
        logp=logp,
        ref_logp=ref_logp,
        mask=torch.ones(1, 3),
        left_out_tokens=torch.tensor([[0, 0, 1]]),
    )
    terms.loss.sum().backward()
    assert logp.grad.abs().max() == 0


def test_a_left_out_tokens_cost_is_bounded():
    """In float32 it would overflow, and a trainer bounds it at 1e6, as the coefficient of k3."""
    logp = torch.tensor([[-1.0, -200.0]], requires_grad=True)
    out = torch.tensor([[0, 1]])

    def coefficient(**options):
        spec = KLSpec.from_name("k1_in_reward", **options)
        ref_logp = torch.tensor([[-1.0, -1.0]])
        return kl_terms(spec, logp=logp, ref_logp=ref_logp, mask=torch.ones(1, 2), left_out_tokens=out).coefficient

    assert coefficient().isfinite().all()
    assert coefficient(left_out_bound=1e6).tolist() == [[-1e6, 0.0]]
    with pytest.raises(ConfigError, match="left_out_bound=-1"):
        coefficient(left_out_bound=-1)


def test_metrics_show_what_was_left_out():
    logp = torch.tensor([[-1.0, -1.0, -1.0, -1.0]])
    ref_logp = torch.tensor([[-1.5, -2.0, -5.0, -9.0]])
    terms = kl_terms(
        KLSpec.from_name("k2_as_loss"),
        logp=logp,
        ref_logp=ref_logp,
        mask=torch.tensor([[1, 1, 1, 0]]),
        left_out_tokens=torch.tensor([[0, 0, 1, 1]]),
    )
    sums = kl_sums(terms, beta=2.0)
    assert sums.shape == (len(SUMS),)
    metrics = kl_metrics(sums, weight_max=terms.weight.max(), beta=2.0)
    assert metrics["kl/k1"] == pytest.approx((0.5 + 1.0) / 2)
    assert metrics["kl/loss"] == pytest.approx(2 * (0.125 + 0.5) / 2)
    assert metrics["kl/left_out"] == pytest.approx(1 / 3)
    assert metrics["kl/left_out_k1"] == pytest.approx(4.0)
    assert metrics["kl/ess"] == pytest.approx(1.0)


def test_metrics_where_whole_rows_are_left_out():
    """Weights are of all counted tokens, the sequences of a target are those with a KL, nothing left out is 0."""
    logp = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]])
    terms = kl_terms(
        KLSpec.from_name("k2_as_loss"),
        logp=logp,
        ref_logp=logp - 3,
        mask=torch.ones(2, 2),
        behavior_logp=logp - torch.tensor([[9.0, 0.0], [0.0, 0.0]]),
        left_out_positions=torch.tensor([[0, 0], [1, 1]]),
    )
    sums = kl_sums(terms, beta=1.0)
    assert dict(zip(SUMS, sums.tolist(), strict=True))["sequences"] == 1
    for per, target in (("token", 3.0), ("sequence", 6.0)):  # of k1, which is 3 at the two tokens that have a KL
        options = {"kl_controller": "pi", "kl_target_per": per}
        held = ControllerSpec(kl_target=target, **options).start(0.05)
        assert next_beta(held, sums) == pytest.approx(0.05, rel=1e-9)
        assert next_beta(ControllerSpec(kl_target=target / 1.1, **options).start(0.05), sums) > 0.0505
    assert kl_metrics(sums, weight_max=terms.weight.max(), beta=1.0)["kl/clipped"] == 1 / 4
    nothing = torch.zeros(len(SUMS))
    assert kl_metrics(nothing, weight_max=nothing[0], beta=1.0, leaves_out=True)["kl/left_out"] == 0
    assert "kl/left_out" not in kl_metrics(nothing, weight_max=nothing[0], beta=1.0)


@pytest.mark.parametrize("options", [{"baseline": None}, {"baseline": "leave_one_out", "group_size": 2}], ids=str)
@pytest.mark.parametrize("off_policy", ["token", "prefix", "sequence"])
@pytest.mark.parametrize("credit", ["to_go", "sequence"])
def test_a_row_that_is_left_out_has_no_gradient_but_for_its_baseline(credit, off_policy, options):
    """It answers for nothing and is a 0 in the others' baseline, also where the reference can't score it."""
    generator = torch.Generator().manual_seed(0)
    logp, ref_logp, behavior = (torch.randn(4, 5, generator=generator) - 3 for _ in range(3))
    rows = torch.tensor([0, 1, 0, 0])[:, None].expand(4, 5)
    spec = KLSpec.from_name(
        "k1_in_reward", credit=credit, off_policy=off_policy, weight_clip=UNBOUNDED, baseline=options["baseline"]
    )
    inputs = {"logp": logp, "mask": torch.ones(4, 5), "behavior_logp": behavior, "left_out_positions": rows}
    inputs |= {"group_size": options.get("group_size")}
    terms = kl_terms(spec, ref_logp=ref_logp, **inputs)
    agreed = kl_terms(spec, ref_logp=torch.where(rows == 1, logp, ref_logp), **inputs | {"left_out_positions": None})
    for name in ("value", "coefficient", "weight", "score_coefficient"):
        torch.testing.assert_close(getattr(terms, name), getattr(agreed, name))
    assert (terms.score_coefficient[1].abs().max() == 0) == (options["baseline"] is None)
    unscored = kl_terms(spec, ref_logp=ref_logp.masked_fill(rows == 1, -math.inf), **inputs)
    assert torch.equal(unscored.loss, terms.loss)


@pytest.mark.parametrize("junk", [math.nan, -math.inf])
@pytest.mark.parametrize("nonfinite", ["error", "drop"])
@pytest.mark.parametrize(("name", "credit"), [("k3_as_loss", "token"), ("k1_in_reward", "to_go")])
def test_where_the_reference_need_not_score_a_left_out_token(name, credit, nonfinite, junk):
    """Nowhere of what is left out by its place; by which token it is, only under credit "token"."""
    logp, out = torch.tensor([[-1.0, -2.0, -0.5]]), torch.tensor([[0, 1, 0]])
    spec = KLSpec.from_name(name, credit=credit, nonfinite=nonfinite)
    scored = torch.tensor([[-1.5, -1.0, -2.0]])
    for mask in ("left_out_positions", "left_out_tokens"):
        inputs = {"logp": logp, "mask": torch.ones(1, 3), mask: out}
        broken = scored.masked_fill(out == 1, junk)
        if mask == "left_out_positions" or credit == "token":
            found, wanted = kl_terms(spec, ref_logp=broken, **inputs), kl_terms(spec, ref_logp=scored, **inputs)
            assert torch.equal(found.score_coefficient, wanted.score_coefficient)
            assert torch.equal(found.left_out, out == 1)
            assert not found.dropped.any()
            assert kl_sums(found, beta=1.0).isfinite().all()
        elif nonfinite == "error":
            with pytest.raises(ValueError, match="not finite"):
                kl_terms(spec, ref_logp=broken, **inputs)
        else:
            found = kl_terms(spec, ref_logp=broken, **inputs)
            assert torch.equal(found.dropped, out == 1)
            assert not found.left_out.any()


def test_nothing_left_out_is_nothing_changed(case):
    plain = found(case, "k1_in_reward", {})
    nothing = torch.zeros_like(case.sequences.tokens)
    assert torch.equal(found(case, "k1_in_reward", {"left_out_tokens": nothing, "left_out_positions": nothing}), plain)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"left_out_tokens": torch.full((1, 2), 2)}, "left_out_tokens must be 0 or 1"),
        ({"left_out_positions": torch.ones(1, 3)}, "left_out_positions"),
    ],
)
def test_refused(masks, message):
    logp = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=message):
        kl_terms(KLSpec.from_name("k2_as_loss"), logp=logp, ref_logp=logp, mask=torch.ones(1, 2), **masks)


def test_tokens_left_out_of_a_sum_over_the_vocabulary_are_refused(case):
    with pytest.raises(ConfigError, match="known for k1 only"):
        found(case, "exact_as_loss", left_out(case, (0,)))


def test_costs_that_are_no_log_ratios_are_refused():
    logp, spec = torch.zeros(1, 2), KLSpec.from_name("k3_in_reward", allow_biased=True)
    with pytest.raises(ConfigError, match="known for k1 only"):
        kl_terms(spec, logp=logp, ref_logp=logp, mask=torch.ones(1, 2), left_out_tokens=torch.ones(1, 2))
