"""The output head: the loss has the logits of the model's own class, whatever its config says of them; and states that are NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cohere2Config,
    Cohere2VisionConfig,
    GraniteConfig,
    LlavaNextConfig,
)

from raysft.data.types import IGNORE_INDEX
from raysft.errors import RequestError
from raysft.train.check_states import check_causal, check_head, check_rows, difference_of
from raysft.train.loss import TokenLoss
from tests.tiny_vision import GRIDS, TEXT, TOWER

CPU = torch.device("cpu")
SIZES = {**TEXT, "vocab_size": 64, "pad_token_id": 0}


def sees_with_granite() -> Any:
    """LLaVA-NeXT, whose class does not divide the logits as Granite alone does."""
    tower = {"model_type": "clip_vision_model", **TOWER, "projection_dim": 32}
    text = {"model_type": "granite", **SIZES, "logits_scaling": 8.0}
    return AutoModelForImageTextToText.from_config(
        LlavaNextConfig(vision_config=tower, text_config=text, image_token_index=63, image_grid_pinpoints=GRIDS)
    )


def of_cohere2_vision() -> Any:
    tower = {"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False}
    text = {"model_type": "cohere2", **SIZES, "logit_scale": 0.25, "sliding_window": 512}
    sizes: dict[str, Any] = {"alignment_intermediate_size": 64, "tie_word_embeddings": False}
    config = Cohere2VisionConfig(vision_config=tower, text_config=text, image_token_id=63, **sizes)
    return AutoModelForImageTextToText.from_config(config)


def of_text(config: Any) -> Any:
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (lambda: of_text(Cohere2Config(**SIZES, logit_scale=0.25, sliding_window=512)), False),
        (lambda: of_text(GraniteConfig(**SIZES, logits_scaling=8.0)), False),
        (sees_with_granite, True),
        (of_cohere2_vision, True),
    ],
    ids=["cohere", "granite", "llava-next with granite", "cohere2-vision"],
)
def test_logits_are_scaled_where_the_class_scales_them(make, plain):
    torch.manual_seed(0)
    model = make().eval()
    loss = TokenLoss(model)
    check_head(loss, CPU)
    ids = torch.randint(1, 60, (1, 20))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0]
        expected = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
        found = loss(ids, torch.arange(20)[None], F.pad(ids[:, 1:], (0, 1), value=IGNORE_INDEX))[0]
        head = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(head, logits, atol=1e-5) == plain


def test_logits_that_are_changed_in_another_way_are_refused():
    model = of_text(Cohere2Config(**SIZES, logit_scale=0.25, sliding_window=512)).eval()
    model.logit_scale = 0.5
    with pytest.raises(RequestError, match="Cohere2ForCausalLM changes its logits after the output head"):
        check_head(TokenLoss(model), CPU)


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        ([1.0, 2.0], [1.0, 2.00001], 0.0),
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([1.0, math.nan], [1.0, 2.0], math.inf),
        ([1.0, 2.0], [math.nan, 2.0], math.inf),
        ([math.nan, 2.0], [math.nan, 2.0], math.inf),
        ([1.0, math.inf], [1.0, math.inf], math.inf),
        ([1.0, math.inf], [1.0, 2.0], math.inf),
        ([1.0, 2.0], [1.0, math.inf], math.inf),
    ],
)
def test_hidden_states_that_are_not_finite_are_not_equal(one, other, found):
    decoder = torch.nn.Linear(1, 1)
    assert difference_of(torch.tensor(one), torch.tensor(other), decoder) == found


@pytest.mark.parametrize(
    ("token", "refusal"),
    [
        (3, "computes logits that are NaN"),
        (17, "is not causal"),
        (14, "does not keep the examples"),
        (9, "does not keep the examples"),
    ],
)
def test_a_model_that_computes_nan_is_refused(token, refusal):
    """Of the checks, the first one to see a token whose embedding is NaN, and all others if it spreads, refuse the model."""
    model = of_text(GraniteConfig(**SIZES)).eval()
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.masked_fill((inputs[0] == token).any(), math.nan)
    )
    loss = TokenLoss(model)

    def check() -> None:
        check_head(loss, CPU)
        check_causal(loss, CPU)
        check_rows(loss, CPU, 2, "set data.packing=false")

    with pytest.raises(RequestError, match=f"GraniteForCausalLM {refusal}") as error:
        check()
    assert "\n" not in str(error.value)
