"""Properties that hold for every configuration and any batch: hypothesis chooses both."""

import math
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import SAMPLED

from kl_plugins import KLSpec, kl_terms
from kl_plugins.core import registry

OUTPUTS = ("loss", "value", "coefficient", "weight", "score_coefficient", "log_ratio", "mask", "cut", "unscored")
# Reproducible, and no database: a run leaves nothing behind.
example = settings(max_examples=80, deadline=None, derandomize=True, database=None)


@st.composite
def specs(draw):
    name = draw(st.sampled_from(sorted(SAMPLED)))
    loss = registry.LOSSES[name]
    options = {"credit": draw(st.sampled_from(sorted(loss.gradient_of)))}
    options["off_policy"] = draw(st.sampled_from(["none", "token", "prefix", "sequence"]))
    options["baseline"] = draw(st.sampled_from([None, "leave_one_out", "group_mean"]))
    if options["credit"] == "to_go":
        options["gamma"] = draw(st.sampled_from([0.0, 0.5, 0.99, 1.0]))
    if options["off_policy"] != "none":
        options["weight_clip"] = draw(st.sampled_from([(0.0, 10.0), (0.5, 2.0), (0.0, math.inf)]))
        options["weight_clip_mode"] = draw(st.sampled_from(["truncate", "mask"]))
    if options["off_policy"] == "token":
        options["clip"] = draw(st.sampled_from([None, "separate", "combined"]))
    if loss.may_overflow:
        options["coefficient_bound"] = draw(st.sampled_from([None, 5.0]))
    return KLSpec.from_name(name, allow_biased=True, **options)


@st.composite
def batches(draw, scales=(1e-3, 1.0, 5.0), dtype=torch.float64):
    """Groups of 2 rows; some rows ragged, some with holes, some fully masked; some tokens not scored by the engine."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, length = 2 * draw(st.integers(1, 4)), draw(st.integers(1, 9))
    scale, density = draw(st.sampled_from(scales)), draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))

    def normal():
        return scale * torch.randn(rows, length, dtype=dtype, generator=generator)

    mask = (torch.rand(rows, length, generator=generator) < density).long()
    logp = normal()
    behavior_logp = logp + normal() / 4
    unscored = torch.rand(rows, length, generator=generator) < 0.1
    return {
        "logp": logp.requires_grad_(),
        "ref_logp": normal(),
        "behavior_logp": behavior_logp.detach().masked_fill(unscored, math.nan),
        "mask": mask,
    }


def differentiate(spec, inputs):
    terms = kl_terms(spec, **inputs, group_size=2)
    return terms, torch.autograd.grad(terms.loss.sum(), inputs["logp"])[0]


@example
@given(specs(), batches(), st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 2**31))
def test_dropping_is_masking(spec, inputs, junk, seed):
    """A token that the reference could not score is dropped and counted, and leaves no other trace."""
    bad = torch.rand(inputs["mask"].shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    expected, expected_gradient = differentiate(spec, dict(inputs, mask=inputs["mask"] * ~bad))
    broken = dict(inputs, ref_logp=inputs["ref_logp"].masked_fill(bad, junk))
    found, gradient = differentiate(replace(spec, nonfinite="drop"), broken)
    for output in OUTPUTS:
        assert torch.equal(getattr(found, output), getattr(expected, output)), output
    assert torch.equal(gradient, expected_gradient)
    assert torch.equal(found.dropped, bad & (inputs["mask"] == 1))


@example
@given(specs(), batches())
def test_a_masked_row_is_zero_with_a_graph(spec, inputs):
    mask = inputs["mask"].clone()
    mask[0] = 0
    terms, gradient = differentiate(spec, dict(inputs, mask=mask))
    assert terms.loss.requires_grad
    assert not terms.loss[0].any()
    assert not gradient[0].any()


def rearranged(inputs, change):
    """The same inputs with `change` applied to each."""
    return {name: change(name, x.detach()).requires_grad_(name == "logp") for name, x in inputs.items()}


def assert_close(found, expected):
    """To float64's rounding of what was summed; exactly for what isn't summed."""
    for output in OUTPUTS:
        a, b = getattr(found, output), getattr(expected, output)
        if a.dtype is torch.bool:
            assert torch.equal(a, b), output
        elif a.numel():
            assert (a - b).abs().max() <= 1e-12 * b.abs().max(), output


def taken(terms, index):
    """The rows (or columns) of every output."""
    return type(terms)(**{name: x[index] for name, x in vars(terms).items()})


@example
@given(specs(), batches(scales=(1e-6, 1.0, 100.0, 1e3, 1e30), dtype=torch.float32))
def test_everything_is_finite(spec, inputs):
    terms, gradient = differentiate(spec, inputs)
    for output in OUTPUTS:
        x = getattr(terms, output)
        assert x.dtype is torch.bool or x.isfinite().all(), output
    assert gradient.isfinite().all()


@example
@given(specs(), batches(), st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_masked_positions_contribute_nothing(spec, inputs, junk):
    off = inputs["mask"] == 0
    terms, gradient = differentiate(spec, inputs)
    dirty = rearranged(inputs, lambda name, x: x if name == "mask" else x.masked_fill(off, junk))
    dirty_terms, dirty_gradient = differentiate(spec, dirty)
    for output in OUTPUTS:
        assert torch.equal(getattr(dirty_terms, output), getattr(terms, output)), output
        assert not getattr(terms, output)[off].any(), output
    assert torch.equal(dirty_gradient, gradient)
    assert not gradient[off].any()


@example
@given(specs(), batches())
def test_loss_is_the_value_and_its_gradient_the_score_coefficient(spec, inputs):
    terms, gradient = differentiate(spec, inputs)
    assert torch.equal(terms.loss, terms.value)
    assert torch.equal(gradient, terms.score_coefficient)
    if spec.off_policy != "prefix" or spec.credit == "token":
        product = terms.weight * terms.coefficient
        assert (gradient - product).abs().max() <= 1e-12 * product.abs().max()


@example
@given(specs(), batches(), st.randoms(use_true_random=False))
def test_order_of_rows_does_not_matter(spec, inputs, random):
    groups = list(range(len(inputs["mask"]) // 2))
    random.shuffle(groups)
    order = torch.tensor([row for group in groups for row in random.sample([2 * group, 2 * group + 1], 2)])
    terms, gradient = differentiate(spec, inputs)
    found, found_gradient = differentiate(spec, rearranged(inputs, lambda name, x: x[order]))
    assert_close(found, taken(terms, order))
    assert (found_gradient - gradient[order]).abs().max() <= 1e-12 * gradient.abs().max()


@example
@given(specs(), batches(), st.integers(0, 5), st.integers(0, 5))
def test_padding_does_not_matter(spec, inputs, left, right):
    def pad(name, x):
        return torch.nn.functional.pad(x, (left, right), value=0 if name == "mask" else math.nan)

    terms, gradient = differentiate(spec, inputs)
    found, found_gradient = differentiate(spec, rearranged(inputs, pad))
    kept = (slice(None), slice(left, left + inputs["mask"].size(1)))
    assert_close(taken(found, kept), terms)
    assert (found_gradient[kept] - gradient).abs().max() <= 1e-12 * gradient.abs().max()
    assert found_gradient.count_nonzero() == found_gradient[kept].count_nonzero()


@example
@given(specs(), batches(), st.integers(1, 3))
def test_micro_batches_do_not_matter(spec, inputs, groups_each):
    terms, gradient = differentiate(spec, inputs)
    for start in range(0, len(inputs["mask"]), 2 * groups_each):
        part = slice(start, start + 2 * groups_each)
        found, found_gradient = differentiate(spec, rearranged(inputs, lambda name, x, part=part: x[part]))
        assert_close(found, taken(terms, part))
        assert (found_gradient - gradient[part]).abs().max() <= 1e-12 * gradient[part].abs().max()


def test_a_batch_statistic_is_noticed_by_micro_batches():
    """Twin: whitening over the batch, which hosts do to rewards, changes when the batch is split."""
    c = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    whitened = (c - c.mean()) / c.std()
    part = (c[:2] - c[:2].mean()) / c[:2].std()
    assert (whitened[:2] - part).abs().max() > 1e-3


@example
@given(specs(), batches(), st.integers(0, 100), st.integers(0, 100))
def test_a_token_answers_for_what_its_credit_says(spec, inputs, row, column):
    """Changing one token's reference log-prob moves the coefficients that its credit names, and no others."""
    row, column = row % inputs["mask"].size(0), column % inputs["mask"].size(1)
    before, _ = differentiate(spec, inputs)
    changed = inputs["ref_logp"].clone()
    changed[row, column] += 0.5
    after, _ = differentiate(spec, dict(inputs, ref_logp=changed))
    assert torch.equal(before.weight, after.weight) or spec.clip is not None  # PPO's clip depends on the sign of c
    moved = before.coefficient != after.coefficient
    answers = torch.zeros_like(moved)
    columns = {"token": slice(column, column + 1), "to_go": slice(0, column + 1), "sequence": slice(None)}
    rows = slice(row, row + 1) if spec.baseline is None else slice(row // 2 * 2, row // 2 * 2 + 2)
    answers[rows, columns[spec.credit]] = True
    assert not (moved & ~(answers & before.mask)).any()
    if before.mask[row, column] and spec.name in ("k1_in_reward", "k2_as_loss"):
        assert moved[row, column]


@example
@given(specs(), batches(), st.integers(0, 100), st.integers(0, 100))
def test_a_weight_depends_on_the_tokens_it_should(spec, inputs, row, column):
    """Token: its own ratio. Prefix: those up to it. Sequence: all. Never another row's."""
    row, column = row % inputs["mask"].size(0), column % inputs["mask"].size(1)
    before, _ = differentiate(spec, inputs)
    changed = inputs["behavior_logp"].clone()
    changed[row, column] = changed[row, column].nan_to_num(0.0) + 0.3
    after, _ = differentiate(spec, dict(inputs, behavior_logp=changed))
    allowed = torch.zeros_like(before.mask)
    columns = {
        "none": slice(0, 0),
        "token": slice(column, column + 1),
        "prefix": slice(column, None),
        "sequence": slice(None),
    }
    allowed[row, columns[spec.off_policy]] = True
    assert not ((before.weight != after.weight) & ~(allowed & before.mask)).any()
    assert torch.equal(before.coefficient, after.coefficient)
    if spec.off_policy == "none":
        assert torch.equal(before.weight, before.mask.double())
