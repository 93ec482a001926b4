"""`kl-plugins trl grpo --kl ...`: TRL's own command line, with the `kl_*` options, in every process that it starts."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable

from kl_plugins.errors import refuse
from kl_plugins.patching import Patching, load_patches, untested_allowed
from kl_plugins.trl.apply import apply_to_trl

COMMANDS = ("grpo", "rloo")  # of TRL's commands, those whose trainers have a KL to a reference


def run(arguments: list[str]) -> int:
    """Run `trl ARGUMENTS`. What TRL's parser reads, it checks here, before any process is started."""
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        refuse(
            [f"kl-plugins trl {name}: choose from {', '.join(COMMANDS)}; the other commands of trl have no such KL"]
        )
    from trl.cli.main import main

    patching = Patching(load_patches("trl", "command"), allow_untested=untested_allowed())
    with patching, apply_to_trl(trainers=[name], require_kl=True):
        return main(arguments)


def launch_with_kl(launch: Callable[..., None]) -> Callable[..., None]:
    """In the place of TRL's launcher: `accelerate launch` of this module, which then runs TRL's script."""

    def launch_training_script(script_name: str, launch_args: list[str], training_script_args: list[str]) -> None:
        from accelerate.commands.launch import launch_command, launch_command_parser

        script = ["--module", __name__, script_name.removesuffix(".py"), *training_script_args]
        launch_command(launch_command_parser().parse_args([*launch_args, *script]))

    return launch_training_script


def main() -> None:
    """In a process that `accelerate launch` started: TRL's script."""
    name = sys.argv.pop(1)
    apply_to_trl(trainers=[name], require_kl=True)
    runpy.run_module(f"trl.scripts.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
