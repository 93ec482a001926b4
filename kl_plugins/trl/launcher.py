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
    """Run TRL's command line, `trl grpo ...` or `trl rloo ...`, with the `kl_*` options; its exit code.

    `arguments` are the words after `kl-plugins trl`. TRL's parser reads and checks them in this process, before
    another one is started.

    Raises:
        ConfigError: For another command than those two, options that can't be, or no `kl`.
        PatchError: For a TRL that isn't as it was tested.
    """
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        refuse(
            [f"kl-plugins trl {name}: choose from {', '.join(COMMANDS)}; the other commands of trl have no such KL"]
        )
    from trl.cli.main import main

    patching = Patching(load_patches("trl", "command"), allow_untested=untested_allowed())
    with patching, apply_to_trl(trainers=[name], require_kl=True):
        return int(main(arguments))


def launch_with_kl(launch: Callable[..., None]) -> Callable[..., None]:
    """What takes the place of TRL's `launch`: `accelerate launch` of this module, which then runs TRL's script."""

    def launch_training_script(script_name: str, launch_args: list[str], training_script_args: list[str]) -> None:
        from accelerate.commands.launch import launch_command, launch_command_parser

        script = ["--module", __name__, script_name.removesuffix(".py"), *training_script_args]
        launch_command(launch_command_parser().parse_args([*launch_args, *script]))

    return launch_training_script


def main() -> None:
    """Run TRL's script, in a process that `accelerate launch` has started with `grpo` or `rloo` as first argument."""
    name = sys.argv.pop(1)
    apply_to_trl(trainers=[name], require_kl=True)
    runpy.run_module(f"trl.scripts.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
