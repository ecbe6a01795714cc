"""Prepare models for training: load, freeze, add adapters, switch dropout off, set autocast.

Trained weights are float32. If `compute.dtype` is bfloat16, autocast computes matrix products in
bfloat16, and the model is written in bfloat16. On a CPU autocast took 0.7 of the time of bfloat16
weights with float32 masters (SmolLM2-135M, 8 × 130 tokens, one core).
"""

import os

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from rso.config import Compute, Lora, Optimisation
from rso.errors import UserError
from rso.models import load_model, load_tokenizer
from rso.training.adapters import add_adapters


def trainable(
    model: PreTrainedModel, settings: Optimisation, seed: int, *, where: str
) -> PreTrainedModel:
    """`model` in float32 with some parts frozen, or with adapters, which alone are trained.

    With `lora.quantise` the quantised weights stay quantised. `where` names the stage in messages.

    Raises:
        UserError: the settings do not fit the model or one another.
    """
    if settings.lora is not None:
        return add_adapters(model, settings, seed, where=where)
    freeze(model, settings, where=where)
    return model.float()


def weights_dtype(compute: Compute) -> torch.dtype:
    """The dtype in which models are loaded and written; `compute.dtype` must not be auto."""
    assert compute.dtype != "auto", "resolve the config before training"
    return torch.bfloat16 if compute.dtype == "bfloat16" else torch.float32


def load_for_training(
    location: str, compute: Compute, lora: Lora | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model at `location` in evaluation mode on the training device, and its tokenizer.

    The model has `weights_dtype`, or 4-bit linear layers if `lora.quantise` is set.

    Raises:
        UserError: there is no such model or tokenizer, or this machine cannot load it.
    """
    # Progress bars of loading and saving would interrupt the progress bar of the training.
    logging.disable_progress_bar()
    tokenizer = load_tokenizer(location)
    model = load_model(
        location,
        dtype=weights_dtype(compute),
        # Each of several processes has its own GPU. No library has selected it yet.
        device="cpu" if on_cpu(compute) else f"cuda:{os.environ.get('LOCAL_RANK', 0)}",
        attention=compute.attention,
        quantise=lora is not None and lora.quantise != "none",
    )
    return model, tokenizer


def freeze(model: PreTrainedModel, settings: Optimisation, *, where: str) -> None:
    """Freeze the parts that `settings` name, so that backward stops at the lowest trained layer.

    Raises:
        UserError: the model has fewer layers than `freeze_layers`.
    """
    stacks = _layers(model)
    most = min(map(len, stacks))
    if settings.freeze_layers > most:
        raise UserError(
            f"{where}.freeze_layers is {settings.freeze_layers}, but the model has {most}"
            f" layers; give a number from 0 to {most}."
        )
    model.requires_grad_(True)
    if settings.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    for layers in stacks:
        for layer in layers[: settings.freeze_layers]:
            layer.requires_grad_(False)


def drop_nothing(model: nn.Module) -> None:
    """Set every dropout rate to 0.

    Training mode stays on, because gradient checkpointing needs it.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def autocast(model: PreTrainedModel) -> None:
    """Let the decoder, the encoder if there is one, and the head compute in bfloat16.

    Autocast does not cover the whole step, because the ranker computes the logits of its two labels
    from the head's weights in float32.
    """
    modules = [model.get_decoder(), model.get_output_embeddings()]
    if model.config.is_encoder_decoder:
        modules.append(model.get_encoder())
    for module in modules:
        module.forward = torch.autocast(model.device.type, torch.bfloat16)(module.forward)


def on_cpu(compute: Compute) -> bool:
    """Whether training runs on the CPU: `compute.device` is cpu, or there is no GPU."""
    return compute.device == "cpu" or not torch.cuda.is_available()


def _layers(model: PreTrainedModel) -> list[nn.ModuleList]:
    """The stacks of layers, lowest layer first: of the decoder, or of encoder and decoder."""
    if model.config.is_encoder_decoder:
        return [model.get_encoder().block, model.get_decoder().block]
    return [model.get_decoder().layers]
