"""Means with 95% intervals over seeds, paired differences, and the claims that are judged by them."""

import math
from dataclasses import dataclass

from rich.markup import escape

from kl_plugins.report.runs import mean_and_width


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half width of its 95% interval, by Student's t."""

    mean: float
    half: float

    @property
    def low(self):
        """The lower end."""
        return self.mean - self.half

    @property
    def high(self):
        """The upper end."""
        return self.mean + self.half

    def __format__(self, form):
        """`f"{interval:.3f}"` is "0.985 ± 0.004"."""
        return f"{self.mean:{form}} ± {self.half:{form}}"


def interval(values):
    """The `Interval` of some numbers, one per seed; of a single one it is infinitely wide."""
    values = list(values)
    mean, half = mean_and_width(values)
    return Interval(mean, half if len(values) > 1 else math.inf)


def select(rows, **wanted):
    """The rows of `runs.run_all` with these values."""
    return [row for row in rows if wanted.items() <= row.items()]


def of(rows, metric, **wanted):
    """The `Interval` of a metric over the seeds of the rows with these values."""
    return interval(row[metric] for row in select(rows, **wanted))


def paired(rows, metric, more, less, **wanted):
    """The `Interval` of `metric` of the arm `more` minus that of the arm `less`, seed by seed."""
    first, second = ({row["seed"]: row[metric] for row in select(rows, arm=arm, **wanted)} for arm in (more, less))
    if not first or first.keys() != second.keys():
        raise ValueError(f"{more} and {less} with {wanted}: seeds {sorted(first)} and {sorted(second)} are no pairs")
    return interval(first[seed] - second[seed] for seed in first)


@dataclass(frozen=True)
class Claim:
    """Something that the numbers show or don't: it holds if the whole interval of a difference is above 0."""

    says: str
    difference: Interval

    @property
    def verdict(self):
        """`"holds"`, `"contradicted"`, or `"not separated"`, if the interval has 0 in it."""
        if self.difference.low > 0:
            return "holds"
        return "contradicted" if self.difference.high < 0 else "not separated"


def judge(claims, console):
    """Print each claim with its verdict; returns those that don't hold."""
    colours = {"holds": "green", "contradicted": "red", "not separated": "yellow"}
    for claim in claims:
        colour = colours[claim.verdict]
        console.print(f"[{colour}]{claim.verdict:>13}[/]  {escape(claim.says)}  ({claim.difference:.3g})")
    return [claim for claim in claims if claim.verdict != "holds"]


def leaders(rows, metric="share"):
    """The arm with the largest mean, and those tied with it: 0 is in the interval of their paired difference."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    best = max(arms, key=lambda arm: of(rows, metric, arm=arm).mean)
    return best, [arm for arm in arms if arm != best and paired(rows, metric, best, arm).low <= 0]


def marked(rows, metric="share", form=".3f"):
    """arm -> its interval as text: the best one's in bold, and behind those that are tied with it "(tie)"."""
    best, ties = leaders(rows, metric)
    said = {row["arm"]: f"{of(rows, metric, arm=row['arm']):{form}}" for row in rows}
    return {
        arm: f"**{text}**" if arm == best else f"{text} (tie)" if arm in ties else text for arm, text in said.items()
    }
