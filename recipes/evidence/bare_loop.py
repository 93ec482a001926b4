"""The known optimum in a bare loop: any length, and regimes that a trainer would take hours for; nothing but torch.

`kl_plugins.conformance.known_optimum` has the loop: a policy that is a table, GRPO's own part of the loss, exact
evaluation. All seeds of an arm train side by side, as one job. Parts:

    lengths  share of the attainable against the length of completions
    regimes  groups, scales, small betas, several updates a batch, stale samplers, an engine that differs
    weights  the same KL off-policy: in the advantage, or in a term of its own with weights of its own
    noise    squared error of reward and KL together, on the way to the optimum and where no KL leads
    back     training back from far past the optimum, where rewards hardly differ
"""

import torch
from evidence.intervals import marked, of, select

from kl_plugins import KLSpec
from kl_plugins.conformance import known_optimum as known

BETAS = {"terminal": 0.3, "hackable": 0.3, "dense": 1.0}
LENGTHS = (16, 32, 64, 128, 256)
BATCH = 64
SEEDS = 6
STEPS = 200
BACK_STEPS = 80
BATCHES = 256
"""Batches that the noise is measured on: half of them for the coefficient of the mix."""


def as_of_the_rollout(scored, outcome, beta):
    """The k1 of the policy at rollout in the reward, once for all updates: what stock RLOO and verl do."""
    total = (outcome - beta * (scored.old_logp - scored.ref_logp).sum(-1)).view(-1, scored.group_size)
    return (total - total.mean(1, keepdim=True)).flatten()[:, None].expand_as(scored.logp)


def between():
    """k1 whose credit is between to_go and sequence: as much of the KL *before* a token as cancels the reward's noise.

    The advantage is R - beta U_later - lambda beta U_before, less the group's mean. Its expected gradient is the same
    for every lambda: 0 is to_go, 1 sequence. Each position's lambda is the regression of the first two terms on the
    third, from earlier batches. Not a configuration of the package: what one could gain.
    """
    sums = None

    def advantages(scored, outcome, beta):
        nonlocal sums
        u = scored.old_logp - scored.ref_logp
        later = u.flip(-1).cumsum(-1).flip(-1)
        costs = torch.stack([outcome[:, None] - beta * later, beta * (u.sum(-1, keepdim=True) - later)])
        groups = costs.view(2, -1, scored.group_size, u.size(1))
        centred = groups - groups.mean(2, keepdim=True)
        rest, before = centred.view(2, -1, BATCH, u.size(1))  # the runs, their rows, positions
        part = 0 if sums is None else (sums[0] / sums[1].clamp(min=1e-12)).clamp(0, 1)
        new = torch.stack([(rest * before).sum(1, keepdim=True), before.square().sum(1, keepdim=True)])
        sums = new if sums is None else 0.9 * sums + 0.1 * new
        return (rest - part * before).view_as(u)

    return known.InReward(name="between to_go and sequence", advantages=advantages)


def k1(credit="sequence", **options):
    """k1 in reward, treated as GRPO treats its rewards."""
    return KLSpec(name="k1_in_reward", credit=credit, baseline="group_mean", **options)


PICKED = "reverse_kl"
BETWEEN = "between to_go and sequence"
ARMS = {
    "no KL": None,
    "k1_as_loss": KLSpec(name="k1_as_loss", allow_biased=True),
    "k2_as_loss": KLSpec(name="k2_as_loss"),
    "k3_as_loss": KLSpec(name="k3_as_loss"),
    "exact_as_loss": KLSpec(name="exact_as_loss"),
    "exact_in_reward": KLSpec(name="exact_in_reward", baseline="group_mean"),
    "k1_in_reward, to_go": k1("to_go"),
    "k1 as of the rollout": known.InReward(name="k1 as of the rollout", advantages=as_of_the_rollout),
    PICKED: k1(clip="combined"),  # and what `picked` says
    BETWEEN: between,
}
WEIGHTS = {
    "sequence, in the advantage": k1(clip="combined"),
    "sequence, token weights": k1(off_policy="token"),
    "sequence, prefix weights": k1(off_policy="prefix"),
    "sequence, sequence weights": k1(off_policy="sequence"),
    "sequence, no weights": k1(off_policy="none"),
    "to_go, in the advantage": k1("to_go", clip="combined"),
    "to_go, token weights": k1("to_go"),
}
REGIMES = {
    "on-policy": {},
    "groups of 2": {"group_size": 2},
    "groups of 4": {"group_size": 4},
    "groups of 16": {"group_size": 16},
    "a third of beta": {"beta": 1 / 3},
    "a tenth of beta": {"beta": 0.1},
    "rewards over the group's deviation": {"scale": "group"},
    "rewards and KL over it": {"scale": "group", "kl_scale": "reward"},
    "4 updates a batch": {"iterations": 4, "rate": 0.02},
    "8 updates stale": {"staleness": 8},
    "16 updates stale": {"staleness": 16},
    "an engine off by 0.2": {"engine_noise": 0.2},
    "an engine off by 0.5": {"engine_noise": 0.5},
}
OFF_POLICY = list(REGIMES)[-5:]
POINTS = {
    "after 20 updates": (PICKED, 20),
    "after 200 updates": (PICKED, 200),
    "after 60 without a KL": ("no KL", 60),
    "after 200 without a KL": ("no KL", 200),
}
"""Name -> the arm and the updates that have made the policy of the part "noise"."""
FAR = 0.1
"""The part "back" starts at the policy that is optimal at this many times beta."""
LASTING = ("no KL", "k1_as_loss")
SAID = {
    "lengths": f"Share of the attainable, groups of 8, {STEPS} rollouts of 64. Adam's rate is 0.2 over the root of "
    "the length, so that an update moves completions about as far. What is between to_go and sequence is no option of "
    "the package: it subtracts as much of the KL before a token as cancelled the reward's noise in earlier batches.",
    "regimes": f"Share of the attainable at length 16; groups of 8, {STEPS} rollouts of 64. Adam's rate is 0.05, with "
    "4 updates a batch 0.02. What is as of the rollout is divided by no deviation.",
    "weights": "k1 in reward off-policy, with several credits, placements and weights.",
    "back": f"{BACK_STEPS} rollouts of 64, from the policy that is optimal at {FAR} times beta.",
    "noise": "Squared error of the gradient of a batch of 64, in the unit of the reward's own error (no KL). Mix: "
    "sequence + coefficient (exact - sequence), which has the same expected gradient; the coefficient is estimated "
    "from other batches.",
}


def jobs(quick):
    """Every arm of every part; quick: a few of them, which show that it runs."""
    if quick:
        wanted = [("lengths", "terminal", length, "on-policy") for length in (16, 64)]
        wanted += [("regimes", "hackable", 16, regime) for regime in ("on-policy", "8 updates stale")]
    else:
        wanted = [("lengths", problem, length, "on-policy") for problem in BETAS for length in LENGTHS]
        wanted += [("regimes", problem, 16, regime) for problem in BETAS for regime in REGIMES]
        wanted += [("weights", problem, 16, regime) for problem in BETAS for regime in OFF_POLICY]
        wanted += [("noise", problem, 16, point) for problem in BETAS for point in POINTS]
        wanted += [("back", problem, 16, "from far past it") for problem in BETAS]
    regularized = [arm for arm in ARMS if arm not in (*LASTING, BETWEEN)]
    arms = {
        "lengths": [*regularized, BETWEEN],
        "regimes": [*LASTING, *regularized],
        "weights": list(WEIGHTS),
        "noise": [""],
        "back": regularized,
    }
    return [
        {"part": part, "problem": problem, "length": length, "regime": regime, "arm": arm, "seeds": list(range(SEEDS))}
        for part, problem, length, regime in wanted
        for arm in arms[part]
    ]


def work(job):
    """Lists of numbers, one for each seed: `share`, `reward`, `kl`, `largest_gradient` of a training; or `noise`."""
    torch.set_num_threads(1)
    if job["part"] == "noise":
        problems = [problem_of(job, seed) for seed in job["seeds"]]
        arm, steps = POINTS[job["regime"]]
        trained = known.train_all(ARMS[arm], problems, seeds=job["seeds"], steps=steps)
        found = [noise(problem, each.policy) for problem, each in zip(problems, trained, strict=True)]
        return {name: [each[name] for each in found] for name in found[0]}
    options = dict(REGIMES.get(job["regime"], {}))
    problems = [problem_of(job, seed, options.get("beta", 1.0)) for seed in job["seeds"]]
    options.pop("beta", None)
    options |= {"steps": STEPS, "batch": BATCH}
    if job["part"] == "lengths":
        options["rate"] = 0.2 / job["length"] ** 0.5
    if job["part"] == "back":
        options |= {"start": [known.optimum(problem_of(job, s, FAR))[0] for s in job["seeds"]], "steps": BACK_STEPS}
    term = (WEIGHTS if job["part"] == "weights" else ARMS)[job["arm"]]
    term = term() if term is between else term
    if job["arm"] == PICKED:
        term = picked(options)
    trained = known.train_all(term, problems, seeds=job["seeds"], **options)
    return {name: [getattr(each, name) for each in trained] for name in ("share", "reward", "kl", "largest_gradient")}


def picked(regime):
    """What `reverse_kl` picks in a regime: with an engine that differs weights of its own."""
    return k1() if "engine_noise" in regime else ARMS[PICKED]


def problem_of(job, seed, times_beta=1.0):
    """A problem of its own for each seed."""
    kind = job["problem"]
    return known.PROBLEMS[kind](length=job["length"], beta=times_beta * BETAS[kind], seed=seed)


def noise(problem, policy):
    """Expected squared errors of the gradient of reward and KL together, in the unit of the reward's own error.

    `mix` is sequence + `coefficient` (exact - sequence) on the same samples, which has the same expected gradient; the
    coefficient, the best one, is taken from other batches.
    """
    policy = policy.clone().requires_grad_()
    reward, kl = known.worth(policy, problem)
    (true,) = torch.autograd.grad(problem.beta * kl - reward, policy, retain_graph=True)
    (of_reward,) = torch.autograd.grad(-reward, policy)
    terms = {
        "reward": None,
        "sequence": KLSpec(name="k1_in_reward", credit="sequence", baseline="leave_one_out"),
        "to_go": KLSpec(name="k1_in_reward", baseline="leave_one_out"),
        "exact": KLSpec(name="exact_in_reward", baseline="leave_one_out"),
    }
    errors = {
        name: known.gradients(term, problem, policy.detach(), seeds=range(BATCHES)) for name, term in terms.items()
    }
    errors = {name: found - (of_reward if name == "reward" else true) for name, found in errors.items()}
    earlier, later = ({name: x[part::2] for name, x in errors.items()} for part in (0, 1))
    apart = earlier["exact"] - earlier["sequence"]
    coefficient = -(earlier["sequence"] * apart).sum() / apart.square().sum()
    later["mix"] = later["sequence"] + coefficient * (later["exact"] - later["sequence"])
    size = {name: x.square().flatten(1).sum(1).mean().item() for name, x in later.items()}
    found = {name: size[name] / size["reward"] for name in ("sequence", "to_go", "exact", "mix")}
    return found | {"coefficient": coefficient.item()}


def by_seed(rows):
    """The rows of `runs.run_all`, one for each seed."""
    return [
        {"seed": seed} | {name: value[i] if isinstance(value, list) else value for name, value in row.items()}
        for row in rows
        for i, seed in enumerate(row["seeds"])
    ]


def sections(rows):
    """Tables of the rows `by_seed`: (title, columns, rows, a sentence about them)."""
    found = []
    for problem in BETAS:
        for part, across in (("lengths", "length"), ("regimes", "regime"), ("weights", "regime")):
            here = select(rows, part=part, problem=problem)
            if here:
                found.append((f"{part}: {problem} reward", *shares(here, across), SAID[part]))
    back, noises = select(rows, part="back"), select(rows, part="noise")
    if back:
        found.append(("back: the same, from far past the optimum", *shares(back, "problem"), SAID["back"]))
    if noises:
        found.append(("noise: reward and KL together", *noise_table(noises), SAID["noise"]))
    return found


def shares(rows, across):
    """Columns and rows of a table: the share of each arm, for each length, regime or problem."""
    arms, values = (list(dict.fromkeys(row[name] for row in rows)) for name in ("arm", across))
    cells = {value: marked(select(rows, **{across: value})) for value in values}
    if len(values) > len(arms):
        return (across, *arms), [[value, *(cells[value][arm] for arm in arms)] for value in values]
    return ("KL", *map(str, values)), [[arm, *(cells[value][arm] for value in values)] for arm in arms]


def noise_table(rows):
    """Columns and rows of the noises, a line for each problem and point."""
    columns = ("sequence", "to_go", "exact", "mix", "coefficient")
    lines = [
        [problem, point, *(f"{of(rows, name, problem=problem, regime=point):.2f}" for name in columns)]
        for problem in BETAS
        for point in POINTS
    ]
    return ("reward", "policy", *columns), lines
