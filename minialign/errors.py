"""The one exception for bad input; `cli.run_main` turns it into one line and exit code 2."""


class UserError(Exception):
    """Bad input: one line that says what is wrong, where (file, line, field), and the remedy."""
