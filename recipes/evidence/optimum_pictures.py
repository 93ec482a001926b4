"""The pictures of `recipes/known_optimum.py`."""

import matplotlib
from evidence.intervals import of
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from kl_plugins.report.plots import COLOURS, LINE_STYLES

BLUE, ORANGE, GREY, BLACK = COLOURS[0], COLOURS[1], COLOURS[6], COLOURS[7]
MARKERS = "os^Dv<>P"
LOWEST = -0.5
"""Where the axis of shares ends: no KL and k1 as loss go on, and an axis down to them would hide all else."""
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#999999"}


def draw_shares(hosts, path):
    """Save a bar for each arm's share, with its 95% interval, in a panel for each host.

    Args:
        hosts: Title of the panel -> its rows, of one regime.
        path: Where to.
    """
    arms = {title: list(dict.fromkeys(row["arm"] for row in rows)) for title, rows in hosts.items()}
    heights = [len(each) for each in arms.values()]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 1.2 + 0.28 * sum(heights) + 0.45 * len(hosts)), dpi=150, layout="constrained")
        axes = figure.subplots(len(hosts), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axis, (title, rows) in zip(axes, hosts.items(), strict=True):
            for place, arm in enumerate(arms[title]):
                _bar(axis, place, of(rows, "share", arm=arm), arm)
            axis.set_yticks(range(len(arms[title])), arms[title])
            axis.invert_yaxis()
            axis.axvline(0.0, color="#999999", linewidth=0.8)
            axis.axvline(1.0, color="#999999", linewidth=0.8, linestyle=(0, (3, 2)))
            axis.set_title(f"{title}, {rows[0]['regime']}", loc="left", fontsize=10.5)
        axes[-1].set_xlim(LOWEST, 1.3)
        axes[-1].set_xticks([-0.5, 0, 0.5, 1])
        axes[-1].set_xlabel("share of the attainable: 0 the reference, 1 the optimum (95% intervals)")
        kinds = {"the host's own": ORANGE, "kl_plugins": BLUE, "no KL": GREY}
        patches = [Patch(color=colour, label=kind) for kind, colour in kinds.items()]
        figure.legend(handles=patches, loc="outside upper right", ncols=3, frameon=False)
        figure.savefig(path)
    return path


def _bar(axis, place, value, arm):
    colour = GREY if arm == "no KL" else ORANGE if arm.startswith(("TRL's", "OpenRLHF's")) else BLUE
    axis.barh(place, max(value.mean, LOWEST), color=colour, height=0.66)
    if value.mean > LOWEST:
        axis.errorbar(value.mean, place, xerr=value.half, color="#111111", capsize=2.5, linewidth=1.2)
    axis.text(1.1, place, f"{value.mean:.3f}", va="center", fontsize=9, color="#222222")


def draw_lengths(rows, path):
    """Save each arm's share against the length of completions, with 95% intervals, in a panel for each reward."""
    problems, arms, lengths = (list(dict.fromkeys(row[name] for row in rows)) for name in ("problem", "arm", "length"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8 * len(problems), 4.6), dpi=150, layout="constrained")
        axes = figure.subplots(1, len(problems), sharey=True, squeeze=False)[0]
        for axis, problem in zip(axes, problems, strict=True):
            for i, arm in enumerate(arms):
                values = [of(rows, "share", problem=problem, arm=arm, length=length) for length in lengths]
                axis.errorbar(
                    lengths,
                    [value.mean for value in values],
                    yerr=[value.half for value in values],
                    label=arm,
                    color=BLACK if arm == "reverse_kl" else COLOURS[i],
                    linestyle="-" if arm == "reverse_kl" else LINE_STYLES[i],
                    marker=MARKERS[i],
                    markersize=5,
                    capsize=2,
                    linewidth=1.6,
                )
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, list(map(str, lengths)))
            axis.set_title(f"{problem} reward", loc="left", fontsize=10.5)
            axis.set_xlabel("length of completions, in tokens")
            axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes[0].set_ylabel("share of the attainable")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2 * len(problems), frameon=False)
        figure.savefig(path)
    return path
