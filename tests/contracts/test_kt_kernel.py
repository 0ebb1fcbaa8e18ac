"""kt-kernel: the class that computes the experts of a layer, which its package does not document."""

from __future__ import annotations

from tests.contracts.contract import Contract
from tests.kt import needs_kernel

KT = Contract("kt-kernel", "raysft/models/kt_internals.py")


@needs_kernel
def test_the_package_says_what_it_has_for_this_cpu():
    import kt_kernel  # pyright: ignore[reportMissingImports]

    KT.name(kt_kernel, "__cpu_variant__")
    KT.name(KT.name(kt_kernel, "kt_kernel_ext").moe, "AMXBF16_SFT_MOE")


@needs_kernel
def test_the_wrapper_of_a_layer_takes_what_it_is_given():
    from kt_kernel.sft.amx import AMXSFTMoEWrapper  # pyright: ignore[reportMissingImports]
    from kt_kernel.sft.base import KExpertsSFTBuffer  # pyright: ignore[reportMissingImports]

    KT.name(KExpertsSFTBuffer, "clear_cache")
    KT.parameters(
        AMXSFTMoEWrapper,
        (
            "layer_idx", "num_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size", "num_gpu_experts",
            "cpuinfer_threads", "threadpool_count", "weight_path", "chunked_prefill_size", "lora_rank", "lora_alpha",
            "max_cache_depth", "method",
        ),
        "AMXSFTMoEWrapper(",
    )  # fmt: skip
    factors = [f"{name}_lora_{half}" for name in ("gate", "up", "down") for half in "ab"]
    KT.parameters(AMXSFTMoEWrapper.init_lora_weights, [*factors, *(f"grad_{name}" for name in factors)])
    KT.positional(AMXSFTMoEWrapper.load_weights_from_tensors, 5)
    KT.positional(AMXSFTMoEWrapper.update_lora_weights, 1)
    KT.parameters(AMXSFTMoEWrapper.forward, ("save_for_backward", "output_device"), ".forward(")
    KT.parameters(AMXSFTMoEWrapper.backward, ("output_device",), ".backward(")


@needs_kernel
def test_the_wrapper_reads_how_weights_and_what_is_kept_are_shared():
    from kt_kernel.sft.amx import AMXSFTMoEWrapper  # pyright: ignore[reportMissingImports]

    for name in ("share_backward_bb", "share_cache_pool"):
        KT.source(AMXSFTMoEWrapper.load_weights, f'getattr(self, "{name}", False)', name)
