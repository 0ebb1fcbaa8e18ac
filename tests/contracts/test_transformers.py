"""transformers: what models say of their attention, and how chat templates are rendered."""

from __future__ import annotations

import inspect
from unittest.mock import patch

import jinja2
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralForCausalLM,
    PreTrainedModel,
    conversion_mapping,
    core_model_loading,
    masking_utils,
)
from transformers.models.auto import tokenization_auto
from transformers.utils import chat_template_utils

from raysft.models import transformers_internals
from tests.contracts.contract import Contract

TRANSFORMERS = Contract("transformers", "raysft/models/transformers_internals.py")


@pytest.fixture(scope="module")
def model():
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8,
            attn_implementation="sdpa",
        )
    )  # fmt: skip


def test_models_say_which_attention_they_use_and_support(model):
    for name in ("_supports_flash_attn", "_supports_sdpa", "_supports_attention_backend", "_is_stateful"):
        TRANSFORMERS.name(PreTrainedModel, name)
    TRANSFORMERS.name(PreTrainedModel, "_can_set_attn_implementation")
    assert TRANSFORMERS.name(model.config, "_attn_implementation") == "sdpa"
    assert transformers_internals.supports_flash_attention(model)
    assert transformers_internals.can_set_attention(model)
    assert transformers_internals.supports_registered_attention(LlamaForCausalLM)
    assert not transformers_internals.is_recurrent(LlamaForCausalLM)


def test_masks_ask_one_function_whether_rows_have_several_examples(model):
    asked = TRANSFORMERS.name(masking_utils, "find_packed_sequence_indices")
    TRANSFORMERS.positional(asked, 1)
    with patch.object(masking_utils, "find_packed_sequence_indices", wraps=asked) as function, torch.no_grad():
        positions = torch.tensor([[0, 1, 0, 1]])
        model.model(input_ids=positions, position_ids=positions, use_cache=False)
    assert function.call_count == 1


def test_layers_recompute_around_what_their_class_defines(model):
    (layer,) = model.model.layers
    plain = transformers_internals.without_recomputation(layer)
    assert plain.__func__ is not type(layer).forward
    assert transformers_internals.recomputation_of(layer) is None
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    recompute = transformers_internals.recomputation_of(layer)
    with patch.object(layer, "_gradient_checkpointing_func", wraps=recompute) as function:
        model(input_ids=torch.tensor([[0, 1]]), use_cache=False)
    assert function.call_args.args[0].func is plain.__func__
    model.gradient_checkpointing_disable()
    assert transformers_internals.recomputation_of(layer) is None


def test_mixtures_of_experts_mark_their_routers():
    from transformers.models.mixtral.modeling_mixtral import MixtralPreTrainedModel

    assert issubclass(MixtralForCausalLM, MixtralPreTrainedModel)
    outputs = TRANSFORMERS.name(MixtralPreTrainedModel, "_can_record_outputs")
    assert "router_logits" in outputs, f"look at raysft/models/routers.py; there are {sorted(outputs)}"


def test_experts_are_computed_by_a_function_that_can_be_replaced():
    """An estimate replaces it; ``tests/invariants/test_experts.py`` compares the default with one expert after the other."""
    from transformers.integrations import moe
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    for kind in (MixtralExperts, GptOssExperts):
        TRANSFORMERS.name(kind, "_apply_gate")
    TRANSFORMERS.name(moe.ALL_EXPERTS_FUNCTIONS, "register")
    TRANSFORMERS.name(PreTrainedModel, "set_experts_implementation")
    source = inspect.getsource(moe.grouped_mm_experts_forward)
    for name in ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed"):
        assert f"self.{name}" in source, f"look at raysft/estimate/fake_experts.py, which reads {name}"


def test_modules_of_experts_say_what_they_compute():
    from transformers.integrations import moe
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    function = TRANSFORMERS.name(moe, "_default_apply_gate")
    assert TRANSFORMERS.name(MixtralExperts, "_apply_gate") is function
    for name in ("has_gate", "is_concatenated", "has_bias", "is_transposed", "has_post_expert_norm"):
        TRANSFORMERS.source(moe.use_experts_implementation, f"self.{name} = {name}", f"experts.{name}")


def test_weights_are_converted_by_a_mapping_of_the_model(model):
    TRANSFORMERS.positional(TRANSFORMERS.name(conversion_mapping, "get_model_conversion_mapping"), 1)
    assert transformers_internals.weight_conversions(model) is not None


def test_a_layer_has_a_function_that_computes_it_again(model):
    layer = model.model.layers[0]
    assert transformers_internals.recomputes_itself(layer)
    assert not transformers_internals.recomputes_itself(layer.mlp)
    model.activation_checkpointing_enable({"use_reentrant": False})
    before = TRANSFORMERS.name(layer, "_gradient_checkpointing_func")
    transformers_internals.wrap_recomputation(layer, lambda function: [function])
    assert layer._gradient_checkpointing_func == [before]
    layer._gradient_checkpointing_func = before
    model.gradient_checkpointing_disable()


def test_descriptions_are_read_without_code():
    TRANSFORMERS.positional(TRANSFORMERS.name(tokenization_auto, "get_tokenizer_config"), 1)


def test_chat_templates_are_compiled_and_rendered_by_the_same_code():
    TRANSFORMERS.positional(TRANSFORMERS.name(chat_template_utils, "_compile_jinja_template"), 1)
    render = TRANSFORMERS.name(chat_template_utils, "render_jinja_template")
    TRANSFORMERS.parameters(
        render, ["conversations", "tools", "chat_template", "add_generation_prompt", "return_assistant_tokens_mask"]
    )
    TRANSFORMERS.source(render, "_compile_jinja_template(chat_template)", "_compile_jinja_template")
    with pytest.raises(jinja2.TemplateSyntaxError):
        transformers_internals.compile_chat_template("{% if %}")
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    texts, spans = transformers_internals.render_chat_template(
        conversations=[[{"role": "assistant", "content": "yes"}]],
        chat_template=template,
        return_assistant_tokens_mask=True,
    )
    assert (texts, [[tuple(span) for span in each] for each in spans]) == (["yes"], [[(0, 3)]])


def test_a_dequantized_model_forgets_its_quantizer(model):
    model.config.quantization_config, model.hf_quantizer = {}, object()
    transformers_internals.forget_quantizer(model)
    assert not hasattr(model.config, "quantization_config")
    assert model.hf_quantizer is None
    TRANSFORMERS.source(PreTrainedModel, "hf_quantizer", "hf_quantizer")


def test_models_say_which_weights_stay_in_float32(model):
    TRANSFORMERS.positional(TRANSFORMERS.name(PreTrainedModel, "_get_dtype_plan"), 2)
    model._keep_in_fp32_modules_strict = {"norm"}
    assert transformers_internals.kept_in_float32(model, "bfloat16") == ["norm"]
    assert transformers_internals.kept_in_float32(model, "float32") == []


def test_models_keep_the_conversions_that_were_used(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert TRANSFORMERS.name(loaded, "_weight_conversions") == []
    renaming = core_model_loading.WeightRenaming("former", "present")
    loaded._weight_conversions = [renaming]
    transformers_internals.keep_used_conversions(loaded)
    assert loaded._weight_conversions == []
    renaming.rename_source_key("former")
    loaded._weight_conversions = [renaming]
    transformers_internals.keep_used_conversions(loaded)
    assert loaded._weight_conversions == [renaming]
