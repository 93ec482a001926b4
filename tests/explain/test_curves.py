"""`kl-plugins curves`: the coefficients are the analytic ones, the dead zones where the clamps put them."""

from __future__ import annotations

import csv
import json
import math
import re
import sys

import matplotlib.pyplot as plt
import pytest
import torch
import trl
import typer
from tiny_openrlhf import import_openrlhf
from typer.testing import CliRunner

from kl_plugins import KLSpec, kl_terms
from kl_plugins.cli.curves import curves as command
from kl_plugins.conformance import hosts
from kl_plugins.explain import curves
from kl_plugins.explain.curves import coefficients, exact_zeros, own_term
from kl_plugins.explain.host_terms import TERMS
from kl_plugins.report import curves as drawing

U = torch.tensor([-30.0, -7.5, -2.7, -2.5, -1.0, -0.3, 0.0, 1e-9, 0.3, 1.0, 4.0, 7.5, 12.0], dtype=torch.float64)
GRID = torch.linspace(-8, 13, 2101, dtype=torch.float64)
ANALYTIC = {
    "k1_as_loss": torch.ones_like,
    "k2_as_loss": lambda u: u,
    "k1_in_reward": lambda u: u,
    "k3_as_loss": lambda u: -torch.expm1(-u),
}
CLAMPS = {"k2": (-math.sqrt(20), math.sqrt(20)), "k3": (-2.6108686381498756, 10.999983298101)}


@pytest.fixture(scope="module", autouse=True)
def openrlhf():
    """Its own function: without a GPU the import needs a stand-in for flash-attn, which transformers must not see."""
    assert trl.GRPOTrainer
    import_openrlhf()


def trl_term(corrected=True):
    terms, _ = hosts.installed("TRL")
    return terms[0 if corrected else 1].subject


def openrlhf_term(name):
    terms, problem = hosts.installed("OpenRLHF")
    assert not problem
    (found,) = [term.subject for term in terms if term.subject.name == name]
    return found


@pytest.mark.parametrize(("name", "credit"), curves.OURS)
def test_ours_are_the_analytic_ones_and_those_of_kl_terms(name, credit):
    found = coefficients(own_term(name, credit), U)
    torch.testing.assert_close(found, ANALYTIC[name](U), rtol=1e-14, atol=0)
    spec = KLSpec(name=name, credit=credit, allow_biased=True)
    column = U[:, None]
    terms = kl_terms(spec, logp=column, ref_logp=torch.zeros_like(column), mask=torch.ones_like(column))
    assert torch.equal(found, terms.coefficient[:, 0])
    others = [other(U) for other in ANALYTIC.values() if not torch.equal(other(U), ANALYTIC[name](U))]
    assert not any(torch.allclose(found, other) for other in others)
    assert exact_zeros(own_term(name, credit), GRID) == []


@pytest.mark.parametrize(("corrected", "analytic"), [(True, "k2_as_loss"), (False, "k3_as_loss")])
def test_trls_own_function(corrected, analytic, monkeypatch):
    u = U[1:]  # at -30 its exp has swallowed half of the digits
    term = trl_term(corrected)
    run = f"trl {trl.__version__}: GRPOTrainer._compute_loss, run on a stub of a trainer, use_bias_correction_kl="
    assert term.origin == f"{run}{corrected}"
    torch.testing.assert_close(coefficients(term, u), ANALYTIC[analytic](u), rtol=1e-12, atol=1e-12)
    # What stands for it where it can't be run says so, and is the same.
    monkeypatch.setitem(sys.modules, "trl", None)
    stated = trl_term(corrected)
    assert stated.origin.startswith("formula of TRL 1.16, not run (TRL is installed, but can't be imported")
    torch.testing.assert_close(coefficients(stated, u), coefficients(term, u), rtol=1e-10, atol=1e-12)


def test_a_trl_that_the_stub_does_not_fit(monkeypatch):
    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", lambda self, model, inputs: self.something_new)
    term = trl_term()
    assert term.origin.startswith(
        f"formula of TRL 1.16, not run (TRL {trl.__version__} is installed, but its function"
    )
    torch.testing.assert_close(coefficients(term, U[1:]), U[1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", CLAMPS)
def test_openrlhfs_dead_zones_are_where_its_clamp_puts_them(estimator):
    """Its function computes in float32."""
    low, high = CLAMPS[estimator]
    value = {"k2": lambda u: u * u / 2, "k3": lambda u: math.expm1(-u) + u}[estimator]
    assert [value(low), value(high)] == pytest.approx([10, 10], rel=1e-9)
    term = openrlhf_term(estimator)
    (first, last) = exact_zeros(term, GRID)
    assert (first[0], last[1]) == (-8, 13)
    assert (first[1], last[0]) == pytest.approx((low, high), rel=1e-6)
    alive = GRID[(GRID > low) & (GRID < high) & (GRID.abs() > 1e-6)]
    analytic = ANALYTIC[f"{estimator}_as_loss"](alive)
    torch.testing.assert_close(coefficients(term, alive), analytic, rtol=1e-4, atol=1e-6)
    # What `explain` says is what was computed.
    said = TERMS[f"openrlhf_loss_{estimator}"]
    assert f"{abs(low):.2f}" in said.dead_zone
    assert f"{abs(low):.2f}" in said.coefficient
    (times,) = re.findall(r"([\d.]+) times less", said.dead_zone)
    assert float(times) == pytest.approx(math.exp(-low), rel=1e-2)


def test_openrlhfs_unbiased_gradient_has_none():
    term = openrlhf_term("unbiased_gradient")
    assert exact_zeros(term, GRID) == []
    torch.testing.assert_close(coefficients(term, GRID), GRID, rtol=1e-6, atol=1e-6)


def test_without_openrlhf_its_curves_are_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "openrlhf.models.utils", None)
    found, (line,) = curves.all_curves()
    assert not [curve for curve in found if curve.name.startswith("OpenRLHF")]
    assert line.startswith("OpenRLHF's curves are left out: OpenRLHF is installed, but can't be imported")


def test_what_float32_loses():
    u = torch.tensor([-20.0, -40.0, -89.0])
    term = trl_term()
    lost = coefficients(term, u)
    assert lost[:2].tolist() == [-32, 0]
    assert lost[2].isnan()
    assert torch.equal(coefficients(own_term("k2_as_loss", "token"), u), u)
    (zero,) = exact_zeros(term, torch.linspace(-96, 0, 1921))
    assert zero == pytest.approx((-88.72, -20.1), rel=1e-2)
    assert torch.allclose(coefficients(term, u.double())[:1], u[:1].double(), rtol=1e-6)  # it is a matter of float32


@pytest.fixture(scope="module")
def found(openrlhf):
    return curves.all_curves()[0]


def test_every_curve_has_its_place_in_the_picture(found, tmp_path, monkeypatch):
    assert {(curve.panel, curve.name) for curve in found} == set(drawing._DRAWN)
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    pictures = [drawing.plot(found, tmp_path / f"{dark}.png", dark=dark).read_bytes() for dark in (False, True)]
    assert pictures[0] != pictures[1]
    for figure in figures:
        figure.set_dpi(150)  # as it was saved
        figure.canvas.draw()
        page = figure.get_window_extent()
        texts = [text for axis in figure.axes for text in axis.texts]
        assert len(texts) >= len(found)
        for axis in figure.axes:
            boxes = [text.get_window_extent() for text in axis.texts]
            assert all(axis.get_window_extent().x0 <= box.x0 and box.x1 <= page.x1 for box in boxes)
            overlapping = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
            assert overlapping == []
    monkeypatch.undo()
    for figure in figures:
        plt.close(figure)


def test_a_picture_without_openrlhf(found, tmp_path):
    some = [curve for curve in found if not curve.name.startswith("OpenRLHF")]
    assert drawing.plot(some, tmp_path / "some.svg").stat().st_size > 10_000


def test_the_numbers(found, tmp_path):
    drawing.write(found, tmp_path / "curves.json")
    rows = json.loads((tmp_path / "curves.json").read_text(), parse_constant=pytest.fail)  # no NaN, which isn't JSON
    assert [row["name"] for row in rows] == [curve.name for curve in found]
    assert rows[0]["coefficient"] == found[0].coefficient
    assert None in next(row for row in rows if (row["panel"], row["name"]) == ("float32", "TRL GRPO"))["coefficient"]
    drawing.write(found, tmp_path / "curves.csv")
    with (tmp_path / "curves.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == sum(len(curve.u) for curve in found)
    assert [float(row["coefficient"]) for row in table[: len(found[0].u)]] == found[0].coefficient


app = typer.Typer()
app.command()(command)


def test_the_command(tmp_path):
    out, data = tmp_path / "new" / "c.png", tmp_path / "c.csv"
    run = CliRunner().invoke(app, ["--out", str(out), "--data", str(data), "--dark"])
    assert run.exit_code == 0, run.output
    assert out.is_file()
    assert data.is_file()
    assert "hosts: OpenRLHF k3" in run.output
    assert "exactly 0 for u in [-8, -2.611]" in " ".join(run.output.split())
    assert f"trl {trl.__version__}: GRPOTrainer._compute_loss, run" in " ".join(run.output.split())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--out", "c.bmp"), "ends in .png, .svg or .pdf"),
        (("--data", "c.txt"), "end in .json or .csv"),
        (("--out", "/proc/none/c.png"), "error:"),
    ],
)
def test_what_cannot_be_written_is_said(words, says, monkeypatch):
    monkeypatch.setattr(curves, "all_curves", lambda: ([], []))
    run = CliRunner().invoke(app, list(words))
    assert run.exit_code == 2
    assert says in run.output


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = CliRunner().invoke(app, [])
    assert run.exit_code == 2
    assert "pip install 'kl_plugins[plot]'" in run.output
