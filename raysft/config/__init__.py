"""Typed configuration: defaults < YAML file < ``key.path=value`` overrides.

Unknown keys are refused with the nearest known one named, everything is frozen, and each field is documented by the
docstring under it, from which ``raysft COMMAND --help`` is generated.
"""

from raysft.config.config import Config
from raysft.config.data import DataSection, Source
from raysft.config.generate import GenerateSection
from raysft.config.load import load, parse, with_overrides
from raysft.config.model import ModelSection
from raysft.config.package_paths import locate
from raysft.config.run import RunSection
from raysft.config.scaling import ScalingSection
from raysft.config.secrets import masked, refuse_secrets
from raysft.config.section import Section
from raysft.config.train import TrainSection
from raysft.config.tune import TuneSection
from raysft.config.validate import documented_fields

__all__ = [
    "Config",
    "DataSection",
    "GenerateSection",
    "ModelSection",
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
    "with_overrides",
]
