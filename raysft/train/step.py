"""One optimizer step, and one pass over an evaluation set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from raysft.records import IGNORED, Evaluation, RunFailed

Batch = dict[str, np.ndarray]


def train_step(engine: Any, batch: Batch, trained_tokens: int) -> tuple[float, float]:
    """Train on one worker's rows of a step.

    Args:
        engine: the DeepSpeed engine.
        batch: this worker's rows, as ``data.stream`` makes them.
        trained_tokens: trained tokens of the whole step, over all workers.

    Returns:
        The step's loss over all workers, which is the sum over trained tokens divided by their number; and the norm of the
        whole gradient before clipping.
    """
    accumulation = engine.gradient_accumulation_steps()
    # DeepSpeed averages over microbatches and workers; the sum is wanted, over one known number of tokens.
    scale = accumulation * dist.get_world_size() / trained_tokens
    total = torch.zeros((), device=engine.device)
    norm = None
    for microbatch in microbatches(batch, engine.train_micro_batch_size_per_gpu(), engine.device):
        loss, _ = engine(**microbatch)
        engine.backward(loss * scale)
        if engine.is_gradient_accumulation_boundary() and not hasattr(engine.optimizer, "_global_grad_norm"):
            # A plain optimizer (ZeRO 0 in float32) does not keep the norm, and its gradients are whole on each worker.
            norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
        engine.step()
        total += loss.detach()
    dist.all_reduce(total)
    return float(total) / trained_tokens, float(norm if norm is not None else engine.get_global_grad_norm())


@torch.no_grad()
def evaluate(model: Any, name: str, step: int, batches: Iterable[Batch], rows: int, device: torch.device) -> Evaluation:
    """Loss and accuracy of an evaluation set, exact over all workers: sums are added up, then divided once.

    Args:
        model: ``TokenLoss``, or the engine around it.
        name: name of the set.
        step: optimizer steps done.
        batches: this worker's rows; every worker has the same number of them.
        rows: rows computed at once.
        device: where the model is.
    """
    training = model.training
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in batches:
        for microbatch in microbatches(batch, rows, device):
            loss, correct = model(**microbatch, score=True)
            # A label at the front of an example is never predicted, and the data stage has masked it.
            trained = (microbatch["labels"][:, 1:] != IGNORED).sum()
            totals += torch.stack([loss.double(), correct.double(), trained.double()])
    model.train(training)
    dist.all_reduce(totals)
    loss, correct, trained = totals.tolist()
    if not trained:
        raise RunFailed(f"evaluation set {name!r} has no trained token")
    return Evaluation(name=name, step=step, loss=loss / trained, accuracy=correct / trained, tokens=int(trained))


def microbatches(batch: Batch, rows: int, device: torch.device) -> Iterable[dict[str, torch.Tensor]]:
    """Cut rows into microbatches, without the padding that all rows of one have at their end."""
    for start in range(0, len(batch["row"]), rows):
        part = {name: values[start : start + rows] for name, values in batch.items()}
        width = max(8, -(-int(part["tokens"].max()) // 8) * 8)
        yield {
            name: torch.as_tensor(part[name][:, :width], dtype=torch.long).to(device, non_blocking=True)
            for name in ("input_ids", "position_ids", "labels")
        }
