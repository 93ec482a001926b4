"""Where each KL term's training comes to rest, by exact arithmetic: nothing is sampled, nothing is optimized.

A random reference over all completions of `LENGTH` tokens, and a reward of whole completions. Backward induction gives

    sequence  the optimum of E[R] - beta KL(policy || reference): terms with the gradient of the sequence's KL
    local     terms whose gradient is that of the next-token reverse KLs at the prefixes that were visited (k2 as loss,
              k3 times the ratio, exact as loss): pi(.|s) = ref exp(E_pi[R | s, .] / beta)
    forward   k3 as loss: pi(.|s) = beta ref / (level - E_pi[R | s, .])

What each has reached of the best E[R] - beta KL, and how much more KL it spends for the same reward.
"""

import math

import torch
from evidence.intervals import of

VOCABULARY, LENGTH = 4, 7
TERMS = ("sequence", "local", "forward")
REWARDS = ("sparse", "dense", "pattern")
BETAS = (0.02, 0.1, 0.5)
SHARES_OF_REWARD = (0.5, 0.9)


def jobs(quick):
    """One for each reward and seed, of which the reference and the reward are made."""
    return [
        {"part": "fixed points", "reward": reward, "seed": seed}
        for reward in REWARDS
        for seed in range(2 if quick else 5)
    ]


def work(job):
    """`"<term> share <beta>"` of the attainable, and `"<term> more KL <share>"`: of the optimum's, for that reward."""
    torch.set_num_threads(1)
    reference, reward = problem(job["reward"], job["seed"])
    start, found = worth(reference, reference, reward)[0], {}
    for beta in BETAS:
        at = {term: worth(fixed_point(term, reference, reward, beta), reference, reward) for term in TERMS}
        objective = {term: r - beta * kl for term, (r, kl) in at.items()}
        for term in TERMS:
            found[f"{term} share {beta}"] = (objective[term] - start) / (objective["sequence"] - start)
    for some in SHARES_OF_REWARD:
        wanted = start + some * (reward.max().item() - start)
        spent = {term: kl_for(wanted, term, reference, reward) for term in TERMS}
        for term in TERMS:
            found[f"{term} more KL {some}"] = spent[term] / spent["sequence"] - 1
    return found


def problem(kind, seed):
    """Log-probs of the reference after each prefix, one tensor per length of prefix, and the (V, ..., V) rewards."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [[VOCABULARY] * (t + 1) for t in range(LENGTH)]
    reference = [torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1) for shape in shapes]
    if kind == "sparse":
        reward = (torch.rand(shapes[-1], generator=generator, dtype=torch.float64) < 0.02).double()
    elif kind == "dense":
        reward = torch.randn(shapes[-1], generator=generator, dtype=torch.float64)
    else:
        reward = torch.zeros(shapes[-1], dtype=torch.float64)
        reward[tuple(torch.randint(VOCABULARY, (LENGTH - 2,), generator=generator).tolist())] = 1.0
    return reference, reward


def fixed_point(term, reference, reward, beta):
    """The policy at which the term's expected gradient balances the reward's, as log-probs like the reference's."""
    policy, value = [], reward
    for step in reversed(reference):
        tilted = step + value / beta
        logp = forward(step, value, beta) if term == "forward" else tilted.log_softmax(-1)
        policy.insert(0, logp)
        value = beta * tilted.logsumexp(-1) if term == "sequence" else (logp.exp() * value).sum(-1)
    return policy


def forward(step, value, beta):
    """beta ref / (level - value), with the level at which it sums to 1: by bisection."""
    low, high = value.amax(-1) + 1e-14, value.amax(-1) + beta
    for _ in range(50):
        middle = (low + high) / 2
        above = (beta * step.exp() / (middle[..., None] - value)).sum(-1) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (step - (high[..., None] - value).log()).log_softmax(-1)


def worth(policy, reference, reward):
    """E[R] and the KL to the reference, in nats, of whole completions."""
    value, kl = reward, torch.zeros_like(reward)
    for logp, step in zip(reversed(policy), reversed(reference), strict=True):
        p = logp.exp()
        value, kl = (p * value).sum(-1), (p * (kl + logp - step)).sum(-1)
    return value.item(), kl.item()


def kl_for(wanted, term, reference, reward):
    """The KL at which the term's fixed point has a reward of `wanted`, by bisection: more beta is less reward."""
    low, high = math.log(1e-4), math.log(1e3)
    for _ in range(50):
        middle = (low + high) / 2
        found, kl = worth(fixed_point(term, reference, reward, math.exp(middle)), reference, reward)
        low, high = (middle, high) if found > wanted else (low, middle)
    return kl


def sections(rows):
    """Tables of the rows: (title, columns, rows, a sentence about them)."""
    lines = []
    for reward in REWARDS:
        for term in TERMS:
            shares = [f"{of(rows, f'{term} share {beta}', reward=reward):.3f}" for beta in BETAS]
            more = [f"{of(rows, f'{term} more KL {some}', reward=reward):.1%}" for some in SHARES_OF_REWARD]
            lines.append([reward, term, *shares, *more])
    columns = ("reward", "gradient", *(f"share, beta {beta}" for beta in BETAS))
    columns += tuple(f"more KL, {some:.0%} of the reward" for some in SHARES_OF_REWARD)
    said = "Share: of the attainable at that beta. More KL: than the optimum spends for that part of the reward."
    return [("fixed points: where each gradient comes to rest", columns, lines, said)]
