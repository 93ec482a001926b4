"""What `kl_terms` takes and refuses, and that a token which doesn't count contributes exactly nothing."""

import math
from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from numerics import SAMPLED

from kl_plugins import ConfigError, ExactKL, KLSpec, kl_terms, surrogate
from kl_plugins.core import registry
from kl_plugins.core.checks import require_policy_scores
from kl_plugins.core.spec import BASELINES, CLIPS, OFF_POLICY

# Each way through `kl_terms` once: coefficients, credits, weights, clip and baseline. hypothesis mixes them, in
# test_properties.py.
EVERY_BRANCH = [
    {"name": "k1_as_loss", "off_policy": "none"},
    {"name": "k2_as_loss"},
    {"name": "k2_as_loss", "clip": "separate"},
    {"name": "k2_as_loss", "credit": "sequence", "off_policy": "prefix"},
    {"name": "k3_as_loss", "off_policy": "prefix"},
    {"name": "k3_as_loss", "clip": "combined", "baseline": "leave_one_out"},
    {"name": "k1_in_reward", "off_policy": "prefix", "baseline": "leave_one_out"},
    {"name": "k1_in_reward", "off_policy": "sequence"},
    {"name": "k1_in_reward", "credit": "sequence", "baseline": "leave_one_out"},
    {"name": "k2_in_reward", "off_policy": "sequence", "baseline": "group_mean"},
    {"name": "k3_in_reward", "off_policy": "none", "baseline": "leave_one_out"},
    {"name": "k3_in_reward", "off_policy": "prefix"},
]
OUTPUTS = ("loss", "value", "coefficient", "weight", "score_coefficient", "log_ratio", "mask", "cut", "unscored")
K2 = KLSpec.from_name("k2_as_loss")
TO_GO = KLSpec.from_name("k1_in_reward", baseline="leave_one_out")


def name_of(options):
    return "-".join(str(value) for value in options.values())


def batch(rows=4, length=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return -3 * torch.rand(rows, length, dtype=dtype, generator=generator)

    mask = torch.rand(rows, length, generator=generator) < 0.7
    mask[0] = True
    return {"logp": draw().requires_grad_(), "ref_logp": draw(), "behavior_logp": draw(), "mask": mask.long()}


def differentiate(spec, inputs, **more):
    terms = kl_terms(spec, **inputs, **more)
    return terms, torch.autograd.grad(terms.loss.sum(), inputs["logp"])[0]


def assert_same(found, expected):
    for output in OUTPUTS:
        assert torch.equal(getattr(found, output), getattr(expected, output)), output


def test_every_branch_is_tested():
    """What the list below would miss if a loss or an option were added."""
    specs = [KLSpec.from_name(**options, allow_biased=True) for options in EVERY_BRANCH]
    assert {spec.name for spec in specs} == set(SAMPLED)
    assert {spec.credit for spec in specs} == set(registry.CREDITS)
    for option, offered in {"off_policy": OFF_POLICY, "baseline": BASELINES, "clip": CLIPS}.items():
        assert {getattr(spec, option) for spec in specs} == set(offered)


@pytest.mark.parametrize("options", EVERY_BRANCH, ids=name_of)
def test_masked_positions_contribute_exactly_nothing(options):
    spec = KLSpec.from_name(**options, allow_biased=True)
    clean = batch()
    off = clean["mask"] == 0
    terms, gradient = differentiate(spec, clean, group_size=2)
    for junk in (math.nan, math.inf, -math.inf, 1e30):
        dirty = {
            name: x if name == "mask" else x.detach().masked_fill(off, junk).requires_grad_(name == "logp")
            for name, x in clean.items()
        }
        dirty_terms, dirty_gradient = differentiate(spec, dirty, group_size=2)
        assert_same(dirty_terms, terms)
        assert torch.equal(dirty_gradient, gradient)
        assert torch.equal(dirty_gradient[off], torch.zeros(int(off.sum())))
    for output in OUTPUTS:
        assert not getattr(terms, output)[off].any(), output
    assert gradient[~off].any()


def test_multiplying_by_the_mask_is_noticed():
    """Twin: 0 * NaN is NaN, in the value and in the gradient."""
    inputs = batch()
    off = inputs["mask"] == 0
    logp = inputs["logp"].detach().masked_fill(off, math.nan).requires_grad_()
    loss = ((logp - inputs["ref_logp"]) ** 2 / 2 * inputs["mask"]).sum()
    assert loss.isnan()
    assert torch.autograd.grad(loss, logp)[0][off].isnan().all()


def test_masked_logits_upstream_get_no_gradient():
    """Through a gather from logits that are -inf, as padded rows have them."""
    logits = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    logits[0, 2, 1] = -math.inf
    logits.requires_grad_()
    logp = logits.log_softmax(-1)[..., 1]
    terms = kl_terms(K2, logp=logp, ref_logp=torch.zeros(1, 3), mask=torch.tensor([[1, 1, 0]]))
    terms.loss.sum().backward()
    assert torch.equal(logits.grad[0, 2], torch.zeros(4))
    assert logits.grad[0, :2].isfinite().all()


@pytest.mark.parametrize("off", ["token", "prefix", "sequence"])
def test_unscored_behavior_tokens_have_ratio_one_and_are_counted(off):
    spec = KLSpec.from_name("k2_as_loss", off_policy=off)
    inputs = batch()
    inputs["mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    holes = torch.zeros(4, 5, dtype=torch.bool)
    holes[0, 2] = holes[1, 1] = holes[1, 4] = holes[2] = True
    known = torch.where(holes, inputs["logp"].detach(), inputs["behavior_logp"])  # the ratio is then 1
    expected, _ = differentiate(spec, inputs | {"behavior_logp": known})
    found, _ = differentiate(spec, inputs | {"behavior_logp": known.masked_fill(holes, math.nan)})
    for output in OUTPUTS[:-1]:
        assert torch.equal(getattr(found, output), getattr(expected, output)), output
    assert torch.equal(found.unscored, holes & inputs["mask"].bool())  # (1, 1) is masked: not counted
    assert not expected.unscored.any()
    assert torch.equal(found.weight[2], torch.ones(5))
    if off == "token":
        assert (found.weight != 1)[~holes & inputs["mask"].bool()].all()


NOT_FINITE = [(where, junk) for where in ("logp", "ref_logp") for junk in (math.nan, math.inf, -math.inf)]
NOT_FINITE += [("behavior_logp", math.inf), ("behavior_logp", -math.inf)]  # NaN is "not scored", see above


@pytest.mark.parametrize(("where", "junk"), NOT_FINITE)
def test_non_finite_counted_tokens_are_an_error_that_says_where(where, junk):
    inputs = batch()
    inputs["mask"] = torch.ones(4, 5)
    with torch.no_grad():
        inputs[where][2, 3] = inputs[where][3, 0] = junk
    with pytest.raises(ValueError, match=rf"2 counted tokens .*row 2, position 3: .*{where}={junk}.*nonfinite='drop'"):
        kl_terms(K2, **inputs)


@pytest.mark.parametrize("options", EVERY_BRANCH[::3], ids=name_of)
def test_dropping_is_masking_and_is_counted(options):
    spec = KLSpec.from_name(**options, allow_biased=True, nonfinite="drop")
    inputs = batch()
    masked = inputs["mask"] == 0
    bad = torch.zeros(4, 5, dtype=torch.bool)
    bad[0, 1] = bad[0, 4] = bad[2, 0] = True
    broken = dict(inputs, ref_logp=inputs["ref_logp"].masked_fill(bad | masked, math.nan))
    found, gradient = differentiate(spec, broken, group_size=2)
    expected, expected_gradient = differentiate(spec, dict(inputs, mask=inputs["mask"] * ~bad), group_size=2)
    assert_same(found, expected)
    assert torch.equal(gradient, expected_gradient)
    assert torch.equal(found.dropped, bad & ~masked)
    assert found.dropped.sum() in (2, 3)
    assert not expected.dropped.any()


WRONG_SHAPES = [("mask", shape) for shape in ((4, 6), (3, 5), (1, 5), (4, 1), (5,), (4, 5, 1))]
WRONG_SHAPES += [(name, (4, 1)) for name in ("logp", "ref_logp", "behavior_logp")]  # which would broadcast


@pytest.mark.parametrize(("wrong", "shape"), WRONG_SHAPES)
def test_shapes_must_be_the_same(wrong, shape):
    inputs = batch()
    inputs[wrong] = torch.zeros(shape, requires_grad=wrong == "logp")
    with pytest.raises(ValueError, match="one shape") as error:
        kl_terms(K2, **inputs)
    assert f"{wrong} {shape}" in str(error.value)


def test_shapes_must_be_two_dimensional():
    one = {name: x[0] for name, x in batch().items()}
    with pytest.raises(ValueError, match=r"logp \(5,\)"):
        kl_terms(K2, **one)
    with pytest.raises(ValueError, match=r"logp \(1, 4, 5\)"):
        kl_terms(K2, **{name: x[None] for name, x in batch().items()})
    with pytest.raises(TypeError):
        kl_terms(K2, *one.values())


@pytest.mark.parametrize("junk", [0.5, 2.0, -1.0, math.nan, math.inf])
def test_mask_must_be_binary(junk):
    inputs = batch()
    inputs["mask"] = inputs["mask"].float()
    inputs["mask"][1, 2] = junk
    with pytest.raises(ValueError, match=f"mask must be 0 or 1, found {junk}"):
        kl_terms(K2, **inputs)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.uint8, torch.float32, torch.bfloat16])
def test_mask_of_any_dtype(dtype):
    inputs = batch()
    expected, _ = differentiate(TO_GO, inputs, group_size=2)
    found, _ = differentiate(TO_GO, dict(inputs, mask=inputs["mask"].to(dtype)), group_size=2)
    assert_same(found, expected)


@pytest.mark.parametrize("group_size", [0, 1, 3, 5, 8, -2])
def test_group_sizes_that_cannot_be(group_size):
    with pytest.raises(ValueError, match=f"group_size={group_size} on a batch of 4 rows"):
        kl_terms(TO_GO, **batch(), group_size=group_size)


def test_leave_one_out_needs_groups():
    with pytest.raises(ConfigError, match="pass group_size"):
        kl_terms(TO_GO, **batch())


def test_given_baseline_is_subtracted_from_the_coefficient():
    inputs = batch()
    given = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    plain, _ = differentiate(KLSpec.from_name("k1_in_reward"), inputs)
    found, gradient = differentiate(TO_GO, inputs, baseline=given)
    torch.testing.assert_close(found.coefficient, plain.coefficient - given * inputs["mask"])
    torch.testing.assert_close(gradient, plain.weight * (plain.coefficient - given * inputs["mask"]))
    with pytest.raises(ValueError, match=r"baseline \(4, 1\)"):
        kl_terms(TO_GO, **inputs, baseline=given[:, :1])


def test_given_baseline_is_detached():
    terms = kl_terms(TO_GO, **batch(), baseline=torch.zeros(4, 5, requires_grad=True))
    assert not terms.coefficient.requires_grad
    assert not terms.score_coefficient.requires_grad


def test_given_baseline_must_be_finite():
    with pytest.raises(ValueError, match="baseline"):
        kl_terms(TO_GO, **batch(), baseline=torch.full((4, 5), math.nan))


def test_given_baseline_that_is_not_used_is_refused():
    with pytest.raises(ConfigError, match="baseline"):
        kl_terms(KLSpec.from_name("k1_in_reward"), **batch(), baseline=torch.zeros(4, 5))


@pytest.mark.parametrize("options", EVERY_BRANCH[::3], ids=name_of)
def test_fully_masked_is_zero_with_a_graph(options):
    spec = KLSpec.from_name(**options, allow_biased=True)
    inputs = batch()
    inputs["mask"] = inputs["mask"].clone()
    inputs["mask"][1] = 0
    terms, gradient = differentiate(spec, inputs, group_size=2)
    assert torch.equal(terms.loss[1], torch.zeros(5))
    assert torch.equal(gradient[1], torch.zeros(5))
    assert gradient[0].any()
    inputs["mask"][:] = 0
    terms, gradient = differentiate(spec, inputs, group_size=2)
    assert terms.loss.requires_grad
    assert torch.equal(terms.loss, torch.zeros(4, 5))
    assert torch.equal(gradient, torch.zeros(4, 5))


@pytest.mark.parametrize("shape", [(0, 5), (4, 0)], ids=str)
@pytest.mark.parametrize("options", [*EVERY_BRANCH, {"name": "exact_in_reward", "off_policy": "prefix"}], ids=name_of)
def test_empty_batch_is_zero_with_a_graph(options, shape):
    logp = torch.zeros(shape, requires_grad=True)
    spec = KLSpec.from_name(**options, allow_biased=True)
    kl = ExactKL(value=torch.zeros(shape), outside=torch.zeros(shape, dtype=torch.bool), of="reverse_kl")
    terms = kl_terms(
        spec,
        exact=kl if spec.loss.exact else None,
        logp=logp,
        ref_logp=torch.zeros(shape),
        behavior_logp=torch.zeros(shape),
        mask=torch.zeros(shape),
        group_size=2,
    )
    assert terms.loss.shape == shape
    terms.loss.sum().backward()
    assert torch.equal(logp.grad, torch.zeros(shape))


def test_only_the_loss_has_a_graph():
    inputs = batch()
    for name in ("ref_logp", "behavior_logp"):
        inputs[name] = inputs[name].requires_grad_()
    terms = kl_terms(TO_GO, **inputs, group_size=2)
    assert terms.loss.requires_grad
    for field in fields(terms):
        assert field.name == "loss" or not getattr(terms, field.name).requires_grad
    terms.loss.sum().backward()
    assert inputs["ref_logp"].grad is None
    assert inputs["behavior_logp"].grad is None


def test_no_graph_under_no_grad():
    with torch.no_grad():
        terms = kl_terms(TO_GO, **batch(), group_size=2)
    assert not terms.loss.requires_grad
    assert torch.equal(terms.loss, terms.value)


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(given, computed):
    inputs = {
        name: x if name == "mask" else x.detach().to(given).requires_grad_(name == "logp")
        for name, x in batch(dtype=torch.float64).items()
    }
    terms, gradient = differentiate(TO_GO, inputs, group_size=2)
    for name in ("loss", "value", "coefficient", "weight", "score_coefficient", "log_ratio"):
        assert getattr(terms, name).dtype is computed, name
    for name in ("mask", "cut", "unscored", "dropped"):
        assert getattr(terms, name).dtype is torch.bool, name
    assert gradient.dtype is given


def test_inputs_are_left_alone():
    inputs = batch()
    before = {name: x.detach().clone() for name, x in inputs.items()}
    differentiate(TO_GO, inputs, group_size=2)
    for name, x in inputs.items():
        assert torch.equal(x.detach(), before[name])


def test_result_is_frozen():
    terms = kl_terms(K2, **batch())
    with pytest.raises(FrozenInstanceError):
        terms.loss = torch.zeros(4, 5)


def test_one_gradient_per_loss_however_often_it_is_used():
    """The surrogate's forward value is the estimate, and scaling the loss scales the gradient."""
    inputs = batch()
    terms, gradient = differentiate(K2, inputs)
    assert torch.equal(terms.loss, terms.value)
    assert torch.equal(gradient, terms.score_coefficient)
    again = torch.autograd.grad(0.5 * kl_terms(K2, **inputs).loss.sum(), inputs["logp"])[0]
    assert torch.equal(again, 0.5 * gradient)


def test_surrogate_differentiates_the_log_probability_only():
    logp, value, coefficient = (torch.full((1, 2), x, requires_grad=True) for x in (-1.0, 2.0, 3.0))
    loss = surrogate(logp=logp, value=value, score_coefficient=coefficient)
    assert torch.equal(loss, value)
    loss.sum().backward()
    assert torch.equal(logp.grad, coefficient.detach())
    assert value.grad is None
    assert coefficient.grad is None


def test_behavior_equal_to_the_policy_is_on_policy():
    inputs = batch()
    on_policy = {name: x for name, x in inputs.items() if name != "behavior_logp"}
    for off in ("none", "token", "prefix", "sequence"):
        spec = KLSpec.from_name("k1_in_reward", off_policy=off)
        without, _ = differentiate(spec, on_policy)
        same, _ = differentiate(spec, dict(on_policy, behavior_logp=inputs["logp"].detach()))
        assert_same(same, without)
        assert torch.equal(without.weight, inputs["mask"].float())


def test_a_nan_of_the_policy_is_not_dropped_in_silence():
    """`kl_terms` would drop the token; the host's own loss, which knows nothing of it, would not."""
    drop, logp = KLSpec.from_name("k2_as_loss", nonfinite="drop"), torch.tensor([[-1.0, math.nan]])
    with pytest.raises(ValueError, match="hold a NaN, which TRL's own loss would spread"):
        require_policy_scores(drop, logp=logp, mask=torch.ones(1, 2), host="TRL")
    require_policy_scores(drop, logp=logp, mask=torch.tensor([[1, 0]]), host="TRL")
    require_policy_scores(drop, logp=torch.full((1, 2), -math.inf), mask=torch.ones(1, 2), host="TRL")
