"""Flat configs of LLaMA-Factory 0.9.5, stages sft and pt, as configs of raysft.

``table`` says for every key what it becomes: a key of raysft, nothing, or a refusal. ``translation`` and its neighbours derive
what several keys say together.
"""

from raysft.config.llamafactory.conversion import Conversion, convert
from raysft.config.llamafactory.recognition import is_llamafactory, refuse
from raysft.config.llamafactory.rendering import render
from raysft.config.llamafactory.settings import Refusal
from raysft.config.llamafactory.table import TABLE

__all__ = ["TABLE", "Conversion", "Refusal", "convert", "is_llamafactory", "refuse", "render"]
