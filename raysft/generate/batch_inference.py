"""Batch inference: send prompts through a pool of engines, store the predictions, and score them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raysft.config import Config
from raysft.errors import RunFailed, RunStopped
from raysft.generate import engine_pool, metrics
from raysft.generate.engines import check_engine, check_suitable, for_images
from raysft.generate.prediction_store import PredictionStore, Stored, fingerprint
from raysft.generate.progress import GenerationProgress
from raysft.generate.prompts import MEDIA, ModelPrompts, Prompts
from raysft.generate.ray_pipeline import completions
from raysft.generate.signs_of_life import Listener
from raysft.models.weight_files import check_weights
from raysft.stopping import current
from raysft.storage.json_files import read_jsonl
from raysft.storage.local_cache import model_copy

NOBODY = Listener()
SHOWN_OF_MEDIUM = ("kind", "location", "width", "height")
"""What a prediction says of each image of its prompt."""


@dataclass(frozen=True)
class Output:
    """What one model predicts, and where it is written."""

    model: str
    """Folder of a Hugging Face model, or of a peft adapter whose base is a local folder."""
    path: Path
    """JSON Lines file: ``{"prompt", "predict", "label", "id", "source", "tokens", "stop"}``. A prompt that failed has an
    ``error`` and an empty prediction, and one with images has ``media``: the kind, location, width and height of each."""
    role: metrics.ModelRole = "trained"
    """The part that the model plays in this run, for the metric rows."""
    described: str = "the model"
    earlier: Sequence[Path] = ()
    """Outputs of the same run, which are taken over if they are of the same model, prompts and settings."""


def generate(
    config: Config,
    prompts: Path,
    outputs: Sequence[Output],
    *,
    progress: bool = True,
    notify: Callable[[str], None] = lambda line: None,
    room: engine_pool.Room | None = None,
    listener: Listener = NOBODY,
) -> list[metrics.MetricRow]:
    """Generate a prediction for each prompt with each model, write them in the order of the prompts, and score them.

    Ray must be initialised. One pool of engines serves all outputs, one after another. Predictions are stored as they arrive:
    if the process is killed and called again with the same models, prompts and settings, it generates only what is missing. A
    complete output without failed prompts is only scored again.

    Args:
        prompts: Parquet file with the columns id (unique), source, prompt, input_ids and label; generation also stops at the
            ``end_tokens`` of its metadata.
        outputs: in the order in which they are generated, each with a separate file.
        progress: report progress on stderr.
        notify: gets a line when it is an output's turn.
        room: what the engines may use; if given, scoring starts no tasks. Default: the whole cluster.
        listener: is told of its progress.

    Returns:
        For each output, the rows of ``metrics.score`` and three about its generation. ``runtime`` is the time until its last
        prediction: of the first output since the call, with the start of the engines; of another since the output before was
        complete, or since its own first batch began if that was earlier. ``tokens_per_second`` is that from the start of its
        first batch to the end of its last, ``samples_per_second`` the predictions of that call by ``runtime``.

    Raises:
        RequestError: a model, the prompts, a metric, the engine or the pool size is invalid; raised before anything starts.
        RunFailed: an engine failed; the predictions so far stay on disk.
        RunStopped: the run was asked to stop; they stay as well.
    """
    metrics.check(config)
    check_engine(config)
    read = Prompts.read(Path(prompts))
    config = config if read.media is None else for_images(config)
    predictions = [
        _Predictions(config, each, read, fingerprint(config, each.model, Path(prompts)), shown=progress)
        for each in outputs
    ]
    for each in predictions:
        if each.facts is None:
            check_weights(model_copy(each.output.model), each.output.model)
            check_suitable(config, each.output.model)
    try:
        with current().ending_by_itself():
            _generate_missing(config, read, predictions, notify, room, listener)
    except RunStopped as stopped:
        kept, all_prompts = sum(each.done for each in predictions), len(read) * len(predictions)
        raise RunStopped(f"{stopped}; {kept} of {all_prompts} predictions are kept") from None
    listener.scoring()
    return [row for each in predictions for row in each.score(by_tasks=room is None)]


def _generate_missing(
    config: Config,
    prompts: Prompts,
    predictions: Sequence[_Predictions],
    notify: Callable[[str], None],
    room: engine_pool.Room | None,
    listener: Listener,
) -> None:
    """Generate what the outputs lack, and finish each as soon as it is complete."""
    unfinished = [each for each in predictions if each.facts is None]
    with contextlib.ExitStack() as stack:
        asked = [stack.enter_context(each).missing() for each in unfinished]
        batches = stack.enter_context(
            contextlib.closing(completions(config, asked, prompts.end_tokens, room, listener.engine))
        )
        for each in predictions:
            notify(f"generating with {each.output.described}")
            if each not in unfinished:
                continue
            with each.progress:
                if not each.is_complete:
                    for index, batch in batches:
                        # Engines may be at the next output while the last batches of this one are on their way.
                        unfinished[index].add(batch)
                        listener.advanced(each.done)
                        current().check()
                        if each.is_complete:
                            break
                each.finish()
            each.warn()


class _Predictions:
    """The predictions of one output, while they are generated; a context that keeps its file open.

    Of a prediction it remembers where it is stored, not what it says.

    Attributes:
        facts: runtime and speed of the call that wrote the output; None until it is complete.
    """

    def __init__(self, config: Config, output: Output, prompts: Prompts, fingerprint: str, *, shown: bool) -> None:
        self._config, self.output, self._prompts, self._shown = config, output, prompts, shown
        self._store = PredictionStore(output.path, fingerprint)
        self._places = np.full(len(prompts), -1, np.int64)
        self._cut = np.zeros(len(prompts), bool)
        self._errors: dict[int, str] = {}
        self._done = 0
        self._generated = 0
        """Predictions that this call has added to those that were there."""
        self.facts = self._store.finished() or self._store.take_over(output.earlier)

    def __enter__(self) -> _Predictions:
        # Retry what failed before: memory may have run out for another reason.
        self._remember([entry for entry in self._store.open() if not entry.error])
        use_gpu = self._config.scaling.use_gpu
        self.progress = GenerationProgress(
            self.output.path.stem,
            total=len(self._prompts),
            done=self._done,
            waiting=lambda: engine_pool.free_now(use_gpu),
            shown=self._shown,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    def _remember(self, entries: Sequence[Stored]) -> None:
        for entry in entries:
            number = self._prompts.index[entry.id]
            self._done += self._places[number] < 0
            self._places[number], self._cut[number] = entry.place, entry.cut
            self._errors.pop(number, None)
            if entry.error:
                self._errors[number] = entry.error

    def missing(self) -> ModelPrompts:
        """Return the prompts without a prediction."""
        return ModelPrompts.all(self.output.model, self._prompts).without(self._places >= 0)

    @property
    def done(self) -> int:
        """Number of predictions that are stored."""
        return len(self._prompts) if self.facts is not None else self._done

    @property
    def is_complete(self) -> bool:
        return self._done == len(self._prompts)

    def add(self, batch: list[dict[str, Any]]) -> None:
        """Store a batch of predictions, and write the output if they are the last.

        Raises:
            RunFailed: all prompts failed.
        """
        self._remember(self._store.append(batch))
        self._generated += len(batch)
        self.progress.advance(len(batch), sum(entry["tokens"] for entry in batch), batch[0]["seconds"])
        if self.is_complete:
            self.finish()

    def finish(self) -> None:
        """Write the output, unless it is written already.

        Raises:
            RunFailed: all prompts failed.
        """
        if self.facts is not None:
            return
        failed = len(self._errors)
        if failed and failed == self._done:
            raise RunFailed(f"generation failed: {next(iter(self._errors.values()))}")
        facts = {
            "runtime": round(self.progress.seconds, 3),
            "samples_per_second": round(self._generated / max(self.progress.seconds, 1e-6), 3),
            "tokens_per_second": round(self.progress.tokens_per_second, 3),
        }
        self._store.finish(self._rows(), facts, failed)
        self.facts = facts

    def _rows(self) -> Iterator[dict[str, Any]]:
        """The predictions in the order of the prompts, with the columns of the output."""
        for text, place in zip(self._prompts.texts(), self._places.tolist(), strict=True):
            entry = self._store.entry(place)
            yield {
                "prompt": text["prompt"],
                "predict": entry["predict"],
                "label": text["label"],
                "id": text["id"],
                "source": text["source"],
                **(
                    {"media": [{key: each[key] for key in SHOWN_OF_MEDIUM} for each in text[MEDIA]]}
                    if text.get(MEDIA)
                    else {}
                ),
                **{key: entry[key] for key in ("tokens", "stop", "error") if entry[key]},
            }

    def warn(self) -> None:
        """Say on stderr which prompts failed or were cut."""
        name, total = self.output.path.stem, len(self._prompts)
        if self._errors:
            number, error = next(iter(self._errors.items()))
            print(f"{name}: {len(self._errors)} of {total} prompts failed, the first of them {self._prompts.ids[number]}: "
                  f"{error}; generate again to retry them", file=sys.stderr)  # fmt: skip
        if cut := int(self._cut.sum()):
            print(f"{name}: {cut} of {total} prompts were truncated at the beginning, because they exceed the model's context "
                  f"length with generate.max_new_tokens={self._config.generate.max_new_tokens}; lower it",
                  file=sys.stderr)  # fmt: skip

    def score(self, by_tasks: bool = True) -> list[metrics.MetricRow]:
        """Score a complete output."""
        assert self.facts is not None
        role, facts = self.output.role, self.facts
        speed = facts["tokens_per_second"]
        rows = metrics.score_labelled(self._config, read_jsonl(self.output.path), role, by_tasks)
        if unscored := next((int(row.value) for row in rows if row.metric == "unscored"), 0):
            none = "; there are no metrics" if unscored == len(self._prompts) else ""
            print(f"{self.output.path.stem}: {unscored} of {len(self._prompts)} predictions are not scored, because their "
                  f"records have no answer{none}", file=sys.stderr)  # fmt: skip
        samples = facts.get("samples_per_second", 0.0)
        return [
            *rows,
            metrics.MetricRow("runtime", None, role, facts["runtime"], unit="seconds", higher_is_better=False),
            metrics.MetricRow("samples_per_second", None, role, samples, unit="examples/second", higher_is_better=True),
            metrics.MetricRow("tokens_per_second", None, role, speed, unit="tokens/second", higher_is_better=True),
        ]
