"""`Recorder`: what is logged and what a controller gets are those of the whole batch, however it was split."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kl_plugins import KLSpec, kl_terms
from kl_plugins.core.controllers import ControllerSpec
from kl_plugins.core.metrics import SUMS, WEIGHT_METRICS, kl_metrics, kl_sums, next_beta
from kl_plugins.integration.recorder import Recorder

BETA = 0.25
SPEC = KLSpec.from_name("k2_as_loss", weight_clip=(0.0, 1.5))
LENGTHS = torch.tensor([1, 6, 2, 5, 3, 0])


def batch():
    """Six completions of unlike lengths (one is empty), whose KL grows from row to row, off-policy."""
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(6, 6, generator=generator, dtype=torch.float64) - 2
    return {
        "logp": logp,
        "ref_logp": logp - torch.arange(6.0)[:, None] - torch.rand(6, 6, generator=generator),
        "mask": torch.arange(6) < LENGTHS[:, None],
        "behavior_logp": logp + 0.5 * torch.randn(6, 6, generator=generator),
    }


def terms_of(rows):
    return kl_terms(SPEC, **{name: x[rows] for name, x in batch().items()})


ALL = slice(None)
SPLITS = {
    "one": [ALL],
    "two": [slice(0, 2), slice(2, 6)],
    "rows": [slice(i, i + 1) for i in range(6)],
    "empty first": [slice(5, 6), slice(0, 5)],
}


def whole_metrics():
    """The numbers of the whole batch, written out here."""
    data, terms = batch(), terms_of(ALL)
    mask = data["mask"]
    u = (data["logp"] - data["ref_logp"])[mask]
    ratio = (data["logp"] - data["behavior_logp"]).exp()[mask]
    weight = ratio.clamp(max=1.5)
    assert terms.cut.any()
    return {
        "kl/k1": u.mean().item(),
        "kl/k2": (u.square() / 2).mean().item(),
        "kl/k3": ((-u).exp() - 1 + u).mean().item(),
        "kl/loss": BETA * (u.square() / 2).mean().item(),
        "kl/ess": (weight.sum() ** 2 / weight.square().sum() / len(u)).item(),
        "kl/weight_max": 1.5,
        "kl/clipped": (ratio > 1.5).double().mean().item(),
        "kl/unscored": 0,
        "kl/dropped": 0,
        "kl/beta": 0.1,
    }


def problems(recorder_class):
    """The splits, and the numbers of each, in which a recorder differs from the whole batch."""
    found = []
    for name, rows in SPLITS.items():
        recorder = recorder_class()
        for part in rows:
            recorder.add(terms_of(part), BETA)
        wanted, metrics = whole_metrics(), recorder.metrics(beta=0.1)
        found += [f"{name}: {key}" for key in wanted if metrics[key] != pytest.approx(wanted[key], rel=1e-9)]
        found += [f"{name}: {key}" for key in metrics.keys() - wanted.keys()]
        update = recorder.since_update()
        if update is None or not torch.allclose(update, kl_sums(terms_of(ALL), beta=BETA)):
            found.append(f"{name}: update")
    return found


def test_the_numbers_are_those_of_the_whole_batch_however_it_is_split():
    assert problems(Recorder) == []


class MeanOfMicroBatches(Recorder):
    """The wrong twin: it averages the means of micro-batches, as if all had as many tokens."""

    def add(self, terms, beta):
        super().add(terms, beta)
        own = kl_metrics(kl_sums(terms, beta=beta), weight_max=terms.weight.max(), beta=beta)
        vars(self).setdefault("means", []).append(own)

    def metrics(self, **options):
        means = {name: sum(each[name] for each in self.means) / self.added for name in self.means[0]}
        return super().metrics(**options) | {name: means[name] for name in ("kl/k1", "kl/k2", "kl/loss")}


class WithoutWeights(Recorder):
    """The wrong twin: it forgets that tokens are weighted."""

    def add(self, terms, beta):
        weights = SUMS.index("weight"), SUMS.index("weight_squared")
        super().add(terms, beta)
        self._sums = self._sums.clone()
        self._sums[list(weights)] = self._sums[SUMS.index("tokens")].item()


class LastMicroBatch(Recorder):
    """The wrong twin: its largest weight is that of the last micro-batch."""

    def add(self, terms, beta):
        self._weight_max = None
        super().add(terms, beta)


class LogEndsUpdate(Recorder):
    """The wrong twin: a log takes what a controller is waiting for."""

    def metrics(self, **options):
        self._since_update = None
        return super().metrics(**options)


@pytest.mark.parametrize(
    ("twin", "differs_in"),
    [
        (MeanOfMicroBatches, {"kl/k1", "kl/k2", "kl/loss"}),
        (WithoutWeights, {"kl/ess"}),
        (LastMicroBatch, {"kl/weight_max"}),
        (LogEndsUpdate, {"update"}),
    ],
)
def test_twins_that_are_seen(twin, differs_in):
    assert {problem.partition(": ")[2] for problem in problems(twin)} == differs_in


def test_each_log_and_each_update_starts_anew():
    recorder = Recorder()
    assert recorder.metrics(beta=BETA) == {}
    assert recorder.since_update() is None
    recorder.add(terms_of(slice(0, 3)), BETA)
    recorder.metrics(beta=BETA)
    recorder.add(terms_of(slice(3, 6)), BETA)
    assert recorder.metrics(beta=BETA)["kl/k1"] == pytest.approx(u_mean(slice(3, 6)))
    assert recorder.metrics(beta=BETA) == {}
    torch.testing.assert_close(recorder.since_update(), kl_sums(terms_of(ALL), beta=BETA))  # of both
    assert recorder.since_update() is None
    assert recorder.added == 2


def u_mean(rows):
    terms = terms_of(rows)
    return terms.log_ratio[terms.mask].mean().item()


def test_a_micro_batch_without_tokens_is_one_all_the_same():
    recorder = Recorder()
    recorder.add(terms_of(slice(5, 6)), BETA)
    metrics = recorder.metrics(beta=BETA)
    assert metrics.pop("kl/beta") == BETA
    assert set(metrics.values()) == {0.0}


def test_what_is_logged_is_what_the_run_has():
    recorder = Recorder()
    for own_weights in (True, False):
        recorder.add(terms_of(ALL), BETA)
        names = recorder.metrics(beta=BETA, own_weights=own_weights).keys()
        assert set(WEIGHT_METRICS) & names == (set(WEIGHT_METRICS) if own_weights else set())
        assert "kl/left_out" not in names
    recorder.add(terms_of(ALL), BETA)
    assert recorder.metrics(beta=BETA, leaves_out=True)["kl/left_out"] == 0


def two_ranks(parts, *, in_step):
    """A recorder of rank 0, and how often it asked the other, which added `parts[1]`."""
    asked = []
    other = Recorder()
    for rows in parts[1]:
        other.add(terms_of(rows), BETA)
    sums, largest = other._sums, other._weight_max

    def over(x, theirs, merge):
        asked.append(merge)
        return x if theirs is None else merge(x.to(theirs), theirs)

    recorder = Recorder(
        sum_over_ranks=partial(over, theirs=sums, merge=torch.add),
        max_over_ranks=partial(over, theirs=largest, merge=torch.maximum),
        in_step=in_step,
    )
    for rows in parts[0]:
        recorder.add(terms_of(rows), BETA)
    return recorder, asked


def test_numbers_are_over_all_ranks():
    recorder, _ = two_ranks(([slice(0, 1)], [slice(1, 6)]), in_step=True)
    assert recorder.metrics(beta=0.1) == pytest.approx(whole_metrics(), rel=1e-9)
    torch.testing.assert_close(recorder.since_update(), kl_sums(terms_of(ALL), beta=BETA))


def test_a_rank_without_a_micro_batch_takes_part_unless_ranks_are_in_step():
    recorder, asked = two_ranks(([], [ALL]), in_step=False)
    assert recorder.metrics(beta=0.1) == pytest.approx(whole_metrics(), rel=1e-6)
    torch.testing.assert_close(recorder.since_update(), kl_sums(terms_of(ALL), beta=BETA))
    assert asked == [torch.add, torch.maximum, torch.add]
    recorder, asked = two_ranks(([], []), in_step=False)
    assert (recorder.metrics(beta=0.1), recorder.since_update()) == ({}, None)
    assert asked == [torch.add, torch.add]
    recorder, asked = two_ranks(([], []), in_step=True)
    assert (recorder.metrics(beta=0.1), recorder.since_update()) == ({}, None)
    assert asked == []


def test_a_controller_moves_on_its_sums():
    options = {"kl_controller": "proportional", "kl_target": 0.1, "kl_horizon": 2.0}
    found, plain = (ControllerSpec(**options).start(BETA) for _ in range(2))
    recorder = Recorder()
    for rows in SPLITS["rows"]:
        recorder.add(terms_of(rows), BETA)
    terms = terms_of(ALL)
    plain.update(kl_sum=terms.log_ratio.sum().item(), tokens=int(LENGTHS.sum()), sequences=5)
    assert next_beta(found, recorder.since_update()) == plain.beta == BETA * 1.1
