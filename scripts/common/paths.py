"""Where the repository lies, and how paths are looked up and written down."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def resolve(path: str | Path) -> Path:
    """Look a path up from the working folder, else from the repository; one that is in neither comes back as it is."""
    here, there = Path(path), ROOT / path
    return there if there.exists() and not here.exists() else here


def portable_path(path: str | Path) -> str:
    """Write a path relative to the repository where it lies inside, so that manifests can travel."""
    resolved = Path(path).resolve()
    return resolved.relative_to(ROOT).as_posix() if resolved.is_relative_to(ROOT) else str(path)
