"""Training runs as a report compares them: what they logged, wherever they logged it, and means over seeds.

A run is a `metrics.jsonl` (the recipes'), TensorBoard's event files (OpenRLHF's and TRL's), or the
`trainer_state.json` of a checkpoint of transformers' trainers; where it has several, the first of these.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kl_plugins.errors import ConfigError
from kl_plugins.report.plots import read_metrics

JSON_LINES, EVENTS, STATE = "metrics.jsonl", "events.out.tfevents", "trainer_state.json"
SEED = re.compile(r"(?P<name>.*?)[-_/ ]?seed[-_]?\d+$")
# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number that is logged over the steps."""

    keys: tuple[str, ...]
    """The names under which it is logged; of those that a row has, the first is read."""
    title: str
    means: str
    """What it measures and how to read it, in two sentences."""
    asked: bool = True
    """Whether it is listed as missing where no run has it."""


METRICS = (
    Metric(
        keys=("reward",),
        title="Reward",
        means="The mean reward of the completions of a step. What training raises; the KL is what it costs.",
    ),
    Metric(
        keys=("kl/k1",),
        title="k1, nats a token",
        means="The mean log-ratio of policy and reference. It estimates the KL without bias, can be negative, and is "
        "the noisiest of the three.",
    ),
    Metric(
        keys=("kl/k2",),
        title="k2, nats a token",
        means="Half the mean squared log-ratio. Biased as an estimate of the KL, but never negative.",
    ),
    Metric(
        keys=("kl/k3",),
        title="k3, nats a token",
        means="exp(-u) - 1 + u of the log-ratio u. Unbiased and never negative, with rare large values where the "
        "policy has left the reference's tokens.",
    ),
    Metric(
        keys=("kl",),
        title="KL as the host logs it",
        means="The trainer's own number, with the meaning that the trainer gives it. Compare it within a host only.",
    ),
    Metric(
        keys=("kl/loss",),
        title="KL term of the loss",
        means="beta times the token mean of the term's value. Its size says nothing about its gradient.",
    ),
    Metric(
        keys=("kl/ess",),
        title="Effective sample size, share",
        means="(sum of weights)^2 / sum of squares, as a share of tokens. Near 1 samples are as good as on-policy; "
        "where it is small a few tokens decide the gradient.",
    ),
    Metric(
        keys=("kl/weight_max",),
        title="Largest importance weight",
        means="The largest weight of a token. At the bound of weight_clip it was cut.",
    ),
    Metric(
        keys=("kl/clipped",),
        title="Share of weights cut",
        means="Tokens whose weight was truncated, masked or clipped. Each cut trades variance for bias.",
    ),
    Metric(
        keys=("kl/beta",),
        title="beta",
        means="The coefficient of the KL. It moves only if a controller moves it.",
    ),
    Metric(
        keys=("kl/dead",),
        title="Share of dead tokens",
        means="Tokens whose KL gradient is exactly 0 though the policy has left the reference. There the penalty is "
        "switched off.",
        asked=False,
    ),
    Metric(
        keys=("kl/gradient_ratio",),
        title="KL gradient over the rest",
        means="The norm of the gradient of the KL term over that of the rest of the loss. Far above 1 the KL decides "
        "where the policy goes, far below 1 it hardly matters.",
        asked=False,
    ),
    Metric(
        keys=("kl/engine_gap",),
        title="Gap of the rollout engine, nats",
        means="The mean absolute difference of the engine's log-probs and the trainer's, for the same policy and "
        "tokens. What importance weights have to make up for.",
        asked=False,
    ),
    Metric(
        keys=("kl/left_out",),
        title="Share of tokens left out",
        means="Tokens whose KL was left out, as kl_leave_out asks for. The means above are over the others.",
        asked=False,
    ),
)


@dataclass(kw_only=True)
class LoggedRun:
    """What a run has logged of `METRICS`."""

    name: str
    path: Path
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    """Title of the metric -> step -> value, NaN where none could be computed."""
    steps: int = 0
    cut_off: bool = False
    """The last line wasn't complete: the run was interrupted while it wrote."""


def read_runs(paths: Sequence[Path], groups: Sequence[str] = ()) -> dict[str, list[LoggedRun]]:
    """Runs by the name of their configuration, seeds together.

    Args:
        paths: Folders with logs of runs in or below them, or such files.
        groups: `NAME=PATH,PATH`.

    Raises `ConfigError` for a path without metrics, a group that can't be read, or a file that isn't metrics.
    """
    found: dict[str, list[Path]] = {}
    for text in groups:
        name, equals, listed = text.partition("=")
        if not (name and equals and listed):
            raise ConfigError(f"--group {text!r} was given: write NAME=PATH,PATH")
        found.setdefault(name, []).extend(file for part in listed.split(",") for file in _files(Path(part)))
    loose = [file for path in paths for file in _files(path)]
    for file, name in zip(loose, _names(loose), strict=True):
        match = SEED.match(name)
        found.setdefault(match["name"] if match and match["name"] else name, []).append(file)
    if not found:
        raise ConfigError("no run was named: give folders of runs, or their logs")
    return {name: [_read(file) for file in dict.fromkeys(files)] for name, files in found.items()}


def _files(path: Path) -> list[Path]:
    """The logs of the runs in or below a folder: files, and folders of TensorBoard's event files."""
    if path.is_file():
        return [path.parent if path.name.startswith(EVENTS) else path]
    lines = [path / JSON_LINES] if (path / JSON_LINES).is_file() else sorted(path.rglob(JSON_LINES))
    events = sorted({file.parent for file in path.rglob(f"{EVENTS}*")})
    states = {file.parent.parent: file for file in sorted(path.rglob(STATE), key=_checkpoint_step)}  # the last of each
    below = [
        *lines,
        *(folder for folder in events if not any(file.parent in (folder, *folder.parents) for file in lines)),
        *(
            file
            for run, file in states.items()
            if not any(run in (log, *log.parents) for log in events)
            and not any(log.parent in (run, *run.parents) for log in lines)
        ),
    ]
    if not below:
        what = f"has no {JSON_LINES}, {EVENTS}* or {STATE} in or below it" if path.is_dir() else "isn't there"
        raise ConfigError(f"{path} was given, but it {what}: name a run's folder or its log")
    return below


def _checkpoint_step(state: Path) -> tuple[int, str]:
    number = state.parent.name.rpartition("-")[2]
    return (int(number) if number.isdigit() else -1, str(state))


def _names(files: Sequence[Path]) -> list[str]:
    """The part of each run's folder that tells it from the others, with the folder above a bare `seed0`."""
    folders = [_folder(file).absolute() for file in files]
    if not folders:
        return []
    common = Path(os.path.commonpath(folders))
    names = [str(folder.relative_to(common)) if folder != common else folder.name for folder in folders]
    return [
        f"{folder.parent.name}/{name}" if re.fullmatch(r"seed[-_]?\d+", name) else name
        for name, folder in zip(names, folders, strict=True)
    ]


def _folder(log: Path) -> Path:
    """The folder that a run is named after."""
    if log.is_dir():
        return log
    if log.name == STATE:
        return log.parent.parent
    return log.parent if log.name == JSON_LINES else log.with_suffix("")


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.is_dir():
        return _tensorboard_rows(path)
    if path.name == STATE:
        return list(json.loads(path.read_text())["log_history"])
    return read_metrics(path)


def _tensorboard_rows(folder: Path) -> list[dict[str, Any]]:
    """One row a step, of the training's scalars ("train/" is taken off); what was cut off is left out."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise ConfigError(
            f"{folder} holds TensorBoard's event files, which need it: pip install tensorboard"
        ) from error
    logged = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: all of them
    logged.Reload()
    rows: dict[int, dict[str, Any]] = {}
    for tag in logged.Tags()["scalars"]:
        if not tag.startswith("eval/"):
            for event in logged.Scalars(tag):
                rows.setdefault(event.step, {"step": event.step})[tag.removeprefix("train/")] = event.value
    return [rows[step] for step in sorted(rows)]


def _read(path: Path) -> LoggedRun:
    run = LoggedRun(name=_folder(path).name, path=path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            rows = _rows(path)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ConfigError(str(error) if str(path) in str(error) else f"{path} can't be read: {error}") from error
    run.cut_off = any("cut off" in str(warning.message) for warning in caught)
    for number, row in enumerate(rows, start=1):
        step = row.get("step", number)
        for metric in METRICS:
            value = next((row[key] for key in metric.keys if row.get(key) is not None), None)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not isinstance(step, int | float):
                raise ConfigError(
                    f"{path}, row {number}: {metric.keys[0]} of step {step!r} is {value!r}, not a number"
                )
            run.curves.setdefault(metric.title, {})[int(step)] = value if math.isfinite(value) else math.nan
            run.steps = max(run.steps, int(step))
    if not run.curves:
        raise ConfigError(f"{path} has {len(rows)} rows, but none of them has a metric such as reward or kl/k1")
    return run


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A metric of a configuration over the steps: the mean over its seeds, with a 95% interval of that."""

    steps: list[int]
    values: list[float]
    half_widths: list[float]
    """0 with a single seed."""


def mean_over_seeds(curves: Sequence[dict[int, float]]) -> Mean:
    """Average the curves (step -> value) of several seeds, at the steps that all of them have.

    Runs may have been cut off at different steps. Where one seed's value is NaN, so is the mean.
    """
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    values, widths = [], []
    for step in steps:
        column = [curve[step] for curve in curves]
        mean, width = mean_and_width(column)
        values.append(mean)
        widths.append(width)
    return Mean(steps=steps, values=values, half_widths=widths)


def mean_and_width(column: Sequence[float]) -> tuple[float, float]:
    """Mean, and the half width of its 95% interval by Student's t; 0 for a single number."""
    if any(map(math.isnan, column)):
        return math.nan, math.nan
    if len(column) < 2:
        return column[0], 0.0
    freedom = len(column) - 1
    t = STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96 + 2.7 / freedom
    return statistics.fmean(column), t * statistics.stdev(column) / math.sqrt(len(column))


def pieces(mean: Mean) -> Iterator[tuple[list[int], list[float], list[float]]]:
    """Split a curve at its NaNs: steps, values and half widths of each piece between them."""
    steps: list[int] = []
    values: list[float] = []
    widths: list[float] = []
    for step, value, width in zip(mean.steps, mean.values, mean.half_widths, strict=True):
        if math.isnan(value):
            if steps:
                yield steps, values, widths
            steps, values, widths = [], [], []
        else:
            steps.append(step)
            values.append(value)
            widths.append(width)
    if steps:
        yield steps, values, widths


__all__ = ["METRICS", "LoggedRun", "Mean", "Metric", "mean_and_width", "mean_over_seeds", "pieces", "read_runs"]
