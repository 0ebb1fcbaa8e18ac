"""Chat templates by name, composed from ``raysft/chat_templates``.

A template is the words of its entry in ``names.yaml``, as ``set`` statements, then the macros of its tool format, then
``base.jinja``. The result is plain Jinja that is saved with the model.
"""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent.parent / "chat_templates"
DEFAULTS: dict[str, Any] = {
    "prefix": "",
    "default_system": "",
    "system": "{content}",
    "user": "{content}",
    "prompt": "",
    "answer": "{content}{eos}",
    "tools": ["default"],
    "tools_frame": "{content}",
    "thought": "<think>\n{content}\n</think>\n\n",
}
TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
"""How templates write special tokens."""


@lru_cache(maxsize=1)
def _entries() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((FOLDER / "names.yaml").read_text(encoding="utf-8"))


def template_names() -> list[str]:
    """Return all names, sorted."""
    return sorted(_entries())


def similar_name(name: str) -> str | None:
    """Return the template name that is most similar to another text; None if none is."""
    return next(iter(difflib.get_close_matches(name.lower(), template_names(), n=1)), None)


def template_words(name: str) -> dict[str, Any]:
    """Return the words of a template, as ``names.yaml`` describes them, with their defaults."""
    entry = dict(_entries()[name])
    while "like" in entry:
        entry = {**_entries()[entry.pop("like")], **entry}
    words = {**DEFAULTS, **entry}
    words.setdefault("tool", words["user"])
    words.setdefault("tool_prompt", words["prompt"])
    words.setdefault("call", words["answer"])
    words.setdefault("empty_thought", words["thought"].replace("{content}", "", 1))
    return words


def special_tokens(name: str) -> list[str]:
    """Return what a template writes around the turns as special tokens, in the order of a conversation.

    ``{bos}`` and ``{eos}`` are not among them: they are whatever the tokenizer has.
    """
    words = template_words(name)
    if words.get("plain_words"):
        return []
    frames = "".join(words[key] for key in ("prefix", "system", "user", "prompt", "answer"))
    return list(dict.fromkeys(TAG.findall(frames)))


@lru_cache(maxsize=8)
def named_template(name: str) -> str:
    """Compose a template's Jinja text."""
    words = template_words(name)
    joined = "<tool_response>\n" in words["tool"]
    statements = {
        "prefix": _expression(words["prefix"]),
        # ``data.default_system: ""`` turns it off.
        "default_system": f"default_system if default_system is defined else {_expression(words['default_system'])}",
        "system_frame": _frame(words["system"]),
        "system_in_question": str(words.get("system_in_question", False)).lower(),
        "tools_frame": _frame(words["tools_frame"]),
        "user_frame": _frame(words["user"]),
        "tool_frame": _frame(words["tool"]),
        "result_separator": _expression("\n</tool_response>\n<tool_response>\n" if joined else ""),
        "prompt": _expression(words["prompt"]),
        "tool_prompt": _expression(words["tool_prompt"]),
        "answer_frame": _answer_frame(words["answer"]),
        "call_frame": _answer_frame(words["call"]),
        "ends_with_eos": str(words.get("ends_with_eos", False)).lower(),
        "thought_words": _frame(words["thought"]),
        "empty_thought": _expression(words["empty_thought"] if words.get("thinks") else ""),
    }
    macros = [_text(FOLDER / "tools" / f"{file}.jinja") for file in ("arguments", *words["tools"])]
    return "".join(
        [
            *(f"{{%- set {key} = {value} -%}}\n" for key, value in statements.items()),
            *macros,
            _text(FOLDER / "base.jinja").rstrip("\n"),
        ]
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _frame(words: str) -> str:
    """Write what surrounds ``{content}`` as a Jinja list."""
    return f"[{', '.join(_expression(part) for part in words.split('{content}', 1))}]"


def _answer_frame(words: str) -> str:
    """Write an answer's frame as a Jinja list, with the white space after its end by itself: nobody should learn to write it."""
    start, end = words.split("{content}", 1)
    rest = end[len(end.rstrip()) :]
    return f"[{', '.join(_expression(part) for part in (start, end[: len(end) - len(rest)], rest))}]"


def _expression(words: str) -> str:
    """Write words as a Jinja expression.

    >>> _expression("{bos}[INST] it's\\n")
    "bos_token ~ '[INST] it\\\\'s\\\\n'"
    """
    tokens = {"{bos}": "bos_token", "{eos}": "eos_token"}
    parts = [part for part in re.split(r"(\{bos\}|\{eos\})", words) if part]
    quoted = [tokens.get(part) or f"'{_escaped(part)}'" for part in parts]
    # A tokenizer may lack the token; joined to a text, an undefined value writes nothing.
    return " ~ ".join([*quoted, "''"] if parts and parts[-1] in tokens else quoted or ["''"])


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
