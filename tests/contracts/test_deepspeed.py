"""DeepSpeed: where ZeRO 1 to 3 keep the weights that the optimizer updates."""

from __future__ import annotations

import inspect
import subprocess
import sys

import deepspeed
from deepspeed.comm.torch import build_shm_op
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

from tests.contracts.contract import Contract

DEEPSPEED = Contract("deepspeed", "raysft/train/deepspeed_internals.py")
STATE = Contract("deepspeed", "raysft/train/checkpoint/state.py")


def test_its_autotuner_does_without_mlflow():
    code = "import raysft.train.deepspeed_import, sys; print('mlflow' in sys.modules); import mlflow; print(mlflow.__name__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.split()[-2:] == ["False", "mlflow"], "not imported, and whoever asks for it gets it"


def test_its_own_all_reduce_can_be_turned_off():
    DEEPSPEED.line(f'"{ShareMemCommBuilder.NAME}"')
    # A dictionary of this name takes the place of what DeepSpeed would find out, and needs no other entry.
    DEEPSPEED.source(build_shm_op, "deepspeed.ops.__compatible_ops__.get(builder.NAME, False)", ".setdefault(")
    assert '__compatible_ops__"] =' in inspect.getsource(deepspeed.ops.__getattr__), (
        "it is found out when it is asked for"
    )


def test_parameters_that_are_split_know_their_whole_shape():
    for attribute in ("ds_id", "ds_numel", "ds_shape"):
        DEEPSPEED.source(partition_parameters.Init, f"param.{attribute} =", attribute)
    for method in ("partition_numel", "all_gather", "partition"):
        DEEPSPEED.source(partition_parameters.Init, f"param.{method} = {method}", f".{method}(")


def test_zero_1_and_2_keep_flat_float32_weights_and_what_maps_parameters_to_them():
    for attribute in ("bit16_groups", "single_partition_of_fp32_groups", "_global_grad_norm", "loss_scaler"):
        DEEPSPEED.source(DeepSpeedZeroOptimizer, f"self.{attribute} =", attribute)
    DEEPSPEED.source(DeepSpeedZeroOptimizer, "self.optimizer = init_optimizer", "engine.optimizer.optimizer")
    DEEPSPEED.source(DeepSpeedZeroOptimizer, "._hp_mapping", "_hp_mapping")
    for attribute in ("lp_fragment_address", "hp_fragment_address"):
        assert attribute in tensor_fragment.__annotations__, f"look at {DEEPSPEED.line(attribute)}"
    assert {"numel", "start"} <= set(fragment_address.__annotations__), f"look at {DEEPSPEED.line('fragment.numel')}"
    DEEPSPEED.positional(DEEPSPEED.name(DeepSpeedZeroOptimizer, "update_lp_params"), 1)


def test_zero_3_keeps_flat_float32_weights_in_groups_of_parameters():
    for attribute in (
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "persistent_parameters",
        "_global_grad_norm",
        "loss_scaler",
    ):
        DEEPSPEED.source(DeepSpeedZeroOptimizer_Stage3, f"self.{attribute} =", attribute)
    DEEPSPEED.source(DeepSpeedZeroOptimizer_Stage3, "self.optimizer = init_optimizer", "engine.optimizer.optimizer")
    sync = DEEPSPEED.name(DeepSpeedZeroOptimizer_Stage3, "_reassign_or_swap_out_partitioned_parameters")
    DEEPSPEED.positional(sync, 2)


def test_cpu_adam_computes_its_bias_corrections_step_by_step():
    DEEPSPEED.source(DeepSpeedCPUAdam, "self.ds_opt_adam = CPUAdamBuilder().load()", "ds_opt_adam")
    DEEPSPEED.source(
        DeepSpeedCPUAdam, "self.ds_opt_adam.adam_update(self.opt_id, state['step'], group['lr'], beta1", "adam_update("
    )


def test_an_engine_counts_what_a_checkpoint_holds():
    for attribute in ("global_steps", "global_samples", "skipped_steps"):
        STATE.source(DeepSpeedEngine, f"self.{attribute} =", attribute)
    for method in ("zero_optimization_stage", "get_global_grad_norm", "was_step_applied"):
        assert callable(getattr(DeepSpeedEngine, method, None)), (
            f"DeepSpeedEngine.{method}; look at raysft/train/step.py"
        )
