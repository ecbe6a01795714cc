"""The preference losses. Pure functions: log-probs in, one loss per pair out.

A new loss is a function here and a row of `LOSSES`: then `train_policy.loss` may name it.

In every function `*_logps` are [pair], in nats, summed over the tokens of the response, end of
sequence included. Give them in float32 or wider: bfloat16 has no decimals left in a sum of hundreds
of nats. `gamma` is the scale of the loss logit. A preference loss is [pair], not reduced. It never
rises as the margin of the chosen over the rejected response grows.

TRL has other names. The DPO trainer's `sigmoid` is `sigmoid_norm` here, and its `hinge` is
`hinge_norm`. The CPO trainer's `hinge` is `hinge`. TRL's own `sigmoid_norm` is another loss, on
means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

# The names in `LOSSES` are checked before a run starts. So this module must load without torch.
if TYPE_CHECKING:
    from torch import Tensor


class Side(NamedTuple):
    """The chosen or the rejected responses of some pairs; every field is [pair].

    `policy` and `reference` are log-probs, nats, summed over tokens.
    """

    policy: Tensor
    reference: Tensor
    num_tokens: Tensor


def sigmoid_norm(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    gamma: float,
) -> Tensor:
    """-log sigmoid(gamma * normalised margin) [pair], the DPO loss (eq. 8).

    It is log 2 where the policy equals the reference.
    """
    margin = _normalised_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    from torch.nn import functional

    return -functional.logsigmoid(gamma * margin)


def hinge(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, gamma: float) -> Tensor:
    """max(0, 1 - gamma * margin) [pair], SLiC's loss without its regulariser (eq. 9).

    The loss is gamma times the first term of eq. 1 at delta = 1 / gamma. So a regulariser with
    weight lambda in eq. 1 has weight gamma * lambda beside this loss.
    """
    return (1 - gamma * (policy_chosen_logps - policy_rejected_logps)).relu()


def hinge_norm(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    gamma: float,
) -> Tensor:
    """max(0, 1 - gamma * normalised margin) [pair] (eq. 10).

    It is 1 where the policy equals the reference.
    """
    margin = _normalised_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    return (1 - gamma * margin).relu()


def rrhf(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_num_tokens: Tensor,
    rejected_num_tokens: Tensor,
) -> Tensor:
    """max(0, mean log-prob of rejected - mean log-prob of chosen) [pair], nats per token.

    This is the ranking loss of RRHF (Yuan et al. 2023, eq. 2). Each mean is over the tokens of one
    response. `*_num_tokens` [pair] are their numbers. The loss has no margin, no scale and no
    reference policy. RRHF's fine-tuning term is `regulariser`.
    """
    return (
        policy_rejected_logps / rejected_num_tokens - policy_chosen_logps / chosen_num_tokens
    ).relu()


def regulariser(policy_target_logps: Tensor, strength: float) -> Tensor:
    """-strength * log pi(target) [pair], the second term of eq. 1.

    `policy_target_logps` [pair] are the log-probs of the fine-tuning target of each pair's prompt.
    Beside a loss that is scaled by gamma, `strength` must be gamma * lambda.
    """
    return -strength * policy_target_logps


def soften(loss: Tensor, swapped_loss: Tensor, label_probability: Tensor) -> Tensor:
    """The expected loss [pair] if each label is right with `label_probability` [pair].

    `swapped_loss` [pair] is `loss` with the two responses exchanged. The same probability
    1 - epsilon for all pairs is label smoothing (conservative DPO). The ranker's probabilities are
    soft labels.
    """
    return label_probability * loss + (1 - label_probability) * swapped_loss


def _normalised_margin(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> Tensor:
    """log pi(y_w)/pi_sft(y_w) - log pi(y_l)/pi_sft(y_l) [pair], nats."""
    return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)


class Loss(NamedTuple):
    """A preference loss that `train_policy.loss` can name.

    `of_pairs(chosen, rejected, gamma)` is the loss [pair]. `gamma` is `train_policy.gamma`; without
    `has_gamma` the loss ignores it, and another value than the default is refused.
    """

    of_pairs: Callable[[Side, Side, float], Tensor]
    has_gamma: bool = True


LOSSES: Mapping[str, Loss] = {
    "sigmoid_norm": Loss(
        lambda chosen, rejected, gamma: sigmoid_norm(
            chosen.policy, rejected.policy, chosen.reference, rejected.reference, gamma
        )
    ),
    "hinge": Loss(lambda chosen, rejected, gamma: hinge(chosen.policy, rejected.policy, gamma)),
    "hinge_norm": Loss(
        lambda chosen, rejected, gamma: hinge_norm(
            chosen.policy, rejected.policy, chosen.reference, rejected.reference, gamma
        )
    ),
    "rrhf": Loss(
        lambda chosen, rejected, gamma: rrhf(
            chosen.policy, rejected.policy, chosen.num_tokens, rejected.num_tokens
        ),
        has_gamma=False,
    ),
}
# The loss on the new targets of `targets` (RAFT, ReST). It is not on pairs.
CROSS_ENTROPY = "cross_entropy"
