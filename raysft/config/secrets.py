"""Secrets in a config: found, and never repeated.

A config is copied into run directories, model cards and trackers, and its paths stand in logs. Leaving a secret out of all of
those could not be held for ever, and a ``config.yaml`` with holes would resume nothing: so no config may hold one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from raysft.errors import RequestError

_S3 = "leave it out: storage takes AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the machine's role"
_TOKEN = "leave it out: libraries take it from the environment (HF_TOKEN, WANDB_API_KEY, MLFLOW_TRACKING_PASSWORD)"
_NAMES = "password|passwd|secret|secret_key|access_key|account_key|api_key|access_token|auth_token|session_token"

_PATTERNS: tuple[tuple[str, str, re.Pattern[str]], ...] = (
    # The host of a URI may have a port (hdfs://host:8020/a@b), and a secret slashes that should have been escaped. A user
    # without a password (hdfs://me@host) is no secret, and what precedes @ elsewhere (s3://bucket/a@b) is no user.
    ("a password in a URI", _S3, re.compile(r"(?<=://)[^/@:\[\s]*:(?!\d{1,5}(?:[/?#]|$))\S*(?=@)")),
    (
        "a secret among the options of a URI",
        _S3,
        re.compile(rf"(?i)(?<=[?&])(?:{_NAMES}|token|sig|signature|x-amz-[a-z-]+)=[^&#\s]+"),
    ),
    ("an Azure account key", _S3, re.compile(r"(?i)\bAccountKey=[^;&\s]+")),
    ("an AWS access key", _S3, re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")),
    ("a Hugging Face token", _TOKEN, re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")),
    ("a GitHub token", _TOKEN, re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})\b")),
    # With a hyphen only behind the prefixes that keys have: sk-learn-on-our-data is a name.
    ("an API key", _TOKEN, re.compile(r"\bsk-(?:(?:proj|ant|svcacct)-[\w-]{20,}|[A-Za-z0-9]{20,}\b)")),
    ("a private key", _TOKEN, re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*")),
)
"""What it is, what to do instead, and how it looks. Short on purpose: a path that is refused for no reason is a bug too."""
_SECRET_KEY = re.compile(rf"(?i)(?:^|[_-])(?:{_NAMES.replace('_', '[_-]?')})$")
"""Keys of free mappings (``train.deepspeed``) whose text is a secret however it looks."""


def masked(text: str) -> str:
    """A text for people with *** in the place of what looks like a secret.

    >>> masked("s3://KEY:SEC/RET@bucket/a.jsonl cannot be read")
    's3://***@bucket/a.jsonl cannot be read'
    >>> masked("hdfs://host:8020/a@b, s3://bucket/a@b?region=eu and file@2x.json")
    'hdfs://host:8020/a@b, s3://bucket/a@b?region=eu and file@2x.json'
    """
    for _, _, pattern in _PATTERNS:
        text = pattern.sub("***", text)
    return text


def refuse_secrets(raw: Any, where: Callable[[tuple[str, ...]], str]) -> None:
    """Look at every key and text of nested mappings and lists, before anything else repeats what is there.

    Args:
        raw: as YAML or JSON gives it.
        where: the file and line of a key path.

    Raises:
        RequestError: a key holds a secret; it is named and the secret is not.
    """
    for place, text in _texts(raw, (), set()):
        kind = next(((what, remedy) for what, remedy, pattern in _PATTERNS if pattern.search(text)), None)
        if kind is None and text and place and _SECRET_KEY.search(place[-1]):
            kind = ("a secret", _TOKEN)
        if kind:
            what, remedy = kind
            raise RequestError(
                f"{masked(where(place))}: {masked('.'.join(place)) or 'the file'} holds {what}, and a config is copied "
                f"into run directories, logs and trackers; {remedy}"
            )


def _texts(value: Any, place: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text with the path of its key; a key is a text too."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict | list) and id(value) not in seen:
        seen.add(id(value))  # an anchor of YAML may hold itself
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield place, str(key)
            yield from _texts(inner, (*place, str(key)), seen)
