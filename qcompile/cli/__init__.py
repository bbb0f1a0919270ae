"""The command line."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import QCompileError


def main() -> None:
    """Entry point: bad input gets one line on standard error and exit code 2, no traceback.

    `--debug` anywhere on the line shows tracebacks.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) != len(sys.argv) - 1
    from .app import app

    try:
        code: Any = app(args=arguments or ["--help"], prog_name="qcompile", standalone_mode=False)
    except QCompileError as error:
        if debug:
            raise
        _fail(2, str(error))
    except BrokenPipeError:
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        # typer keeps its classes of usage errors to itself; they know their message and exit code
        message = getattr(error, "format_message", None)
        if message is not None:
            _fail(int(getattr(error, "exit_code", 2)), f"{message()} (`--help` shows what there is)")
        if debug:
            raise
        reason = str(error) or type(error).__name__
        _fail(1, f"{type(error).__name__}: {reason} (run again with --debug for details)")
    raise SystemExit(code if isinstance(code, int) else 0)


def _fail(code: int, message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code) from None
