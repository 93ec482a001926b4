"""The numbers of `kl_plugins.core.monitor` once more, token by token, in numpy and plain loops."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np


def mean_and_error(rows):
    """Ratio mean and clustered standard error of rows, each the values of one completion's tokens."""
    rows = [np.asarray(row) for row in rows if len(row)]
    tokens = sum(len(row) for row in rows)
    mean = sum(row.sum() for row in rows) / tokens
    deviations = sum((row - mean).sum() ** 2 for row in rows)
    error = math.sqrt(len(rows) / (len(rows) - 1) * deviations) / tokens if len(rows) > 1 else None
    return mean, error


def plain_metrics(*, logp, mask, ref_logp=None, old_logp=None, engine_logp=None, classes=None):
    """What `monitor_metrics(monitor_sums(...))` should say of (B, T) tensors, but for `coefficient` and `gradient`."""
    arrays = {"logp": logp, "ref": ref_logp, "old": old_logp, "engine": engine_logp, "class": classes}
    array = {name: np.asarray(x.float()).astype(float) for name, x in arrays.items() if x is not None}
    tokens = [(i, t) for i in range(mask.shape[0]) for t in range(mask.shape[1]) if mask[i, t]]
    found = {}
    if ref_logp is not None:
        u = array["logp"] - array["ref"]
        finite = [(i, t) for i, t in tokens if math.isfinite(u[i, t])]

        def report(name, value, chosen=lambda i, t: True):
            per_completion = [[value(u[j, t]) for j, t in finite if j == i and chosen(j, t)] for i in range(len(u))]
            if any(per_completion):
                found[f"kl/{name}"], found[f"kl/{name}_se"] = mean_and_error(per_completion)

        report("k1", lambda x: x)
        report("k2", lambda x: x * x / 2)
        report("k3", lambda x: math.expm1(-x) + x)
        bounds = [0, 1, 4, 16, 64, 256, 1024, 4096, 10**9]
        for low, high in pairwise(bounds):
            name = f"{low}-up" if high == 10**9 else f"{low}-{high - 1}" if high > low + 1 else str(low)
            report(f"position/{name}", lambda x: x, lambda i, t, low=low, high=high: low <= t < high)
        for index, name in enumerate(("text", "eos", "special")):
            if classes is not None:
                report(f"class/{name}", lambda x: x, lambda i, t, index=index: array["class"][i, t] == index)
        rows = [[t for j, t in tokens if j == i] for i in range(len(u))]
        whole = [
            [sum(u[i, t] for t in row)] for i, row in enumerate(rows) if row and all((i, t) in finite for t in row)
        ]
        found["kl/sequence"], found["kl/sequence_se"] = mean_and_error(whole)
        found["kl/nonfinite"] = len(tokens) - len(finite)
        found["kl/dead_at_10/k2"] = np.mean([u[at] ** 2 / 2 > 10 for at in finite])
        found["kl/dead_at_10/k3"] = np.mean([math.expm1(-u[at]) + u[at] > 10 for at in finite])
    behavior = array.get("engine", array.get("old"))
    if behavior is not None:
        scored = [at for at in tokens if math.isfinite(array["logp"][at] - behavior[at])]
        ratio = np.array([math.exp(array["logp"][at] - behavior[at]) for at in scored])
        found["kl/ratio_ess"] = ratio.sum() ** 2 / (ratio**2).sum() / len(ratio)
        found["kl/ratio_max"] = ratio.max()
        found["kl/ratio_above_2"], found["kl/ratio_above_10"] = (ratio > 2).mean(), (ratio > 10).mean()
        found["kl/ratio_below_0.1"] = (ratio < 0.1).mean()
        found["kl/ratio_unscored"] = len(tokens) - len(scored)
    if engine_logp is not None:
        gap = array["engine"] - array.get("old", array["logp"])
        scored = [gap[at] for at in tokens if math.isfinite(gap[at])]
        found["kl/engine_gap"], found["kl/engine_gap_max"] = np.mean(np.abs(scored)), np.abs(scored).max()
        found["kl/engine_k1"], found["kl/engine_unscored"] = np.mean(scored), len(tokens) - len(scored)
    return {name: float(value) for name, value in found.items() if value is not None}
