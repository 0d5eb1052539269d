"""``python -m dml_kernels {info,train,bench}``; each subcommand is imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# name: (module whose main(argv) runs it, help)
COMMANDS = {
    "info": ("dml_kernels.cli.info", "what was built, what is missing, which backend runs what, and why"),
    "train": (
        "dml_kernels.demo.train",
        "the main job: train embeddings with Proxy-NCA and with Magnet, evaluate them on unseen classes",
    ),
    "bench": ("dml_kernels.cli.bench", "run the repository's benchmarks"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dml_kernels",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Losses for deep metric learning that never build the similarity matrix.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<6} {text}" for name, (_, text) in COMMANDS.items())
        + "\n\n`python -m dml_kernels COMMAND --help` shows a command's own options.",
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="the command's own options")
    args = parser.parse_args(argv)
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
