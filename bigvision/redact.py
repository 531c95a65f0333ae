"""Texts and configurations without secrets, for files that others may read: the report, run.yaml, the restart log.

`without_secrets` removes passwords and tokens, `redacted` also who runs this. A path stays one that the same user can open:
their home folder becomes ``~``, and a folder that is named as they are becomes ``$USER``, which paths of a recipe understand.
"""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

Change = Callable[[str], str]
HIDDEN = "***"
SECRET = r"(?:token|passw(?:or)?d|passphrase|secret|credentials?|signature|api[_-]?key|access[_-]?key|auth(?:orization)?)"
"""How the names of what is secret end, such as HF_TOKEN and WANDB_API_KEY."""
NAME = re.compile(rf"(?:^|.*[_.-]){SECRET}(?:[_-]?id)?$", re.IGNORECASE)
URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"<>]+", re.IGNORECASE)
USER_OF_URL = re.compile(r"://[^/?#]*@")
QUERY = re.compile(rf"([?&;#][\w.-]*(?:{SECRET}|sig|key)=)[^&;#]+", re.IGNORECASE)
ASSIGNED = re.compile(rf"((?:\b|_){SECRET}['\"]?\s*(?:=|:)\s*['\"]?)(?!\*\*\*|Bearer |Basic )[^\s'\",;&]{{6,}}", re.IGNORECASE)
TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|sk-[\w-]{16,}|xox[abprs]-[\w-]{10,}|"
    r"(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)|(?<=\bBearer )\S{6,}|(?<=\bBasic )\S{6,}"
)
"""Tokens of Hugging Face, GitHub, GitLab, OpenAI, Slack, AWS and Google, web tokens, and those of HTTP headers."""
HOMES = re.compile(r"(?:(?<=/home/)|(?<=/Users/))[^/\s'\"]+")
END = r"(?=$|[/\s'\":,;?)\]}])"


def without_secrets(value: Any) -> Any:
    """*value*, a text or JSON data, without passwords and tokens: by the names of keys, in URLs, by their forms, and whatever
    a variable of this environment with such a name contains."""
    return _each_text(value, _hide_secrets())


def redacted(value: Any, strict: bool = False) -> Any:
    """*value* without secrets and without the name of the user. *strict*: without other users' home folders too."""
    hide_secrets, hide_user = _hide_secrets(), _hide_user()

    def change(text: str) -> str:
        text = hide_user(hide_secrets(text))
        return HOMES.sub(HIDDEN, text) if strict else text

    return _each_text(value, change)


def _each_text(value: Any, change: Change) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            change(name) if isinstance(name, str) else name: HIDDEN
            if isinstance(name, str) and isinstance(inner, str) and inner and NAME.match(name)
            else _each_text(inner, change)
            for name, inner in value.items()
        }
    return [_each_text(inner, change) for inner in value] if isinstance(value, (list, tuple)) else value


def _hide_secrets() -> Change:
    known = [value for name, value in os.environ.items() if len(value) >= 8 and NAME.match(name)]

    def change(text: str) -> str:
        for value in known:
            text = text.replace(value, HIDDEN)
        if "://" in text:
            text = URL.sub(lambda match: QUERY.sub(rf"\g<1>{HIDDEN}", USER_OF_URL.sub(f"://{HIDDEN}@", match[0])), text)
        return ASSIGNED.sub(rf"\g<1>{HIDDEN}", TOKENS.sub(HIDDEN, text)) if len(text) > 8 else text

    return change


def _hide_user() -> Change:
    rules: list[tuple[re.Pattern[str], str]] = []
    with suppress(RuntimeError):
        home = str(Path.home())
        if home.count("/") > 1 or home == "/root":
            rules.append((re.compile(rf"(?<![\w.~/-]){re.escape(home)}{END}"), "~"))
    names = {os.environ[variable]: f"${variable}" for variable in ("LOGNAME", "USER") if os.environ.get(variable)}
    with suppress(OSError, KeyError, ImportError):  # a user without an entry, as in containers
        names.setdefault(getpass.getuser(), HIDDEN)
    for name, instead in names.items():
        rules.append((re.compile(rf"(?<=/){re.escape(name)}{END}"), instead))
        rules.append((re.compile(rf"(?<![\w.-]){re.escape(name)}(?=@[\w.-]+:)"), HIDDEN))  # alice@host:/data

    def change(text: str) -> str:
        if "/" in text or "@" in text:
            for pattern, instead in rules:
                text = pattern.sub(lambda _, instead=instead: instead, text)
        return text

    return change
