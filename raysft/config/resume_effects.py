"""Which config keys may change when a run resumes. Pure.

This table is the single source for what a resumed run refuses or accepts, for the notes in ``raysft config``, and for the settings
that identify a run.
"""

from __future__ import annotations

import re
from collections.abc import Container
from enum import Enum


class Effect(Enum):
    """Effect of a key that has a new value when a run resumes."""

    ALWAYS = "can change at any time"
    """The key does not affect the numbers of a training."""
    NOW = "can change with --allow-changed, from the next step on"
    """The new value applies from the first step after the checkpoint."""
    EPOCH = "can change with --allow-changed, from the next epoch on"
    """The current epoch is completed with the old value, so that it contains each example once."""
    NEVER = "cannot change once a run has started"
    """The state of the run or its rows would no longer match."""


_KEYS = {
    Effect.ALWAYS: """
        run.name run.sweep run.storage data.cache
        train.gradient_checkpointing train.recompute_layers train.offload.activations
        train.eval_at_start train.save_every_steps train.save_every_epochs
        train.save_every_minutes train.keep_last train.max_failures train.hang_minutes train.max_hours train.trackers
        train.tracking.project train.tracking.run_name train.tracking.tags train.tracking.group
        scaling.num_workers scaling.sequence_parallel scaling.wait_minutes scaling.use_gpu scaling.cpus_per_worker
        scaling.threads_per_worker
        scaling.worker_tokens_per_second scaling.placement scaling.data_label scaling.address
        evaluate.model
        generate.enabled generate.compare_base generate.every_steps generate.model generate.sources generate.engine
        generate.num_actors
        generate.gpus_per_engine generate.max_examples generate.batching generate.batch_size generate.max_new_tokens
        generate.do_sample generate.temperature generate.top_p generate.top_k generate.repetition_penalty generate.num_beams
        generate.length_penalty generate.stop_tokens generate.skip_special_tokens generate.max_seconds generate.metrics
        tune.space tune.search tune.num_samples tune.seed tune.metric tune.mode tune.repeats
        tune.scheduler tune.scheduler_options tune.max_concurrent tune.max_failures tune.max_minutes tune.keep
        cluster.image cluster.image_folders cluster.image_pull_secrets cluster.namespace cluster.service_account
        cluster.secrets cluster.environment cluster.priority_class cluster.queue cluster.topology cluster.prometheus
        cluster.start_minutes cluster.deadline_hours cluster.ttl_seconds cluster.release_workers cluster.debug
        cluster.head.cpus cluster.head.memory cluster.head.disk cluster.head.node_selector cluster.head.tolerations
        cluster.workers.cpus cluster.workers.memory cluster.workers.disk cluster.workers.node_selector
        cluster.workers.tolerations cluster.workers.gpus cluster.workers.gpu_resource cluster.workers.resources
        cluster.workers.replicas cluster.workers.spot
        cluster.data_workers.cpus cluster.data_workers.memory cluster.data_workers.disk cluster.data_workers.node_selector
        cluster.data_workers.tolerations cluster.data_workers.replicas
        cluster.volume.claim cluster.volume.mount_path cluster.volume.size cluster.volume.storage_class
        cluster.volume.access_mode
    """,
    # Paths may change because files can move; the content of the files is compared separately.
    Effect.NOW: """
        model.path model.revision model.trust_remote_code model.adapters model.attention model.liger model.experts
        model.lora.dropout model.lora.loraplus_ratio model.oft.dropout
        data.train[].path data.eval data.registry data.media_dir data.max_rejected
        train.epochs train.max_steps train.micro_batch_size
        train.learning_rate train.weight_decay train.betas train.epsilon train.max_grad_norm
        train.schedule train.schedule_options train.warmup_ratio train.warmup_steps
        train.loss train.eaft_alpha train.asft_alpha train.reference_model train.label_smoothing train.z_loss train.neftune_alpha
        train.router_aux_loss_coef
        train.zero_stage train.offload.optimizer train.offload.parameters train.offload.folder train.deepspeed train.fp8
        train.compile
        train.nonfinite train.eval_every_steps train.eval_every_epochs train.eval_delay
        train.early_stopping.patience train.early_stopping.threshold
        train.keep_best train.best_metric train.best_mode
    """,
    Effect.EPOCH: """
        model.chat_template
        data.train data.train[].name data.train[].format data.train[].columns data.train[].tags data.train[].weight
        data.train[].max_examples data.train[].num_samples data.train[].slice
        data.max_examples data.shuffle data.duplicates data.mixing
        data.mask_history data.train_on_prompt data.on_overflow data.keep_prompt data.control_tokens_in_text data.template_options
        data.default_system data.thinking data.media_hosts data.image_max_pixels data.image_min_pixels
    """,
    Effect.NEVER: """
        stage run.seed
        model.new_tokens.plain model.new_tokens.special model.new_tokens.descriptions model.new_tokens.noise
        model.new_layers model.rope_scaling
        model.dtype model.finetuning model.train_parts
        model.freeze.layers model.freeze.spread model.freeze.modules model.freeze.extra_modules
        model.lora.rank model.lora.alpha model.lora.target model.lora.extra_modules model.lora.dora model.lora.rslora
        model.lora.pissa model.lora.pissa_iterations model.oft.block_size model.oft.target model.oft.extra_modules
        model.new_adapter model.dequantize model.quantization model.quantization_type model.double_quantization
        data.holdout data.sequence_length data.packing data.document_mask
        train.pure_bf16 train.global_batch_size train.optimizer train.optimizer_options train.optimizer_target
    """,
}
_FILES = {
    "the model": Effect.NEVER,
    "the adapter": Effect.NEVER,
    "the reference": Effect.NOW,
    "the data": Effect.EPOCH,
}
"""Effects for the content of files, which the config only names."""
EFFECTS: dict[str, Effect] = {key: effect for effect, keys in _KEYS.items() for key in keys.split()}
"""Effect of every config key, with the names of ``documented_fields``."""


def effect_of(key: str) -> Effect:
    """Effect of a key, which may be inside a free mapping or a list.

    >>> effect_of("train.schedule_options.num_cycles").name, effect_of("data.train.0.path").name, effect_of("run.seed").name
    ('NOW', 'NOW', 'NEVER')
    """
    for name, effect in _FILES.items():
        if key.startswith(name):
            return effect
    return EFFECTS[documented_key(key, EFFECTS)]


def documented_key(key: str, documented: Container[str]) -> str:
    """Documented key that a key inside a free mapping or a list belongs to.

    >>> documented_key("data.train.0.columns.output", {"data.train", "data.train[].columns"})
    'data.train[].columns'
    """
    known = re.sub(r"\.\d+(?=\.|$)", "[]", key)
    while known not in documented:
        known = known[:-2] if known.endswith("[]") else known.rpartition(".")[0]
    return known
