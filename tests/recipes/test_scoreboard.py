"""The scoreboard: what it measures on ours and on TRL, what it says of those that are missing, what it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from kl_plugins.conformance import measure
from kl_plugins.conformance.hosts import Term
from kl_plugins.conformance.subject import Scored, from_function, from_spec
from kl_plugins.core.spec import KLSpec
from kl_plugins.oracle import relative_error, second_moment
from kl_plugins.patching.versions import installed_version

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "scoreboard"))  # as Python does for a script
import frameworks
import language_model
import pages
import scoreboard
import standings
import trained
import worker

app = typer.Typer()
app.command()(scoreboard.main)


@pytest.fixture(scope="module")
def drawn():
    """Models that have hardly been trained, and few completions."""
    return {
        task: language_model.draw(language_model.train(task, steps=5, updates=2), prompts=64) for task in ("plain",)
    }


@pytest.fixture(scope="module")
def entries():
    return {entry.subject.name: entry for entry in frameworks.ours()}


@pytest.fixture(scope="module")
def rows(entries):
    """Two of ours and two of a made-up framework, measured."""
    names = ("k1_in_reward to_go", "exact_in_reward to_go", "exact_in_reward to_go, prefix weights")
    clamped = from_function(lambda logp, ref: ((logp - ref).square() / 2).clamp(max=10), name="k2, clamped")
    reward = from_function(lambda logp, ref: logp - ref, kind="reward", name="k1 in reward")
    theirs = [Term(subject=clamped, where="loss", default=True)]
    theirs.append(Term(subject=reward, where="reward"))
    return [worker.measured(entries[name], None) for name in names], [worker.measured(e, None) for e in theirs]


def shares(mean):
    """Of three seeds each, in two regimes of one problem."""
    return {"terminal": {"on-policy": [mean - 0.01, mean, mean + 0.01], "stale": [0.5, 0.5, 0.5]}}


@pytest.fixture(scope="module")
def found(rows):
    ours, theirs = rows
    result = {"python": "3", "seconds": 1.0, "left_out": {"NeMo-RL": "a placeholder"}, "language_model": {}}
    result["frameworks"] = [
        {
            "framework": name,
            "version": "1",
            "note": "",
            "rows": some,
            "trained": [{"name": row, "shares": shares(mean)}],
            "seconds": {"import": 0.0, "measure": 1.0, "train": 1.0},
        }
        for name, some, row, mean in (
            ("kl_plugins", ours, "reverse_kl", 0.99),
            ("Other", theirs, "k2, clamped", 0.8),
        )
    ]
    return result | {"goals": scoreboard.goals(result)}


def test_every_configuration_of_ours_is_a_row(entries):
    from kl_plugins.core.registry import all_losses

    for name, loss in all_losses().items():
        for credit, gradient in loss.gradient_of.items():
            assert (f"{name} {credit}" in entries) == (gradient not in ("zero", "biased"))
    assert {"exact_as_loss token", "exact_in_reward to_go"} <= set(entries)


@pytest.mark.parametrize("setting", measure.SETTINGS)
def test_whole_weights_leave_no_bias(entries, setting):
    for name, entry in entries.items():
        if entry.off_policy in ("prefix", "sequence"):
            bias = measure.bias(measure.expected_gradients(entry.subject, setting), setting)
            assert bias.worst[entry.subject.claims] < scoreboard.GOALS["bias"], name


def test_the_squared_error_is_bias_and_variance_over_samples():
    """Against the oracle's own second moment, and by drawing where a baseline ties rows together."""
    case, spec = measure.cases()[4], KLSpec(name="k1_in_reward")
    of_one = (spec, case.sequences, case.policy, case.reference)
    mean, variance = second_moment(*of_one, group_size=1)
    subject = from_spec(spec)
    found = measure.moments(subject, case, "on_policy")
    assert relative_error(found[0], mean) < 1e-12
    assert found[1] == pytest.approx(float(variance))
    scale = float(case.true("reverse_kl").square().sum())
    exact, none = measure.squared_error(subject, case, "on_policy", samples=64)
    assert (exact, none) == (pytest.approx(float(variance) / 64 / scale), 0.0)
    drawing = from_spec(spec, grouped=True)  # the same, but drawn in batches
    sampled, error = measure.squared_error(drawing, case, "on_policy", samples=64, batches=400)
    assert abs(sampled - exact) < 4 * error < exact


def test_what_a_clamp_and_a_placeholder_do_is_said(found):
    page = pages.markdown(found)
    row, _ = [line for line in page.splitlines() if line.startswith("| Other k2, clamped *")]
    assert "< -4.5, > 4.5" in row
    assert "-4.5 to 4.5" in row
    assert "Not here: NeMo-RL: a placeholder." in page
    assert "kl_plugins 1, Other 1" in page


def test_goals_are_reported_as_measured(found):
    goals = found["goals"]
    assert goals["bias"]["measured"] < 1e-12
    assert goals["attained"]["terminal"]["mean"] == pytest.approx(0.99)
    assert goals["ahead"] == {"regimes": "1 of 2 regimes", "not": [("terminal", "stale", "Other k2, clamped", "tie")]}
    said = list(pages.goal_lines(found))
    assert any("terminal reward: goal at least 0.98, measured 0.990 ± 0.0" in line for line in said)
    assert "not apart: Other k2, clamped (tie), terminal reward, stale" in said


@pytest.mark.parametrize(("mean", "verdict"), [(1.1, "ahead"), (0.98, "tie"), (0.9, "")])
def test_a_framework_that_wins_or_ties_is_shown_as_such(found, mean, verdict):
    theirs = found["frameworks"][1] | {"trained": [{"name": "k2", "shares": shares(mean)}]}
    changed = found | {"frameworks": [found["frameworks"][0], theirs]}
    columns, rows = standings.share_table(changed, "terminal")
    assert columns == ["terminal reward", "on-policy", "stale"]
    (row,) = [row for row in rows if row[0] == "Other k2"]
    assert row[1].startswith(f"{mean:.3f} ± 0.0")
    assert row[1].endswith(f" ({verdict})" if verdict else "25")
    others = scoreboard.goals(changed)["ahead"]["not"]
    assert [each[2:] for each in others if each[1] == "on-policy"] == ([("Other k2", verdict)] if verdict else [])


def test_the_error_of_the_kl_alone_stands_apart_with_the_reason(found):
    *_, facts, errors = pages.tables(found)
    assert "MSE at 64" not in facts[1]
    assert "MSE at 64" in errors[1]
    assert "This is not the aim" in errors[3]


def test_rows_that_agree_in_everything_stand_together(found):
    twice = found | {"frameworks": [*found["frameworks"], found["frameworks"][1] | {"framework": "Third"}]}
    assert "Other k2, clamped *; Third k2, clamped *" in [line.said for line in pages.lines(twice)]


def test_the_language_models_estimates(drawn, entries):
    """Bias and error of what is the target itself are the noise's, and intervals hold it."""
    plain = drawn["plain"]
    found = language_model.statistics(entries["exact_in_reward to_go"].subject, plain, samples=64)
    bias = language_model.jackknife(found["on_policy"]["bias"])
    assert bias["low"] < 0 < bias["high"]
    error = language_model.jackknife(found["on_policy"]["mse"])
    assert 0 < error["low"] < error["value"] < error["high"]
    target = SimpleNamespace(logit_gradient=language_model._low_noise)
    itself = language_model.statistics(target, plain, samples=64)["on_policy"]
    assert abs(itself["bias"][0]) < 1e-6
    assert itself["mse"][0] < error["value"]


def test_a_completion_ends_with_its_first_newline():
    tokens = torch.tensor([[3, 0, 0, 0], [3, 4, 5, 6], [0, 0, 0, 0]])
    assert language_model.mask_of(tokens).long().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


def test_trl_by_its_own_functions():
    entries = {entry.subject.name: entry.subject for entry in frameworks.framework("TRL").entries()}
    ratio, plain, rloo = entries.values()
    means = {name: measure.expected_gradients(s, "stale") for name, s in (("ratio", ratio), ("plain", plain))}
    assert measure.bias(means["ratio"], "stale").names(1e-9) == ["local_reverse_kl"]
    assert measure.bias(means["plain"], "stale").names(1e-9) == []
    case = measure.cases()[0]
    mean, _ = measure.moments(rloo, case, "on_policy")  # every pair of completions
    assert relative_error(mean, case.true("reverse_kl")) < 1e-6


class TestTrained:
    """What is trained: the frameworks' own functions, down to the advantages."""

    @pytest.fixture
    def rollout(self):
        generator = torch.Generator().manual_seed(0)
        logp, ref_logp = torch.randn(2, 8, 5, dtype=torch.float64, generator=generator)
        outcome = torch.randn(8, dtype=torch.float64, generator=generator)
        scored = Scored(logp=logp, ref_logp=ref_logp, mask=torch.ones(8, 5).bool(), old_logp=logp, group_size=4)
        return scored, outcome

    @staticmethod
    def less_others(x, size=4):
        groups = x.view(-1, size, *x.shape[1:])
        return ((groups - groups.mean(1, keepdim=True)) * size / (size - 1)).view_as(x)

    def test_trl_rloo(self, rollout):
        scored, outcome = rollout
        (rloo,) = trained.trl()
        found = rloo.advantages(scored, outcome, 0.3)
        whole = outcome - 0.3 * (scored.logp - scored.ref_logp).sum(-1)
        torch.testing.assert_close(found, self.less_others(whole)[:, None].expand(8, 5), rtol=1e-5, atol=1e-5)

    def test_openrlhf_sums_the_kl_from_the_token_on_and_subtracts_nothing(self, rollout):
        scored, outcome = rollout
        by_name = {each.name: each.advantages for each in trained.openrlhf()}
        later = (scored.logp - scored.ref_logp).flip(-1).cumsum(-1).flip(-1)
        found = by_name["k1 in reward, rloo"](scored, outcome, 0.3)
        torch.testing.assert_close(found, self.less_others(outcome)[:, None] - 0.3 * later, rtol=1e-5, atol=1e-5)
        grpo = by_name["k1 in reward, dr_grpo"](scored, outcome, 0.3)
        torch.testing.assert_close(grpo, 0.75 * self.less_others(outcome)[:, None] - 0.3 * later, rtol=1e-5, atol=1e-5)

    def test_every_default_is_trained(self):
        ours = [name for name, _ in trained.terms("kl_plugins", frameworks.ours())]
        trl = [name for name, _ in trained.terms("TRL", frameworks.framework("TRL").entries())]
        assert ours == ["reverse_kl"]
        assert (trained.PICKED.credit, trained.PICKED.baseline) == ("sequence", "group_mean")
        assert trl == ["GRPO (k3, bias correction)", "RLOO (k1, whole sequences)"]

    def test_every_regime_has_a_share_of_each_seed(self):
        found = trained.shares(trained.PICKED, seeds=2, steps=2)
        assert list(found) == list(trained.BETAS)
        assert all([len(values) for values in of.values()] == [2] * len(trained.REGIMES) for of in found.values())


def test_any_viewer_draws_the_picture(found, tmp_path):
    """Outside a browser a colour that is a CSS variable comes out black."""
    svg, png = standings.draw(found, tmp_path / "new" / "a.svg", tmp_path / "a.png")
    assert ElementTree.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in svg.read_text()
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_shipped_pictures_are_drawn_by_any_viewer():
    pictures = sorted((Path(__file__).parents[2] / "recipes").rglob("*.svg"))
    assert len(pictures) == 1
    assert [path.name for path in pictures if "var(" in path.read_text()] == []


def test_the_pages_section_is_replaced_and_nothing_else(found, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{pages.BEGIN}\nwhat stood here\n{pages.END}\nafter\n")
    written = pages.write_all(found, tmp_path / "out", page=page)
    text = page.read_text()
    assert text.startswith(f"before\n{pages.BEGIN}\n### Share of the attainable")
    assert text.endswith(f"{pages.END}\nafter\n")
    assert "what stood here" not in text
    assert json.loads((tmp_path / "out" / "scoreboard.json").read_text())["goals"]
    names = {"scoreboard.json", "scoreboard.md", "scoreboard.svg", "scoreboard.png", "page.md"}
    assert {path.name for path in written} == names
    assert (tmp_path / "images" / "scoreboard.png").is_file()


@pytest.mark.parametrize("text", ["nothing", f"{pages.END}\n{pages.BEGIN}\n", None])
def test_a_page_without_markers_is_refused_before_anything_is_measured(text, tmp_path, monkeypatch):
    monkeypatch.setattr(scoreboard, "collect", pytest.fail)
    if text is not None:
        (tmp_path / "page.md").write_text(text)
    done = CliRunner().invoke(app, ["--page", str(tmp_path / "page.md"), "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "it must have a line" in " ".join(done.output.split())


@pytest.mark.skipif(installed_version("verl") is not None, reason="verl is installed here")
def test_a_framework_that_is_missing_or_crashes_is_left_out_and_named(tmp_path):
    said = scoreboard._measure("verl", tmp_path / "nowhere", "", tmp_path / "found.json")
    assert isinstance(said, str)
    assert "verl" in said
    found = scoreboard.collect(tmp_path, install=False, only=["verl"], with_model=False, console=Console(quiet=True))
    assert [each["framework"] for each in found["frameworks"]] == ["kl_plugins"]
    assert "verl" in found["left_out"]


def test_an_unknown_framework_is_refused(tmp_path):
    done = CliRunner().invoke(app, ["--only", "verll", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "choose from kl_plugins, TRL" in " ".join(done.output.split())
