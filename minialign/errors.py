"""The one exception for bad input; `cli.run_main` turns it into one line and exit code 2."""

import re

LONGEST = 1000  # letters of a message, and 200 of a word: what is read may be of megabytes


class UserError(Exception):
    """Bad input: one line that says what is wrong, where (file, line, field), and the remedy."""

    def __init__(self, message: str):
        # What a file holds may stand in the message: no line breaks and no terminal codes of its
        # making.
        message = re.sub(r"\S{201,}", lambda word: f"{word[0][:100]}...{word[0][-100:]}", message)
        if len(message) > LONGEST:  # the place stands at its head, the remedy at its end
            message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
        super().__init__("".join(c if c.isprintable() else " " for c in message))


def remedy_of(error: Exception) -> str:
    """What helps against an error of files, by its cause."""
    text = str(error)
    if "No space left" in text or "quota" in text.lower():
        return "make room for it, or name another place"
    if isinstance(error, PermissionError) or "Read-only" in text:
        return "allow it, or name another place"
    if isinstance(error, FileNotFoundError):
        return "put it back, or name another place"
    return "mend it, or name another place"
