"""What is wrong where: the expected gradient of the KL terms that frameworks put into their loss, by enumeration.

Each term is written as it is usually shipped and differentiated by autograd; nothing is sampled. Prints the relative
error against the local reverse KL's gradient (the prefixes held fixed, as every token-level term does) and against the
whole sequence's, on-policy and with tokens from a stale policy, as geometric means over nine structured policies.

Then what the leave-one-out baseline does to the variance of k1 in reward, far from and near the reference; and how
often, among random policies, the exact KL's gradient has more variance than the sampled one's.

Hardware: any CPU. Takes: about 5 seconds. Launch: python recipes/gradients.py
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: more threads only wait for each other

import torch
from rich.console import Console
from rich.table import Table

from kl_plugins import KLSpec
from kl_plugins.oracle import (
    enumerate_sequences,
    expected_gradient,
    relative_error,
    second_moment,
    sequence_probability,
    structured_policies,
    token_logp,
    true_gradient,
)


# Functions of d = log pi - log ref and rho = pi / behavior, both live in the graph.
def k3(d):
    return torch.exp(-d) + d - 1


TERMS = {
    "k1": lambda d, rho: d,
    "k2": lambda d, rho: d.square() / 2,
    "k3 (GRPO's paper)": lambda d, rho: k3(d),
    "k3 * ratio (TRL 1.16)": lambda d, rho: rho * k3(d),
    "k2, weighted": lambda d, rho: rho.detach() * d.square() / 2,
    "k3, value clamped at 10": lambda d, rho: k3(d).clamp(-10, 10),
}
UNCLIPPED = (0.0, float("inf"))
OURS = {
    "kl_plugins k2_as_loss": KLSpec.from_name("k2_as_loss", weight_clip=UNCLIPPED),
    "kl_plugins k1_in_reward, prefix": KLSpec.from_name("k1_in_reward", off_policy="prefix", weight_clip=UNCLIPPED),
}

sequences = enumerate_sequences(vocabulary=3, length=4)
errors = {name: [[], [], [], []] for name in (*TERMS, *OURS)}
for seed in range(3):
    for strength in (1.0, 2.0, 3.0):
        policy, reference, stale = structured_policies(sequences, seed=seed, strength=strength)
        whole = true_gradient("reverse_kl", sequences, policy, reference)
        for off_policy, behavior in enumerate((None, stale)):
            local = true_gradient("local_reverse_kl", sequences, policy, reference, prefixes_of=behavior)
            gradients = {
                name: expected_gradient(spec, sequences, policy, reference, behavior=behavior)
                for name, spec in OURS.items()
            }
            for name, term in TERMS.items():
                theta = policy.clone().requires_grad_()
                logp = token_logp(theta, sequences)
                sampler = policy if behavior is None else behavior
                rho = (logp - token_logp(sampler, sequences)).exp()
                per_token = term(logp - token_logp(reference, sequences), rho) * sequences.mask
                loss = (sequence_probability(sampler, sequences)[:, None] * per_token).sum()
                gradients[name] = torch.autograd.grad(loss, theta)[0]
            for name, gradient in gradients.items():
                errors[name][off_policy].append(relative_error(gradient, local))
                errors[name][2 + off_policy].append(relative_error(gradient, whole))

table = Table(title="Relative error of the expected gradient (geometric mean of nine policies)", title_justify="left")
for column in ("term", "local, on-policy", "local, stale", "sequence, on-policy", "sequence, stale"):
    table.add_column(column, justify="left" if column == "term" else "right")
for name, columns in errors.items():
    means = [torch.tensor(column, dtype=torch.float64).log().mean().exp().item() for column in columns]
    table.add_row(name, *(f"{mean:.2f}" if mean > 1e-10 else "0" for mean in means))
Console(width=120).print(table)
print("0: below 1e-10. The clamp's gradient is exactly 0 for tokens ~14 times less likely than under the reference.")

# The baseline: exact total variance of the mean gradient of a group of four, with it over without it.
table = Table(title="Variance of k1 in reward with the leave-one-out baseline, over without", title_justify="left")
for column in ("policy", "KL, nats", "its deviation", "variance ratio"):
    table.add_column(column, justify="left" if column == "policy" else "right")
sequences = enumerate_sequences(vocabulary=3, length=3)
avoided = torch.nn.functional.one_hot(torch.zeros(sequences.prefixes, dtype=torch.long), 3)
for name, strengths in (("far: it avoids the reference's token", (2.0, 3.0, 4.0)), ("near", (0.5, 1.0, 2.0))):
    for strength in strengths:
        policy, reference, _ = structured_policies(sequences, seed=0, strength=strength)
        if name != "near":
            policy, reference = reference - strength * avoided, reference + strength * avoided
        gap = ((token_logp(policy, sequences) - token_logp(reference, sequences)) * sequences.mask).sum(-1)
        probability = sequence_probability(policy, sequences)
        kl = (probability * gap).sum()
        deviation = (probability * (gap - kl).square()).sum().sqrt()
        variances = [
            second_moment(
                KLSpec.from_name("k1_in_reward", baseline=baseline), sequences, policy, reference, group_size=4
            )[1]
            for baseline in ("leave_one_out", None)
        ]
        table.add_row(name, f"{kl:.2f}", f"{deviation:.2f}", f"{variances[0] / variances[1]:.2f}")
Console(width=120).print(table)

# Exact against sampled: total variance of one completion's gradient, over random policies and references.
sequences = enumerate_sequences(vocabulary=2, length=3)
generator = torch.Generator().manual_seed(0)
exact, sampled = (KLSpec.from_name(name) for name in ("exact_in_reward", "k1_in_reward"))
ratios = []
for _ in range(400):
    policy, reference = (
        1.5 * torch.randn(sequences.prefixes, 2, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    variances = [second_moment(spec, sequences, policy, reference, group_size=1)[1] for spec in (exact, sampled)]
    ratios.append(float(variances[0] / variances[1]))
more = sum(ratio > 1 for ratio in ratios)
print(f"\nOf {len(ratios)} random policies, exact_in_reward has more variance than k1_in_reward on {more}; ", end="")
print(f"the median ratio of the variances is {sorted(ratios)[len(ratios) // 2]:.2f}.")
