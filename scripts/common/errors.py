"""The one style in which this project tells a user what went wrong."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable, Iterable, Sequence

EXIT_MISTAKE = 2  # what argparse uses too
EXIT_SIGINT = 130
EXIT_SIGTERM = 143
SHOWN = 20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNUSABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


class UserError(Exception):
    """Say what is wrong, where, and what to do next; shown without a traceback."""


class Interrupted(BaseException):
    """Carry the signal that ended a run in good order."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def listing(head: str, problems: Iterable[str], next_step: str = "") -> str:
    """Write several problems at once: the first 20, then how many more there are."""
    found = list(problems)
    lines = [head, *(f"  {problem}" for problem in found[:SHOWN])]
    if len(found) > SHOWN:
        lines.append(f"  … and {len(found) - SHOWN} more")
    if next_step:
        lines.append(next_step)
    return "\n".join(lines)


def entry_point(main: Callable[..., int]) -> Callable[..., int]:
    """Turn a user's mistake, an interrupt or a full disk into one message and an exit code."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except UserError as error:
            message, code = f"error: {error}", EXIT_MISTAKE
        except Interrupted as interrupt:
            message, code = "", interrupt.exit_code
        except KeyboardInterrupt:
            message, code = "interrupted", EXIT_SIGINT
        except OSError as error:
            if error.errno not in FULL + UNUSABLE:
                raise
            where = f" at {error.filename}" if error.filename else ""
            message, code = (
                f"error: cannot write{where}: {error.strerror}. Free some space or choose another folder.",
                EXIT_MISTAKE,
            )
            if error.errno in UNUSABLE:
                message = f"error: {error.filename or 'a file'}: {error.strerror}. Correct the path or its permissions."
        if message:
            sys.stderr.write(message + "\n")
        return code

    return wrapped
