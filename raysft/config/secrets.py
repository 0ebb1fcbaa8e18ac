"""Refuse configs that contain secrets, and mask secrets in messages.

A config is copied to run directories, model cards and trackers, and logs contain its paths. Removing a secret from all of these
is error-prone, and a run cannot resume from a ``config.yaml`` with gaps. So no config may contain a secret.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from raysft.errors import RequestError

_STORAGE = "remove it (storage uses AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the machine's role)"
_TOKEN = (
    "remove it (libraries use HF_TOKEN, WANDB_API_KEY, SWANLAB_API_KEY and MLFLOW_TRACKING_PASSWORD of the environment)"
)
_NAMES = "password|passwd|secret|secret_key|access_key|account_key|api_key|access_token|auth_token|session_token"

_PATTERNS: tuple[tuple[str, str, re.Pattern[str]], ...] = (
    # A host may have a port (hdfs://host:8020/a@b), and a secret may contain unescaped slashes. A user without a password
    # (hdfs://me@host) is not a secret, and text before an @ elsewhere (s3://bucket/a@b) is not a user.
    ("a password in a URI", _STORAGE, re.compile(r"(?<=://)[^/@:\[\s]*:(?!\d{1,5}(?:[/?#]|$))\S*(?=@)")),
    (
        "a secret among the options of a URI",
        _STORAGE,
        re.compile(rf"(?i)(?<=[?&])(?:{_NAMES}|token|sig|signature|x-amz-[a-z-]+)=[^&#\s]+"),
    ),
    ("an Azure account key", _STORAGE, re.compile(r"(?i)\bAccountKey=[^;&\s]+")),
    ("an AWS access key", _STORAGE, re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")),
    ("a Hugging Face token", _TOKEN, re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")),
    ("a GitHub token", _TOKEN, re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})\b")),
    # A hyphen may follow only the prefixes that real keys have: sk-learn-on-our-data is a name.
    ("an API key", _TOKEN, re.compile(r"\bsk-(?:(?:proj|ant|svcacct)-[\w-]{20,}|[A-Za-z0-9]{20,}\b)")),
    ("a private key", _TOKEN, re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*")),
)
"""Name, remedy and pattern of each kind of secret. Short on purpose: refusing a harmless path is a bug too."""
_SECRET_KEY = re.compile(rf"(?i)(?:^|[_-])(?:{_NAMES.replace('_', '[_-]?')})$")
"""Keys of free mappings (``train.deepspeed``) whose text is a secret in any form."""


def masked(text: str) -> str:
    """Replace everything that looks like a secret with ``***``.

    >>> masked("s3://KEY:SEC/RET@bucket/a.jsonl cannot be read")
    's3://***@bucket/a.jsonl cannot be read'
    >>> masked("hdfs://host:8020/a@b, s3://bucket/a@b?region=eu and file@2x.json")
    'hdfs://host:8020/a@b, s3://bucket/a@b?region=eu and file@2x.json'
    """
    for _, _, pattern in _PATTERNS:
        text = pattern.sub("***", text)
    return text


def refuse_secrets(raw: Any, where: Callable[[tuple[str, ...]], str]) -> None:
    """Search every key and text of nested mappings and lists for secrets.

    Args:
        raw: the mappings, as YAML or JSON gives them.
        where: file and line of a key path, for the error message.

    Raises:
        RequestError: names the key that contains a secret, but not the secret.
    """
    for path, text in _texts(raw, (), set()):
        found = next(((kind, remedy) for kind, remedy, pattern in _PATTERNS if pattern.search(text)), None)
        if found is None and text and path and _SECRET_KEY.search(path[-1]):
            found = ("a secret", _TOKEN)
        if found:
            kind, remedy = found
            raise RequestError(
                f"{masked(where(path))}: {masked('.'.join(path)) or 'the file'} contains {kind}, but configs are copied to run "
                f"directories, logs and trackers; {remedy}"
            )


def _texts(value: Any, path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield every text, keys included, with its key path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict | list) and id(value) not in seen:
        seen.add(id(value))  # a YAML anchor may contain itself
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield path, str(key)
            yield from _texts(inner, (*path, str(key)), seen)
