"""What messages must hold, so that their wording can improve."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from raysft.errors import RequestError


def holds(message: str, parts: str) -> bool:
    """True if a message is one line that begins with the first part and contains the others, which `` … `` separates, in order.

    >>> holds("train.epochs=0: must be greater than 0", "train.epochs=0 … greater")
    True
    >>> holds("train.epochs=0: must be greater than 0", "epochs")
    False
    """
    return re.fullmatch(".*".join(re.escape(part) for part in parts.split(" … ")) + ".*", message) is not None


def refusal(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Return the message, which must be one line, with which a call refuses a request."""
    with pytest.raises(RequestError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
