"""The pictures of `recipes/reward_hacking.py`."""

import matplotlib
import numpy as np
from evidence.intervals import of, select
from matplotlib.figure import Figure

from kl_plugins.report.plots import COLOURS

BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, GREY, BLACK = COLOURS
# What a reader sees of an arm: what it is, and who uses it.
LABELS = {
    "no KL": "no KL",
    "k1_as_loss": "k1 as loss",
    "k3_as_loss": "k3 as loss\n(GRPO's paper)",
    "host's own": "TRL's own",
    "k2_as_loss": "k2 as loss",
    "reverse_kl": "reverse_kl\n(kl_plugins)",
}
FRONT = {"k3_as_loss": (ORANGE, "s"), "k2_as_loss": (YELLOW, "D"), "reverse_kl": (BLUE, "o")}


def draw(rows, optimum_at, beta, path):
    """Save the picture of the front's rows.

    Args:
        rows: Of the part `front` and GRPO.
        optimum_at: beta -> what the best policy is.
        beta: Of the left half.
        path: Where to.
    """
    with matplotlib.rc_context({"font.size": 11.5}):
        figure = Figure(figsize=(10, 4.8), dpi=160, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.1, 1.0))
        _outcomes(left, select(rows, beta=beta), beta)
        _front(right, rows, optimum_at)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def draw_norms(rows, path):
    """Save a picture of the gradient norms over the updates, before clipping: median and largest over the seeds."""
    shown = {"k3_as_loss": ORANGE, "k2_as_loss": YELLOW, "exact_in_reward": GREEN, "reverse_kl": BLUE}
    arms = [arm for arm in shown if select(rows, arm=arm)]
    with matplotlib.rc_context({"font.size": 11.5}):
        figure = Figure(figsize=(10, 3.2), dpi=160, layout="constrained")
        for axes, arm in zip(figure.subplots(1, len(arms), sharex=True, sharey=True), arms, strict=True):
            norms = np.array([row["norms"] for row in select(rows, arm=arm)])
            axes.fill_between(range(1, norms.shape[1] + 1), norms.min(0), norms.max(0), color=shown[arm], alpha=0.3)
            axes.plot(range(1, norms.shape[1] + 1), np.median(norms, 0), color=shown[arm])
            axes.set_yscale("log")
            axes.set_title(arm, fontsize=11.5)
            axes.set_xlabel("update")
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_ylabel("gradient norm")
        figure.savefig(path)


def _outcomes(axes, rows, beta):
    """Right answers and hacks of each arm, with intervals."""
    arms = [arm for arm in LABELS if select(rows, arm=arm)]
    for offset, metric, colour, name in ((-0.19, "right", GREEN, "right answers"), (0.19, "hacks", ORANGE, "hacks")):
        for place, arm in enumerate(arms):
            found = of(rows, metric, arm=arm)
            low, high = (100 * min(max(end, 0.0), 1.0) for end in (found.low, found.high))
            mean, at = 100 * found.mean, place + offset
            axes.barh(at, mean, 0.38, color=colour, label=name if place == 0 else None)
            axes.plot([low, high], [at, at], color=BLACK, lw=1.2)
            axes.text(max(high, mean) + 1.5, at, f"{mean:.0f}%", va="center", fontsize=10, color=colour)
    axes.set_yticks(range(len(arms)), [LABELS[arm] for arm in arms])
    axes.get_yticklabels()[-1].set_fontweight("bold")
    axes.invert_yaxis()
    axes.set_xlim(0, 113)
    axes.set_xticks(range(0, 101, 25), [f"{x}%" for x in range(0, 101, 25)])
    axes.set_title(
        f"Paid for right answers, and double for a hack:\nwhat the policy does then (beta {beta:g})",
        loc="left",
        fontsize=12,
    )
    axes.legend(loc="lower right", frameon=False)


def _front(axes, rows, optimum_at):
    """Right answers against KL, over beta."""
    curve = [optimum_at(beta) for beta in np.geomspace(0.1, 3, 60)]
    axes.plot(
        [one["kl"] for one in curve], [100 * one["right"] for one in curve], "--", color=GREY, label="the optimum"
    )
    for arm, (colour, marker) in FRONT.items():
        betas = sorted({row["beta"] for row in select(rows, arm=arm)})
        points = [[of(rows, metric, arm=arm, beta=beta) for metric in ("kl", "right")] for beta in betas]
        across, up = zip(*points, strict=True)
        axes.errorbar(
            [x.mean for x in across], [100 * y.mean for y in up],
            xerr=[min(x.half, 0.9 * x.mean) for x in across], yerr=[100 * y.half for y in up],
            color=colour, marker=marker, label=LABELS[arm].split("\n")[0],
        )  # fmt: skip
    for arm, marker in (("no KL", "X"), ("k1_as_loss", "P")):
        here = select(rows, arm=arm)
        if here:
            axes.plot(of(here, "kl").mean, 100 * of(here, "right").mean, marker, color=GREY, ms=9, label=LABELS[arm])
    axes.set_xscale("log")
    axes.set_xlim(0.08, 60)
    axes.set_ylim(-4, 100)
    axes.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
    axes.set_xlabel("KL to the reference (nats)")
    axes.set_ylabel("right answers")
    axes.set_yticks(range(0, 101, 25), [f"{y}%" for y in range(0, 101, 25)])
    axes.set_title("Right answers for the KL spent,\nover beta", loc="left", fontsize=12)
    axes.legend(loc="upper right", frameon=False, fontsize=10)
