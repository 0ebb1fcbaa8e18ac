"""peft: adapters on the weights of experts, and the warning by which missing weights are known."""

from __future__ import annotations

import inspect

import peft
from peft.tuners import tuners_utils
from peft.tuners.lora import layer
from peft.utils import other, transformers_weight_conversion

from raysft.models import peft_internals
from tests.contracts.contract import Contract

PEFT = Contract("peft", "raysft/models/peft_internals.py")
ADAPTERS = Contract("peft", "raysft/models/adapters.py")


def test_configurations_are_changed_for_merged_experts():
    convert = PEFT.name(transformers_weight_conversion, "convert_peft_config_for_transformers")
    PEFT.parameters(convert, ["model", "conversions"])
    PEFT.positional(convert, 3)


def test_adapters_on_parameters_are_modules_of_one_class():
    assert inspect.isclass(PEFT.name(layer, "ParamWrapper"))


def test_layers_are_switched_by_two_attributes_and_the_first_adapter_has_a_name():
    for source, name in ((tuners_utils, "BaseTunerLayer"), (other, "AuxiliaryTrainingWrapper")):
        kind = PEFT.name(source, name)
        for attribute in ("self._disable_adapters", "self._active_adapter"):
            PEFT.source(kind, attribute, attribute.removeprefix("self."))
    PEFT.parameters(peft.get_peft_model, ["adapter_name"])
    assert inspect.signature(peft.get_peft_model).parameters["adapter_name"].default == peft_internals.TRAINED


def test_missing_weights_of_an_adapter_are_warned_of():
    ADAPTERS.source(peft.PeftModel, "Found missing adapter keys", "Found missing adapter keys")
