"""Demonstrations to the reference policy by supervised fine-tuning."""

from rso.models import resolve_model, save_model
from rso.progress import is_first_process
from rso.training.loading import load_for_training, weights_dtype
from rso.training.sft import Demonstration, train_sft
from stages.context import Context, Outcome


def run(context: Context) -> Outcome:
    """Fine-tune the base model on the training demonstrations.

    Each demonstration of a prompt is a separate example. With `train_sft.skip` the base model is
    written without training.
    """
    config = context.config
    location = str(resolve_model(config.model).location)
    if config.train_sft.skip:
        if is_first_process():
            model, tokenizer = load_for_training(location, config.compute)
            dtype = weights_dtype(config.compute)
            save_model(model, tokenizer, context.work.output("reference"), dtype=dtype)
        return Outcome({"steps": 0, "tokens": 0})
    result = train_sft(
        location,
        [
            Demonstration(row["prompt_id"], row["prompt"], row["target"])
            for row in context.table("demonstrations").to_pylist()
            if row["split"] == "train"
        ],
        config.train_sft,
        config.compute,
        config.templates,
        seed=config.seed,
        work_directory=context.work.scratch,
        output_directory=context.work.output("reference"),
    )
    counters = {"steps": result.num_steps, "tokens": result.num_tokens}
    return Outcome(counters, {"train_sft": result.curve})
