"""What a person should know before they use the model: what the plan warned of, and what the course of the training shows."""

from __future__ import annotations

from raysft.report.logs import RunLog


def warnings(log: RunLog) -> list[str]:
    """One line for each, those of the plan first."""
    planned = log.plan.get("warnings")
    return [str(line) for line in planned] if isinstance(planned, list) else []
