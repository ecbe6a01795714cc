"""Models as training takes them: loaded, frozen or adapted, without dropout, under autocast.

Weights in training are float32. Where `compute.dtype` is bfloat16, matrix products compute in it
by autocast, which on a CPU took 0.7 of the time of bfloat16 weights with float32 masters
(SmolLM2-135M, 8 × 130 tokens, one core), and the model is written in bfloat16.
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
    """`model` in float32 with its frozen parts, or with adapters that are all there is to train."""
    if settings.lora is not None:
        return add_adapters(model, settings, seed, where=where)
    freeze(model, settings, where=where)
    return model.float()


def weights_dtype(compute: Compute) -> torch.dtype:
    """The type of weights as loaded and written; `compute.dtype` is resolved, never auto."""
    assert compute.dtype != "auto", "resolve the config before training"
    return torch.bfloat16 if compute.dtype == "bfloat16" else torch.float32


def load(
    location: str, compute: Compute, lora: Lora | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model at `location` in the type of `compute` on the training device; its tokenizer.

    In 4 bits where `lora` says so.
    """
    # Bars of loading and saving would break into the bar of the training.
    logging.disable_progress_bar()
    tokenizer = load_tokenizer(location)
    model = load_model(
        location,
        dtype=weights_dtype(compute),
        # A process of several has its own GPU, which no library has chosen yet.
        device="cpu" if on_cpu(compute) else f"cuda:{os.environ.get('LOCAL_RANK', 0)}",
        attention=compute.attention,
        quantise=lora is not None and lora.quantise != "none",
    )
    return model, tokenizer


def freeze(model: PreTrainedModel, settings: Optimisation, *, where: str) -> None:
    """Take the frozen parts out of training, so that backward stops at the lowest trained layer.

    Raises:
        UserError: there are fewer layers than `freeze_layers`.
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
    """Switch dropout off and leave training mode on, which gradient checkpointing asks for."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def autocast(model: PreTrainedModel) -> None:
    """Let the decoder, the encoder where there is one, and the head compute in bfloat16.

    Not the whole step: the ranker projects on its two labels in float32 by the head's weights.
    """
    modules = [model.get_decoder(), model.get_output_embeddings()]
    if model.config.is_encoder_decoder:
        modules.append(model.get_encoder())
    for module in modules:
        module.forward = torch.autocast(model.device.type, torch.bfloat16)(module.forward)


def on_cpu(compute: Compute) -> bool:
    """Whether training runs on the CPU: by choice, or for want of a GPU."""
    return compute.device == "cpu" or not torch.cuda.is_available()


def _layers(model: PreTrainedModel) -> list[nn.ModuleList]:
    """Layers from the lowest: of the decoder, or of the encoder and of the decoder."""
    if model.config.is_encoder_decoder:
        return [model.get_encoder().block, model.get_decoder().block]
    return [model.get_decoder().layers]
