"""Write Ollama's Modelfile, with the chat template in Ollama's own language where that can express it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from scripts.common.errors import UserError
from scripts.dataset.chat_format import ChatFormat, stop_token_ids, without_marks

log = logging.getLogger(__name__)

# The spaces at both ends reveal a template that strips messages, which Ollama's language cannot express.
MARKS = {"system": " §0 ", "user": " §1 ", "assistant": " §2 "}
CONVERSATIONS = ("u", "su", "uau", "suau", "uauau", "suauau")


def write_modelfile(chat: ChatFormat, folder: Path, weights: str, *, adds_bos: bool) -> None:
    """Write the file from which Ollama makes a model, with the chat template where its language can express it."""
    tokenizer = chat.tokenizer
    template = go_template(chat, tokenizer.bos_token if adds_bos else "")
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
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def go_template(chat: ChatFormat, bos: str = "") -> str | None:
    """Translate a chat template into Go's template language; None when it does more than put text around each message.

    The texts are read off from prompts as they are served, and then checked against other prompts. `bos` is what a GGUF
    reader puts before every prompt by itself.
    """
    names = {role[0]: role for role in MARKS}

    def messages(roles: str) -> list[dict[str, str]]:
        return [{"role": names[role], "content": MARKS[names[role]]} for role in roles]

    try:
        shown = {roles: without_marks(chat.write_prompt(messages(roles))) for roles in CONVERSATIONS}
        user_alone = without_marks(chat.write(messages("u")))
    except UserError:  # a template that refuses a system message, say
        return None
    question = shown["u"].removeprefix(user_alone)
    before_user, _, after_user = user_alone.partition(MARKS["user"])
    opening, system, behind_system = shown["su"].partition(MARKS["user"])[0].partition(MARKS["system"])
    turns, assistant, behind_assistant = shown["uau"].removeprefix(user_alone).partition(MARKS["assistant"])
    behind_assistant = behind_assistant.partition(MARKS["user"])[0]
    # What precedes every user message belongs to it; the rest of it to what stands before.
    own = os.path.commonprefix([text[::-1] for text in (before_user, behind_system, behind_assistant)])[::-1]  # noqa: RUF071
    around = {
        "user": (own, after_user),
        "assistant": (turns, behind_assistant.removesuffix(own)),
        "system": (opening, behind_system.removesuffix(own)),
    }
    default = before_user.removesuffix(own)

    def translated(roles: str) -> str:
        written = (
            "" if roles[0] == "s" else default,
            *(MARKS[names[role]].join(around[names[role]]) for role in roles),
        )
        return "".join(written) + question

    texts = [default, question, *(text for pair in around.values() for text in pair)]
    if not system or not assistant or any(translated(roles) != text for roles, text in shown.items()):
        return None  # it changes the text of messages
    if any("{{" in text or '"""' in text for text in texts):
        return None
    opening, default = opening.removeprefix(bos), default.removeprefix(bos)
    cases = " else ".join(
        f'if eq .Role "{role}" }}}}{opening if role == "system" else before}{{{{ .Content }}}}{after}{{{{'
        for role, (before, after) in around.items()
    )
    start = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{default}{{{{ end }}}}' if default else ""
    return f"{start}{{{{ range .Messages }}}}{{{{ {cases} end }}}}{{{{ end }}}}{question}"
