"""What a person would otherwise find out only by looking at the result: one line for each, known before anything starts.

``check`` and ``run`` print the lines with the plan, and the report repeats them from ``plan.json``. A warning refuses nothing:
the run is possible, and perhaps not what is wanted. Each line is fact, value and remedy, and each function is one warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from raysft.config import Config
from raysft.data.rows.batch_size import MIN_AUTO_STEPS

if TYPE_CHECKING:
    from raysft.run.plan import Plan

FEW_STEPS = 20
"""Adam moves a weight by about the learning rate in a step: in fewer steps, at the default rate and with warm-up and decay, by less
than 0.001, which is a few hundredths of what a weight is."""
FEW_EXAMPLES, FEW_TOKENS = 10, 1000
"""An evaluation set that is smaller in both says little: one example more or less changes its figures by a tenth."""
MANY = 0.1
"""Share of a source that nobody loses on purpose."""


def warnings(config: Config, plan: Plan) -> Iterator[str]:
    """The lines for a run, most important first."""
    for warning in WARNINGS:
        yield from warning(config, plan)


def few_steps(config: Config, plan: Plan) -> Iterator[str]:
    """A training may be over before it has learnt anything."""
    if plan.steps < FEW_STEPS:
        steps = "1 step is" if plan.steps == 1 else f"{plan.steps} steps are"
        yield f"{steps} too few to learn anything; {_more_steps(config, plan)}"


def _more_steps(config: Config, plan: Plan) -> str:
    """What gives a training more steps: a hundred, where one remedy does it."""
    of_epoch, chosen = plan.rows_of_epochs[0], plan.global_batch_size_chosen
    # Cut short, a training ends before its last epoch, or behind a full step of that.
    unfinished = len(plan.rows_of_epochs) < plan.epochs or plan.rows_of_epochs[-1] % plan.global_batch_size == 0
    if plan.steps == config.train.max_steps and unfinished:
        return f"raise train.max_steps={plan.steps}"
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
    """Steps may have more room than an epoch has rows."""
    room = plan.steps * plan.global_batch_size
    if 2 * plan.empty_rows > room:
        yield (
            f"{plan.empty_rows / room:.0%} of the rows of all steps are empty, as "
            f"train.global_batch_size={plan.global_batch_size} and an epoch has {plan.rows_of_epochs[0]}; use "
            "train.global_batch_size=auto"
        )


def idle_workers(config: Config, plan: Plan) -> Iterator[str]:
    """A step may have fewer rows than there are workers."""
    idle = plan.workers - plan.global_batch_size
    if idle > 0:
        yield (
            f"{idle} of {plan.workers} workers have nothing to do, as a step has {plan.global_batch_size} "
            f"row{'' if plan.global_batch_size == 1 else 's'}; use scaling.num_workers={plan.global_batch_size}"
        )


def padding(config: Config, plan: Plan) -> Iterator[str]:
    """Rows may be much longer than what stands in them."""
    if plan.packing_efficiency >= 0.5:
        return
    enough = math.ceil(max(source.longest for source in plan.sources.values()) / 8) * 8
    if 2 * enough <= plan.sequence_length:
        remedy = f"data.sequence_length={max(enough, 8)} instead of {plan.sequence_length} holds the longest example"
    elif not config.data.packing and plan.rows * plan.packing_efficiency >= MIN_AUTO_STEPS:
        remedy = "data.packing=true puts several examples into a row"
    else:
        return
    yield f"{1 - plan.packing_efficiency:.0%} of the rows is padding; {remedy}"


def nothing_evaluated(config: Config, plan: Plan) -> Iterator[str]:
    """Without held-out examples nobody learns whether the model got better."""
    if plan.evaluation:
        return
    # A hash decides what is held out, and nothing may come of a few examples: with five expected, that is one case in a hundred.
    fewest = min(source.examples for source in plan.sources.values())
    shares = [share for share in (0.1, 0.2, 0.3) if share * fewest >= FEW_EXAMPLES / 2]
    share = next((share for share in shares if share * plan.examples >= FEW_EXAMPLES), max(shares, default=None))
    hold_out = f"hold some examples out with data.holdout={share:g}, or " if share else ""
    yield f"nothing is evaluated, so nothing will tell whether the model got better; {hold_out}name files in data.eval"


def little_evaluated(config: Config, plan: Plan) -> Iterator[str]:
    """An evaluation of a few examples is chance."""
    for name, source in plan.evaluation.items():
        if source.examples < FEW_EXAMPLES and source.loss_tokens < FEW_TOKENS:
            count = f"{source.examples} example{'' if source.examples == 1 else 's'}"
            held_out = config.data.holdout and name in plan.sources
            remedy = "raise data.holdout" if held_out else "add examples to it"
            yield f"evaluation set {name!r} has {count}, so its figures are mostly chance; {remedy}"


def evaluated_on_training_data(config: Config, plan: Plan) -> Iterator[str]:
    """An evaluation on what was trained on says how well a model remembers."""
    for name, (source, file) in plan.shared_files.items():
        yield (
            f"evaluation set {name!r} and training source {source!r} both read {file}: its figures say what the model remembers, "
            "not what it learnt; name other files, or use data.holdout"
        )


def lost_records(config: Config, plan: Plan) -> Iterator[str]:
    """Much of a source may not be learnt from as it is."""
    for name, source in {**plan.evaluation, **plan.sources}.items():
        lost = source.rejected + source.dropped
        if lost >= MANY * source.records:
            records = f"{lost:,} of {source.records:,} records"
            yield f"source {name!r}: {records} are rejected or dropped; rejected.jsonl of a run says why"
        cut = source.counts.get("truncated", 0)
        if cut >= MANY * max(1, source.examples):
            yield (
                f"source {name!r}: {cut:,} of {source.examples:,} examples are cut off at data.sequence_length="
                f"{plan.sequence_length}; raise it, or use data.on_overflow=split"
            )


def quoted_arguments(config: Config, plan: Plan) -> Iterator[str]:
    """Arguments that are JSON text already may be encoded once more, and the model learns to write them so."""
    for name, source in {**plan.evaluation, **plan.sources}.items():
        if count := source.counts.get("quoted_arguments", 0):
            yield (
                f"source {name!r}: {count:,} of {source.examples:,} examples give the arguments of calls as JSON text, which the "
                'chat template encodes once more ("{\\"city\\": …}"), and the model learns to write it so; give arguments as '
                "objects in the records"
            )


def long_warm_up(config: Config, plan: Plan) -> Iterator[str]:
    """The learning rate may hardly reach its height."""
    rising = math.ceil(config.train.warmup_ratio * plan.steps)
    if plan.steps >= FEW_STEPS and 2 * rising >= plan.steps:
        yield (
            f"the learning rate rises from 0 in {rising:,} of {plan.steps:,} steps; lower train.warmup_ratio="
            f"{config.train.warmup_ratio:g}"
        )


def turns_do_not_end(config: Config, plan: Plan) -> Iterator[str]:
    """Where no token ends the assistant's turns, generation runs to its limit."""
    turns = plan.turns
    remedy = "name a template in model.chat_template that writes a special token, such as eos_token, behind each answer"
    endless = turns.no_end + turns.text_ends
    if config.stage != "sft" or not turns.total:
        return
    if turns.truncated == turns.total:
        yield (
            f"every trained turn is cut off before its end, so the model cannot learn to stop; raise "
            f"data.sequence_length={plan.sequence_length}, or set data.on_overflow=drop"
        )
    elif turns.end_tokens and set(turns.end_tokens) == set(turns.inner_end_tokens):
        yield (
            f"{', '.join(turns.inner_end_tokens)} ends the assistant's turns and also stands inside them, so generation does not "
            "stop there; name the token to stop at in generate.stop_tokens"
        )
    elif turns.end_tokens and endless:
        yield f"no token of its own ends {endless:,} of {turns.total:,} trained turns; {remedy}"
    elif turns.text_ends > turns.no_end:
        yield (
            f"the assistant's turns end with ordinary text (its last token is {turns.end_text!r}) and not with a special token, "
            f"so generation does not know where to stop; {remedy}"
        )
    elif turns.no_end:
        yield f"no token ends the assistant's turns, so the model cannot learn to stop; {remedy}"


def prompts_open_what_was_not_trained(config: Config, plan: Plan) -> Iterator[str]:
    """Generation should begin where training begins."""
    if plan.turns.prompt_only:
        yield (
            f"the generation prompt ends with {plan.turns.prompt_only!r}, and no trained turn begins that way, so the model will "
            "be asked for what it has not learnt; put that into the data (reasoning_content, where it opens thinking), change "
            "data.template_options, or name another template in model.chat_template"
        )
    if plan.turns.turn_only:
        yield (
            f"the generation prompt opens no turn, and the trained ones follow {plan.turns.turn_only!r}; name a template in "
            "model.chat_template that writes it under add_generation_prompt"
        )


def no_checkpoints(config: Config, plan: Plan) -> Iterator[str]:
    """Whoever relies on the checkpoints that are written by default has to know."""
    if not config.train.resumes:
        yield (
            f"no checkpoints are written, because train.optimizer={config.train.optimizer} cannot go on from one: a run that "
            "dies begins anew; take another optimizer if that matters"
        )


WARNINGS: tuple[Callable[[Config, Plan], Iterator[str]], ...] = (
    few_steps,
    empty_steps,
    idle_workers,
    padding,
    nothing_evaluated,
    little_evaluated,
    evaluated_on_training_data,
    lost_records,
    quoted_arguments,
    turns_do_not_end,
    prompts_open_what_was_not_trained,
    long_warm_up,
    no_checkpoints,
)
