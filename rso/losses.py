"""The preference losses. Pure: log-probs in, one loss a pair out.

Everywhere `*_logps` are [pair], nats, summed over the response's tokens, end of sequence included,
and best given in float32 or wider: sums of hundreds of nats leave bfloat16 no decimals. `gamma` is
the scale of the loss logit. Losses are [pair], not reduced, and fall as the margin of the chosen
over the rejected response grows.
"""

import torch
from torch import Tensor
from torch.nn import functional


def sigmoid_norm(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    gamma: float,
) -> Tensor:
    """-log sigmoid(gamma * normalised margin) [pair], the DPO loss (eq. 8).

    log 2 where the policy equals the reference.
    """
    margin = _normalised_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    return -functional.logsigmoid(gamma * margin)


def hinge(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, gamma: float) -> Tensor:
    """max(0, 1 - gamma * margin) [pair], SLiC's loss without its regulariser (eq. 9).

    It is gamma times the first term of eq. 1 at delta = 1 / gamma, so a regulariser of weight
    lambda there has weight gamma * lambda beside this.
    """
    return torch.relu(1 - gamma * (policy_chosen_logps - policy_rejected_logps))


def hinge_norm(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    gamma: float,
) -> Tensor:
    """max(0, 1 - gamma * normalised margin) [pair] (eq. 10).

    1 where the policy equals the reference.
    """
    margin = _normalised_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    return torch.relu(1 - gamma * margin)


def _normalised_margin(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> Tensor:
    """log pi(y_w)/pi_sft(y_w) - log pi(y_l)/pi_sft(y_l) [pair], nats."""
    return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
