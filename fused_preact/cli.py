"""The command fused-preact. A subcommand is a module with add_arguments(parser), run(args)."""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": ("fused_preact.training.command", "train a network and leave a run folder"),
    "bench": ("fused_preact.bench.command", "measure beside PyTorch's layers, or report on it"),
    "tune": ("fused_preact.tune", "measure the Triton kernels' tile sizes on this GPU"),
    "doctor": ("fused_preact.doctor", "say what was built and what will run here"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; its exit code is 0, 1 for a failure or 2 for a bad argument."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="fused-preact", description="Pre-activation residual networks on fused kernels."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in argv[:1]:  # what does not run is not imported
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    return args.run(args)
