"""The one style in which this project says what went wrong."""

from __future__ import annotations

import difflib
import errno
import functools
import os
import select
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TextIO

from scripts.common.colour import RED, coloured

EXIT_MISTAKE = 2  # what argparse uses too
EXIT_SIGINT = 130
EXIT_SIGPIPE = 141
EXIT_SIGTERM = 143
SHOWN = 20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNUSABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
IN_USE = (32, 33)  # ERROR_SHARING_VIOLATION and ERROR_LOCK_VIOLATION of Windows
# What torch, C libraries and the loader of shared objects say.
NO_MEMORY_TEXTS = ("can't allocate memory", "Cannot allocate memory", "bad_alloc", "failed to map segment")
# What safetensors (Rust) and torch.save say of a full disk; neither raises an OSError.
FULL_TEXTS = ("os error 28", "os error 27", "PytorchStreamWriter failed", "unexpected pos", "iostream error")


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


def did_you_mean(path: str | Path) -> str:
    """Return a sentence on how to write a path that leads nowhere, or nothing."""
    text, folder = str(path), Path(path).parent
    if text.startswith("~"):
        return f" Only a shell knows ~; write {Path(text).expanduser()}."
    if "\\" in text and os.name != "nt":
        slashes = text.replace("\\", "/")
        return f" Write / between folders: {slashes}."
    if not folder.is_dir():
        return "" if folder == folder.parent else did_you_mean(folder)
    name, known = Path(path).name, sorted(os.listdir(folder))
    near = difflib.get_close_matches(name, known, n=1) or [entry for entry in known if name and entry.startswith(name)]
    return f" Did you mean {folder / near[0]}?" if near else ""


def not_utf8(path: str | Path, error: UnicodeDecodeError) -> UserError:
    """Say where a file stops being UTF-8 and how to save it so."""
    line = error.object.count(b"\n", 0, error.start) + 1
    utf16 = error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
    return UserError(
        f"{path}:{line}: {'is UTF-16' if utf16 else f'byte {error.start + 1} is not UTF-8'}. Save the file as UTF-8: "
        f"in Excel as `CSV UTF-8`, in an editor under Encoding, or `iconv -f {'UTF-16' if utf16 else 'CP1252'} -t UTF-8 OLD > NEW`."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, of the machine or of a GPU."""
    # torch has a type of its own for a GPU only, and this module does not import torch.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(text in str(error) for text in NO_MEMORY_TEXTS)


def explain_lack(error: Exception) -> str | None:
    """Say what to do when memory, disk or permission is lacking; None for any other error, which is a bug."""
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    if is_out_of_memory(error):
        return (
            f"memory ran out ({reason}). Lower the batch (per_device_train_batch_size, eval.batch_size, lmeval.batch_size), "
            "max_length, max_new_tokens or the workers, choose a smaller base model, or close other programs."
        )
    if isinstance(error, OSError) and getattr(error, "winerror", None) in IN_USE:
        return (
            f"{error.filename or 'a file'}: another program has it open. Close that program and run the command again."
        )
    if isinstance(error, OSError) and error.errno in UNUSABLE:
        return f"{error.filename or 'a file'}: {error.strerror}. Correct the path or its permissions."
    if isinstance(error, OSError) and error.errno in FULL:
        where = f" at {error.filename}" if error.filename else ""
        return f"cannot write{where}: {error.strerror}. Free some space or choose another folder."
    if any(text in str(error) for text in FULL_TEXTS):
        return f"cannot write: {reason}. Free some space or choose another folder."
    return None


def _is_read(stream: TextIO) -> bool:
    """Tell whether anybody still reads a stream; where not, as behind `| head`, let what is left in it go nowhere."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except (AttributeError, OSError):  # Windows has no poll, and a stream may be none of the system's
        return True
    if not poll.poll(0):
        return True
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return False


def entry_point(main: Callable[..., int]) -> Callable[..., int]:
    """Turn a user's mistake, an interrupt, a full disk or a lack of memory into one message and an exit code."""

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
        except Exception as error:
            if isinstance(error, BrokenPipeError) and not _is_read(sys.stdout):
                return EXIT_SIGPIPE
            explained = explain_lack(error)
            if explained is None:
                raise
            message, code = f"error: {explained}", EXIT_MISTAKE
        if message:
            head, colon, rest = message.partition(":")
            sys.stderr.write(coloured(head + colon, RED, sys.stderr) + rest + "\n")
        return code

    return wrapped
