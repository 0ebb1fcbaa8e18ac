"""Warnings about a plan: problems that would otherwise only show up in the results. One function per warning.

``check`` and ``run`` print them with the plan, and the report repeats them from ``plan.json``. A warning never refuses
anything. Each line has a fact, a value and a remedy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from raysft.config import Config
from raysft.data.rows.batch_size import MIN_AUTO_STEPS
from raysft.errors import as_yaml
from raysft.run.unused_settings import unused_settings

if TYPE_CHECKING:
    from raysft.run.plan import Plan
    from raysft.run.source_plan import SourcePlan

FEW_STEPS = 20
"""Adam moves a weight by about the learning rate per step. In fewer steps, at the default rate with warm-up and decay, that is less
than 0.001 in all: a few hundredths of a typical weight."""
FEW_EXAMPLES, FEW_TOKENS = 10, 1000
"""An evaluation set that is smaller in both is unreliable: one example changes its results by a tenth."""
MANY = 0.1
"""Share of a source that is too large to be lost on purpose."""


def warnings(config: Config, plan: Plan) -> Iterator[str]:
    """Yield the warnings about a run, most important first."""
    for warning in WARNINGS:
        yield from warning(config, plan)


def few_steps(config: Config, plan: Plan) -> Iterator[str]:
    """A training run with few steps learns nothing."""
    if plan.steps < FEW_STEPS:
        steps = "1 step is" if plan.steps == 1 else f"{plan.steps} steps are"
        yield f"{steps} too few to learn anything; {_more_steps(config, plan)}"


def _more_steps(config: Config, plan: Plan) -> str:
    """Return how to get more steps: a hundred, if one remedy gives that many."""
    if config.train.max_steps is not None:
        return f"raise train.max_steps={plan.steps}"
    chosen, of_epoch = plan.global_batch_size_chosen, math.ceil(plan.rows_of_epochs[0] / min(1, plan.epochs))
    if plan.global_batch_size > 1 and plan.rows >= FEW_STEPS and not chosen:
        return f"use train.global_batch_size=auto instead of {plan.global_batch_size}"
    remedies = []
    if config.stage == "sft" and config.data.packing and plan.examples > of_epoch:
        remedies.append(f"data.packing=false ({plan.examples} rows an epoch instead of {of_epoch})")
        of_epoch = plan.examples
    if of_epoch * plan.epochs < MIN_AUTO_STEPS:
        remedies.append(f"train.epochs={math.ceil(MIN_AUTO_STEPS / of_epoch)}")
    if not chosen and plan.global_batch_size > 1:
        remedies.append("train.global_batch_size=auto")
    return f"use {' and '.join(remedies)}, or add data"


def empty_steps(config: Config, plan: Plan) -> Iterator[str]:
    """A step may have more rows than an epoch."""
    step_rows = plan.steps * plan.global_batch_size
    if 2 * plan.empty_rows > step_rows:
        yield (
            f"{plan.empty_rows / step_rows:.0%} of the rows of all steps are empty, because "
            f"train.global_batch_size={plan.global_batch_size} but an epoch has {plan.rows_of_epochs[0]} rows; use "
            "train.global_batch_size=auto"
        )


def idle_workers(config: Config, plan: Plan) -> Iterator[str]:
    """A step may have fewer rows than there are workers."""
    size = plan.sequence_parallel
    idle = plan.workers - plan.global_batch_size * size
    if idle > 0:
        yield (
            f"{idle} of {plan.workers} workers are idle, because a step has {plan.global_batch_size} "
            f"row{'' if plan.global_batch_size == 1 else 's'}; use scaling.num_workers={plan.global_batch_size * size}"
        )


def groups_across_nodes(config: Config, plan: Plan) -> Iterator[str]:
    """Workers that share rows exchange them in every layer."""
    if plan.groups_cross_nodes:
        yield (
            f"groups of scaling.sequence_parallel={plan.sequence_parallel} workers span nodes, so every layer waits for the "
            "network; use a number that divides the number of workers on each node"
        )


def padding(config: Config, plan: Plan) -> Iterator[str]:
    """Rows may be much longer than their examples."""
    if plan.packing_efficiency >= 0.5:
        return
    longest = math.ceil(max(source.longest for source in plan.sources.values()) / 8) * 8
    if 2 * longest <= plan.sequence_length:
        remedy = f"use data.sequence_length={max(longest, 8)} instead of {plan.sequence_length}, which fits the longest example"
    elif not config.data.packing and plan.rows * plan.packing_efficiency >= MIN_AUTO_STEPS:
        remedy = "use data.packing=true, which packs several examples into a row"
    else:
        return
    yield f"{1 - plan.packing_efficiency:.0%} of the positions in rows are padding; {remedy}"


def no_evaluation(config: Config, plan: Plan) -> Iterator[str]:
    """Without held-out examples, nothing shows whether the model improves."""
    if plan.evaluation:
        return
    # A hash decides which examples are held out. With 5 expected, the chance of getting none is below 1 in 100.
    fewest = min(source.examples for source in plan.sources.values())
    possible = [holdout for holdout in (0.1, 0.2, 0.3) if holdout * fewest >= FEW_EXAMPLES / 2]
    holdout = next(
        (each for each in possible if each * plan.examples_of_sources >= FEW_EXAMPLES), max(possible, default=None)
    )
    hold_out = f"use data.holdout={holdout:g}, or " if holdout else ""
    yield f"nothing is evaluated, so nothing shows whether the model improves; {hold_out}give files in data.eval"


def small_evaluation(config: Config, plan: Plan) -> Iterator[str]:
    """An evaluation of a few examples is mostly chance."""
    for name, source in plan.evaluation.items():
        if source.examples < FEW_EXAMPLES and source.loss_tokens < FEW_TOKENS:
            count = f"{source.examples} example{'' if source.examples == 1 else 's'}"
            held_out = config.data.holdout and name in plan.sources
            remedy = "raise data.holdout" if held_out else "add examples to it"
            yield f"evaluation set {name!r} has {count}, so its results are mostly chance; {remedy}"


def evaluated_on_training_data(config: Config, plan: Plan) -> Iterator[str]:
    """An evaluation on training data measures memory."""
    for name, (source, file) in plan.shared_files.items():
        yield (
            f"evaluation set {name!r} and training source {source!r} both read {file}, so its results show what the model "
            "remembers, not how it generalizes; give other files, or use data.holdout"
        )


def trained_on(config: Config, plan: Plan) -> Iterator[str]:
    """Evaluation examples may be among the training data."""
    for name, source in plan.evaluation.items():
        count = source.counts.get("trained_on", 0)
        if count and name not in plan.shared_files:
            yield (
                f"{count:,} of {source.examples:,} examples of evaluation set {name!r} are trained on, so its results show "
                "what the model remembers; use data.duplicates=drop, which removes them from training"
            )


def repeated_examples(config: Config, plan: Plan) -> Iterator[str]:
    """Much of the training data may be copies of the rest."""
    counts = [source.counts for source in plan.sources.values()]
    if any(each.get("left_out") for each in counts):
        return
    repeated = sum(each.get(name, 0) for each in counts for name in ("repeated", "repeated_elsewhere"))
    examples = plan.examples_of_sources
    if repeated >= MANY * examples and repeated:
        yield (
            f"{repeated:,} of {examples:,} training examples are duplicates of another one, which gives it more weight; use "
            "data.duplicates=drop if that is not intended"
        )


def emptied_sources(config: Config, plan: Plan) -> Iterator[str]:
    """Nothing of a source may be left to train on."""
    for name, source in plan.sources.items():
        if source.counts.get("left_out") == source.examples:
            yield (
                f"source {name!r}: all of its {source.examples:,} examples are in an evaluation set or an earlier source, so "
                "data.duplicates=drop removes all of them; remove the source"
            )


def lost_records(config: Config, plan: Plan) -> Iterator[str]:
    """Much of a source may be lost or cut."""
    for name, source in {**plan.evaluation, **plan.sources}.items():
        lost = source.rejected + source.dropped
        if lost >= MANY * source.records:
            records = f"{lost:,} of {source.records:,} records"
            yield f"source {name!r}: {records} are rejected or dropped; see rejected.jsonl of the run for the reasons"
        cut = source.counts.get("truncated", 0)
        if cut >= MANY * max(1, source.examples):
            yield (
                f"source {name!r}: {cut:,} of {source.examples:,} examples are truncated at data.sequence_length="
                f"{plan.sequence_length}; raise it, or use data.on_overflow=split"
            )


def beyond_positions(config: Config, plan: Plan) -> Iterator[str]:
    """A model was never trained on positions beyond its own range."""
    yield from beyond_lines(config, {**plan.evaluation, **plan.sources}, plan.positions, plan.can_be_scaled)


def beyond_lines(
    config: Config, sources: Mapping[str, SourcePlan], positions: int | None, can_be_scaled: bool = True
) -> Iterator[str]:
    """Yield the warnings about sources with examples longer than the model's positions; None: it has no limit."""
    asked, row = config.model.rope_scaling, config.data.sequence_length
    if positions is None or row <= positions:
        return  # rows cut longer documents
    lower = f"lower data.sequence_length to {positions}"
    scale = (
        "set model.rope_scaling=yarn" if asked is None else f"raise the factor of model.rope_scaling={as_yaml(asked)}"
    )
    remedy = f"beyond which it was never trained; {f'{scale}, or {lower}' if can_be_scaled else lower}"
    if config.stage == "pt" and not config.data.document_mask:
        yield (
            f"with data.document_mask=false each row is one text of {row:,} tokens, longer than the model's {positions:,} "
            f"positions, {remedy}"
        )
        return
    for name, source in sources.items():
        if source.beyond:
            yield (
                f"source {name!r}: {source.beyond:,} of {source.examples:,} examples are longer than the model's {positions:,} "
                f"positions (the longest has {min(source.longest, row):,} tokens), {remedy}"
            )


def quoted_arguments(config: Config, plan: Plan) -> Iterator[str]:
    """The chat template may encode arguments that are already JSON text a second time, and the model learns that."""
    for name, source in {**plan.evaluation, **plan.sources}.items():
        if count := source.counts.get("quoted_arguments", 0):
            yield (
                f"source {name!r}: {count:,} of {source.examples:,} examples have tool-call arguments as JSON text, which the "
                'chat template encodes a second time ("{\\"city\\": …}"), so the model learns to write them that way; give '
                "arguments as objects in the records"
            )


def stray_marks(config: Config, plan: Plan) -> Iterator[str]:
    """A vision-language model may be given records whose images are in a column that is not read."""
    for name, source in {**plan.evaluation, **plan.sources}.items():
        if count := source.counts.get("stray_marks", 0):
            yield (
                f"source {name!r}: {count:,} of {source.examples:,} examples have no images, but image placeholders in their "
                "text (<image>), which are treated as plain text; name the column of their images with columns: "
                "{images: COLUMN}"
            )


def long_warm_up(config: Config, plan: Plan) -> Iterator[str]:
    """The warm-up may take most of the training."""
    given, ratio = config.train.warmup_steps, config.train.warmup_ratio
    warm_up = math.ceil(ratio * plan.steps) if given is None else given
    if config.train.schedule != "constant" and plan.steps >= FEW_STEPS and 2 * warm_up >= plan.steps:
        key = f"warmup_ratio={ratio:g}" if given is None else f"warmup_steps={given}"
        yield f"warm-up takes {warm_up:,} of {plan.steps:,} steps; lower train.{key}"


def endless_turns(config: Config, plan: Plan) -> Iterator[str]:
    """If no token ends the assistant's turns, generation always runs to its limit."""
    turns = plan.turns
    remedy = "set model.chat_template to a template that writes a special token, such as eos_token, after each answer"
    endless = turns.no_end + turns.text_ends
    if config.stage != "sft" or not turns.total:
        return
    if turns.truncated == turns.total:
        yield (
            f"every trained turn is truncated before its end, so the model cannot learn to stop; raise "
            f"data.sequence_length={plan.sequence_length}, or set data.on_overflow=drop"
        )
    elif turns.end_tokens and set(turns.end_tokens) == set(turns.inner_end_tokens):
        yield (
            f"{', '.join(turns.inner_end_tokens)} ends the assistant's turns but also occurs inside them, so generation does not "
            "stop there; name the token to stop at in generate.stop_tokens"
        )
    elif turns.end_tokens and endless:
        yield f"no special token ends {endless:,} of {turns.total:,} trained turns; {remedy}"
    elif turns.text_ends > turns.no_end:
        yield (
            f"the assistant's turns end with ordinary text (its last token is {turns.end_text!r}) not with a special token, "
            f"so generation cannot tell where to stop; {remedy}"
        )
    elif turns.no_end:
        yield f"no token ends the assistant's turns, so the model cannot learn to stop; {remedy}"


def untrained_end_tokens(config: Config, plan: Plan) -> Iterator[str]:
    """An adapter on the layers alone cannot teach a model a token whose embedding means nothing."""
    if plan.untrained_ends:
        yield (
            f"{' '.join(plan.untrained_ends)} ends turns, but the model has never been trained on it, and "
            f"model.finetuning={config.model.finetuning} trains no embeddings, so it may not learn to stop; add it to "
            "model.new_tokens.special, which trains them"
        )


def untrained_prompt_endings(config: Config, plan: Plan) -> Iterator[str]:
    """The generation prompt should begin turns as the trained turns begin."""
    if plan.turns.prompt_only:
        yield (
            f"the generation prompt ends with {plan.turns.prompt_only!r}, but no trained turn begins that way, so the model "
            "does not learn to continue it; add it to the data (as reasoning_content if it opens thinking), change "
            "data.template_options, or set another model.chat_template"
        )
    if plan.turns.turn_only:
        yield (
            f"the generation prompt opens no turn, but trained turns follow {plan.turns.turn_only!r}; set model.chat_template to a "
            "template that writes it under add_generation_prompt"
        )


def foreign_template(config: Config, plan: Plan) -> Iterator[str]:
    """The model may belong to a different family than the chat template."""
    if plan.missing_tokens:
        tokens = ", ".join(plan.missing_tokens)
        yield (
            f"model.chat_template={config.model.chat_template} writes {tokens}, but the tokenizer of {config.model.path} has no "
            "such special tokens and splits them; use the template of the model's family, or add them in model.new_tokens.special"
        )


def no_checkpoints(config: Config, plan: Plan) -> Iterator[str]:
    """Some optimizers cannot resume, so no checkpoints are written."""
    if not config.train.resumes:
        yield (
            f"no checkpoints are written, because train.optimizer={config.train.optimizer} cannot resume: a run that is killed "
            "restarts from the beginning; use another optimizer if that matters"
        )


def no_effect(config: Config, plan: Plan) -> Iterator[str]:
    """Some settings have no effect given others."""
    yield from unused_settings(config.train)


WARNINGS: tuple[Callable[[Config, Plan], Iterator[str]], ...] = (
    few_steps,
    empty_steps,
    idle_workers,
    groups_across_nodes,
    padding,
    no_evaluation,
    small_evaluation,
    evaluated_on_training_data,
    trained_on,
    repeated_examples,
    emptied_sources,
    lost_records,
    beyond_positions,
    quoted_arguments,
    stray_marks,
    foreign_template,
    endless_turns,
    untrained_end_tokens,
    untrained_prompt_endings,
    long_warm_up,
    no_checkpoints,
    no_effect,
)
