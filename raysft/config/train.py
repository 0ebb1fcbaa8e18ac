"""The ``model`` and ``train`` sections: what is trained, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from raysft.config.section import Beta, Count, Fraction, Positive, Section, Text

Targets = Literal["all"] | Annotated[list[Text], Field(min_length=1)]
Optimizer = Literal["adamw", "adafactor", "muon", "adam_mini", "galore", "apollo", "badam"]
ZERO_OPTIMIZERS = ("adamw",)
"""Those that look at each weight alone; the others look at the shape of a matrix, which ZeRO's flat parts do not have."""
Schedule = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "cosine_with_min_lr", "polynomial",
    "inverse_sqrt", "warmup_stable_decay",
]  # fmt: skip


class OffloadSection(Section):
    optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer's states are kept and its step is computed: on the device, in the node's memory, or on disk."""
    parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where weights wait while they are not computed with; with ``zero_stage: 3``."""
    folder: Text | None = None
    """Folder on a local NVMe disk, for ``nvme``."""


class EarlyStopping(Section):
    patience: Positive | None = None
    """Stop after this many evaluations without improvement. Default: never."""
    threshold: Annotated[float, Field(ge=0)] = 0.0
    """How much better than the best an evaluation must be to count as an improvement."""


class TrainSection(Section):
    epochs: Positive = 1
    """Times that every example is trained on."""
    max_steps: Positive | None = None
    """Stop after this many optimizer steps, if that comes before the end of the epochs."""
    global_batch_size: Positive | Literal["auto"] = "auto"
    """Rows in one optimizer step over all workers together, whatever their number. ``auto``: 32 where all epochs together then
    have at least 100 steps, else 16, 8, 4, 2 or 1; data and config alone decide, and ``max_steps`` does not count. The run's
    ``config.yaml`` has the number, and a run that goes on keeps it. An epoch begins with a step of its own."""
    micro_batch_size: Positive = 1
    """Rows that one worker computes at once; more are accumulated."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Highest learning rate of the schedule."""
    optimizer: Optimizer = "adamw"
    """``adamw`` (torch's, or DeepSpeed's CPU-Adam when offloaded), ``adafactor`` and ``muon`` (torch's; with muon, matrices
    inside the layers by Muon and all else by AdamW), ``adam_mini``, ``galore``, ``apollo``, ``badam`` (extra ``optim``)."""
    optimizer_options: dict[str, Any] = {}
    """More arguments of the optimizer, under the names that its library gives them, for example ``{rank: 64}`` for galore."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's term that keeps the division finite."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this global norm; 0 switches clipping off."""
    schedule: Schedule = "cosine"
    """Course of the learning rate after warm-up, over the exact number of steps; transformers' schedules by their names."""
    schedule_options: dict[str, Any] = {}
    """More arguments of the schedule, for example ``{num_cycles: 3}`` or, for warmup_stable_decay, ``{num_decay_steps: 100}``
    (default there: a tenth of the steps)."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    loss: Literal["cross_entropy", "dft", "eaft"] = "cross_entropy"
    """Loss of a trained token: cross-entropy; DFT, which weighs it by the token's own probability; or EAFT, which weighs it
    by the entropy of the prediction. A step's loss is the sum over its trained tokens divided by their number."""
    eaft_alpha: Annotated[float, Field(gt=0)] = 1.0
    """Exponent of EAFT's entropy weight."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target's probability that is spread over all tokens."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared log of the softmax's denominator, added to the loss of each trained token."""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """NEFTune: strength of the noise on the embeddings, which is ± alpha / √(tokens of the example · embedding size)."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: what the workers share out: nothing, optimizer states, gradients too, weights too."""
    offload: OffloadSection = OffloadSection()
    """What is kept outside the device."""
    deepspeed: dict[str, Any] | Text = {}
    """More DeepSpeed settings, or the path of a JSON file with them; they may not contradict what the config says."""
    gradient_checkpointing: bool = False
    """Compute activations a second time instead of keeping them: less memory, about a third more time."""
    fp8: Literal["off", "torchao"] = "off"
    """Multiply matrices in 8-bit floats on GPUs that can (Hopper and later), through torchao (extra ``fp8``)."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when the loss or the gradient is infinite or no number: stop and name the rows, or leave the step out."""
    eval_at_start: bool = True
    """Evaluate before the first step as well, so that a run shows what it changed."""
    eval_every_steps: Positive | None = None
    """Evaluate every N steps; always at the end."""
    early_stopping: EarlyStopping = EarlyStopping()
    """When to stop before the end of the schedule; looks at ``eval_loss``."""
    keep_best: bool = False
    """Write the model of the evaluation with the lowest ``eval_loss`` instead of the last one."""
    save_every_steps: Positive | None = None
    """Write a checkpoint to resume from every N steps, and at the end; these stay when the run is done. Default: none."""
    save_every_minutes: Annotated[float, Field(gt=0)] | None = 15
    """Write a checkpoint when N minutes have passed since the last one, so that a run that dies loses no more than that. They
    are removed once the trained model is written. ``null``: none."""
    keep_last: Positive = 2
    """How many checkpoints are kept, the newest ones; a damaged one is passed over for the one before."""
    max_failures: Count = 3
    """How often the workers are started again from the newest checkpoint after one of them died. An error of their own that
    comes again at the same step ends the run."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]
    """Where the figures of each step go besides ``trainer_log.jsonl``: TensorBoard files in the run directory; W&B and MLflow
    (extras of their names, which find their servers and keys themselves)."""

    @property
    def resumes(self) -> bool:
        """Whether a training can go on from a checkpoint. badam keeps the state of one block at a time, and cannot."""
        return self.optimizer != "badam"
