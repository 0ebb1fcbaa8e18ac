"""Values that Kubernetes takes: names, labels, amounts, folders, variables.

KubeRay accepts a RayJob with wrong ones, and then waits for pods that nobody can create; so they are refused here.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator

from raysft.config.section import Positive, Text

LABEL_LENGTH = 63
_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_OBJECT_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_WORD = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_QUANTITY = re.compile(r"([1-9][0-9]{0,5})(Mi|Gi|Ti|M|G|T)")
_UNITS = {"Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "M": 10**6, "G": 10**9, "T": 10**12}
_VARIABLE = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
_POD_RESOURCES = ("cpu", "memory", "ephemeral-storage")
_TOLERATION = {"key", "operator", "value", "effect", "tolerationSeconds"}
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")


def _object_name(value: str) -> str:
    if len(value) > 253 or not _OBJECT_NAME.fullmatch(value):
        raise ValueError("must be a Kubernetes object name: lower-case letters, digits, '-' and '.'")
    return value


def _short_name(value: str) -> str:
    if len(value) > LABEL_LENGTH or not re.fullmatch(_LABEL, value):
        raise ValueError(
            f"must be a short Kubernetes name: at most {LABEL_LENGTH} lower-case letters, digits and '-', a letter or digit at "
            "both ends"
        )
    return value


def _selected(value: str) -> str:
    return value and _label_value(value)  # many labels of nodes have no value


def _label_value(value: str) -> str:
    if len(value) > LABEL_LENGTH or not _WORD.fullmatch(value):
        raise ValueError(
            f"must be a label value: at most {LABEL_LENGTH} letters, digits, '-', '_' and '.', a letter or digit at both ends"
        )
    return value


def _label(value: str) -> str:
    prefix, slash, name = value.rpartition("/")
    if len(name) > LABEL_LENGTH or not _WORD.fullmatch(name) or (slash and not _OBJECT_NAME.fullmatch(prefix)):
        raise ValueError(
            "must be a name like topology.kubernetes.io/zone: a domain, '/', and letters, digits, '-', '_', '.'"
        )
    return value


def _device(value: str) -> str:
    if value in _POD_RESOURCES or ("/" not in value and not value.startswith("hugepages-")):
        raise ValueError(
            "must be the name of a device such as nvidia.com/gpu; cpus, memory and disk have their own keys"
        )
    return _label(value)


def _quantity(value: str) -> str:
    if not _QUANTITY.fullmatch(value):
        raise ValueError(f"must be a whole number with a unit ({', '.join(_UNITS)}), for example 64Gi")
    return value


def _folder(value: str) -> str:
    if not value.startswith("/") or ".." in value.split("/") or ":" in value or not value.isprintable():
        raise ValueError("must be an absolute path inside the pods, for example /mnt/raysft")
    return "/" + posixpath.normpath(value).lstrip("/")


def _image(value: str) -> str:
    if "://" in value or not value.isprintable() or " " in value:
        raise ValueError("must be the name of an image, for example registry.example.com/raysft:0.1")
    return value


def _variable(value: str) -> str:
    if not _VARIABLE.fullmatch(value):
        raise ValueError("must be a variable name: letters, digits, '_', '-' and '.', not starting with a digit")
    return value


def _text(value: str) -> str:
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("contains characters that cannot occur in a process's environment; remove them")
    return value


def _toleration(value: dict[str, Any]) -> dict[str, Any]:
    if unknown := value.keys() - _TOLERATION:
        raise ValueError(f"a toleration has no key {min(unknown)}; use {', '.join(sorted(_TOLERATION))}")
    operator, seconds = value.get("operator", "Equal"), value.get("tolerationSeconds")
    if operator not in ("Exists", "Equal") or value.get("effect", _EFFECTS[0]) not in _EFFECTS:
        raise ValueError(f"operator must be Exists or Equal, and effect one of {', '.join(_EFFECTS)}")
    if "key" in value:
        _label(_string(value, "key"))
    elif operator != "Exists":
        raise ValueError("a toleration without a key needs operator: Exists")
    if "value" in value and operator == "Exists":
        raise ValueError("operator: Exists does not take a value; remove it")
    if value.get("value"):
        _label_value(_string(value, "value"))
    if seconds is not None and (type(seconds) is not int or value.get("effect") != "NoExecute"):
        raise ValueError("tolerationSeconds must be a whole number, and needs effect: NoExecute")
    return value


def _string(value: dict[str, Any], key: str) -> str:
    if not isinstance(value[key], str):
        raise ValueError(f"{key} must be text; write it in quotes")
    return value[key]


def _named(check: Callable[[str], str]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Check the keys of a mapping; pydantic's own message would call them unknown."""

    def checked(value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            try:
                check(key)
            except ValueError as error:
                raise ValueError(f"the key {key!r} {error}") from None
        return value

    return checked


ObjectName = Annotated[str, AfterValidator(_object_name)]
"""Name of an object in Kubernetes."""
ShortName = Annotated[str, AfterValidator(_short_name)]
"""Name of an object that is also the value of a label, or a namespace."""
LabelValue = Annotated[str, AfterValidator(_label_value)]
"""Value of a label."""
Label = Annotated[str, AfterValidator(_label)]
"""Key of a label."""
Device = Annotated[str, AfterValidator(_device)]
"""Name of a resource that a device plugin offers."""
Devices = Annotated[dict[str, Positive], AfterValidator(_named(_device))]
"""Number of each device."""
NodeSelector = Annotated[dict[str, Annotated[str, AfterValidator(_selected)]], AfterValidator(_named(_label))]
"""Labels that a node must have."""
Toleration = Annotated[dict[Text, Any], AfterValidator(_toleration)]
"""A taint that a pod tolerates, as Kubernetes writes it."""
Variables = Annotated[dict[str, Annotated[str, AfterValidator(_text)]], AfterValidator(_named(_variable))]
"""Environment variables."""
Quantity = Annotated[str, AfterValidator(_quantity)]
"""Amount of memory or disk, as Kubernetes writes it: 64Gi."""
Folder = Annotated[str, AfterValidator(_folder)]
"""Absolute path inside the pods."""
Image = Annotated[Text, AfterValidator(_image)]
"""Name of an image."""


def bytes_of(quantity: str) -> int:
    """Bytes of an amount of memory or disk.

    >>> bytes_of("64Gi") == 64 * 2**30, bytes_of("500M")
    (True, 500000000)
    """
    unit = quantity.lstrip("0123456789")
    return int(quantity.removesuffix(unit)) * _UNITS[unit]
