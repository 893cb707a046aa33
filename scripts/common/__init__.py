"""What the stages share. Started without its packages, a stage says how to get them instead of showing a traceback."""

import io
import sys
from types import TracebackType


def _explain(kind: type[BaseException], error: BaseException, trace: "TracebackType | None") -> None:
    ours = str(getattr(error, "name", None)).startswith(("scripts", "serve", "eval"))
    too_old = isinstance(error, ImportError) and sys.version_info < (3, 11)
    if not too_old and (ours or not isinstance(error, ModuleNotFoundError)):
        sys.__excepthook__(kind, error, trace)
        return
    version = ".".join(map(str, sys.version_info[:2]))
    sys.stderr.write(
        f"error: {error} (Python {version}, {sys.executable})\n"
        "Enter the environment with `source .venv/bin/activate` (Windows: .venv\\Scripts\\Activate.ps1) after `make setup`, or\n"
        "`pip install -r requirements.txt` with Python 3.11 or newer. `python -m scripts.doctor` says what else is missing.\n"
    )


sys.excepthook = _explain
if sys.platform == "win32":  # a console takes every letter there; a pipe or a file only those of an old code page
    for _stream in (sys.stdout, sys.stderr):
        if isinstance(_stream, io.TextIOWrapper) and not _stream.isatty():
            _stream.reconfigure(encoding="utf-8", errors="backslashreplace")
