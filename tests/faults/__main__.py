"""A training that meets one fault after the other, against one that is left alone: ``python -m tests.faults``.

Trains a tiny model through the command line, in float32. The process is killed (SIGKILL) at moments of each kind, and the same
command is given again until it is done; workers are killed, checkpoints damaged, nodes of a cluster die, leave and come back, the
storage fails. At its end there is a table: what happened, whether the training came to its end, rows that were lost or trained
twice in what the log says, and the largest differences of a step's loss and of a trained weight.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from tests.faults import nodes, storage
from tests.faults.processes import flip_a_bit, kill_a_worker, killed, lose_a_part, moments
from tests.faults.runs import TITLE, Outcome, attempt, prepare

FAULTS = {
    "a worker is killed": kill_a_worker,
    "a bit of a checkpoint flips": flip_a_bit,
    "a checkpoint has lost a part": lose_a_part,
    "a node dies while data is prepared": nodes.dies_in_preparation,
    "a node dies in training": nodes.dies_in_training,
    "a node dies under workers that share rows": nodes.dies_under_groups,
    "a node dies while the workers evaluate": nodes.dies_in_evaluation,
    "a node leaves with notice": nodes.leaves_with_notice,
    "a node dies and another one comes": nodes.comes_back,
    "a node dies while predictions are generated": nodes.dies_in_generation,
    "a node dies under a trial of a sweep": nodes.dies_under_a_trial(again=False),
    "a node dies under a trial that fails": nodes.dies_under_a_trial(again=True),
    "S3 answers 500 for 15 seconds": storage.failing(500),
    "S3 answers 503 for 15 seconds": storage.failing(503),
    "S3 does not respond for 15 seconds": storage.failing(503, late=30.0),
    "S3 has all that a lost machine leaves": storage.loses_its_machine,
    "the disk is full": storage.is_full,
}
LONGER = (
    "a node leaves with notice",
    "a node dies and another one comes",
    "a node dies under a trial of a sweep",
    "a node dies under a trial that fails",
)
"""Those that need more steps to happen in."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="of the whole process, over all kinds (default 20)")
    parser.add_argument("--only", metavar="WORDS", default="", help="only faults whose names hold these words")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default 1)")
    parsed = parser.parse_args()
    draw, outcomes = random.Random(parsed.seed), list[Outcome]()
    kinds, faults = moments(draw), {fault: act for fault, act in FAULTS.items() if parsed.only in fault}
    each, more = divmod(parsed.kills, len(kinds))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, large=True)
        left_alone(folder, "left-alone")
        if any(fault in faults for fault in LONGER):
            left_alone(folder, "longer", *nodes.LONGER, "train.save_every_steps=200")
        print(TITLE, flush=True)
        for number, (kind, make) in enumerate(kinds.items()):
            times = each + (number < more)
            if times and parsed.only in kind:
                outcomes.append(killed(folder, "left-alone", kind, [make() for _ in range(times)]))
                print(outcomes[-1].line(), flush=True)
        for fault, act in faults.items():
            outcomes.append(act(folder, "left-alone", fault, draw))
            print(outcomes[-1].line(), flush=True)
    return 0 if all(outcome.good for outcome in outcomes) else 1


def left_alone(folder: Path, name: str, *settings: str) -> None:
    """The training that others are compared with."""
    if attempt(folder, name, None, *settings) != 0:
        raise RuntimeError(f"the training that is left alone failed: {(folder / f'{name}.log').read_text()[-1000:]}")


if __name__ == "__main__":
    sys.exit(main())
