"""Raw files to prompts, demonstrations, comparisons and quarantine."""

from dataclasses import dataclass
from functools import partial

from pipelines.prepare import PREPARE_OUTPUTS, prepare_shards
from rso.errors import UserError
from rso.models import load_tokenizer, resolve_model
from rso.sources import TokenCounter
from stages.context import Context, Outcome


def run(context: Context) -> Outcome:
    """Read, check and split the rows of all sources; a refused row is kept with its reason.

    Raises:
        UserError: the settings or a raw file are unusable, or all rows were refused.
    """
    settings = context.config.prepare
    counters = prepare_shards(
        settings,
        seed=context.config.seed,
        load_counter=partial(_load_counter, str(resolve_model(context.config.model).location)),
        outputs={name: context.work.output(name) for name in PREPARE_OUTPUTS},
        counters=f"{context.work.scratch}/counters",
        beam_settings=context.beam,
    )
    if not counters["rows_accepted"]:
        causes = {n: c for n, c in counters.items() if n.startswith("refused: ")}
        raise UserError(
            f"prepare: all {counters['rows_read']:.0f} rows of "
            f"{', '.join(source.path for source in settings.sources)} were refused, "
            f"{', '.join(f'{c:.0f} {n}' for n, c in causes.items())}; mend the files or the field "
            "names in prepare.sources."
        )
    return Outcome(counters)


@dataclass(frozen=True)
class _CountTokens:
    tokenizer: object

    def __call__(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[operator]


def _load_counter(location: str) -> TokenCounter:
    return _CountTokens(load_tokenizer(location))
