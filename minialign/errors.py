"""Bad input ends a program with one clear line and exit code 2, never with a traceback."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input: one line that says what is wrong, where (file, line, field), and the remedy."""


def run_main(main: Callable[[], None]) -> None:
    """Run a program's `main`; a `UserError` becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
