"""Typed configuration: defaults < YAML file < ``key.path=value`` overrides.

An unknown key is refused with a suggestion. All sections are frozen. The docstring under each field documents it in
``raysft config`` and ``raysft VERB --help``.
"""

from raysft.config.cluster import ClusterSection
from raysft.config.config import Config
from raysft.config.data import DataSection, Source
from raysft.config.generate import GenerateSection
from raysft.config.load import convert_file, export_arguments, load, parse, with_overrides
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
    "ClusterSection",
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
    "convert_file",
    "documented_fields",
    "export_arguments",
    "load",
    "locate",
    "masked",
    "parse",
    "refuse_secrets",
    "with_overrides",
]
