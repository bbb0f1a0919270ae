"""How close one mode's outputs are to those of a guide: a higher mode, the float parent, a float teacher.

All take (N, classes, ...) logits, treat the guide's as constants, and average over all but the classes.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def divergence(guide: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(guide / T) || softmax(student / T))."""
    wanted = functional.log_softmax(guide.detach() / temperature, dim=1)
    found = functional.log_softmax(student / temperature, dim=1)
    return functional.kl_div(found, wanted, reduction="none", log_target=True).sum(1).mean()


def soft_cross_entropy(guide: Tensor, student: Tensor) -> Tensor:
    """-sum softmax(guide) log softmax(student)."""
    wanted = functional.softmax(guide.detach(), dim=1)
    return -(wanted * functional.log_softmax(student, dim=1)).sum(1).mean()


def cosine_distance(guide: Tensor, student: Tensor) -> Tensor:
    """1 - cosine similarity of the probabilities."""
    wanted, found = functional.softmax(guide.detach(), dim=1), functional.softmax(student, dim=1)
    return (1.0 - functional.cosine_similarity(wanted, found, dim=1)).mean()
