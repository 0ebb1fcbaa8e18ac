"""A file for ``llamafactory-cli export`` as a command of raysft."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from raysft.config.llamafactory.settings import Refusal, Settings
from raysft.config.llamafactory.translation_model import located

READ = ("model_name_or_path", "model_revision", "adapter_name_or_path", "adapter_folder", "export_dir", "export_size",
        "infer_dtype", "export_hub_model_id", "trust_remote_code")  # fmt: skip
"""Keys that the command comes from."""
ADDED = ("add_tokens", "add_special_tokens", "new_special_tokens_config")


def export_arguments(given: Settings) -> list[str]:
    """Return the arguments of ``raysft export``."""
    path, revision = located(given)
    arguments = [path + (f"@{revision}" if revision else "")]
    folder = given["adapter_folder"]
    if adapters := given["adapter_name_or_path"]:
        arguments += ["--adapters", *(f"{adapter}/{folder}" if folder else adapter for adapter in adapters)]
    if given["export_dir"]:
        arguments += ["--output", given["export_dir"]]
    if given["infer_dtype"] != "auto":
        arguments += ["--dtype", given["infer_dtype"]]
    if given.given("export_size"):
        arguments += ["--shard-size", f"{given['export_size']}GB"]
    if given["trust_remote_code"]:
        arguments.append("--trust-remote-code")
    if given["export_hub_model_id"]:
        arguments += ["--push", given["export_hub_model_id"]]
    return arguments


def export_command(given: Settings) -> str:
    """Return the command, as a shell takes it."""
    return shlex.join(["raysft", "export", *export_arguments(given)])


def export_refusals(given: Settings) -> Iterator[Refusal]:
    """Yield what LLaMA-Factory's export does and raysft's does not."""
    if given["model_name_or_path"] is None:
        yield Refusal("model_name_or_path", "model_name_or_path is required, but missing; add it")
    if given["quantization_bit"] is not None:
        yield Refusal("quantization_bit", "quantization_bit: raysft export does not quantize; remove it")
    for name in ADDED:
        if given[name]:
            yield Refusal(name, f"{name}: raysft export adds no tokens; remove it, and train with model.new_tokens")


def unsupported(given: Settings) -> Iterator[Refusal]:
    """Yield the keys whose values raysft does not take, in a file for an export or any other."""
    taken = READ if given.exports else ()
    yield from (refusal for refusal in given.unsupported() if refusal.key not in taken)
