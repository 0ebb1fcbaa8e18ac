"""Which config keys may change the evaluation of a model before it is trained. Pure.

The cache keeps that evaluation for later runs. Its key holds every setting that this table does not exclude, so that a number is
taken from there only if this run would compute the same, to the last bit.
"""

from __future__ import annotations

from enum import Enum

from raysft.config.resume_effects import documented_key


class Bearing(Enum):
    """How a key bears on the evaluation before the first step."""

    SETTING = "the evaluation is another one with another value"
    """Also where that is only possible: then another value costs one evaluation more."""
    CONTENT = "decides rows, files, workers or threads; the evaluation's key holds these instead of the setting"
    ADAPTER = "has no effect on a model that starts as its base"
    NONE = "has no effect before the first step"


_KEYS = {
    Bearing.SETTING: """
        stage
        model.new_tokens.plain model.new_tokens.special model.new_tokens.descriptions model.new_tokens.noise
        model.new_layers model.rope_scaling
        model.dtype model.finetuning model.train_parts
        model.freeze.layers model.freeze.spread model.freeze.modules model.freeze.extra_modules
        model.lora.target model.lora.extra_modules model.lora.dora model.lora.pissa model.lora.pissa_iterations
        model.oft.block_size model.oft.dropout model.oft.target model.oft.extra_modules model.new_adapter
        model.dequantize model.quantization model.quantization_type model.double_quantization model.attention model.liger
        model.experts
        data.sequence_length data.packing data.document_mask
        train.micro_batch_size train.optimizer train.optimizer_options train.optimizer_target
        train.zero_stage train.offload.optimizer train.offload.parameters train.offload.folder train.deepspeed
        train.gradient_checkpointing train.recompute_layers train.offload.activations train.fp8 train.pure_bf16
        scaling.use_gpu scaling.sequence_parallel
    """,
    Bearing.CONTENT: """
        model.path model.revision model.trust_remote_code model.chat_template model.adapters
        data.train data.train[].name data.train[].path data.train[].format data.train[].columns data.train[].tags
        data.train[].max_examples data.train[].num_samples data.train[].slice
        data.max_examples data.eval data.registry data.holdout
        data.mask_history data.train_on_prompt data.on_overflow data.keep_prompt data.control_tokens_in_text
        data.template_options
        data.default_system data.thinking data.media_dir data.media_hosts data.image_max_pixels data.image_min_pixels
        scaling.num_workers scaling.cpus_per_worker scaling.threads_per_worker scaling.placement
    """,
    Bearing.ADAPTER: """
        run.seed model.lora.rank model.lora.alpha model.lora.rslora model.lora.dropout
    """,
    Bearing.NONE: """
        run.name run.sweep run.storage
        model.lora.loraplus_ratio
        data.train[].weight data.shuffle data.duplicates data.mixing data.max_rejected data.cache
        train.epochs train.max_steps train.global_batch_size
        train.learning_rate train.weight_decay train.betas train.epsilon train.max_grad_norm
        train.schedule train.schedule_options train.warmup_ratio train.warmup_steps
        train.loss train.eaft_alpha train.asft_alpha train.reference_model train.label_smoothing train.z_loss
        train.neftune_alpha train.router_aux_loss_coef train.nonfinite train.compile
        train.eval_at_start train.eval_every_steps train.eval_every_epochs train.eval_delay
        train.early_stopping.patience train.early_stopping.threshold
        train.keep_best train.best_metric train.best_mode
        train.save_every_steps train.save_every_epochs train.save_every_minutes train.keep_last train.max_failures
        train.hang_minutes train.max_hours train.trackers
        train.tracking.project train.tracking.run_name train.tracking.tags train.tracking.group
        scaling.wait_minutes scaling.worker_tokens_per_second scaling.data_label scaling.address
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
}
BEARINGS: dict[str, Bearing] = {key: bearing for bearing, keys in _KEYS.items() for key in keys.split()}
"""Bearing of every config key, with the names of ``documented_fields``."""


def bearing_of(key: str) -> Bearing:
    """Bearing of a key, which may be inside a free mapping or a list.

    >>> bearing_of("train.schedule_options.num_cycles").name, bearing_of("data.eval.0.path").name
    ('NONE', 'CONTENT')
    """
    return BEARINGS[documented_key(key, BEARINGS)]
