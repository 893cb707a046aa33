"""Arrows between the modules of the server point one way."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

from tests.conftest import ROOT


def test_there_is_no_import_circle() -> None:
    """Imports for type checkers alone count, too."""
    modules = {f"serve.{path.stem}": path for path in (ROOT / "serve").glob("*.py")}
    imports: dict[str, set[str]] = {}
    for name, path in modules.items():
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)
        ]
        named = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
        imports[name] = ({node.module or "" for node in nodes} | named) & modules.keys()
    assert "serve.errors" in imports["serve.guard"], "the graph is read as it is written"
    order = list(TopologicalSorter(imports).static_order())  # raises CycleError
    assert order.index("serve.errors") < order.index("serve.service") < order.index("serve.fastapi_server")
