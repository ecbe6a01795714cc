"""The losses against their formulas, their gradients and their symmetries."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rso.losses import hinge, hinge_norm, regulariser, rrhf, sigmoid_norm, soften
from tests.oracles import trl_losses

LOGPS = st.floats(-500, 0)
GAMMAS = st.floats(0.01, 2)


def _tensors(*values: float) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value], dtype=torch.float64) for value in values)


@given(LOGPS, LOGPS, GAMMAS)
def test_losses_where_the_policy_is_the_reference_are_log_2_and_1(chosen, rejected, gamma) -> None:
    logps = _tensors(chosen, rejected, chosen, rejected)
    assert sigmoid_norm(*logps, gamma).item() == math.log(2)
    assert hinge_norm(*logps, gamma).item() == 1.0


@given(LOGPS, LOGPS, LOGPS, LOGPS, GAMMAS)
def test_losses_of_one_pair_are_the_formulas(chosen, rejected, ref_chosen, ref_rejected, gamma):
    logps = _tensors(chosen, rejected, ref_chosen, ref_rejected)
    logit = gamma * ((chosen - ref_chosen) - (rejected - ref_rejected))
    log1p_exp = max(0.0, -logit) + math.log1p(math.exp(-abs(logit)))
    assert sigmoid_norm(*logps, gamma).item() == pytest.approx(log1p_exp, abs=1e-12)
    assert hinge_norm(*logps, gamma).item() == pytest.approx(max(0.0, 1 - logit), abs=1e-12)
    expected = max(0.0, 1 - gamma * (chosen - rejected))
    assert hinge(*logps[:2], gamma).item() == pytest.approx(expected, abs=1e-12)


@given(LOGPS, LOGPS, LOGPS, LOGPS, GAMMAS)
def test_sigmoid_norm_of_a_swapped_pair_differs_by_the_logit(c, r, ref_c, ref_r, gamma) -> None:
    """-log σ(z) + log σ(-z) = -z: swapping negates the margin."""
    swapped = sigmoid_norm(*_tensors(r, c, ref_r, ref_c), gamma).item()
    logit = gamma * ((c - ref_c) - (r - ref_r))
    loss = sigmoid_norm(*_tensors(c, r, ref_c, ref_r), gamma).item()
    assert loss - swapped == pytest.approx(-logit, abs=1e-9)


@given(LOGPS, LOGPS, GAMMAS)
def test_hinge_is_gamma_times_the_margin_loss_of_slic(chosen, rejected, gamma) -> None:
    """Eq. 9 against eq. 1's first term at delta = 1 / gamma."""
    slic = max(0.0, 1 / gamma - chosen + rejected)
    loss = hinge(*_tensors(chosen, rejected), gamma).item()
    assert loss == pytest.approx(gamma * slic, abs=1e-9)


@given(LOGPS, LOGPS, GAMMAS)
def test_hinge_norm_under_an_indifferent_reference_is_hinge(chosen, rejected, gamma) -> None:
    logps = _tensors(chosen, rejected, -3.0, -3.0)
    assert hinge_norm(*logps, gamma).item() == pytest.approx(
        hinge(*logps[:2], gamma).item(), abs=1e-9
    )


def test_losses_of_a_batch_are_one_a_pair() -> None:
    chosen, rejected = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-3.0, -2.0, -1.0])
    reference = torch.tensor([-2.0, -2.0, -2.0])
    assert hinge(chosen, rejected, 0.25).tolist() == [0.5, 1.0, 1.5]
    assert hinge_norm(chosen, rejected, reference, reference, 0.25).tolist() == [0.5, 1.0, 1.5]
    losses = sigmoid_norm(chosen, rejected, reference, reference, 0.25)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-z)) for z in (0.5, 0, -0.5)])


def test_sigmoid_norm_at_the_reference_pulls_each_side_by_half_gamma() -> None:
    chosen, rejected = (torch.tensor([-5.0], requires_grad=True) for _ in range(2))
    sigmoid_norm(chosen, rejected, chosen.detach(), rejected.detach(), 0.05).sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.025)
    assert rejected.grad.item() == pytest.approx(0.025)


def test_hinges_beyond_their_margin_have_no_gradient() -> None:
    chosen = torch.tensor([-1.0], requires_grad=True)
    rejected, reference = torch.tensor([-9.0]), torch.tensor([-5.0])
    (
        hinge(chosen, rejected, 0.5) + hinge_norm(chosen, rejected, reference, reference, 0.5)
    ).backward()
    assert chosen.grad is not None and chosen.grad.item() == 0


def test_sigmoid_norm_of_extreme_margins_is_finite() -> None:
    far = torch.tensor([-1e5, 0.0])
    reference = torch.zeros(2)
    losses = sigmoid_norm(far, far.flip(0), reference, reference, 1.0)
    assert losses.tolist() == [1e5, 0.0]


@given(LOGPS, LOGPS, st.integers(1, 90), st.integers(1, 90))
def test_rrhf_compares_means_over_tokens(chosen, rejected, num_chosen, num_rejected) -> None:
    loss = rrhf(*_tensors(chosen, rejected, num_chosen, num_rejected)).item()
    expected = max(0.0, rejected / num_rejected - chosen / num_chosen)
    assert loss == pytest.approx(expected, abs=1e-12)


@given(LOGPS, LOGPS, LOGPS, GAMMAS, st.floats(0, 50))
def test_hinge_with_the_regulariser_is_gamma_times_slic(chosen, rejected, target, gamma, lam):
    """Eq. 1 whole, at delta = 1 / gamma: the regulariser's strength is gamma * lambda."""
    slic = max(0.0, 1 / gamma - chosen + rejected) - lam * target
    ours = hinge(*_tensors(chosen, rejected), gamma) + regulariser(*_tensors(target), gamma * lam)
    assert ours.item() == pytest.approx(gamma * slic, rel=1e-9, abs=1e-9)


@given(LOGPS, LOGPS, LOGPS, LOGPS, GAMMAS, st.floats(0, 1))
def test_softened_loss_is_least_where_the_model_agrees_with_the_label(c, r, ref_c, ref_r, gamma, p):
    """The binary cross-entropy of sigmoid(z) against p, whose gradient in z is sigmoid(z) - p."""
    sides = _tensors(c, r, ref_c, ref_r)
    sides[0].requires_grad_(True)
    loss = soften(
        sigmoid_norm(*sides, gamma),
        sigmoid_norm(*(sides[i] for i in (1, 0, 3, 2)), gamma),
        torch.tensor([p], dtype=torch.float64),
    )
    (gradient,) = torch.autograd.grad(loss.sum(), sides[0])
    z = gamma * ((c - ref_c) - (r - ref_r))
    believed = torch.tensor(z, dtype=torch.float64).sigmoid().item()
    assert gradient.item() == pytest.approx(gamma * (believed - p), abs=1e-9)


SMOOTHING = st.floats(0, 0.49)


@given(LOGPS, LOGPS, LOGPS, LOGPS, GAMMAS)
def test_losses_are_those_of_trl_under_their_names_there(c, r, ref_c, ref_r, gamma) -> None:
    sides = _tensors(c, r, ref_c, ref_r)
    assert torch.equal(sigmoid_norm(*sides, gamma), trl_losses.dpo("sigmoid", *sides, gamma))
    assert torch.equal(hinge_norm(*sides, gamma), trl_losses.dpo("hinge", *sides, gamma))
    assert torch.equal(hinge(*sides[:2], gamma), trl_losses.cpo("hinge", *sides[:2], gamma))


@given(LOGPS, LOGPS, GAMMAS, SMOOTHING)
def test_label_smoothing_is_that_of_trl(chosen, rejected, gamma, smoothing) -> None:
    chosen, rejected, nothing = _tensors(chosen, rejected, 0.0)
    ours = soften(
        sigmoid_norm(chosen, rejected, nothing, nothing, gamma),
        sigmoid_norm(rejected, chosen, nothing, nothing, gamma),
        torch.tensor([1 - smoothing], dtype=torch.float64),
    )
    theirs = trl_losses.cpo("sigmoid", chosen, rejected, gamma, smoothing)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)


@pytest.mark.parametrize(("loss_type", "smoothing"), [("sigmoid", 0.1), ("hinge", 0.0)])
def test_transcription_of_trl_is_trl(loss_type: str, smoothing: float) -> None:
    """Where TRL is installed (requirements/bench.txt); DPO's own is run by benchmarks/train.py."""
    cpo = pytest.importorskip("trl.experimental.cpo", reason="TRL is for benchmarks alone")
    chosen, rejected = torch.randn(2, 64, dtype=torch.float64) * 9
    settings = SimpleNamespace(
        alpha=0.0,
        beta=0.3,
        loss_type=loss_type,
        label_smoothing=smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )
    theirs, *_ = cpo.CPOTrainer.cpo_loss(settings, chosen, rejected)
    assert torch.equal(theirs, trl_losses.cpo(loss_type, chosen, rejected, 0.3, smoothing))
