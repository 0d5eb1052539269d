"""``python -m dml_kernels {info,train,bench}``: each subcommand is imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from dml_kernels.cli.arguments import Parser
from dml_kernels.cli.process import exit_status, steady_output, stoppable

# name -> (the module whose main(argv) runs the command, help)
COMMANDS = {
    "info": ("dml_kernels.cli.info", "what was built, what is missing, which backend runs what, and why"),
    "train": (
        "dml_kernels.demo.train",
        "the main job: train embeddings with Proxy-NCA and with Magnet, evaluate them on unseen classes",
    ),
    "bench": ("dml_kernels.cli.bench", "run the repository's benchmarks"),
}


EXAMPLES = """
examples:
  python -m dml_kernels info
  python -m dml_kernels train --quick --out runs/try
  python -m dml_kernels bench --quick
"""


def main(argv: Sequence[str] | None = None) -> int:
    with steady_output():
        try:
            with stoppable():
                return _run(argv)
        except KeyboardInterrupt as interrupt:
            print("Interrupted.", file=sys.stderr)
            return exit_status(interrupt)


def _run(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m dml_kernels",
        description="Losses for deep metric learning that never build the similarity matrix.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<6} {text}" for name, (_, text) in COMMANDS.items())
        + f"\n{EXAMPLES}\n`python -m dml_kernels COMMAND --help` shows a command's own options.",
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="the command's own options")
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    args = parser.parse_args(arguments)
    try:
        command = importlib.import_module(COMMANDS[args.command][0])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("dml_kernels"):
            raise
        fix = "pip install -r requirements/torch.txt -r requirements/demo.txt, in the repository"
        parser.exit(2, f"error: `{args.command}` needs the module {error.name}: {fix}\n")
    return command.main(args.options) or 0


if __name__ == "__main__":
    sys.exit(main())
