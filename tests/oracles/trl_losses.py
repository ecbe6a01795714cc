"""The losses of TRL 1.16.0, transcribed from its trainers as plain functions of log-probs.

`DPOTrainer._compute_loss` (trl/trainer/dpo_trainer.py) for loss types sigmoid and hinge,
`CPOTrainer.cpo_loss` (trl/experimental/cpo/cpo_trainer.py) for hinge and for sigmoid with
`label_smoothing`, whose logits have no reference policy.
"""

import torch.nn.functional as F
from torch import Tensor, relu


def dpo(
    loss_type: str,
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
) -> Tensor:
    """One loss a pair."""
    chosen_scores = chosen - ref_chosen
    rejected_scores = rejected - ref_rejected
    delta_score = chosen_scores - rejected_scores
    if loss_type == "sigmoid":
        return -F.logsigmoid(beta * delta_score)
    assert loss_type == "hinge"
    return relu(1 - beta * delta_score)


def cpo(
    loss_type: str, chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """One loss a pair."""
    logits = chosen - rejected
    if loss_type == "sigmoid":
        return (
            -F.logsigmoid(beta * logits) * (1 - label_smoothing)
            - F.logsigmoid(-beta * logits) * label_smoothing
        )
    assert loss_type == "hinge"
    return relu(1 - beta * logits)
