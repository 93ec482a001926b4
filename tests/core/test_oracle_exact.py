"""Exact KLs, by enumeration: their gradients, on- and off-policy, and the slips that look alike."""

import itertools
import math

import pytest
import torch

from kl_plugins import ConfigError, KLSpec, exact_kl, kl_terms, leave_one_out_baseline, oracle
from kl_plugins.oracle import RTOL, expected_gradient, relative_error, second_moment, terms_of

UNBOUNDED = (0.0, math.inf)
NAMES = ("exact_as_loss", "exact_in_reward", "exact_forward_as_loss")
TOP_K = (None, 1, 2)
SMALL = oracle.enumerate_sequences(3, 3)


def gradient(case, name, *, off=None, gamma=None, behavior="behavior", **options):
    if off not in (None, "none"):
        weightless = off == "token" and "as_loss" in name and (options.get("top_k") is None or "tail" in options)
        options |= {"off_policy": off} | ({} if weightless else {"weight_clip": UNBOUNDED})
    if gamma is not None:
        options["gamma"] = gamma
    spec = KLSpec.from_name(name, allow_biased=True, **options)
    sampler = None if off is None else getattr(case, behavior)
    return expected_gradient(
        spec, case.sequences, case.policy, case.reference, behavior=sampler, environment=case.environment
    )


def declared(name):
    return KLSpec.from_name(name).gradient_of


@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("name", NAMES)
def test_any_head_has_the_gradient_of_the_whole(name, top_k, case, exact):
    assert relative_error(gradient(case, name, top_k=top_k), exact.closed_form(declared(name), case)) <= RTOL


@pytest.mark.parametrize("off", ["prefix", "sequence"])
@pytest.mark.parametrize("top_k", [None, 1])
@pytest.mark.parametrize("name", NAMES)
def test_off_policy_weights_recover_it(name, top_k, off, case, exact):
    found = gradient(case, name, top_k=top_k, off=off)
    assert relative_error(found, exact.closed_form(declared(name), case)) <= RTOL
    unweighted = gradient(case, name, top_k=top_k, off="none")
    assert relative_error(unweighted, exact.closed_form(declared(name), case)) > 1e-3


@pytest.mark.parametrize("top_k", [None, 1])
@pytest.mark.parametrize("name", ["exact_as_loss", "exact_forward_as_loss"])
def test_token_weights_leave_the_prefixes_of_the_sampler(name, top_k, case, exact):
    """Within a step the sum over the vocabulary is under the policy already: the token's ratio has no part in it."""
    found = gradient(case, name, top_k=top_k, off="token")
    assert relative_error(found, exact.closed_form(declared(name), case, prefixes_of=case.behavior)) <= RTOL


@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("off", [None, "prefix"])
def test_discounted_it_is_what_k1_in_reward_is(off, gamma, case):
    found, sampled = (gradient(case, name, off=off, gamma=gamma) for name in ("exact_in_reward", "k1_in_reward"))
    assert relative_error(found, sampled) <= RTOL


def test_an_engine_that_samples_from_another_distribution(exact):
    """A sharper and noisier sampler than the trainer's policy: what a quantized or truncated engine is."""
    case = exact.make_case("steered-more")
    noise = torch.randn(case.policy.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    case.engine = 1.3 * case.policy + 0.2 * noise
    for name in NAMES:
        found = gradient(case, name, off="prefix", behavior="engine")
        assert relative_error(found, exact.closed_form(declared(name), case)) <= RTOL


# Wrong estimators, each of which differs in one step from the right one below.


def tables(case):
    """Of each token of each sequence: live log-probs, log-ratio and KL, and the mask."""
    theta = case.policy.clone().requires_grad_()
    p, r = theta.log_softmax(-1), case.reference.log_softmax(-1)
    kl = (p.exp() * (p - r)).sum(-1)
    prefix, tokens, mask = case.sequences.prefix, case.sequences.tokens, case.sequences.mask
    logp = torch.where(mask, p[prefix, tokens], 0.0)
    u = torch.where(mask, (p - r)[prefix, tokens], 0.0).detach()
    return theta, p, r, logp, u, torch.where(mask, kl[prefix], 0.0)


def differentiate(theta, per_token, case, sampler=None):
    logits = case.policy if sampler is None else sampler
    probability = oracle.sequence_probability(logits, case.sequences, case.environment)
    return torch.autograd.grad((probability[:, None] * per_token * case.sequences.mask).sum(), theta)[0]


def later(x, own=False):
    to_go = x.flip(-1).cumsum(-1).flip(-1)
    return to_go if own else to_go - x


WRONG = {
    "right": lambda logp, kl: kl + later(kl.detach()) * logp,
    "right, too: the own KL in the coefficient": lambda logp, kl: kl + later(kl.detach(), own=True) * logp,
    "wrong: a detached reward alone": lambda logp, kl: later(kl.detach(), own=True) * logp,
    "wrong: a loss alone": lambda logp, kl: kl,
    "wrong: earlier KLs as well, the own gradient twice": lambda logp, kl: 2 * kl + later(kl.detach()) * logp,
    "wrong: the future not detached": lambda logp, kl: kl + later(kl) * logp,
}


@pytest.mark.parametrize("name", WRONG)
def test_which_coefficients_give_the_sequence_gradient(name, steered, exact):
    theta, _, _, logp, _, kl = tables(steered)
    found = differentiate(theta, WRONG[name](logp, kl), steered)
    error = relative_error(found, exact.closed_form("reverse_kl", steered))
    assert error > 1e-2 if name.startswith("wrong") else error <= RTOL
    if name == "right":
        assert relative_error(found, gradient(steered, "exact_in_reward")) <= RTOL


def test_a_detached_reward_alone_can_point_away_from_the_reference(exact):
    """Fact 3. One token is all there is to decide: its KL as a reward has no gradient, or the future's sign only."""
    case = exact.make_case("steered")
    case.reference = torch.zeros_like(case.policy)
    case.policy = torch.zeros_like(case.policy)
    case.policy[0, 1] = 3.0  # prefers a first token that the reference has no preference for,
    starts_with_1 = case.sequences.prefix[case.sequences.tokens[:, 0] == 1][:, 1:].unique()
    starts_with_2 = case.sequences.prefix[case.sequences.tokens[:, 0] == 2][:, 1:].unique()
    case.policy[starts_with_2, 0] = 4.0  # while the KL lies behind another one
    assert len(starts_with_1) == len(starts_with_2)
    theta, _, _, logp, _, kl = tables(case)
    detached = differentiate(theta, later(kl.detach(), own=True) * logp, case)
    right = exact.closed_form("reverse_kl", case)
    assert (detached * right).sum() < 0
    assert (gradient(case, "exact_in_reward") * right).sum() > 0


TAILS = {
    "right": lambda u: u + 1,
    "wrong: u, as if the tail's expected score were 0": lambda u: u,
    "wrong: no tail": lambda u: u * 0,
    "wrong: minus": lambda u: -u - 1,
}


@pytest.mark.parametrize("off", [False, True])
@pytest.mark.parametrize("name", TAILS)
def test_which_coefficient_a_sampled_tail_needs(name, off, steered, exact):
    """Fact 7, on- and off-policy; the head is the policy's likeliest tokens."""
    theta, p, r, logp, u, _ = tables(steered)
    head = torch.zeros_like(p, dtype=torch.bool).scatter(-1, p.detach().topk(1).indices, True)
    summed = ((p.exp() * (p - r)) * head).sum(-1)[steered.sequences.prefix]
    outside = ~head[steered.sequences.prefix, steered.sequences.tokens]
    rho = steered.log_rho.exp() if off else torch.ones_like(u)
    sampler = steered.behavior if off else None
    found = differentiate(theta, summed + (rho * outside * TAILS[name](u)).detach() * logp, steered, sampler)
    error = relative_error(found, exact.closed_form("local_reverse_kl", steered, prefixes_of=sampler))
    assert error > 1e-3 if name.startswith("wrong") else error <= RTOL
    if name == "right":
        ours = gradient(steered, "exact_as_loss", top_k=1, off="token" if off else None)
        assert relative_error(found, ours) <= RTOL


@pytest.mark.parametrize("inclusive", [False, True])
def test_the_weight_of_a_state_excludes_its_token(inclusive, steered, exact):
    """The inclusive weight is biased: E_mu[rho_t] = 1 lets it pass within a step, and not in the coefficients."""
    theta, _, _, logp, _, kl = tables(steered)
    log_rho = steered.log_rho
    weight = log_rho.cumsum(-1)
    weight = (weight if inclusive else weight - log_rho).exp()
    wanted = exact.closed_form("reverse_kl", steered)

    def found(of_state, of_later):
        return differentiate(theta, of_state * kl + later((of_later * kl).detach()) * logp, steered, steered.behavior)

    exclusive = (log_rho.cumsum(-1) - log_rho).exp()
    assert relative_error(found(exclusive, weight), wanted) <= RTOL  # of later KLs both are right: E_mu[rho_s] = 1 ...
    theta, _, _, logp, _, kl = tables(steered)
    assert relative_error(found(weight, exclusive), wanted) <= RTOL  # ... and so it is within a step
    own = {True: log_rho.cumsum(-1), False: log_rho.cumsum(-1) - log_rho}[inclusive].exp()
    theta, _, _, logp, _, kl = tables(steered)
    score = own * later(kl.detach())  # but the weight of the token, not of the later state, misses rho between them
    per_token = exclusive * kl + score.detach() * logp
    assert relative_error(differentiate(theta, per_token, steered, steered.behavior), wanted) > 1e-2


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_bucket_has_the_gradient_of_the_coarsened_divergence(top_k, steered):
    """Which is a lower bound of the KL, and another gradient: so it is declared biased."""
    for name in ("exact_as_loss", "exact_forward_as_loss"):
        spec = KLSpec.from_name(name, top_k=top_k, tail="bucket", allow_biased=True)
        assert spec.gradient_of == "biased"
        theta = steered.policy.clone().requires_grad_()
        p, r = theta.softmax(-1), steered.reference.softmax(-1)
        head = p.detach().topk(top_k).indices
        p, r = (torch.cat([x.gather(-1, head), 1 - x.gather(-1, head).sum(-1, keepdim=True)], -1) for x in (p, r))
        if name == "exact_forward_as_loss":
            p, r = r, p
        coarse = (p * (p / r).log()).sum(-1)
        visits = oracle.prefix_probability(steered.policy, steered.sequences)
        wanted = torch.autograd.grad((visits * coarse).sum(), theta)[0]
        found = gradient(steered, name, top_k=top_k, tail="bucket")
        assert relative_error(found, wanted) <= RTOL
        if top_k == 1:  # two tokens and a bucket of one are all three
            assert relative_error(found, gradient(steered, name)) > 1e-3
        terms = terms_of(spec, steered.sequences, steered.policy, steered.reference)
        whole = terms_of(KLSpec.from_name(name), steered.sequences, steered.policy, steered.reference)
        assert (terms.value <= whole.value + 1e-12).all()


@pytest.mark.parametrize("off", [None, "token", "prefix", "sequence"])
@pytest.mark.parametrize("top_k", [None, 1])
def test_leave_one_out_keeps_the_mean(top_k, off):
    policy, reference, behavior = oracle.structured_policies(SMALL, seed=1, strength=2.0)
    options = {"top_k": top_k} | ({} if off is None else {"off_policy": off, "weight_clip": UNBOUNDED})
    sampler = None if off is None else behavior
    plain = expected_gradient(
        KLSpec.from_name("exact_in_reward", **options), SMALL, policy, reference, behavior=sampler
    )
    spec = KLSpec.from_name("exact_in_reward", baseline="leave_one_out", **options)
    for group_size in (2, 3):
        found = expected_gradient(spec, SMALL, policy, reference, behavior=sampler, group_size=group_size)
        assert relative_error(found, plain) <= RTOL


def test_a_baseline_with_the_states_weight_would_be_biased(steered, exact):
    """E_mu[w b score] is 0 only with the token's own ratio in w."""
    theta, _, _, logp, _, kl = tables(steered)
    log_rho = steered.log_rho
    exclusive = (log_rho.cumsum(-1) - log_rho).exp()
    per_token = exclusive * kl + (later((exclusive * kl).detach()) - exclusive * 0.7).detach() * logp
    found = differentiate(theta, per_token, steered, steered.behavior)
    assert relative_error(found, exact.closed_form("reverse_kl", steered)) > 1e-2


# Variance, exactly.


def variance(name, policy, reference, group_size=1, **options):
    mean, total = second_moment(KLSpec.from_name(name, **options), SMALL, policy, reference, group_size=group_size)
    truth = oracle.true_gradient(KLSpec.from_name(name).gradient_of, SMALL, policy, reference)
    assert relative_error(mean, truth) <= RTOL
    return float(total)


def test_the_variance_on_structured_policies():
    """Of the sequence gradient 0.12 to 0.43 of k1's (geometric mean 0.27), of the local one 0.04 to 0.58 of k2's."""
    ratios = {"exact_in_reward": [], "exact_as_loss": []}
    for seed, strength in itertools.product((0, 1, 2, 7), (1.0, 2.0, 3.0)):
        policy, reference, _ = oracle.structured_policies(SMALL, seed=seed, strength=strength)
        for name, sampled in (("exact_in_reward", "k1_in_reward"), ("exact_as_loss", "k2_as_loss")):
            ours = variance(name, policy, reference)
            ratios[name].append(ours / variance(sampled, policy, reference))
            assert ours < variance(name, policy, reference, top_k=1)
    means = {name: math.exp(sum(map(math.log, found)) / len(found)) for name, found in ratios.items()}
    assert max(ratios["exact_in_reward"]) < 0.45
    assert max(ratios["exact_as_loss"]) < 0.6
    assert means["exact_in_reward"] < 0.3
    assert means["exact_as_loss"] < 0.25


def test_the_own_kl_in_the_coefficient_only_adds_variance():
    policy, reference, _ = oracle.structured_policies(SMALL, seed=1, strength=2.0)
    terms = terms_of(KLSpec.from_name("exact_in_reward"), SMALL, policy, reference)
    p, r = policy.log_softmax(-1), reference.log_softmax(-1)
    local = (p.exp() * ((p - r) - (p.exp() * (p - r)).sum(-1, keepdim=True)))[SMALL.prefix]
    score = torch.nn.functional.one_hot(SMALL.tokens, 3) - policy.softmax(-1)[SMALL.prefix]
    probability = oracle.sequence_probability(policy, SMALL)

    def moments(coefficient):
        rows = (local + coefficient[..., None] * score) * SMALL.mask[..., None]
        found = torch.zeros(len(probability), *policy.shape, dtype=policy.dtype)
        found.index_put_((torch.arange(len(rows))[:, None].expand_as(SMALL.prefix), SMALL.prefix), rows, True)
        mean = (probability[:, None, None] * found).sum(0)
        return mean, float((probability * (found - mean).square().sum((1, 2))).sum())

    mean, plain = moments(terms.coefficient)
    mean_with_own, with_own = moments(terms.coefficient + terms.value)
    assert relative_error(mean_with_own, mean) <= RTOL
    assert plain == pytest.approx(variance("exact_in_reward", policy, reference))
    assert with_own > 1.05 * plain


def conditioned():
    """A reference, and nearly itself given that the second token is 1: what RL on a verifiable reward converges to.

    After first token 1 that happens nine times in ten, after 2 once in ten. So the policy starts with 1 nine times in
    ten, and the sum of u is log 2 whatever it draws: sampling has no noise that could be averaged out, but the exact
    KL of the second token, 0.1 after 1 and 2.3 after 2, varies with the first.
    """
    reference = torch.full((SMALL.prefixes, 3), -40.0, dtype=torch.float64)
    policy = reference.clone()
    first, seconds, thirds = SMALL.prefix[0, 0], {}, set()
    for tokens, prefix in zip(SMALL.tokens.tolist(), SMALL.prefix.tolist(), strict=True):
        seconds[tokens[0]] = prefix[1]
        thirds.add(prefix[2])
    reference[first, 1:] = math.log(0.5)
    policy[first, 1:] = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    for token, success in ((1, 0.9), (2, 0.1)):
        reference[seconds[token], 1:] = torch.tensor([success, 1 - success], dtype=torch.float64).log()
        policy[seconds[token], 1:] = torch.tensor([0.999, 0.001], dtype=torch.float64).log()
    for logits in (policy, reference):
        logits[sorted(thirds), 0] = 0.0  # then both end
    return policy, reference


def test_a_policy_whose_sampled_gradient_has_less_variance():
    """The measured counter-example: the exact KL's variance is 5.3 times that of k1 in reward."""
    policy, reference = conditioned()
    terms = terms_of(KLSpec.from_name("k1_in_reward"), SMALL, policy, reference)
    probability = oracle.sequence_probability(policy, SMALL)
    assert ((terms.coefficient[:, 0] - math.log(2)).abs() * probability).sum() < 0.01
    ratio = variance("exact_in_reward", policy, reference) / variance("k1_in_reward", policy, reference)
    assert 5 < ratio < 6


def test_how_often_sampling_is_better():
    """Rarely, of random policies: Rao-Blackwellization lowers the variance of each KL, not of each sum.

    recipes/gradients.py counts it on 400 of them.
    """
    sequences = oracle.enumerate_sequences(2, 3)
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(40):
        policy, reference = (
            1.5 * torch.randn(sequences.prefixes, 2, dtype=torch.float64, generator=generator) for _ in range(2)
        )
        exactly, sampled = (
            float(second_moment(KLSpec.from_name(name), sequences, policy, reference, group_size=1)[1])
            for name in ("exact_in_reward", "k1_in_reward")
        )
        ratios.append(exactly / sampled)
    ratios.sort()
    assert 0 < sum(ratio > 1 for ratio in ratios) <= 4
    assert 0.1 < ratios[len(ratios) // 2] < 0.3


# What it takes, and what it refuses.


def batch(dtype=torch.float32, rows=4, length=5, vocabulary=7, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits, ref_logits, behavior = (
        (scale * torch.randn(rows, length, vocabulary, generator=generator)).to(dtype) for _ in range(3)
    )
    tokens = torch.randint(0, vocabulary, (rows, length), generator=generator)
    mask = torch.arange(length) < torch.tensor([[5], [2], [4], [1]])
    return {
        "logits": logits.requires_grad_(),
        "ref_logits": ref_logits,
        "behavior": behavior,
        "tokens": tokens,
        "mask": mask,
    }


def computed(spec, inputs, **more):
    def logp(logits):
        return logits.log_softmax(-1).gather(-1, inputs["tokens"][..., None]).squeeze(-1)

    summed = exact_kl(spec, **{name: inputs[name] for name in ("logits", "ref_logits", "mask", "tokens")})
    return kl_terms(
        spec,
        logp=logp(inputs["logits"]),
        ref_logp=logp(inputs["ref_logits"]),
        behavior_logp=logp(inputs["behavior"]),
        mask=inputs["mask"],
        exact=summed,
        **more,
    )


WHOLE, HEAD, BUCKET = {}, {"top_k": 2}, {"top_k": 2, "tail": "bucket"}


@pytest.mark.parametrize("summed", [WHOLE, HEAD, BUCKET], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_masked_positions_contribute_exactly_nothing(name, summed):
    spec = KLSpec.from_name(name, off_policy="prefix", allow_biased=True, **summed)
    inputs = batch()
    off = ~inputs["mask"]
    clean = computed(spec, inputs)
    gradient = torch.autograd.grad(clean.loss.sum(), inputs["logits"])[0]
    assert gradient[~off].abs().sum() > 0
    assert torch.equal(clean.loss, clean.value)
    for junk in (math.nan, math.inf, -math.inf):
        dirty = inputs | {
            name: inputs[name].detach().masked_fill(off[..., None], junk) for name in ("ref_logits", "behavior")
        }
        dirty["logits"] = inputs["logits"].detach().masked_fill(off[..., None], junk).requires_grad_()
        logits = dirty["logits"]
        summed = exact_kl(spec, **{name: dirty[name] for name in ("logits", "ref_logits", "mask", "tokens")})
        assert torch.equal(torch.autograd.grad(summed.value.sum(), logits)[0][off], torch.zeros(int(off.sum()), 7))
        assert torch.equal(summed.value[off], torch.zeros(int(off.sum())))
    for name in ("loss", "value", "coefficient", "weight", "score_coefficient"):
        assert not getattr(clean, name)[off].any()


@pytest.mark.parametrize("summed", [WHOLE, HEAD, BUCKET], ids=str)
@pytest.mark.parametrize(
    ("name", "off"), [("exact_as_loss", "prefix"), ("exact_in_reward", "token"), ("exact_in_reward", "sequence")]
)
def test_weights_are_bounded_and_their_cuts_counted(name, off, summed):
    for mode in ("truncate", "mask"):
        options = {"off_policy": off, "allow_biased": True, "weight_clip": (0.5, 1.5), "weight_clip_mode": mode}
        terms = computed(KLSpec.from_name(name, **options, **summed), batch(torch.float64, scale=2.0))
        assert terms.cut.any()
        assert terms.weight.max() <= 1.5


@pytest.mark.parametrize("summed", [WHOLE, BUCKET], ids=str)
@pytest.mark.parametrize("mode", [{"weight_clip": (0.5, 1.5)}, {"weight_clip_mode": "mask"}], ids=str)
def test_bounds_of_a_weight_that_is_always_1_are_refused(mode, summed):
    with pytest.raises(ConfigError, match=r"weight_clip.* is not used.*weight 1 for off_policy='token'"):
        KLSpec.from_name("exact_as_loss", allow_biased=True, **summed, **mode)


def test_the_weight_of_an_exact_kl_is_that_of_its_state():
    """Not the token's own ratio: with it the mean would be the same, E_mu[rho_t] = 1, but not the variance."""
    inputs = batch(torch.float64)

    def logp(logits):
        return logits.detach().log_softmax(-1).gather(-1, inputs["tokens"][..., None]).squeeze(-1)

    log_rho = (logp(inputs["logits"]) - logp(inputs["behavior"])).masked_fill(~inputs["mask"], 0)
    of_state = torch.where(inputs["mask"], (log_rho.cumsum(-1) - log_rho).exp(), 0.0)
    local = computed(KLSpec.from_name("exact_as_loss", off_policy="prefix", weight_clip=UNBOUNDED), inputs)
    torch.testing.assert_close(local.weight, of_state)
    whole = computed(KLSpec.from_name("exact_in_reward", off_policy="prefix", weight_clip=UNBOUNDED), inputs)
    torch.testing.assert_close(whole.weight, of_state * log_rho.exp())
    torch.testing.assert_close(whole.score_coefficient, later(of_state * whole.value) * inputs["mask"])
    bounded = computed(KLSpec.from_name("exact_in_reward", off_policy="prefix", weight_clip=(0.5, 1.5)), inputs)
    of_token = of_state * log_rho.exp()
    state_cut, token_cut = (inputs["mask"] & ((w < 0.5) | (w > 1.5)) for w in (of_state, of_token))
    assert (state_cut & ~token_cut).any()
    assert torch.equal(bounded.cut, state_cut | token_cut)  # both stand in the gradient


@pytest.mark.parametrize("name", NAMES)
def test_extreme_log_ratios_in_float32(name):
    """Every |log-ratio| up to 1e3 has the gradient of float64, in the head and at the sampled token."""
    for size in (1.0, 20.0, 89.0, 200.0, 1000.0):
        logits = torch.tensor([[[0.0, size, 0.5], [0.0, -size, 0.5], [size, 0.0, -size]]])
        inputs = {"ref_logits": logits.flip(-1), "tokens": torch.tensor([[0, 1, 2]]), "mask": torch.ones(1, 3)}
        found = []
        for dtype in (torch.float32, torch.float64):
            leaf = logits.to(dtype).requires_grad_()
            each = inputs | {"logits": leaf, "ref_logits": inputs["ref_logits"].to(dtype), "behavior": leaf.detach()}
            terms = computed(KLSpec.from_name(name), each)
            found.append(torch.autograd.grad(terms.loss.sum(), leaf)[0].double())
            assert terms.loss.isfinite().all()
        assert (found[0] - found[1]).abs().max() <= 1e-5 * found[1].abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    inputs = batch(dtype)
    terms = computed(KLSpec.from_name("exact_in_reward"), inputs)
    assert terms.loss.dtype == torch.float32
    wide = {k: x.detach().double() if x.is_floating_point() else x for k, x in inputs.items()}
    wanted = exact_kl(KLSpec.from_name("exact_in_reward"), **{k: wide[k] for k in ("logits", "ref_logits", "mask")})
    assert (terms.value - wanted.value).abs().max() < 1e-5
    assert torch.autograd.grad(terms.loss.sum(), inputs["logits"])[0].dtype == dtype


def test_excluded_tokens():
    """-inf in both: nothing. In the reference only: inf, which is an error, or dropped without a trace."""
    inputs = batch(torch.float64)
    both = inputs | {
        k: inputs[k].detach().index_fill(-1, torch.tensor([0]), -math.inf) for k in ("logits", "ref_logits")
    }
    both["logits"].requires_grad_()
    both["tokens"] = inputs["tokens"].clamp(min=1)
    without = {k: x[..., 1:] if x.dim() == 3 else x for k, x in both.items()} | {"tokens": both["tokens"] - 1}
    for name in NAMES:
        spec = KLSpec.from_name(name)
        found, wanted = computed(spec, both), computed(spec, without)
        torch.testing.assert_close(found.value, wanted.value, rtol=1e-12, atol=1e-12)
        gradient = torch.autograd.grad(found.loss.sum(), both["logits"])[0]
        assert gradient.isfinite().all()
        assert (gradient[..., 0] == 0).all()
    only = dict(both, logits=inputs["logits"])
    with pytest.raises(ValueError, match=r"not finite.*exact_kl=inf.*nonfinite='drop'"):
        computed(KLSpec.from_name("exact_as_loss"), only)
    only["ref_logits"] = inputs["ref_logits"].clone()
    only["ref_logits"][0, 1, 0] = -math.inf
    only["tokens"] = both["tokens"]
    dropped = computed(KLSpec.from_name("exact_in_reward", nonfinite="drop"), only)
    mask = inputs["mask"].clone()
    mask[0, 1] = False
    masked = computed(KLSpec.from_name("exact_in_reward"), dict(inputs, mask=mask, tokens=both["tokens"]))
    assert dropped.dropped.sum() == 1
    for terms in (dropped, masked):
        assert torch.equal(terms.value, masked.value)
    gradients = [torch.autograd.grad(terms.loss.sum(), inputs["logits"])[0] for terms in (dropped, masked)]
    assert torch.equal(*gradients)


def test_a_baseline_made_beforehand_is_the_batchs_own():
    spec = KLSpec.from_name("exact_in_reward", baseline="leave_one_out", off_policy="prefix")
    inputs = batch(torch.float64)

    def logp(logits):
        return logits.detach().log_softmax(-1).gather(-1, inputs["tokens"][..., None]).squeeze(-1)

    together = computed(spec, inputs, group_size=2)
    beforehand = leave_one_out_baseline(
        spec,
        logp=logp(inputs["logits"]),
        ref_logp=logp(inputs["ref_logits"]),
        mask=inputs["mask"],
        group_size=2,
        exact=exact_kl(spec, **{k: inputs[k] for k in ("logits", "ref_logits", "mask")}),
    )
    alone = computed(spec, inputs, baseline=beforehand)
    assert torch.equal(alone.score_coefficient, together.score_coefficient)
    assert beforehand.abs().sum() > 0


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_ppos_clip_is_on_the_coefficients_of_later_kls(epsilon):
    """What the score part would be as PPO's max(rho c, clip(rho) c); the analytic part has no ratio."""
    inputs = batch(torch.float64)
    clipped = computed(KLSpec.from_name("exact_in_reward", clip="separate", clip_epsilon=epsilon), inputs)
    plain = computed(KLSpec.from_name("exact_in_reward"), inputs)
    rho, c = plain.weight, plain.coefficient
    zero = ((c > 0) & (rho < 1 - epsilon)) | ((c < 0) & (rho > 1 + epsilon))
    assert zero.any()
    assert torch.equal(clipped.score_coefficient, plain.score_coefficient.masked_fill(zero, 0))
    assert torch.equal(clipped.loss, plain.loss)


REFUSED = [
    ("exact_as_loss", {"baseline": "leave_one_out"}, "baseline='leave_one_out' is not used.*analytic"),
    ("exact_in_reward", {"credit": "token", "baseline": "leave_one_out"}, "analytic and has no coefficient"),
    ("exact_as_loss", {"clip": "separate"}, "clip='separate' is not used.*analytic"),
    ("exact_in_reward", {"clip": "combined"}, "clip='combined' was asked for.*no advantage.*clip='separate'"),
    ("exact_in_reward", {"credit": "sequence"}, "credit='sequence' is not offered.*'to_go', 'token'"),
    ("exact_as_loss", {"top_k": 0}, "top_k=0: a number of tokens is a positive whole number"),
    ("exact_as_loss", {"top_k": True}, "top_k=True"),
    ("exact_as_loss", {"top_k": 3, "tail": "head"}, "tail='head' is not offered"),
    ("exact_as_loss", {"tail": "bucket"}, "tail='bucket' is not used.*only an exact KL with top_k"),
    ("exact_as_loss", {"top_k": 3, "tail": "bucket"}, "lower bound.*tail='sampled'.*allow_biased"),
    ("k2_as_loss", {"top_k": 3}, "top_k=3 is not used.*only exact KLs"),
    ("exact_as_loss", {"coefficient_bound": 3.0}, "coefficient_bound=3.0 is not used"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_configurations_that_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        KLSpec.from_name(name, **options)


def test_what_kl_terms_refuses():
    inputs = batch()
    spec = KLSpec.from_name("exact_as_loss")
    small = {k: inputs[k] for k in ("logits", "ref_logits", "mask")}
    logp = {"logp": torch.zeros(4, 5), "ref_logp": torch.zeros(4, 5), "mask": inputs["mask"]}
    with pytest.raises(ConfigError, match=r"exact_as_loss sums over the vocabulary.*pass exact=exact_kl"):
        kl_terms(spec, **logp)
    with pytest.raises(ConfigError, match="exact was passed for k2_as_loss, which is sampled"):
        kl_terms(KLSpec.from_name("k2_as_loss"), **logp, exact=exact_kl(spec, **small))
    for other in (KLSpec.from_name("exact_forward_as_loss"), KLSpec.from_name("exact_as_loss", top_k=2)):
        with pytest.raises(ConfigError, match="was given one with"):
            kl_terms(other, **logp, exact=exact_kl(spec, **small))
    sampled, bucket = (
        KLSpec.from_name("exact_as_loss", top_k=2, tail=tail, allow_biased=True) for tail in ("sampled", "bucket")
    )
    with pytest.raises(ConfigError, match="was given one with"):
        kl_terms(sampled, **logp, exact=exact_kl(bucket, **small))
    with pytest.raises(ConfigError, match="top_k=2 with tail='sampled' needs the sampled tokens"):
        exact_kl(KLSpec.from_name("exact_as_loss", top_k=2), **small)
    with pytest.raises(ConfigError, match="exact_kl was asked for k2_as_loss"):
        exact_kl(KLSpec.from_name("k2_as_loss"), **small)
    with pytest.raises(ValueError, match=r"logits \(4, 5, 7\), ref_logits \(4, 5, 6\)"):
        exact_kl(spec, **small | {"ref_logits": small["ref_logits"][..., 1:]})


def test_a_head_as_large_as_the_vocabulary_is_all_of_it():
    inputs = batch(torch.float64)
    found, wanted = (computed(KLSpec.from_name("exact_as_loss", top_k=k), inputs) for k in (100, None))
    assert torch.equal(found.loss, wanted.loss)
