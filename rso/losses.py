"""The preference losses. Pure: log-probs in, one loss a pair out.

Everywhere `*_logps` are [pair], nats, summed over the response's tokens, end of sequence included,
and best given in float32 or wider: sums of hundreds of nats leave bfloat16 no decimals. `gamma` is
the scale of the loss logit. Losses are [pair], not reduced, and fall as the margin of the chosen
over the rejected response grows.

Names differ elsewhere: TRL's DPO `sigmoid` is `sigmoid_norm`, its DPO `hinge` is `hinge_norm`, and
the `hinge` of its CPO trainer is `hinge`; TRL's own `sigmoid_norm` is another loss, on means.
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


def rrhf(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_num_tokens: Tensor,
    rejected_num_tokens: Tensor,
) -> Tensor:
    """max(0, mean log-prob of rejected - mean log-prob of chosen) [pair], nats a token.

    The ranking loss of RRHF (Yuan et al. 2023, eq. 2), which compares means over tokens
    (`*_num_tokens` [pair]) and has neither margin nor scale nor reference policy. Its fine-tuning
    term is `regulariser`.
    """
    return torch.relu(
        policy_rejected_logps / rejected_num_tokens - policy_chosen_logps / chosen_num_tokens
    )


def regulariser(policy_target_logps: Tensor, strength: float) -> Tensor:
    """-strength * log pi(target) [pair], the second term of eq. 1.

    `policy_target_logps` [pair] are of the fine-tuning target of each pair's prompt. Beside losses
    that are scaled by gamma the strength is gamma * lambda.
    """
    return -strength * policy_target_logps


def soften(loss: Tensor, swapped_loss: Tensor, label_probability: Tensor) -> Tensor:
    """The loss expected under a label that is right with `label_probability` [pair] only.

    `swapped_loss` is `loss` with the two responses exchanged. With probability 1 - epsilon for all
    it is label smoothing (conservative DPO); with the ranker's own probability, soft labels.
    """
    return label_probability * loss + (1 - label_probability) * swapped_loss


def _normalised_margin(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> Tensor:
    """log pi(y_w)/pi_sft(y_w) - log pi(y_l)/pi_sft(y_l) [pair], nats."""
    return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
