"""What each KL term's training comes to where the best policy is known: the share of it that is reached.

What:      trains a table of logits with every KL configuration, through TRL's GRPO, RLOO and PPO, through OpenRLHF's
           experience maker and actor, and in a bare loop at any length and with other frameworks' own functions; says
           how much of the best E[R] - beta KL each has reached, exactly: 0 is the reference, 1 the optimum
Hardware:  2 CPU cores, no GPU, no network once TRL 1.12 is there (for PPO; `make evidence` puts it there)
How long:  half an hour on two idle cores, and minutes with --quick: estimates, from runs beside other work
Launch:    python recipes/known_optimum.py --quick
           python recipes/known_optimum.py --parts trl --seeds 2
           python recipes/known_optimum.py --docs docs

Writes a .jsonl per part and the pictures to --out (runs/known_optimum). Ends with exit status 1 if one of the
orderings that the documents rest on doesn't hold, by paired 95% intervals over all seeds.
"""

import argparse
import importlib
import sys
from pathlib import Path

from evidence.intervals import Claim, Interval, judge, marked, of, paired, select
from evidence.runs import run_all
from evidence.tables import markdown, show, write_section
from evidence.trl_trainers import SEQUENCE_CREDIT, TOKEN_CREDIT
from rich.console import Console

# Through real trainers, and by computation: name -> module of recipes/evidence.
TRAINERS = {"trl": "trl_trainers", "ppo": "ppo_trainer", "openrlhf": "openrlhf_trainer"}
COMPUTED = {"bare loop": "bare_loop", "fixed points": "fixed_points"}
PARTS = TRAINERS | COMPUTED
HOSTS = {"trl": "TRL's GRPOTrainer and RLOOTrainer", "ppo": "TRL's PPOTrainer", "openrlhf": "OpenRLHF"}
SAID = {
    "trl": "200 updates of 64 completions of 16 tokens, groups of 8, beta 0.3 (dense reward: 1), Adam's rate 0.05, "
    "loss_type dr_grpo, scale_rewards none (RLOO: normalize_advantages False), but for what a regime says. With "
    "rewards scaled by the group, RLOO's are by the batch. An engine off by 0.1 has that much noise in its logits; "
    "TRL's default (sequence_mask) then drops completions that it would draw too rarely: in GRPO, not in RLOO.",
    "ppo": "The terminal reward, 200 updates of 64 completions of 16 tokens, beta 0.3, Adam's rate 0.05. TRL whitens "
    "the advantages, with a KL in the reward in them; a term of the loss has another price beside them.",
    "openrlhf": "200 updates of 64 completions of 16 tokens, groups of 8, beta 0.3, Adam's rate 0.05. group_norm "
    "divides rewards by their group's deviation, gae and reinforce_baseline rewards and KL together by the batch's; a "
    "term of the loss has another price beside them.",
}


def run(names, args, console):
    """The rows of each part: one per arm, regime and seed."""
    rows = {}
    for name in names:
        part = importlib.import_module(f"evidence.{PARTS[name]}")
        jobs = [job for job in part.jobs(args.quick) if args.seeds is None or job.get("seed", 0) < args.seeds]
        missing = [path for path in getattr(part, "PATHS", ()) if not path.is_dir()]
        if jobs and missing:
            sys.exit(f"The part {name} needs TRL 1.12: pip install --no-deps --target {missing[0]} trl==1.12.0")
        found = run_all(
            jobs,
            part.work,
            out=args.out / f"{name.replace(' ', '_')}.jsonl",
            title=name,
            console=console,
            workers=args.jobs,
            paths=getattr(part, "PATHS", ()),
            resume=args.resume,
        )
        rows[name] = part.by_seed(found) if hasattr(part, "by_seed") else found
    return rows


def claims(rows):
    """The orderings that the documents rest on, by TRL's own trainers."""
    terminal, hackable = {"regime": "terminal reward"}, {"regime": "hackable reward"}
    k1 = of(rows, "share", arm="k1_as_loss", **terminal)
    found = {
        "k2_as_loss reaches more than k1_as_loss": paired(rows, "share", "k2_as_loss", "k1_as_loss", **terminal),
        "k1_as_loss ends below the reference": Interval(-k1.mean, k1.half),
        "k1_as_loss ends with more KL than no KL term at all": paired(rows, "kl", "k1_as_loss", "no KL", **terminal),
        "k3_as_loss drifts further than k2_as_loss where a rare exploit pays": paired(
            rows, "kl", "k3_as_loss", "k2_as_loss", **hackable
        ),
        "k1 in reward reaches more with sequence than with token credit, both with the group's mean": paired(
            rows, "share", SEQUENCE_CREDIT, TOKEN_CREDIT, **terminal
        ),
    }
    return [Claim(says, difference) for says, difference in found.items()]


def first_regime(rows):
    """The rows of the regime in which all arms are compared, which is the first."""
    return select(rows, regime=rows[0]["regime"])


def arm_table(rows):
    """Columns and rows of a table of one regime: what each arm came to."""
    shares = marked(rows)
    lines = [[arm, *(f"{of(rows, name, arm=arm):.3f}" for name in ("reward", "kl")), shares[arm]] for arm in shares]
    return ("KL", "reward", "KL in nats", "share of the attainable"), lines


def regime_table(rows):
    """Columns and rows of a table of the other regimes: the share of each arm, the best marked, ties called ties."""
    rows = [row for row in rows if row["regime"] != rows[0]["regime"]]
    arms, regimes = (list(dict.fromkeys(row[name] for row in rows)) for name in ("arm", "regime"))
    cells = {regime: marked(select(rows, regime=regime)) for regime in regimes}
    return ("regime", *arms), [[regime, *(cells[regime].get(arm, "") for arm in arms)] for regime in regimes]


def sections(rows):
    """name of a section in docs/evidence.md -> its tables, each with a title, columns, rows and a sentence."""
    found = {}
    for name in TRAINERS:
        here = rows.get(name)
        if here:
            title = f"{HOSTS[name]}: {here[0]['regime']}"
            found.setdefault("trainers", []).append((title, *arm_table(first_regime(here)), SAID[name]))
            if len({row["regime"] for row in here}) > 1:
                title = f"{HOSTS[name]}: share of the attainable in other regimes"
                found.setdefault("regimes", []).append((title, *regime_table(here), SAID[name]))
    for name, module in COMPUTED.items():
        if rows.get(name):
            for title, *table in importlib.import_module(f"evidence.{module}").sections(rows[name]):
                found.setdefault(title.split(":")[0], []).append((title, *table))
    return found


def pictures(rows, folder):
    """Draw what there are rows for; yields the paths."""
    from evidence.optimum_pictures import draw_lengths, draw_shares

    folder.mkdir(parents=True, exist_ok=True)
    hosts = {said: first_regime(rows[name]) for name, said in HOSTS.items() if rows.get(name)}
    lengths = select(rows.get("bare loop", []), part="lengths")
    if hosts:
        yield draw_shares(hosts, folder / "known_optimum.png")
    if lengths:
        yield draw_lengths(lengths, folder / "known_optimum_lengths.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only what the orderings that are judged need")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seeds", type=int, help="only so many of the seeds")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--resume", action="store_true", help="keep the runs that --out has, and do the others")
    parser.add_argument("--out", type=Path, default=Path("runs/known_optimum"))
    parser.add_argument("--docs", type=Path, help="folder of the documents: write tables and pictures there, too")
    args = parser.parse_args()
    console = Console()
    rows = run(args.parts, args, console)
    for name, tables in sections(rows).items():
        for title, columns, lines, sentence in tables:
            show(console, title, columns, lines)
            console.print(sentence)
        if args.docs and tables:
            text = [f"**{title}**\n\n{markdown(columns, lines)}\n\n{said}" for title, columns, lines, said in tables]
            write_section(args.docs / "evidence.md", f"known optimum: {name}", "\n\n".join(text))
    for folder in (args.out, *([args.docs / "images"] if args.docs else [])):
        for path in pictures(rows, folder):
            console.print(f"picture  {path}", highlight=False)
    if rows.get("trl"):
        failed = judge(claims(rows["trl"]), console)
        if failed and args.seeds is None:  # fewer seeds have wider intervals
            sys.exit("These orderings don't hold: " + "; ".join(claim.says for claim in failed))


if __name__ == "__main__":
    main()
