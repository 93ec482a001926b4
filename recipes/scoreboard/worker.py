"""Measures one framework, in a process of its own: `python worker.py NAME FOLDER LM OUT`.

Frameworks want different versions of the same packages, patch each other, and may crash; none of that is then anybody
else's problem. What is found goes to OUT as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import language_model
import torch
import trained
from frameworks import framework, prepare

from kl_plugins.conformance import measure
from kl_plugins.conformance.hosts import Term, quiet
from kl_plugins.conformance.shapes import log_ratio_range

SAMPLES = 64
"""Completions in the batch that mean squared errors are of."""


def measured(entry: Term, drawn: dict[str, Any] | None) -> dict[str, Any]:
    """Every number of one row: bias, squared error, range of log-ratios, masks, and what a language model adds."""
    subject = entry.subject
    biases = {s: measure.bias(measure.expected_gradients(subject, s), s) for s in measure.SETTINGS}
    errors = {
        setting: [measure.squared_error(subject, case, setting, samples=SAMPLES) for case in measure.cases()]
        for setting in (measure.SETTINGS if not subject.grouped else ("on_policy",))
    }
    return {
        "name": subject.name,
        "where": entry.where,
        "default": entry.default,
        "claims": subject.claims,
        "origin": subject.origin,
        "off_policy": entry.off_policy,
        "knows_engine": subject.knows_engine,
        "bias": {setting: asdict(found) for setting, found in biases.items()},
        "mse": {s: {"of_each": [e for e, _ in each], "error": [e for _, e in each]} for s, each in errors.items()},
        "range": asdict(log_ratio_range(subject)),
        "masking": asdict(measure.masking(subject)),
        "language_model": {
            task: language_model.statistics(subject, each, samples=SAMPLES) for task, each in (drawn or {}).items()
        },
    }


def run(name: str, folder: Path | None, drawn: dict[str, Any] | None) -> dict[str, Any]:
    """All rows of a framework, with its version, and what its defaults train like."""
    chosen = framework(name)
    prepare(chosen, folder)
    start = time.perf_counter()
    with quiet():
        entries = chosen.entries()
        loaded = time.perf_counter()
        rows = [measured(entry, drawn) for entry in entries]
        seen = time.perf_counter()
        shares = [{"name": said, "shares": trained.shares(term)} for said, term in trained.terms(name, entries)]
    return {
        "framework": name,
        "version": version(chosen.distribution),
        "note": chosen.note,
        "rows": rows,
        "trained": shares,
        "seconds": {"import": loaded - start, "measure": seen - loaded, "train": time.perf_counter() - seen},
    }


def main(name: str, folder: str, model: str, out: str) -> None:
    """What the process does; an empty string for FOLDER or LM leaves that out."""
    torch.set_num_threads(1)
    drawn = language_model.load(Path(model)) if model else None
    found = run(name, Path(folder) if folder else None, drawn)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
