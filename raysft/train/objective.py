"""Training objectives: the loss of each token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from raysft.config import TrainSection

EAFT_TOP = 20
"""Number of most probable tokens over which EAFT computes the entropy."""
EAFT_SCALE = 3.0
"""About ln 20, the entropy of 20 equally probable tokens, so that the weight is between 0 and 1."""


@dataclass(frozen=True)
class Objective:
    """Loss of a token, with the settings of ``train``."""

    loss: str = "cross_entropy"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    eaft_alpha: float = 1.0
    asft_alpha: float = 0.1

    @property
    def has_reference(self) -> bool:
        """True if the loss needs the logits of a frozen model."""
        return self.loss == "asft"

    def __call__(
        self, logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the loss of each token.

        With p the softmax of the logits and t the target:

        - ``cross_entropy``: −log p[t]; with label smoothing ε: −(1 − ε) log p[t] − ε / V · Σ log p (Szegedy et al. 2016).
        - ``dft``: −sg(p[t]) log p[t], sg meaning stop-gradient (Wu et al. 2025, "On the generalization of SFT").
        - ``eaft``: −sg(H / 3)^α log p[t], H the entropy over the 20 most probable tokens (entropy-adaptive fine-tuning).
        - ``asft``: that of ``dft`` + α · KL(q ‖ p), q the softmax of the reference's logits (Zhu et al. 2025, "Anchored
          supervised fine-tuning"). The paper writes KL(p ‖ q); its authors' code and LLaMA-Factory compute KL(q ‖ p), as here.
        - ``z_loss`` ζ adds ζ · log²(Σ exp logits) (PaLM, Chowdhery et al. 2022).

        Args:
            logits: [tokens, vocabulary] float32.
            targets: [tokens], ``IGNORE_INDEX`` where the loss is 0.
            reference: [tokens, vocabulary] float32, logits of the frozen model.

        Returns:
            [tokens] float32.
        """
        if self.loss == "asft":
            assert reference is not None
            return self._anchored(logits, targets, reference)
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)
        if self.loss == "dft":
            losses = losses * torch.exp(-losses.detach())
        elif self.loss == "eaft":
            losses = losses * entropy_weight(logits.detach(), self.eaft_alpha)
        return losses + self._of_sum(logits, targets)

    def _anchored(self, logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        logs = F.log_softmax(logits, -1)
        losses = F.nll_loss(logs, targets, reduction="none")
        # From logarithms, so that equal logits have a divergence of exactly 0.
        divergence = F.kl_div(logs, F.log_softmax(reference, -1), reduction="none", log_target=True).sum(-1)
        losses = losses * torch.exp(-losses.detach()) + self.asft_alpha * divergence * (targets >= 0)
        return losses + self._of_sum(logits, targets)

    def _of_sum(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor | float:
        """The loss of the softmax's denominator."""
        return self.z_loss * torch.logsumexp(logits, -1).square() * (targets >= 0) if self.z_loss else 0.0


def entropy_weight(logits: torch.Tensor, alpha: float) -> torch.Tensor:
    """EAFT's weight of each token: (entropy of the softmax over its 20 highest logits / 3)^alpha; [tokens]."""
    top = torch.topk(logits, min(EAFT_TOP, logits.shape[-1]), dim=-1).values
    logs = torch.log_softmax(top, -1)
    return (-(logs.exp() * logs).sum(-1) / EAFT_SCALE).pow(alpha)


def objective_of(train: TrainSection) -> Objective:
    """Return the objective that the config asks for."""
    return Objective(train.loss, train.label_smoothing, train.z_loss, train.eaft_alpha, train.asft_alpha)


CROSS_ENTROPY = Objective()
"""The objective of evaluations, regardless of the training objective."""


def embedding_noise(lengths: torch.Tensor, size: int, alpha: float) -> torch.Tensor:
    """NEFTune's noise (Jain et al. 2024): uniform in ± alpha / √(L · d), L the length of the token's example.

    Args:
        lengths: [rows, tokens] length of the example that each token belongs to.
        size: d, the size of the embeddings.
        alpha: strength of the noise.

    Returns:
        [rows, tokens, d] float32.
    """
    noise = torch.empty(*lengths.shape, size, device=lengths.device).uniform_(-1, 1)
    return noise * (alpha / (lengths * size).sqrt())[..., None]
