"""The command line."""

from __future__ import annotations

import sys

from ..errors import QCompileError


def main() -> None:
    """Entry point: bad input gets one line on standard error and exit code 2, no traceback.

    `--debug` anywhere on the line shows tracebacks.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) != len(sys.argv) - 1
    from .app import app

    try:
        app(args=arguments, prog_name="qcompile")
    except QCompileError as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if debug:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        print(
            f"error: {type(error).__name__}: {reason} (run again with --debug for details)", file=sys.stderr
        )
        raise SystemExit(1) from None
