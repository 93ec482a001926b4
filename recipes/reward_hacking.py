"""Reward hacking: which KL term keeps a policy from exploiting a reward, through TRL's own trainers.

What:      trains the tiny math model on a reward that pays 1 for the right answer and 2 for an exploit that the
           reference almost never writes, with each KL term and from several seeds; then measures, alike for all,
           right answers, hacks, KL and the objective J = E[reward] - beta KL, against the best J in closed form.
Hardware:  2 CPU cores, no GPU, no network; transformers and vLLM rollouts
How long:  28 min; --quick 3 min, which trains four arms without vLLM
Launch:    python recipes/reward_hacking.py [--quick] [--parts front sequence reuse] [--seeds 5] [--docs docs]

Prints tables, and claims judged by 95% intervals of differences that are paired by seed. Ends with exit status 1 if a
claim of --quick does not hold. Every result goes to runs.jsonl below --out, with the pictures beside it; --docs FOLDER
puts the tables into evidence.md there and the pictures into its images.
"""

import argparse
import functools
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from evidence import hack_picture, hack_runs
from evidence.intervals import Claim, interval, judge, of, paired, select
from evidence.runs import run_all
from evidence.tables import markdown, show, write_section
from rich.console import Console

HERE = Path(__file__).parent
METRICS = {"right": ".3f", "hacks": ".3f", "kl": ".2f", "J": ".3f"}
COLUMNS = ("right answers", "hacks", "KL, nats", "J")
NORMS = "gradient norm: median, largest"


def make_models(parts):
    """The math models that the parts start from, each of them once."""
    for part in parts:
        folder = hack_runs.model_folder(part)
        if not (folder / "warmup.json").is_file():
            target = ["--target", str(hack_runs.PARTS[part].warmed_up_to)]
            subprocess.run([sys.executable, HERE / "make_math_model.py", "--out", folder, *target], check=True)


def outcomes(rows, ends):
    """What each trainer and arm came to at one beta, under the reference and the optimum."""
    found = [["", name, *(format(end[m], form) for m, form in METRICS.items()), ""] for name, end in ends.items()]
    for host, arm in dict.fromkeys((row["host"], row["arm"]) for row in rows):
        here = select(rows, host=host, arm=arm)
        cells = [format(of(here, metric), form) for metric, form in METRICS.items()]
        norms = " / ".join(f"{of(here, name).mean:.1f}" for name in ("median_norm", "largest_norm"))
        found.append([host, arm, *cells, norms])
    return found


def compared(rows, metric, more, less):
    """The `Interval` of what `more` has more of a metric than `less`, over the seeds that both arms have."""
    first, second = ({row["seed"] for row in select(rows, arm=arm)} for arm in (more, less))
    return paired([row for row in rows if row["seed"] in first & second], metric, more, less)


def differences(rows, pairs):
    """Paired by seed: what the first arm of a pair has more than the second; a tie is called one."""
    found = []
    for more, less in pairs:
        cells = []
        for metric in METRICS:
            difference = compared(rows, metric, more, less)
            tie = " (tie)" if difference.low <= 0 <= difference.high else ""
            cells.append(f"{difference.mean:+.3f} ± {difference.half:.3f}{tie}")
        found.append([f"{more} less {less}", *cells])
    return found


def on_the_way(rows, more, less):
    """The same of two arms, after so many updates."""
    found = []
    for step in dict.fromkeys(point["step"] for row in rows for point in row["curve"]):
        then = [row | point for row in rows for point in row["curve"] if point["step"] == step]
        found += [[f"after {step} updates", *cells] for _, *cells in differences(then, [(more, less)])]
    return found


def report(name, rows, console, docs):
    """Print the tables of a part, and put them into the page."""
    part, texts = hack_runs.PARTS[name], []

    def table(title, columns, cells, left=1):
        if cells:
            show(console, title, columns, cells, left)
            texts.append(f"{title}:\n\n{markdown(columns, cells, left)}")

    console.rule(part.title)
    for beta in dict.fromkeys(row["beta"] for row in rows):
        ends = {"reference": hack_runs.reference(name, beta), "optimum": hack_runs.best(name, beta)}
        cells = outcomes(select(rows, beta=beta), ends)
        table(f"Beta {beta:g}, {rows[0]['steps']} updates", ("trainer", "KL term", *COLUMNS, NORMS), cells, left=2)
    main = select(rows, host="GRPO", beta=part.betas[0])
    arms = {row["arm"] for row in main}
    pairs = [pair for pair in part.pairs if set(pair) <= arms]
    table(f"Differences paired by seed, GRPO, beta {part.betas[0]:g}", ("", *COLUMNS), differences(main, pairs))
    exact = ("exact_in_reward", "reverse_kl")
    if set(exact) <= arms:
        table(f"{exact[0]} less {exact[1]} on the way", ("", *COLUMNS), on_the_way(main, *exact))
    if name == "front":
        texts += [
            "![Right answers and hacks of each KL term](images/reward_hacking.png)",
            "Gradient norms before clipping, median and range over the seeds:",
            "![Gradient norms over the updates](images/reward_hacking_norms.png)",
        ]
    if docs:
        write_section(docs / "evidence.md", f"reward hacking: {name}", "\n\n".join(texts))


def claims(rows):
    """What the front has to show, of rows of one host and beta."""

    k1_hacks = interval(row["hacks"] - 0.5 for row in select(rows, arm="k1_as_loss"))
    return [
        Claim("k1 as loss doesn't regularize: most of its completions are hacks", k1_hacks),
        Claim(
            "k1 as loss doesn't regularize: more KL than k2 as loss", compared(rows, "kl", "k1_as_loss", "k2_as_loss")
        ),
        Claim("k3 as loss drifts further than k2: more hacks", compared(rows, "hacks", "k3_as_loss", "k2_as_loss")),
        Claim("k3 as loss drifts further than k2: more KL", compared(rows, "kl", "k3_as_loss", "k2_as_loss")),
        Claim("credit of the sequence hacks less than a token's", compared(rows, "hacks", "k2_as_loss", "reverse_kl")),
        Claim("credit of the sequence reaches more J than a token's", compared(rows, "J", "reverse_kl", "k2_as_loss")),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four arms of the first part; a failed claim is an error")
    parser.add_argument("--parts", nargs="+", default=list(hack_runs.PARTS), choices=list(hack_runs.PARTS))
    parser.add_argument("--seeds", type=int, help="runs of each arm (5; with --quick 3 or 6)")
    parser.add_argument("--steps", type=int, help="updates of each run (each part has its own)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--out", type=Path, default=Path("runs/reward_hacking"))
    parser.add_argument("--docs", type=Path, help="the folder of evidence.md: write tables and pictures there")
    parser.add_argument("--resume", action="store_true", help="keep the results that --out has")
    args = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console.width = 120  # of a log; its tables are wider than 80
    parts = ["front"] if args.quick else args.parts
    make_models(parts)
    rows = run_all(
        hack_runs.jobs(args.quick, parts, args.seeds, args.steps),
        hack_runs.work,
        out=args.out / "runs.jsonl",
        title="Reward hacking",
        console=console,
        workers=args.jobs,
        resume=args.resume,
    )
    for name in parts:
        report(name, select(rows, part=name), console, args.docs)
    if "front" not in parts:
        return
    beta = hack_runs.PARTS["front"].betas[0]
    front = select(rows, part="front", host="GRPO")
    pictures = args.docs / "images" if args.docs else args.out
    optimum_at = functools.partial(hack_runs.best, "front")
    hack_picture.draw(front, optimum_at, beta, pictures / "reward_hacking.png")
    hack_picture.draw_norms(select(front, beta=beta), pictures / "reward_hacking_norms.png")
    console.print(f"pictures {pictures}/reward_hacking*.png", highlight=False)
    failed = judge(claims(select(front, beta=beta)), console)
    if failed and (args.quick or any(claim.verdict == "contradicted" for claim in failed)):
        sys.exit(f"{len(failed)} of the claims above did not hold: has a KL term changed?")


if __name__ == "__main__":
    main()
