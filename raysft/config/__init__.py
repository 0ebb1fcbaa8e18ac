"""Typed configuration: defaults < YAML file < ``key.path=value`` overrides.

Unknown keys are refused with the nearest known one named, everything is frozen, and each field is documented by the
docstring under it, from which ``raysft COMMAND --help`` is generated.
"""

from raysft.config.data import DataSection, Source
from raysft.config.load import load, parse
from raysft.config.packages import locate
from raysft.config.secrets import masked, refuse_secrets
from raysft.config.section import RequestError, Section
from raysft.config.sections import Config, GenerateSection, RunSection, ScalingSection, TuneSection
from raysft.config.training import ModelSection, TrainSection
from raysft.config.validate import documented_fields

__all__ = [
    "Config",
    "DataSection",
    "GenerateSection",
    "ModelSection",
    "RequestError",
    "RunSection",
    "ScalingSection",
    "Section",
    "Source",
    "TrainSection",
    "TuneSection",
    "documented_fields",
    "load",
    "locate",
    "masked",
    "parse",
    "refuse_secrets",
]
