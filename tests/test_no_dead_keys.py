"""Every configuration key is read somewhere."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from pydantic import BaseModel

from scripts.common.schema import Config
from tests.conftest import ROOT

DECLARING = {"schema.py", "reference.py"}


def names_read(path: Path) -> set[str]:
    """Return every name that is read as an attribute, or as a text key of a dumped configuration."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    slices = [node.slice for node in nodes if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load)]
    return attributes | {
        item.value for item in slices if isinstance(item, ast.Constant) and isinstance(item.value, str)
    }


def keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Name every key of a section and of those in it."""
    found = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += keys(inner, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}")
    return found


READ = set().union(
    *(
        names_read(path)
        for folder in ("scripts", "serve", "eval")
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in DECLARING
    )
)


@pytest.mark.parametrize("key", keys(Config))
def test_key_is_read_outside_the_schema(key: str) -> None:
    assert key.rpartition(".")[2] in READ
