"""What a Ray Train worker refuses before it loads anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysft.train.worker import check_alone
from tests.messages import holds, refusal
from tests.training import make_config


@pytest.mark.parametrize(("experts", "together", "refused"), [("kt", 2, True), ("kt", 1, False), ("auto", 2, False)])
def test_workers_that_ray_put_on_one_node_do_not_all_keep_the_experts_there(experts, together, refused):
    """Also where there was room on other nodes, as preflight found."""
    settings = {"model.finetuning": "lora", "model.dtype": "bfloat16", "model.experts": experts}
    config = make_config(Path("/none"), Path("/none/model"), settings)
    if not refused:
        check_alone(config, together)
        return
    message = refusal(check_alone, config, together)
    assert holds(
        message,
        "model.experts=kt needs one worker per node, but 2 are on the same one; use scaling.placement=spread, or fewer",
    )
