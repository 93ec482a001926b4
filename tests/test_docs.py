"""README and docs/: code is run, command lines are parsed, and every name, path and link is one that exists."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer
from typer.testing import CliRunner

from kl_plugins.cli import app
from kl_plugins.core import registry
from kl_plugins.core.controllers import ControllerSpec
from kl_plugins.integration.choice import TREATMENTS
from kl_plugins.integration.flags import parse_flags
from kl_plugins.openrlhf.plan import OpenRLHFOptions

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MORE_PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "README.md"]
FENCE = re.compile(r"(?:^<!-- (?P<note>[^\n]*?) -->\n)?^ *```(?P<language>\w*)\n(?P<body>.*?)^ *```$", re.M | re.S)
OPENRLHF_FLAGS = re.compile(r"--(?:actor|algo|ckpt|critic|data|rollout|train|vllm)\.[\w.]+")


class Block(NamedTuple):
    page: str
    line: int
    language: str
    note: str
    """The HTML comment on the line above: `not run: why`, or `stand-ins: which`."""
    body: str


def blocks(page: Path, *languages: str) -> list[Block]:
    text, name = page.read_text(), page.relative_to(ROOT).as_posix()
    found = (
        Block(name, text.count("\n", 0, m.start("body")) + 1, m["language"], m["note"] or "", m["body"])
        for m in FENCE.finditer(text)
    )
    return [block for block in found if block.language in languages]


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page, *languages)]


# Python


def stand_ins(note: str) -> dict:
    """What a page takes for granted, in small; which ones it needs stands in a comment above its block."""
    if note == "stand-ins: tensors":
        generator = torch.Generator().manual_seed(0)
        logp, ref_logp, vllm_logp = -torch.rand(3, 4, 6, generator=generator)
        return {
            "logp": logp.requires_grad_(),
            "ref_logp": ref_logp,
            "vllm_logp": vllm_logp,
            "mask": torch.ones(4, 6),
            "policy_loss": logp.sum() * 0,
            "beta": 0.04,
        }
    if note == "stand-ins: a run in runs/grpo":
        rows = [{"step": step, "reward": step / 2, "kl/k1": 0.1, "kl/ess": 1.0} for step in (1, 2)]
        Path("runs/grpo").mkdir(parents=True)
        Path("runs/grpo/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {}


def on_cpu(code: str) -> str:
    """The same with TRL's configs told that there may be no GPU, which TRL wants to hear."""
    return re.sub(r"\b(GRPO|RLOO|GMPO)Config\((?!\.\.\.)", r"\g<0>use_cpu=True, bf16=False, ", code)


def run(code: str, where: str, names: dict) -> None:
    exec(compile(code, where, "exec"), names)


@pytest.fixture
def registered(monkeypatch):
    """Losses that a page registers are gone afterwards."""
    monkeypatch.setattr(registry, "LOSSES", dict(registry.LOSSES))


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks(page, "python") if not block.note.startswith("not run: ")]


@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p)], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_python_runs(page, tmp_path, monkeypatch, registered):
    """In the order of the page, in one namespace."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in runnable(page):
        names |= stand_ins(block.note)
        run(on_cpu(block.body), f"{block.page}:{block.line}", names)


def test_what_is_not_run_says_why_and_is_little():
    left_out = [block for block in all_blocks("python") if block.note.startswith("not run: ")]
    assert len(left_out) == 3
    assert all(len(block.note) > len("not run: ") + 10 for block in left_out)
    for block in left_out:
        compile(block.body, block.page, "exec")


def test_a_wrong_block_is_noticed():
    """Twin: an option that doesn't exist, a check in a page that doesn't hold."""
    with pytest.raises(TypeError, match="kl_credits"):
        run(on_cpu('from kl_plugins.trl import GRPOConfig\nGRPOConfig(beta=0.04, kl_credits="token")'), "x", {})
    with pytest.raises(AssertionError):
        run("assert spec == 1", "x", {"spec": 2})


@pytest.mark.parametrize("sign", ["-", "+"])
def test_ten_lines_before_and_after(sign, tmp_path, monkeypatch):
    """README's diff, each side of it as a script: without vLLM, on a tiny model, up to the first step."""
    import datasets
    import transformers
    from tiny_trl import digit_share, make_model

    (diff,) = [block for block in all_blocks("diff") if block.page == "README.md"]
    lines = [line[1:] for line in diff.body.splitlines() if line[:1] in ("", " ", sign)]
    code = on_cpu("\n".join(lines))
    for real, small in {
        "Qwen/Qwen3-0.6B": make_model(tmp_path / "model", seed=0, spread=1.0),
        ', use_vllm=True, vllm_mode="colocate"': "",
    }.items():
        assert code.count(real) == 1
        code = code.replace(real, small)
    prompts = datasets.Dataset.from_list([{"prompt": "1+2="}] * 8)
    trained = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: prompts)
    monkeypatch.setattr(transformers.Trainer, "train", lambda trainer: trained.append(trainer))
    monkeypatch.chdir(tmp_path)
    run(code, "README.md", {"reward": digit_share})
    assert getattr(trained[0].args, "kl", None) == {"-": None, "+": "reverse_kl"}[sign]


# Command lines


def shell_lines() -> list[tuple[str, str]]:
    """Where, and the command, without comments; lines that end in a backslash are joined."""
    return [
        (f"{block.page}:{block.line}", line.strip())
        for block in all_blocks("bash")
        for line in re.sub(r"(?m)(^|\s)#.*$", "", block.body.replace("\\\n", " ")).splitlines()
        if line.strip()
    ]


def parse(words: list[str]) -> None:
    """Parse the words after `kl-plugins` with the real command line, and run nothing. Raises what it raises."""
    group = typer.main.get_command(app)
    with group.make_context("kl-plugins", list(words)) as context:
        name, command, rest = group.resolve_command(context, list(words))
        command.make_context(name, rest, parent=context)


COMMANDS = [
    (where, line[line.index("kl-plugins ") :].split()[1:] and shlex.split(line[line.index("kl-plugins ") :])[1:])
    for where, line in shell_lines()
    if "kl-plugins " in line
]


@pytest.mark.parametrize(("where", "words"), COMMANDS, ids=[f"{w} {' '.join(c)}" for w, c in COMMANDS])
def test_command_lines_are_real(where, words):
    placeholders = {"...": "", "<your": "", "train_ppo_ray": "", "flags>": ""}
    words = [word for word in words if word not in placeholders]
    parse(words)
    after = words[words.index("--") + 1 :] if "--" in words else []
    if words[0] == "explain" and after and not words[1].endswith(".yaml"):
        assert CliRunner().invoke(app, words).exit_code in (0, 1)
    if words[0] == "trl":
        known = trl_flags()
        assert [w for w in words if w.startswith("--") and w.removeprefix("--") not in known] == []


def trl_flags() -> set[str]:
    import trl

    from kl_plugins.trl import GRPOConfig

    return {f.name for cls in (GRPOConfig, trl.ModelConfig, trl.ScriptArguments) for f in dataclasses.fields(cls)}


def test_every_command_is_shown_in_the_readme():
    shown = {words[0] for where, words in COMMANDS if where.startswith("README.md")}
    assert shown == set(typer.main.get_command(app).commands)


def test_options_in_the_environment_are_real():
    """`export KL_PLUGINS_OPENRLHF="..."`."""
    found = re.findall(r'KL_PLUGINS_OPENRLHF="([^"]+)"', "\n".join(line for _, line in shell_lines()))
    assert len(found) >= 3
    for words in found:
        parse_flags(words, OpenRLHFOptions, of="KL_PLUGINS_OPENRLHF")


@pytest.mark.parametrize("words", [["explain", "--hots", "trl"], ["reports"], ["openrlhf", "--kl-credits", "token"]])
def test_a_wrong_command_line_is_noticed(words):
    with pytest.raises(typer.BadParameter.__base__):
        parse(words)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    text = "\n".join(page.read_text() for page in (*PAGES, *MORE_PAGES))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M))
    assert "docs" in named
    assert named <= targets


# Names


def test_openrlhfs_flags_exist():
    spec = find_spec("openrlhf")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    parser = (Path(spec.submodule_search_locations[0]) / "cli" / "train_ppo_ray.py").read_text()
    text = "\n".join(page.read_text() for page in (*PAGES, *MORE_PAGES))
    found = set(OPENRLHF_FLAGS.findall(text))
    assert len(found) >= 10
    assert sorted(flag for flag in found if f'"{flag}"' not in parser) == []


def test_options_exist():
    """Every `kl_...` and `--kl-...` is an option of a host, or of the conformance kit."""
    from kl_plugins.trl import GRPOConfig

    known = {f.name for cls in (GRPOConfig, OpenRLHFOptions, ControllerSpec) for f in dataclasses.fields(cls)}
    known |= {"kl_plugins", "kl_terms", "kl_sum", "kl_coef", "kl_estimator"}  # of the core; of hosts
    known |= set(re.findall(r'"--(kl-[\w-]+)"', (ROOT / "kl_plugins" / "pytest_plugin.py").read_text()))
    known |= {name.replace("_", "-") for name in known}
    text = "\n".join(page.read_text() for page in PAGES)
    found = set(re.findall(r"(?<![\w/.-])(kl_[a-z_]*[a-z])(?![\w*])", text))
    found |= set(re.findall(r"--(kl-[a-z-]*[a-z])(?!\*)", text))
    assert "kl-off-policy" in found
    assert sorted(found - known) == []


def test_paths_exist():
    """Files of the repository that are named; HOST stands for a host."""
    text = "\n".join(page.read_text() for page in (*PAGES, *MORE_PAGES))
    found = set(re.findall(r"(?<![\w/.-])(?:kl_plugins|patches|recipes|tests|docs)/[\w./-]*\w", text))
    assert len(found) > 15
    assert sorted(path for path in found if "HOST" not in path and not (ROOT / path).exists()) == []


def test_tests_that_are_named_exist():
    named = set(re.findall(r"(?:`|::)(test_\w+)`", (ROOT / "docs" / "theory.md").read_text()))
    tests = "\n".join(path.read_text() for path in (ROOT / "tests" / "core").glob("*.py"))
    assert len(named) > 10
    assert sorted(name for name in named if f"def {name}(" not in tests) == []


@pytest.mark.parametrize("page", [*PAGES, *MORE_PAGES], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(page):
    """On GitHub; `make docs` checks them, and anchors, for the site."""
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text()))
    relative = [link for link in links if not re.match(r"https?://|#", link)]
    assert [link for link in relative if not (page.parent / link.partition("#")[0]).exists()] == []


def rows(page: str, header: str) -> list[list[str]]:
    """The cells of a table, without backticks."""
    lines = (ROOT / page).read_text().partition(header)[2].splitlines()[2:]
    table = lines[: next(i for i, line in enumerate([*lines, ""]) if not line.startswith("|"))]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in table]


def test_the_table_of_configurations_is_the_registrys():
    says = {"RKL": "reverse_kl", "local RKL": "local_reverse_kl", "local FKL": "local_forward_kl", "0": "zero"}
    shown, defaults, refused = {}, {}, set()
    for name, credit, _, gradient, verdict in rows("docs/configurations.md", "| `kl=` |"):
        word = credit.removesuffix(" (default)")
        shown[name, word] = says.get(gradient, "biased")
        if word != credit or name not in defaults:
            defaults[name] = word
        refused |= {name} if verdict == "refused" else set()
    losses = {name: registry.LOSSES[name] for name in registry.BUILT_IN}
    assert shown == {(name, credit): of for name, loss in losses.items() for credit, of in loss.gradient_of.items()}
    assert defaults == {name: loss.default_credit for name, loss in losses.items()}
    assert refused == {name for (name, _), of in shown.items() if of in ("zero", "biased")}


def test_the_table_of_picks_is_the_one_that_picks():
    shown = {}
    for trainers, _, options in rows("docs/configurations.md", "| trainer |"):
        credit, baseline = (re.search(rf'{name}="(\w+)"', options) for name in ("kl_credit", "kl_baseline"))
        words = re.findall(r"\w+", trainers)
        hosts = [(host, name) for host, name in TREATMENTS if (name or host.upper()) in words]
        shown |= dict.fromkeys(hosts, (credit[1], baseline and baseline[1]))
    assert shown == {host: (found.credit, found.baseline) for host, found in TREATMENTS.items()}


def test_the_readme_has_the_numbers_of_the_evidence():
    measured = (ROOT / "docs" / "evidence.md").read_text()
    cells = re.findall(r"-?\d\.\d{3} ± \d\.\d{3}", (ROOT / "README.md").read_text())
    assert len(cells) == 23
    assert [cell for cell in cells if cell not in measured] == []


def test_every_option_is_in_the_tables():
    tables = [("docs/configurations.md", "| option | default |"), ("docs/controllers.md", "| option | default |")]
    named = {word for table in tables for row in rows(*table) for word in re.findall(r"kl\w*", row[0])}
    assert {f.name for f in dataclasses.fields(OpenRLHFOptions)} - named == {"kl_monitor"}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180
