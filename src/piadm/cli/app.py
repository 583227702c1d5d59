"""The command ``piadm``: its subcommands, its exit codes and its one line on error."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import piadm
from piadm.cli.interrupts import INTERRUPTED

if TYPE_CHECKING:
    import typer

FAILED = 1
_INTERRUPTED = "piadm: interrupted"
_MISSING = "piadm: the command line needs {name}; install it with: pip install 'piadm[cli,plots,diffusers]'"


def build() -> typer.Typer:
    """Return the application with every subcommand.

    Raises:
        ImportError: If typer or rich is not installed.
    """
    import typer

    from piadm.cli import bench, compare, plan, sample, scaling, verify

    app = typer.Typer(
        name="piadm",
        help="Parallel-in-time sampling of diffusion and flow models.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )

    def tell(asked: bool) -> None:
        if asked:
            print(f"piadm {piadm.__version__}")
            raise typer.Exit

    option = typer.Option(False, "--version", callback=tell, is_eager=True, help="Show the version and exit.")

    # With a callback a subcommand keeps its name even where it is the only one.
    @app.callback()
    def root(version: bool = option) -> None:
        pass

    app.command("sample", epilog=sample.EXAMPLES)(sample.sample)
    app.command("compare", epilog=compare.EXAMPLES)(compare.compare)
    app.command("bench", epilog=bench.EXAMPLES)(bench.bench)
    app.command("plan", epilog=plan.EXAMPLES)(plan.plan)
    app.command("scaling", epilog=scaling.EXAMPLES)(scaling.scaling)
    app.command("verify", epilog=verify.EXAMPLES)(verify.verify)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after ``piadm``; ``sys.argv[1:]`` by default.

    Returns:
        The exit code: 0, 1 for a failure, 2 for a wrong option, 130 after Ctrl-C.  Every failure prints one
        line on standard error; with ``PIADM_TRACEBACK`` set in the environment it raises instead.
    """
    try:
        import typer.main

        command = typer.main.get_command(build())
    except KeyboardInterrupt:  # while the commands are loaded
        return _fail(_INTERRUPTED, INTERRUPTED)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] in ("typer", "rich"):
            return _fail(_MISSING.format(name=error.name.partition(".")[0]), FAILED)
        raise
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = int(command.main(words, prog_name="piadm", standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if os.environ.get("PIADM_TRACEBACK"):
            raise
        return _fail(f"piadm: error: {_one_line(error)}", getattr(error, "exit_code", FAILED))
    return _fail(_INTERRUPTED, INTERRUPTED) if code == INTERRUPTED else code


def _fail(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


def _one_line(error: Exception) -> str:
    """Return an error's message on one line, with its type where it has no message."""
    # Typer's own errors carry their full text in format_message; which click raised them varies by version.
    text = str(getattr(error, "format_message", error.__str__)())
    return " ".join(text.split()) or type(error).__name__
