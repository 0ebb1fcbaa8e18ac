"""The ``train`` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from raysft.config.optimizers import kind_of, optimizer_name
from raysft.config.section import Beta, Count, Epochs, Fraction, Options, PathOrHubId, Positive, Section, Text
from raysft.config.tracking import TrackingSection
from raysft.metric_names import higher_is_better

Targets = Literal["all"] | Annotated[list[Text], Field(min_length=1)]
Optimizer = Annotated[str, AfterValidator(optimizer_name)]
Schedule = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "cosine_with_min_lr", "polynomial",
    "inverse_sqrt", "warmup_stable_decay",
]  # fmt: skip


Tracker = Literal["tensorboard", "wandb", "mlflow", "swanlab", "trackio"]


class OffloadSection(Section):
    """What to offload from the device."""

    optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where DeepSpeed keeps optimizer states and computes the optimizer step. ``none``: on the device; ``cpu``: in host memory,
    on the CPU; ``nvme``: states on disk."""
    parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where ZeRO-3 keeps parameters that are not in use."""
    activations: Literal["none", "cpu"] = "none"
    """Where the inputs of recomputed layers (``gradient_checkpointing``) are kept until the backward pass. ``cpu``: in host
    memory; each is copied back when its layer is recomputed."""
    folder: Text | None = None
    """Folder on a local NVMe disk; required by ``nvme``."""


class EarlyStopping(Section):
    """When to stop before the end of the schedule."""

    patience: Positive | None = None
    """Stop after this many consecutive evaluations without improvement. Default: never."""
    threshold: Annotated[float, Field(ge=0)] = 0.0
    """Minimum change in ``best_metric``, relative to the best value so far, that counts as an improvement."""


class TrainSection(Section):
    """Optimization, loss, evaluation and checkpoints."""

    epochs: Epochs = 1
    """Number of passes over the training data. With a fraction, as in 2.5, the last epoch ends after that fraction of its
    steps, rounded up, as in transformers."""
    max_steps: Positive | None = None
    """Number of optimizer steps. As in transformers, it overrides ``epochs``: training runs for as many epochs as it takes to
    reach this number of steps. Default: the steps of ``epochs``."""
    global_batch_size: Positive | Literal["auto"] = "auto"
    """Rows per optimizer step, summed over all workers and independent of their number. A row holds ``data.sequence_length``
    tokens. ``auto``: the largest of 32, 16, 8, 4, 2 and 1 that gives at least 100 steps over ``epochs`` (1 if none does),
    regardless of ``max_steps``. The run directory's ``config.yaml`` records the number, and a resumed run keeps it. Each epoch
    starts with a new step."""
    micro_batch_size: Positive | Literal["auto"] = "auto"
    """Rows per forward and backward pass of one worker. Gradients accumulate until the step is complete. ``auto``: as many rows
    as fit into 1,024 tokens, at least one."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate. Optimizers that find their own step size, such as ``prodigy``, multiply it by this value, which
    should be about 1 for them."""
    optimizer: Optimizer = "adamw"
    """``adamw`` (PyTorch's, or DeepSpeed's CPUAdam with offload); ``adamw_8bit``, ``paged_adamw``, ``paged_adamw_8bit`` and
    other 8-bit and paged optimizers from bitsandbytes (extra ``quant``); ``adafactor`` (transformers', with updates that do not
    depend on the size of the weights); ``muon`` (PyTorch's; it updates the matrices inside the layers, AdamW everything else);
    ``apollo``, ``badam``, and the optimizers of pytorch-optimizer by name, such as ``lion``, ``adan``, ``galore`` or
    ``schedulefree_adamw`` (extra ``optim``). configs/README.md lists all of them, and what each can be combined with."""
    optimizer_options: Options = {}
    """Additional optimizer arguments, under the names used by its library, for example ``{rank: 64}`` for galore."""
    optimizer_target: Targets = "all"
    """Modules whose matrices ``galore``, ``fira`` and ``apollo`` project: ``all`` inside the layers, or a list of names or regular
    expressions."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of matrices; biases and norms do not decay. Decoupled from the gradient, except with optimizers whose library
    adds it to the gradient, such as ``adam`` and ``sgd``."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam's decay rates for the first and second moments; also used by other optimizers with the same defaults. All others
    keep their own defaults, which ``optimizer_options`` can change."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's epsilon, added to the denominator for numerical stability; applies to the same kinds of optimizers as
    ``betas``."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip gradients to this global norm. 0: no clipping."""
    schedule: Schedule = "cosine"
    """Learning-rate schedule after the warm-up, over the exact number of steps. The names are those of transformers."""
    schedule_options: Options = {}
    """Additional arguments for the schedule, for example ``{num_cycles: 3}``, or ``{num_decay_steps: 100}`` for
    warmup_stable_decay (default: a tenth of the steps)."""
    warmup_ratio: Fraction = 0.03
    """Fraction of the steps, rounded up, over which the learning rate rises linearly from 0."""
    warmup_steps: Count | None = None
    """Number of warm-up steps; overrides ``warmup_ratio``. 0: no warm-up. Default: determined by ``warmup_ratio``."""
    loss: Literal["cross_entropy", "dft", "eaft", "asft"] = "cross_entropy"
    """Loss per token: ``cross_entropy``; ``dft``, which weights it by the probability of the token; ``eaft``, which weights it
    by the entropy of the prediction; or ``asft``, which adds to ``dft`` the divergence from the predictions of a frozen model.
    The loss of a step is the sum over its loss tokens divided by their number."""
    asft_alpha: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the Kullback-Leibler divergence KL(reference ‖ trained) with ``loss: asft``."""
    reference_model: PathOrHubId | None = None
    """The frozen model that ``loss: asft`` stays close to: a model or adapter in any form that ``generate.model`` accepts, with
    the same tokens as the trained model. Default: the model that training starts from, also when the run resumes. A new adapter
    is disabled to compute it; of any other trained weights, a second copy is kept."""
    eaft_alpha: Annotated[float, Field(gt=0)] = 1.0
    """Exponent of the entropy weight with ``loss: eaft``."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability mass that is moved from the target token to all tokens equally."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the z-loss, the squared log of the softmax denominator, which is added to the loss of each loss token."""
    router_aux_loss_coef: Annotated[float, Field(gt=0)] | None = None
    """Weight of the load balancing loss, which keeps the routers of a mixture of experts from sending all tokens to a few
    experts (0.001 in the configs of many models). It is computed as in transformers, for each example separately; a step uses
    the mean over its examples, weighted by their number of tokens. It is logged as ``router_aux_loss``, separately from the
    loss. Its gradient also reaches trained weights before a router, even if the router is frozen. Default: none."""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """NEFTune: add uniform noise of ± alpha / √(tokens of the example · embedding size) to the embeddings. Default: no noise."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage. 0: no partitioning; 1: optimizer states are partitioned across workers; 2: gradients as well;
    3: parameters as well."""
    pure_bf16: bool = False
    """Keep weights, gradients and optimizer states in bfloat16 only, without float32 copies: this takes a third to half of the
    memory, but updates smaller than 1/256 of a weight are rounded away. Requires ``model.dtype`` bfloat16; without ZeRO
    (``zero_stage: 0``) any optimizer but ``adai`` and ``badam`` can be used."""
    offload: OffloadSection = OffloadSection()
    """What to offload from the device."""
    deepspeed: Options | Text = {}
    """Additional DeepSpeed settings, or the path of a JSON file with them. They must not contradict the config."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: uses less memory, takes about a third more time."""
    recompute_layers: Count | None = None
    """Number of the model's first layers that ``gradient_checkpointing`` recomputes; the others store their activations, which
    takes more memory and saves time. Default: all layers."""
    compile: bool = False
    """Compile the decoder's layers with torch.compile, for passes with gradients: steps on GPUs are faster, but the first ones
    take a minute or more longer. Results differ by rounding. Every node needs a compiler: a C compiler with GPUs, a C++
    compiler with CPUs."""
    fp8: Literal["off", "torchao"] = "off"
    """Compute matrix multiplications in FP8 with torchao (extra ``fp8``), on GPUs that support it (Ada, Hopper and later)."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when a loss or gradient is NaN or infinite: stop and list the rows, or skip the step."""
    eval_at_start: bool = True
    """Also evaluate before the first step, so that the report can compare before and after. The results are kept in
    ``data.cache``, where a later run finds them if it would compute the same on the same machines."""
    eval_every_steps: Positive | None = None
    """Evaluate every N steps, in addition to the end of training. Default: only at the end."""
    eval_every_epochs: Epochs | None = None
    """Evaluate after the last step of every Nth epoch; 0.5: also in the middle of each epoch. Can be combined with
    ``eval_every_steps``."""
    eval_delay: Annotated[float, Field(ge=0)] = 0
    """Delay the evaluations every N steps or epochs until this point: a number of steps with ``eval_every_steps``, of epochs
    with ``eval_every_epochs``. The evaluations before the first step and at the end are not affected."""
    early_stopping: EarlyStopping = EarlyStopping()
    """Early stopping by ``best_metric``."""
    keep_best: bool = False
    """Save the model with the best ``best_metric`` instead of the last one."""
    best_metric: Text = "eval_loss"
    """Metric that determines which model is the best, for ``keep_best`` and ``early_stopping``: a key of ``eval_results.json``,
    such as ``eval_accuracy`` or ``eval_NAME_loss`` for one of several evaluation sets, or with ``generate.every_steps`` one of
    ``predict_results.json``, such as ``predict_rouge-l``. A value that is not finite is never the best; of equal values, the
    first wins."""
    best_mode: Literal["min", "max"] | None = None
    """``min``: the lowest ``best_metric`` is best; ``max``: the highest. Default: the metric's own direction."""
    save_every_steps: Positive | None = None
    """Save a checkpoint every N steps and at the end. The run keeps these checkpoints when it is done. Default: none."""
    save_every_epochs: Epochs | None = None
    """Save a checkpoint after the last step of every Nth epoch, in the same way; 0.5: also in the middle of each epoch. Can be
    combined with ``save_every_steps``."""
    save_every_minutes: Annotated[float, Field(gt=0)] | None = 15
    """Save a checkpoint when the last one is N minutes old, so that a crash loses at most this much work. The run deletes these
    checkpoints once it has saved the trained model. ``null``: none."""
    keep_last: Positive | None = 2
    """Number of most recent checkpoints to keep. If the newest one is corrupt, a run resumes from the one before it. ``null``:
    all those from ``save_every_steps`` and ``save_every_epochs``, and the newest one from ``save_every_minutes``."""
    max_failures: Count = 3
    """How many times workers restart from the newest checkpoint after a worker dies. A worker error that recurs at the same
    step ends the run."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Stop after this many hours, counted from the start of the command, with a checkpoint and exit code 75; running the same
    command again resumes, with the same time limit. Leave enough time for one step and a checkpoint before your scheduler would
    kill the job. In a sweep, it limits each trial. Default: no limit."""
    hang_minutes: Annotated[float, Field(gt=0)] | None = 15
    """Minutes without progress after which a worker exits, so that the workers restart from the newest checkpoint; four times
    as long while it loads or writes the model, and at least as long as ten typical steps. Well before that, the log says which
    worker is holding up the others. ``null``: never."""
    trackers: list[Tracker] = ["tensorboard"]
    """Where to log metrics, in addition to ``trainer_log.jsonl``. TensorBoard writes to the run directory; ``wandb``, ``mlflow``,
    ``swanlab`` and ``trackio`` (extras with these names) read their server and credentials from their own environment variables
    and configuration."""
    tracking: TrackingSection = TrackingSection()
    """Names under which trackers show a run."""

    @property
    def comparing_key(self) -> str | None:
        """Key of a setting that compares evaluations; None if nothing compares them."""
        asked = {"train.early_stopping": self.early_stopping.patience, "train.keep_best": self.keep_best}
        return next((key for key, value in asked.items() if value), None)

    @property
    def goes_by_predictions(self) -> bool:
        """True if scores of predictions during the training decide which model is the best."""
        return self.comparing_key is not None and self.best_metric.startswith("predict_")

    @property
    def lowest_is_best(self) -> bool:
        """True if the lowest ``best_metric`` is best."""
        if self.best_mode is not None:
            return self.best_mode == "min"
        return not higher_is_better(self.best_metric)

    @property
    def evaluates_on_the_way(self) -> bool:
        """True if the model is evaluated during the training, so that evaluations can be compared."""
        return self.eval_every_steps is not None or self.eval_every_epochs is not None

    @property
    def saves_on_schedule(self) -> bool:
        """True if checkpoints are written after certain steps, which stay when the run is done."""
        return self.save_every_steps is not None or self.save_every_epochs is not None

    @property
    def resumes(self) -> bool:
        """True if training can resume from a checkpoint. It cannot with badam, which keeps the state of one block at a time."""
        return kind_of(self.optimizer).resumes
