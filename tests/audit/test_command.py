"""`kl-plugins audit`: its page and numbers, what it refuses, and interruptions."""

from __future__ import annotations

import html
import json
import os
import re
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
import typer
from audit_inputs import PROMPTS, lines
from tiny_openrlhf import import_openrlhf
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from kl_plugins.audit import pages
from kl_plugins.audit.model import Pair
from kl_plugins.audit.run import AuditOptions
from kl_plugins.cli.audit import audit
from kl_plugins.errors import ConfigError

app = typer.Typer()
app.command()(audit)


def invoke(folders, *arguments, code=0, out=None):
    words = ["--model", str(folders / "policy"), "--reference", str(folders / "reference")]
    words += ["--completions", "2", "--target-completions", "4", "--max-new-tokens", "6", "--device", "cpu"]
    words += ["--out", str(out)] if out else []
    result = CliRunner().invoke(app, [*words, *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def strict(path):
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(path.read_text(), parse_constant=refuse)


def test_the_command_writes_a_page_and_the_numbers(folders, tmp_path):
    said = invoke(folders, "--prompts", folders / "prompts.jsonl", "--no-hosts", out=tmp_path / "<script>out")
    found = strict(tmp_path / "<script>out" / "audit.json")
    page = (tmp_path / "<script>out" / "audit.html").read_text()
    assert found["status"] == "complete"
    assert found["data"]["prompts"] == 4
    assert found["data"]["completions"] == 8
    assert found["cost"]["tokens_through_both_models"] > 0
    assert found["versions"]["torch"] == torch.__version__
    labels = [row["label"] for row in found["rows"]]
    assert "k1_in_reward to_go" in labels
    assert "k3_in_reward to_go" in labels
    assert "exact_in_reward to_go" in labels
    assert all(label in page for label in labels)
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!#)|url\((?!#)|@import', page)
    assert "Only 8 completions" in said
    assert "0 of" not in page


def test_the_same_seed_gives_the_same_numbers(folders, tmp_path):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        invoke(folders, "--prompts", folders / "prompts.jsonl", "--no-hosts", "--seed", seed, out=tmp_path / name)
        found.append(strict(tmp_path / name / "audit.json")["rows"])
    assert found[0] == found[1] != found[2]


def test_rollouts_of_another_policy_are_audited_off_policy(folders, tmp_path, pair):
    torch.manual_seed(0)
    rows = []
    for prompt in PROMPTS:
        ids = pair.prompt_ids(prompt)
        for completion in pair.sample(ids, 3, max_new_tokens=5):
            rows.append({"prompt": prompt, "completion_ids": completion, "behavior_logp": [-1.0] * len(completion)})
    path = lines(tmp_path / "rollouts.jsonl", *rows)
    import_openrlhf()
    invoke(folders, "--rollouts", path, out=tmp_path / "out")
    found = strict(tmp_path / "out" / "audit.json")
    labels = [row["label"] for row in found["rows"]]
    assert {f"k1_in_reward to_go, {kind}" for kind in ("none", "token", "prefix", "sequence")} <= set(labels)
    assert {"TRL GRPO (k3, bias correction)", "OpenRLHF k1 in reward"} <= set(labels)
    assert found["data"]["off_policy"]
    assert found["data"]["completions"] == 12
    assert found["left_out"] == ["verl is not installed"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", ""], "--model wasn't given: an audit is of your own models"),
        ([], "neither of --prompts and --rollouts were given"),
        (["--prompts", "p", "--rollouts", "r"], "both of --prompts and --rollouts were given"),
        (["--rollouts", "r", "--vllm"], "--vllm draws completions, but --rollouts has them already"),
        (["--prompts", "p", "--dtype", "int8"], "--dtype int8: choose from float32"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl can't be read"),
        (["--prompts", "p", "--reward-column", "r"], "--reward-column r: only saved rollouts have rewards already"),
        (["--rollouts", "r", "--reward-column", "r", "--reward", "m:f"], "both of --reward and --reward-column"),
        (["--prompts", "p", "--beta", "0"], "--beta 0.0: a positive number"),
        (["--prompts", "p", "--trainer", "ppo"], "--trainer ppo: choose from grpo, rloo"),
        (["--prompts", "p", "--scale-rewards", "batch"], "--scale-rewards batch: choose from none, group"),
        (["--prompts", "p", "--trainer", "rloo", "--scale-rewards", "group"], "--scale-rewards group is GRPO's"),
        (["--prompts", "p", "--num-generations", "1"], "--num-generations 1: at least 2"),
    ],
)
def test_bad_options_are_refused(folders, arguments, says):
    assert says in invoke(folders, *arguments, code=2)


def test_a_device_or_engine_that_is_not_there_is_refused(folders, monkeypatch):
    prompts = ["--prompts", folders / "prompts.jsonl", "--no-hosts"]
    assert "device 'cuda:7' was asked for, but" in invoke(folders, *prompts, "--device", "cuda:7", code=2)
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "--vllm was asked for, but vLLM can't be imported" in invoke(folders, *prompts, "--vllm", code=2)


def test_log_probs_that_are_not_finite_are_an_error(folders, tmp_path):
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(folders / "reference")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    model.save_pretrained(broken)
    arguments = ["--reference", broken, "--prompts", folders / "prompts.jsonl", "--no-hosts"]
    said = invoke(folders, *arguments, code=2)
    assert re.search(r"prompt 1: \d+ of \d+ sampled tokens have a log-probability or next-token KL that isn't", said)


@pytest.mark.parametrize("done", [0, 1, 3])
def test_an_interruption_leaves_a_report_on_what_was_done(folders, tmp_path, monkeypatch, done):
    sample, calls = Pair.sample, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) > done:
            raise KeyboardInterrupt
        return sample(self, *arguments, **options)

    monkeypatch.setattr(Pair, "sample", interrupted)
    arguments = ["--prompts", folders / "prompts.jsonl", "--no-hosts"]
    said = invoke(folders, *arguments, code=130, out=tmp_path / "out")
    if not done:
        assert "nothing to report" in said
        assert not (tmp_path / "out").exists()
        return
    found = strict(tmp_path / "out" / "audit.json")
    assert found["status"] == "partial"
    assert found["data"]["prompts"] == done
    page = (tmp_path / "out" / "audit.html").read_text()
    assert "(partial)</h1>" in page
    assert f"interrupted after {done} of 4 prompts" in page


def test_ctrl_c_at_any_moment_leaves_a_report(folders, tmp_path, monkeypatch):
    """A real SIGINT, from a timer: it arrives wherever the audit happens to be, not between two prompts."""
    prompts = lines(tmp_path / "prompts.jsonl", *({"prompt": p} for p in PROMPTS * 500))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    sample, drawn = Pair.sample, []

    def counted(self, *arguments, **options):
        drawn.append(1)
        if len(drawn) == 4:
            timer.start()
        return sample(self, *arguments, **options)

    monkeypatch.setattr(Pair, "sample", counted)
    try:
        invoke(folders, "--prompts", prompts, "--no-hosts", "--max-prompts", 2000, code=130, out=tmp_path / "out")
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    found = strict(tmp_path / "out" / "audit.json")
    assert found["status"] == "partial"
    assert 3 <= found["data"]["prompts"] <= len(drawn) < 2000


def test_without_matplotlib_the_page_has_its_tables(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "can_draw", lambda: False)
    invoke(folders, "--prompts", folders / "prompts.jsonl", "--no-hosts", out=tmp_path)
    page = (tmp_path / "audit.html").read_text()
    assert "<svg" not in page
    assert "pip install &#39;kl_plugins[plot]&#39;" in page


def test_with_a_reward_function_the_whole_is_judged_and_a_line_to_paste_ends_it(folders, tmp_path):
    (tmp_path / "rewards.py").write_text("def length(completions, **_):\n    return [len(c) for c in completions]\n")
    prompts = lines(tmp_path / "prompts.jsonl", *({"prompt": p} for p in PROMPTS * 2))
    arguments = ["--prompts", prompts, "--no-hosts", "--completions", 9, "--batch", 3, "--beta", 0.2]
    said = invoke(
        folders, *arguments, "--reward", f"{tmp_path / 'rewards.py'}:length", "--trainer", "rloo", out=tmp_path
    )
    found = strict(tmp_path / "audit.json")
    whole = found["whole"]
    assert (whole["trainer"], whole["beta"], whole["num_generations"]) == ("rloo", 0.2, 4)
    assert found["data"]["completions"] == 8 * 8  # the ninth of each prompt is in no group
    assert [row["label"] for row in whole["rows"] if row["picked"]] == ["k1_in_reward sequence, leave_one_out"]
    assert all(row["error"]["value"] > 0 for row in whole["rows"])
    page = (tmp_path / "audit.html").read_text()
    line = found["recommended"]["line"]
    assert line.startswith("RLOOConfig(..., beta=0.2, kl=")
    assert html.escape(line, quote=True).replace("&quot;", "&#34;") in page
    assert "The whole gradient, of reward and KL</h2>" in page
    text = said.split("wrote ")[0].rstrip().splitlines()
    assert text[-1] == line
    assert "The error of the KL's gradient by itself is not the aim." in said


def test_saved_rewards_are_judged_off_policy_too(folders, tmp_path, pair):
    torch.manual_seed(0)
    rows = []
    for prompt in PROMPTS * 2:
        for completion in pair.sample(pair.prompt_ids(prompt), 4, max_new_tokens=5):
            rows.append({"prompt": prompt, "completion_ids": completion, "behavior_logp": [-1.0] * len(completion)})
            rows[-1]["score"] = len(completion)
    path = lines(tmp_path / "rollouts.jsonl", *rows)
    invoke(folders, "--rollouts", path, "--reward-column", "score", "--no-hosts", out=tmp_path)
    rows = strict(tmp_path / "audit.json")["whole"]["rows"]
    assert [row["label"] for row in rows if row["picked"]] == ["k1_in_reward sequence, group_mean, token"]
    assert "k1_in_reward sequence, group_mean, prefix" in [row["label"] for row in rows]
    assert "k1_in_reward sequence, group_mean, none" not in [row["label"] for row in rows]


def test_too_few_completions_for_two_groups_are_refused(folders, tmp_path):
    (tmp_path / "rewards.py").write_text("def f(completions):\n    return [0.0 for _ in completions]\n")
    arguments = ["--prompts", folders / "prompts.jsonl", "--no-hosts", "--reward", f"{tmp_path / 'rewards.py'}:f"]
    says = "two groups of 2 completions of each prompt, found 2 completions of one: give more (--completions)"
    assert says in invoke(folders, *arguments, code=2)
    more = ["--completions", 8, "--num-generations", 8]
    says = "two groups of 8 completions of each prompt, found 8 completions of one: give more or a smaller"
    assert says in invoke(folders, *arguments, *more, code=2)


def test_without_rewards_it_is_said_what_is_missing(folders, tmp_path):
    said = invoke(folders, "--prompts", folders / "prompts.jsonl", "--no-hosts", out=tmp_path)
    assert "give rewards with --reward-column (of saved rollouts) or --reward (a function)" in said
    found = strict(tmp_path / "audit.json")
    assert found["whole"] is None
    assert found["recommended"]["line"] == 'GRPOConfig(..., beta=0.04, kl="reverse_kl")'


@pytest.mark.parametrize("rewarded", [False, True])
def test_a_policy_that_is_the_reference_gets_a_sentence_instead_of_dashes(folders, tmp_path, rewarded):
    (tmp_path / "rewards.py").write_text("def length(completions, **_):\n    return [len(c) for c in completions]\n")
    prompts = lines(tmp_path / "prompts.jsonl", *({"prompt": p} for p in PROMPTS * 2))
    arguments = ["--reference", folders / "policy", "--prompts", prompts, "--no-hosts", "--completions", 8]
    arguments += ["--reward", f"{tmp_path / 'rewards.py'}:length"] if rewarded else []
    said = invoke(folders, *arguments, out=tmp_path)
    found = strict(tmp_path / "audit.json")
    page = (tmp_path / "audit.html").read_text()
    assert found["data"]["policy_is_reference"]
    for text in (said, page, *found["notices"][:1]):
        assert "The policy is the reference: every sampled token is as likely under both" in text
    assert "next-token KLs (local)" not in said
    assert "Against the KL of whole completions" not in page
    assert bool(found["whole"]) == rewarded
    if rewarded:
        verdicts = {row["label"]: row["verdict"] for row in found["whole"]["rows"]}
        del verdicts["k1_as_loss token"]  # the only one that has noise where there is no KL
        assert set(verdicts.values()) == {"tie"}


def test_a_policy_that_has_moved_is_not_said_to_be_the_reference(folders, tmp_path):
    said = invoke(folders, "--prompts", folders / "prompts.jsonl", "--no-hosts", out=tmp_path)
    assert not strict(tmp_path / "audit.json")["data"]["policy_is_reference"]
    assert "The policy is the reference" not in said
    assert "next-token KLs (local)" in said


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_draws_from_the_same_policy(folders, pair):
    from kl_plugins.audit.engine import vllm_rollouts

    prompts = [pair.prompt_ids(p) for p in PROMPTS]
    found = vllm_rollouts(
        str(folders / "policy"), prompts, completions=8, max_new_tokens=6, ends=pair.ends, seed=0, dtype="float32"
    )
    for prompt, rollouts in zip(prompts, found, strict=True):
        assert rollouts.by_engine
        (scored,) = pair.score(prompt, rollouts.completions, rollouts.behavior_logp, batch=8)
        logp = scored.logits.log_softmax(-1).gather(-1, scored.tokens[..., None])[..., 0]
        torch.testing.assert_close(logp[scored.mask], scored.behavior_logp[scored.mask], rtol=0, atol=1e-3)


def test_an_error_is_the_first_thing_said(folders):
    """No bar of a progress that never began."""
    arguments = ["--prompts", folders / "nothing.jsonl", "--no-hosts"]
    assert invoke(folders, *arguments, code=2).startswith("error: ")


def test_numbers_that_nothing_can_be_measured_with_are_refused():
    with pytest.raises(ConfigError) as refused:
        AuditOptions(model="m", reference="r", prompts=Path("p"), completions=1, batch=0, max_new_tokens=-1)
    assert [problem.split(":")[0] for problem in refused.value.args] == [
        "--completions 1",
        "--max-new-tokens -1",
        "--batch 0",
    ]
