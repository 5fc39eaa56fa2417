"""The command line: parse, call one function, print."""

import argparse
import atexit
import contextlib
import os
import sys
import warnings

from vitbench.base import progress
from vitbench.base.errors import InputError
from vitbench.base.files import UNWRITABLE_ERRNOS
from vitbench.base.processes import open_standard_streams
from vitbench.cli import combine, compress, edge, measure, mine, run, sweep, verify
from vitbench.cli.interrupts import STOPPED_TEXT, Interrupted, interruptible, kill_and_exit


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns 0, or 1 where a notebook failed; a wrong input prints one line and returns 2.

    As in a shell, 130 stands for SIGINT, 143 for SIGTERM, and 141 for an output that nobody reads any more.
    """
    open_standard_streams()
    progress.escape_unencodable(sys.stdout, sys.stderr)
    options = _parser().parse_args(arguments)
    try:
        with interruptible(), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"vitbench: warning: {message}", file=sys.stderr)
            status = options.command(options)
            sys.stdout.flush()
            return status
    except InputError as error:
        if options.debug:
            raise
        print(f"vitbench: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if options.debug or error.errno not in UNWRITABLE_ERRNOS:
            raise
        print(
            f"vitbench: {error.filename or 'a file'} cannot be written ({error.strerror}); give a folder with free space "
            "that you own; what was finished is kept",
            file=sys.stderr,
        )
        return 2
    except Interrupted as stop:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        atexit._run_exitfuncs()  # removes temporary folders
        kill_and_exit(stop.status)
    except KeyboardInterrupt:  # where signals are not handled by `interruptible`
        print(STOPPED_TEXT, file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vitbench", description="Compress Vision Transformers, measure what it really costs, and compare."
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for module in (run, sweep, compress, combine, mine, measure, verify, edge):
        module.add_command(commands)
    return parser
