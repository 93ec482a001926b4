"""`kl-plugins report`: runs that were cut off, NaN, missing metrics, seeds; and the page it makes of them."""

from __future__ import annotations

import json
import math
import re
import statistics

import pytest
import typer
from typer.testing import CliRunner

from kl_plugins.cli.report import report
from kl_plugins.errors import ConfigError
from kl_plugins.report import read_metrics
from kl_plugins.report import runs as module
from kl_plugins.report.page import can_draw
from kl_plugins.report.runs import mean_and_width, mean_over_seeds, pieces, read_runs

app = typer.Typer()
app.command()(report)


def run(folder, steps=20, *, offset=0.0, **changed):
    """A run's folder, as the recipes write it; `changed`: functions of the step, None to leave a metric out."""
    folder.mkdir(parents=True)
    made = {
        "reward": lambda s: 0.3 + offset + 0.01 * s,
        "kl/k1": lambda s: 0.001 * s + offset,
        "kl/k2": lambda s: 0.002 * s,
        "kl/k3": lambda s: 0.003 * s,
        "kl": lambda s: 0.004 * s,
        "kl/loss": lambda s: 1e-4 * s,
        "kl/ess": lambda s: 1 - 0.001 * s,
        "kl/weight_max": lambda s: 1 + 0.1 * s,
        "kl/clipped": lambda s: 0.0,
        "kl/beta": lambda s: 0.05,
    } | {name.replace("__", "/"): function for name, function in changed.items()}
    rows = [{"step": 0, "eval_reward": 0.3}]
    rows += [{"step": s} | {name: f(s) for name, f in made.items() if f} for s in range(1, steps + 1)]
    rows.append({"step": steps, "train_runtime": 3.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def invoke(*arguments, out, code=0):
    words = [*map(str, arguments), "--out", str(out)]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return out.read_text() if not code else result.output


def cells(page, caption):
    """The rows of the table with a caption, as lists of their cells' text."""
    body = re.search(rf"<caption>{re.escape(caption)}</caption>.*?<tbody>(.*?)</tbody>", page, re.S)[1]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", body, re.S)]


def test_seeds_are_found_by_name_and_averaged(tmp_path):
    for seed, offset in enumerate((0.0, 0.1, 0.2)):
        run(tmp_path / f"k2-seed{seed}", offset=offset)
    run(tmp_path / "k3" / "seed0")
    run(tmp_path / "other")
    found = read_runs([tmp_path])
    assert {name: len(seeds) for name, seeds in found.items()} == {"k2": 3, "k3": 1, "other": 1}
    page = invoke(tmp_path, out=tmp_path / "report.html")
    rows = {row[0]: row[1:] for row in cells(page, "Reward (reward)")}
    half = 4.303 * statistics.stdev([0.0, 0.1, 0.2]) / math.sqrt(3)
    assert rows["k2"] == ["3", f"0.415 ± {half:.3g}", f"0.595 ± {half:.3g}", "0.31", "0.7", "0"]
    assert rows["other"][1] == "0.315"
    assert page.count("<svg") == (10 if can_draw() else 0)
    assert "Left out" not in page


def test_groups_can_be_named(tmp_path):
    paths = [run(tmp_path / name, offset=i / 10) for i, name in enumerate(("a", "b", "c"))]
    found = read_runs([paths[2]], [f"mine={paths[0]},{paths[1] / 'metrics.jsonl'}"])
    assert {name: [r.path.parent.name for r in seeds] for name, seeds in found.items()} == {
        "mine": ["a", "b"],
        "c": ["c"],
    }
    for wrong in ("mine", "=a", "mine="):
        with pytest.raises(ConfigError, match="write NAME=PATH,PATH"):
            read_runs([], [wrong])


def test_seeds_of_several_folders_keep_the_folders_names(tmp_path):
    for arm in ("x", "y"):
        for seed in (0, 1):
            run(tmp_path / arm / f"seed{seed}")
    assert set(read_runs([tmp_path])) == {"x", "y"}
    assert set(read_runs([tmp_path / "x" / "seed0"])) == {"x"}


def test_a_run_that_was_cut_off_is_read_up_to_there(tmp_path):
    folder = run(tmp_path / "a")
    path = folder / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:12])[:-9])
    (only,) = read_runs([folder])["a"]
    assert only.cut_off
    assert only.steps == 10
    page = invoke(folder, out=tmp_path / "report.html")
    assert "the last line was cut off; read up to there, step 10" in page
    with pytest.warns(UserWarning, match="cut off"):
        read_metrics(path)


def test_a_line_broken_elsewhere_is_an_error(tmp_path):
    folder = run(tmp_path / "a")
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"step": 3,', '{"step": 3', 1))
    assert "line 4: not a row of metrics" in invoke(folder, out=tmp_path / "report.html", code=2)


def test_nan_is_a_gap_and_counted(tmp_path):
    folder = run(tmp_path / "a", kl__k1=lambda s: math.nan if s in (5, 6) else -math.inf if s == 9 else 0.1 * s)
    page = invoke(folder, out=tmp_path / "report.html")
    assert [row[-1] for row in cells(page, "k1, nats a token (kl/k1)")] == ["3"]
    curve = read_runs([folder])["a"][0].curves["k1, nats a token"]
    mean = mean_over_seeds([curve])
    assert [steps for steps, _, _ in pieces(mean)] == [[1, 2, 3, 4], [7, 8], list(range(10, 21))]
    everywhere = run(tmp_path / "b", kl__k1=lambda s: math.nan)
    page = invoke(folder, everywhere, out=tmp_path / "report.html")
    assert cells(page, "k1, nats a token (kl/k1)")[1] == ["b", "1", "–", "–", "–", "–", "20"]


def test_missing_metrics_are_left_out_and_listed(tmp_path):
    bare = run(tmp_path / "bare", **{f"kl__{k}": None for k in ("ess", "weight_max", "clipped", "beta", "loss")})
    page = invoke(bare, out=tmp_path / "report.html")
    assert "Left out, since no run logged it: kl/loss, kl/ess, kl/weight_max, kl/clipped, kl/beta." in page
    assert "Effective sample size, share (kl/ess)" not in page
    page = invoke(bare, run(tmp_path / "full"), out=tmp_path / "report.html")
    assert "Left out" not in page
    assert cells(page, "Effective sample size, share (kl/ess)")[0][:3] == ["bare", "1", "–"]
    assert '<td class="word">kl/loss, kl/ess, kl/weight_max, kl/clipped, kl/beta</td>' in page


def test_names_are_escaped(tmp_path):
    hostile = run(tmp_path / "<script>alert(1)<" / "a&$b$")
    page = invoke(hostile, run(tmp_path / "c"), out=tmp_path / "report.html")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;" in page
    assert "a&amp;$b$" in page


def test_seeds_of_different_lengths_are_compared_where_all_have_a_value():
    mean = mean_over_seeds([{1: 1.0, 2: 2.0, 3: 3.0}, {1: 3.0, 2: math.nan}])
    assert mean.steps == [1, 2]
    assert mean.values[0] == 2.0
    assert math.isnan(mean.values[1])
    assert mean.half_widths[0] == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2))


def test_students_t():
    for freedom, t in ((1, 12.706), (4, 2.776), (10, 2.228), (11, 2.201), (30, 2.042), (200, 1.972)):
        column = [0.0, 1.0] * ((freedom + 1) // 2) + [0.5] * ((freedom + 1) % 2)
        _, width = mean_and_width(column)
        assert width == pytest.approx(t * statistics.stdev(column) / math.sqrt(len(column)), rel=0.01), freedom


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("", "has 0 rows, but none of them has a metric such as reward"),
        ('{"loss": 1}\n', "has 1 rows, but none"),
        ('{"step": 1, "reward": "high"}\n', "row 1: reward of step 1 is 'high', not a number"),
        ('{"step": "x", "reward": 1}\n', "of step 'x' is 1"),
        ("[1]\n[2]\n", "line 1: not a row of metrics"),
    ],
)
def test_files_that_are_no_metrics_are_refused(tmp_path, lines, says):
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert says in invoke(tmp_path, out=tmp_path / "report.html", code=2)


def test_what_is_not_there_is_refused(tmp_path):
    out = tmp_path / "report.html"
    says = "has no metrics.jsonl, events.out.tfevents* or trainer_state.json in or below it"
    assert says in invoke(tmp_path, out=out, code=2)
    assert "isn't there" in invoke(tmp_path / "nowhere", out=out, code=2)
    assert "no run was named" in invoke(out=out, code=2)


def write_events(folder, offset=0.0, steps=20):
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(log_dir=str(folder))
    for step in range(1, steps + 1):
        writer.add_scalar("train/reward", offset + step, step)
        writer.add_scalar("train/kl/k1", offset + step / 100, step)
        writer.add_scalar("eval/reward", -1.0, step)
    writer.close()
    return folder


def write_state(folder, steps):
    folder.mkdir(parents=True)
    history = [{"step": step, "reward": step, "kl/k1": 0.5} for step in range(1, steps + 1)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [*history, {"step": 9, "eval_reward": -1}]}))


def test_tensorboards_files_and_checkpoints_are_read(tmp_path):
    write_events(tmp_path / "openrlhf" / "run-seed0")
    write_events(tmp_path / "openrlhf" / "run-seed1", offset=1.0)
    write_state(tmp_path / "trl" / "checkpoint-2", 2)
    write_state(tmp_path / "trl" / "checkpoint-10", 10)
    run(tmp_path / "recipe")
    write_events(tmp_path / "recipe" / "logs")  # of a run whose metrics.jsonl is there: once is enough
    write_state(tmp_path / "recipe" / "checkpoint-3", 3)
    write_state(tmp_path / "both" / "checkpoint-3", 3)
    write_events(tmp_path / "both" / "runs" / "x", steps=7)
    found = read_runs([tmp_path])
    assert {name: [each.steps for each in seeds] for name, seeds in found.items()} == {
        "recipe": [20],
        "both/runs/x": [7],
        "openrlhf/run": [20, 20],
        "trl": [10],
    }
    curve = found["openrlhf/run"][1].curves
    assert curve["Reward"] == {step: 1.0 + step for step in range(1, 21)}
    assert curve["k1, nats a token"][20] == pytest.approx(1.2)
    page = invoke(tmp_path, out=tmp_path / "report.html")
    assert cells(page, "Reward (reward)")


def test_a_tensorboard_file_that_was_cut_off_is_read_up_to_there(tmp_path):
    folder = write_events(tmp_path / "a")
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-70])
    (only,) = read_runs([file])["a"]
    assert 0 < only.steps < 21
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match="none of them has a metric"):
        read_runs([folder])


def test_rows_without_a_step_are_numbered(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"reward": 1}\n{"reward": 2}\n')
    assert read_runs([tmp_path])[tmp_path.name][0].curves == {"Reward": {1: 1, 2: 2}}


def test_every_metric_that_is_asked_for_is_one_that_is_logged():
    from kl_plugins import KLSpec, kl_terms
    from kl_plugins.core.metrics import kl_metrics, kl_sums

    torch = pytest.importorskip("torch")
    ones = torch.ones(1, 1)
    terms = kl_terms(KLSpec.from_name("k2_as_loss"), logp=-ones, ref_logp=-ones, mask=ones)
    logged = kl_metrics(kl_sums(terms, beta=1.0), weight_max=ones, beta=1.0)
    asked = {metric.keys[0] for metric in module.METRICS if metric.asked and metric.keys[0].startswith("kl/")}
    assert asked <= set(logged)
