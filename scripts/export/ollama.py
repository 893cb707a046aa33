"""Write Ollama's Modelfile, with the chat template in Ollama's own language where that can express it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from scripts.dataset.rendering import stop_token_ids

log = logging.getLogger(__name__)

# The spaces at both ends reveal a template that strips messages, which Ollama's language cannot express.
MARKS = {"system": " §0 ", "user": " §1 ", "assistant": " §2 "}
CONVERSATIONS = ("u", "su", "ua", "uau", "suau", "suaua", "uauau")


def write_modelfile(tokenizer: Any, folder: Path, weights: str, *, adds_bos: bool) -> None:
    """Write the file from which Ollama makes a model, with the chat template where its language can express it."""
    template = go_template(tokenizer, tokenizer.bos_token if adds_bos else "")
    lines = [f"FROM ./{weights}"]
    if template is None:
        lines.append(
            "# The chat template of this model cannot be expressed in Ollama's template language, so none is given here and\n"
            "# Ollama guesses one. Compare `ollama run` with the answers of this project before you trust it."
        )
        log.warning("the chat template cannot be expressed in Ollama's language; the Modelfile says so")
    else:
        lines.append(f'TEMPLATE """{template}"""')
    known = (token for token in sorted(stop_token_ids(tokenizer)) if token < len(tokenizer))
    stops = (tokenizer.decode([token], skip_special_tokens=False) for token in known)
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops if stop]
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")


def go_template(tokenizer: Any, bos: str = "") -> str | None:
    """Translate a chat template into Go's template language; None when it does more than put text around each message.

    The texts are read off from renderings and then checked against other conversations. `bos` is what a GGUF reader puts
    before every prompt by itself.
    """
    names = {role[0]: role for role in MARKS}

    def render(roles: str, *, prompt: bool = False) -> str:
        messages = [{"role": names[role], "content": MARKS[names[role]]} for role in roles]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))

    try:
        shown = {roles: render(roles) for roles in CONVERSATIONS}
        question = render("u", prompt=True)[len(shown["u"]) :]
    except (TemplateError, ValueError):  # a template that refuses a system message, say
        return None
    user = shown["suau"][len(render("sua")) :]
    around = {
        "user": user.partition(MARKS["user"]),
        "assistant": render("sua")[len(shown["su"]) :].partition(MARKS["assistant"]),
        "system": shown["su"].removesuffix(user).partition(MARKS["system"]),
    }
    default = shown["u"].removesuffix(user)

    def translated(roles: str) -> str:
        return ("" if roles[0] == "s" else default) + "".join("".join(around[names[role]]) for role in roles)

    texts = [default, question, *(text for before, _, after in around.values() for text in (before, after))]
    if not all(mark for _, mark, _ in around.values()):
        return None  # it changes the text of messages
    if any(translated(roles) != text for roles, text in shown.items()) or any(
        "{{" in text or '"""' in text for text in texts
    ):
        return None
    opening, default = around["system"][0].removeprefix(bos), default.removeprefix(bos)
    cases = " else ".join(
        f'if eq .Role "{role}" }}}}{opening if role == "system" else before}{{{{ .Content }}}}{after}{{{{'
        for role, (before, _, after) in around.items()
    )
    start = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{default}{{{{ end }}}}' if default else ""
    return f"{start}{{{{ range .Messages }}}}{{{{ {cases} end }}}}{{{{ end }}}}{question}"
