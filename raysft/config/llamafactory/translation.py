"""Keys of LLaMA-Factory that take effect together: run, workers, steps, evaluation and predictions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

from raysft.config.llamafactory.settings import Entry, Refusal, Settings
from raysft.config.optimizer_settings import OWN_BETAS, OWN_EPSILON

Derived = Iterator[Entry | Refusal]


def run(given: Settings) -> Derived:
    """``output_dir``: its last part is the run's name."""
    output = given["output_dir"]
    if output is None:
        return
    scheme, separator, rest = output.rpartition("://")
    path = PurePosixPath(rest)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.name).lstrip("._-")
    if not name:
        yield Refusal("output_dir", f"output_dir={output} does not name a folder; add the name of the run")
        return
    if not separator and str(path.parent) == "/":
        yield Entry("run.storage", output, "output_dir", "the run is in this folder, which may be a volume")
        return
    storage = f"{scheme}{separator}{path.parent}"
    note = "" if name == path.name else f"the run is in {storage}/{name}"
    yield Entry("run.name", name, "output_dir", note)
    yield Entry("run.storage", storage, "output_dir")


def workers(given: Settings) -> Derived:
    """Workers and what each of them computes."""
    number = given["ray_num_workers"]
    yield Entry("scaling.use_gpu", not given["use_cpu"], "use_cpu", "" if given["use_cpu"] else "false on CPUs")
    yield Entry("scaling.num_workers", number, "ray_num_workers")
    yield Entry("scaling.placement", given["placement_strategy"], "placement_strategy")
    others = sorted(given["ray_init_kwargs"].keys() - {"address"})
    if others:
        yield Refusal(
            "ray_init_kwargs",
            f"ray_init_kwargs.{others[0]} is not supported; remove it, and start the cluster or submit the job with it",
        )
    if address := given["ray_init_kwargs"].get("address"):
        yield Entry("scaling.address", None if address == "auto" else address, "ray_init_kwargs")
    if not given.trains:
        return
    micro, accumulation = given["per_device_train_batch_size"], given["gradient_accumulation_steps"]
    yield Entry("train.micro_batch_size", micro, "per_device_train_batch_size")
    yield Entry(
        "train.global_batch_size",
        micro * accumulation * number,
        "gradient_accumulation_steps" if given.given("gradient_accumulation_steps") else "per_device_train_batch_size",
        f"{micro} × {accumulation} × {number} rows (batch size, accumulation, workers); if LLaMA-Factory would use N GPUs, set "
        "scaling.num_workers to N and multiply this by N",
    )
    recomputes = not given["disable_gradient_checkpointing"] or given["gradient_checkpointing"]
    ignored = given.given("gradient_checkpointing") and not given["gradient_checkpointing"] and recomputes
    yield Entry(
        "train.gradient_checkpointing",
        recomputes,
        "disable_gradient_checkpointing",
        "LLaMA-Factory only looks at disable_gradient_checkpointing" if ignored else "",
    )
    if given["use_unsloth_gc"] and recomputes:
        yield Entry("train.offload.activations", "cpu", "use_unsloth_gc")


def steps(given: Settings) -> Derived:
    """Epochs, steps, learning rates."""
    if given["max_steps"] is not None:
        yield Entry("train.max_steps", given["max_steps"], "max_steps")
    else:
        epochs = given["num_train_epochs"]
        yield Entry("train.epochs", int(epochs) if epochs == int(epochs) else epochs, "num_train_epochs")
    if given["optim"] not in OWN_BETAS:  # transformers ignores these keys, too, or hands them over as options
        yield Entry("train.betas", [given["adam_beta1"], given["adam_beta2"]], "adam_beta2")
    if given["optim"] not in OWN_EPSILON:
        yield Entry("train.epsilon", given["adam_epsilon"], "adam_epsilon")
    schedule, options = given["lr_scheduler_type"], given["lr_scheduler_kwargs"]
    yield Entry("train.schedule", schedule, "lr_scheduler_type")
    yield Entry("train.schedule_options", options, "lr_scheduler_kwargs")
    if schedule == "warmup_stable_decay" and "num_decay_steps" not in options:
        yield Refusal(
            "lr_scheduler_type",
            "lr_scheduler_type=warmup_stable_decay needs the number of decay steps; set lr_scheduler_kwargs: "
            "{num_decay_steps: N} (LLaMA-Factory uses two thirds of the steps after the warm-up)",
        )
    ratio, warmup = given["warmup_ratio"], given["warmup_steps"]
    if ratio is not None and warmup:
        yield Refusal(
            "warmup_ratio",
            "warmup_ratio and warmup_steps are both set, and versions of transformers differ in which one wins; remove one",
        )
    if ratio is None and warmup >= 1:
        yield Entry("train.warmup_steps", int(warmup), "warmup_steps")
    else:
        key = "warmup_ratio" if ratio is not None else "warmup_steps"
        yield Entry("train.warmup_ratio", warmup if ratio is None else ratio, key)


def evaluation(given: Settings) -> Derived:
    """When to evaluate and to save."""
    yield Entry("train.eval_at_start", given["eval_on_start"], "eval_on_start")
    strategy = given["eval_strategy"]
    if strategy != "no":
        key = "eval_steps" if given.given("eval_steps") else "logging_steps"
        yield from _every(given, "train.eval_every", strategy, key)
        yield Entry("train.eval_delay", given["eval_delay"], "eval_delay")
        if not given["eval_dataset"] and not given["val_size"]:
            yield Refusal(
                "eval_strategy", f"eval_strategy={strategy} needs data to evaluate on; set val_size or eval_dataset"
            )
    yield Entry("train.keep_best", given["load_best_model_at_end"], "load_best_model_at_end")
    if given["load_best_model_at_end"] or given["early_stopping_steps"]:
        yield Entry("train.best_metric", given["metric_for_best_model"], "metric_for_best_model")
        if given.given("greater_is_better"):
            yield Entry("train.best_mode", "max" if given["greater_is_better"] else "min", "greater_is_better")
    strategy = given["save_strategy"]
    if strategy == "best":
        yield Refusal("save_strategy", "save_strategy=best is not supported; set load_best_model_at_end: true instead")
    elif strategy != "no" and not given["use_badam"]:
        yield from _every(given, "train.save_every", strategy, "save_steps")
        yield Entry(
            "train.keep_last", given["save_total_limit"], "save_total_limit", "" if given["save_total_limit"] else "all"
        )


def _every(given: Settings, path: str, strategy: str, key: str) -> Derived:
    every = given[key]
    if strategy == "epoch":
        yield Entry(f"{path}_epochs", 1, f"{path.removeprefix('train.').partition('_')[0]}_strategy")
    elif every < 1 and given["max_steps"] is None:
        yield Refusal(key, f"{key}={every:g} is a fraction of the steps; write a number of steps, or set max_steps")
    else:
        yield Entry(f"{path}_steps", math.ceil(every * given["max_steps"]) if every < 1 else int(every), key)


def predictions(given: Settings) -> Derived:
    """Predictions at the end."""
    asked = given.predicts or (given["predict_with_generate"] and given.evaluates and given.trains)
    during = given["predict_with_generate"] and given.trains and given["eval_strategy"] != "no"
    late = asked and during and given["eval_strategy"] == "epoch"
    key = "do_predict" if given["do_predict"] else "predict_with_generate"
    note = "after training, not after each epoch: for that, set generate.every_steps" if late else ""
    yield Entry("generate.enabled", asked, key, note)
    if not asked:
        return
    if during and not late:
        steps = "eval_steps" if given.given("eval_steps") else "logging_steps"
        for entry in _every(given, "train.eval_every", "steps", steps):
            if isinstance(entry, Entry):  # else it is refused with the evaluations
                yield Entry("generate.every_steps", entry.value, "predict_with_generate", "whenever it evaluates")
    if given.trains:
        yield Entry("generate.compare_base", False, "", "LLaMA-Factory predicts with the trained model only")
    length = "max_new_tokens" if given["max_new_tokens"] > 0 else "max_length"
    yield Entry("generate.max_new_tokens", given[length], length)
    if given["do_sample"] and given["num_beams"] > 1:
        yield Refusal("num_beams", f"num_beams={given['num_beams']} with do_sample=true; set do_sample: false")


TRACKERS = ("tensorboard", "wandb", "mlflow", "swanlab", "trackio")


def trackers(given: Settings) -> Derived:
    """Trackers, and the names under which they show the run."""
    asked = [name for name in given["report_to"] if name not in ("none", "None")]
    unknown = next((name for name in asked if name not in TRACKERS), None)
    if unknown == "all":
        yield Refusal("report_to", f"report_to=all means all installed trackers; name them: {', '.join(TRACKERS)}")
    elif unknown:
        yield Refusal("report_to", f"report_to={unknown} is not supported; use {', '.join(TRACKERS)} or none")
    else:
        local = "trackio" in asked and not given["trackio_space_id"]
        note = "trackio has a local database, unless TRACKIO_SPACE_ID names the Space that LLaMA-Factory would make"
        added = ["swanlab"] if given["use_swanlab"] and "swanlab" not in asked else []
        key = "use_swanlab" if added else "report_to"
        yield Entry("train.trackers", [*asked, *added], key, note if local else "")
    yield from _one_name(given, "project", "swanlab_project")
    yield from _one_name(given, "run_name", "swanlab_run_name")
    if "trackio" in asked and given["trackio_space_id"]:
        yield _for_environment("trackio_space_id", f"TRACKIO_SPACE_ID={given['trackio_space_id']}")
    if given["use_swanlab"]:
        yield from _swanlab(given)


def _one_name(given: Settings, general: str, swanlab: str) -> Derived:
    """A name that all trackers show, where LLaMA-Factory may have another one for SwanLab."""
    key = swanlab if given["use_swanlab"] and not given.given(general) else general
    if given["use_swanlab"] and given.given(general) and given.given(swanlab) and given[general] != given[swanlab]:
        yield Refusal(
            swanlab,
            f"{swanlab}={given[swanlab]} differs from {general}={given[general]}, but raysft uses one setting for all trackers; "
            "remove one of them",
        )
    elif given[key] is not None:
        yield Entry(f"train.tracking.{general}", given[key], key)


def _swanlab(given: Settings) -> Iterator[Refusal]:
    if given["swanlab_workspace"]:
        yield _for_environment("swanlab_workspace", f"SWANLAB_WORKSPACE={given['swanlab_workspace']}")
    if given["swanlab_mode"] == "local":
        yield _for_environment("swanlab_mode", "SWANLAB_MODE=local")
    for key in ("swanlab_lark_webhook_url", "swanlab_lark_secret"):
        if given[key]:
            yield Refusal(key, f"{key} is not supported; remove it: raysft does not send notifications")


def _for_environment(key: str, setting: str) -> Refusal:
    return Refusal(key, f"{key} is not supported; remove it, and set {setting} in the environment")


GENERAL: tuple[Callable[[Settings], Derived], ...] = (
    run, workers, steps, evaluation, predictions, trackers,
)  # fmt: skip
