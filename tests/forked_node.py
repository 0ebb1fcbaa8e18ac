"""``ray start`` of a node whose workers are forks of a server, and the file that this node starts in place of a worker.

A job may bring a working directory along. Then a worker is to change into it first, as a shell would do before it starts one.
"""

import json
import os
import shlex
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def start() -> None:
    """Be ``ray start``."""
    from ray.scripts.scripts import main

    from raysft.cluster.ray_internals import setup_worker

    with setup_worker(os.path.abspath(__file__)):
        main()


def work(arguments: list[str]) -> None:
    """Be a worker."""
    from raysft.cluster.forkserver import CONTEXT, main

    main([CONTEXT + _in_folder(one.removeprefix(CONTEXT)) if one.startswith(CONTEXT) else one for one in arguments])


def _in_folder(text: str) -> str:
    """Change into the folder that a worker's context names, and return the context without it."""
    context = json.loads(text or "{}")
    match context.get("command_prefix"):
        case ["cd", folder, "&&"]:
            os.chdir(*shlex.split(folder))
            context["command_prefix"] = []
    return json.dumps(context)


if __name__ == "__main__":
    start() if sys.argv[1] == "start" else work(sys.argv[1:])
