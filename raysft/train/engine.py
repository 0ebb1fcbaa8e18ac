"""The DeepSpeed engine: model, loss and optimizer of one worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from raysft.config import Config
from raysft.errors import RunFailed, one_line
from raysft.models.attention import NoPositions, use_masks_for_images, use_plain, without_adapters
from raysft.models.examples import begin
from raysft.models.fused_layers import fuse_layers
from raysft.models.kt_experts import move_experts
from raysft.models.model_class import sees_images
from raysft.models.onednn import use_onednn
from raysft.models.peft_internals import parameter_adapters
from raysft.models.sequence_attention import REMEDY
from raysft.train.check_images import check_images
from raysft.train.check_states import check_causal, check_head, check_rows, check_slices
from raysft.train.compilation import compile_layers, layers_of
from raysft.train.deepspeed_config import deepspeed_settings, with_bucket
from raysft.train.deepspeed_import import deepspeed
from raysft.train.deepspeed_internals import use_gloo_allreduce
from raysft.train.finetuning import load_model
from raysft.train.loss import TokenLoss
from raysft.train.objective import objective_of
from raysft.train.operators import ASYNC_IO, load_operator
from raysft.train.optim import make_lr_scheduler, make_optimizer
from raysft.train.packed_weights import release_after_forward
from raysft.train.reference import make_reference
from raysft.train.router_loss import RouterLoss
from raysft.train.sequence_group import ALONE, SequenceGroup
from raysft.train.towers import Towers


def make_engine(
    config: Config,
    model_path: str,
    workers: int,
    steps: int,
    device: torch.device,
    adapter: str | None = None,
    reference: str | None = None,
    processor: Any = None,
    group: SequenceGroup = ALONE,
) -> tuple[Any, Any]:
    """Load the model and wrap it with DeepSpeed.

    Args:
        config: the run's config.
        model_path: folder or Hub id of the model.
        workers: size of the process group, which must exist.
        steps: total optimizer steps of the run.
        device: where the model goes.
        adapter: folder of an adapter to continue training.
        reference: folder or Hub id of ``train.reference_model``.
        processor: of the model; None if no data has images.
        group: the workers that have the same rows.

    Returns:
        The engine, and the LR scheduler.
    """
    if device.type == "cpu":
        use_onednn()
    use_gloo_allreduce()
    # DeepSpeed must adopt the existing process group before ZeRO-3 partitions weights over it.
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    settings = deepspeed_settings(config, workers)
    # While this object exists, from_pretrained partitions weights as it loads them, instead of loading all of them on each worker.
    # Quantized ones are partitioned when the engine is made: bitsandbytes packs whole weights.
    partitions = config.train.zero_stage == 3 and config.model.quantization is None
    partitioning = HfDeepSpeedConfig(settings) if partitions else None
    model = _loss_model(config, model_path, device, adapter, reference, group)
    if processor is not None:
        model.towers = Towers(model.model, processor, device, config.train.zero_stage == 3)
    ratio = config.model.lora.loraplus_ratio if config.model.finetuning == "lora" else None
    optimizer = make_optimizer(model, config.train, ratio)
    lr_scheduler = make_lr_scheduler(optimizer, config.train, steps)
    settings = with_bucket(settings, model)
    if "nvme" in (config.train.offload.optimizer, config.train.offload.parameters):
        load_operator(ASYNC_IO)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=lr_scheduler, config=settings, dist_init_required=False
    )
    del partitioning
    # The inputs of compiled layers have gradients anyway (``gather_whole``).
    if config.train.zero_stage == 3 and not config.train.compile:
        _reach_inputs_of_whole(model)
    if config.train.router_aux_loss_coef:
        model.router_loss = RouterLoss(model.model, config.train.router_aux_loss_coef)
    engine.eval()
    check_model(model, config, device, processor, group)
    if model.reference is not None and model.reference.model is not None:
        check_model(TokenLoss(model.reference.model, towers=model.towers), config, device, processor, group)
    engine.train()
    return engine, lr_scheduler


def _loss_model(
    config: Config,
    model_path: str,
    device: torch.device,
    adapter: str | None,
    reference: str | None,
    group: SequenceGroup = ALONE,
) -> TokenLoss:
    """Load the model with its loss; ZeRO-3 decides where the weights are, otherwise they are on the device."""
    zero3, objective = config.train.zero_stage == 3, objective_of(config.train)
    trained = load_model(config, model_path, device, adapter)
    model = TokenLoss(
        trained,
        objective=objective,
        neftune_alpha=config.train.neftune_alpha,
        max_tokens=group.slice_tokens(config.micro_batch_size * config.data.sequence_length) if zero3 else None,
        reference=make_reference(config, trained, model_path, reference, device) if objective.has_reference else None,
    )
    if config.train.fp8 != "off":
        from raysft.train.fp8 import use_fp8

        for each in (model.model, *(model.reference.children() if model.reference else ())):
            use_fp8(each, device)
    if config.model.experts == "kt":
        move_experts(trained, config)
    if zero3:
        gather_whole(model, layers_of(trained) if config.train.compile else ())
        if getattr(without_adapters(trained), "is_loaded_in_4bit", False):  # here, or by the author of the checkpoint
            release_after_forward(model)
    else:
        model.to(device)
        # A reference computes without gradients, and so without fused layers, which round differently.
        plain = config.train.compile or objective.has_reference
        if device.type == "cpu" and config.dtype == "float32" and not plain:
            fuse_layers(model.model)
    if config.train.compile:
        compile_layers(model.model, device)
    return model


def gather_whole(model: TokenLoss, compiled: Sequence[torch.nn.Module] = ()) -> None:
    """Make ZeRO-3 gather experts with their adapters, and torch's own attention (as at the end of SigLIP), as one module each.

    They compute with weights of inner modules that they do not call, and ZeRO-3 gathers only modules that are called. It does
    the same with a list of experts, as in the code of some models: workers whose tokens go to different experts would wait for each
    other.

    Args:
        model: the model with its loss.
        compiled: modules whose code is compiled, without the calls by which ZeRO-3 would gather the modules inside.
    """
    modules = list(model.modules())
    experts = [each for each in modules if isinstance(getattr(each, "experts", None), torch.nn.ModuleList)]
    whole = [*parameter_adapters(model), *experts, *compiled]
    for module in (*whole, *(each for each in modules if isinstance(each, torch.nn.MultiheadAttention))):
        deepspeed.utils.set_z3_leaf_module(module, True)
    if whole:
        # DeepSpeed waits for gradients of their inputs; without this, the first layer's input has none.
        without_adapters(model.model).enable_input_require_grads()


def _reach_inputs_of_whole(model: TokenLoss) -> None:
    """Let the inputs of modules that ZeRO-3 gathers whole have gradients, even where nothing before them is trained.

    DeepSpeed takes a module's gradients and releases its weights when the input gradients arrive; without them it does so too
    early. It gathers the blocks of some mixtures of experts whole without being asked.
    """
    for module in model.modules():
        if deepspeed.utils.z3_leaf_module(module) and any(each.requires_grad for each in module.parameters()):
            module.register_forward_pre_hook(
                _with_gradients, prepend=True
            )  # before DeepSpeed's, which looks at the inputs


def _with_gradients(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    states = [each for each in inputs if torch.is_tensor(each) and each.is_floating_point()]
    if not torch.is_grad_enabled() or any(each.requires_grad for each in states):
        return inputs
    return tuple(
        each.detach().requires_grad_() if torch.is_tensor(each) and each.is_floating_point() else each
        for each in inputs
    )


def check_model(
    model: TokenLoss, config: Config, device: torch.device, processor: Any = None, group: SequenceGroup = ALONE
) -> None:
    """Check that the loss is right for this architecture: its output head, causality, packed rows, slices of them if ``group`` has
    several workers, and images if data has any.

    Raises:
        RunFailed: one of them is not as the loss requires.
    """
    begin(None)
    try:
        check_head(model, device)
    except NoPositions as error:
        if group.size > 1:
            raise RunFailed(f"scaling.sequence_parallel={group.size}: {error}; {REMEDY}") from None
        use_plain(without_adapters(model.model))
        check_head(model, device)
    except (AttributeError, TypeError, ValueError) as error:
        whole = without_adapters(model.model)
        if not sees_images(whole):
            raise
        raise RunFailed(
            f"{type(whole).__name__} cannot be trained on text without images, or not at all "
            f"({type(error).__name__}: {one_line(error)}); use another model"
        ) from None
    if processor is not None:
        use_masks_for_images(without_adapters(model.model), config)
        check_images(model, processor, device, config.data.packing)
    check_causal(model, device)
    if config.stage == "sft" and config.data.packing:
        check_rows(model, device, config.micro_batch_size, "set data.packing=false")
    elif config.stage == "pt" and config.data.document_mask:
        check_rows(model, device, config.micro_batch_size, "set data.document_mask=false")
    check_slices(model, device, group)
