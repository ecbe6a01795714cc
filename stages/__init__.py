"""The DAG as data: what each stage reads, what it writes and which settings it sees.

Only `TABLE` says which stage feeds which. `rso plan`, the flow and the runner read it.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace

from rso.config import Config, TrainPolicy
from rso.errors import UserError
from rso.labelling import labeller
from rso.losses import CROSS_ENTROPY, LOSSES

Feeds = dict[str, str | tuple[str, ...]]

MODELS = ("reference", "ranker", "policy")
DOCUMENTS = ("report",)


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    `reads` maps each input name that the stage uses to the `stage/output` that it reads. `writes`
    are its outputs. `sees` are the config sections that the stage sees. All others are hidden from
    it and cannot change its result. `externals` names what the stage reads from outside the store:
    `sources` (raw files), `model` (the base model), `init` (the model that training starts from, if
    not the reference), `proposal` (the model that `decode` draws from, if not the reference), or
    `objectives` (the rankers that this run did not train). The code is `stages.<module>`.
    """

    name: str
    _: KW_ONLY
    reads: Mapping[str, str]
    writes: tuple[str, ...]
    sees: tuple[str, ...]
    externals: tuple[str, ...]
    module: str


@dataclass(frozen=True)
class StageRow:
    """A row of `TABLE`: a stage of the runs for which `when` is true.

    An input with several feeds reads the first one whose stage is in the run. An input is left out
    if none is. A section that has the name of a stage is not seen if that stage is not in the run.
    """

    name: str
    _: KW_ONLY
    reads: Feeds
    writes: tuple[str, ...]
    sees: tuple[str, ...]
    externals: tuple[str, ...] = ()
    module: str | None = None
    when: Callable[[Config], bool] = lambda config: True


def is_synthetic(config: Config) -> bool:
    """Return whether a synthetic labeller compares the responses. Otherwise people do."""
    return config.comparisons.labeller is not None


def learns_from_targets(config: Config) -> bool:
    """Return whether the policy learns from the new targets of RAFT or ReST, and not from pairs."""
    return config.train_policy.loss == CROSS_ENTROPY


def is_direct(config: Config) -> bool:
    """Return whether pairs are the comparisons themselves, so that nothing is decoded."""
    return config.pair.source == "direct" and not learns_from_targets(config)


def has_candidates(config: Config) -> bool:
    """Return whether candidates are decoded and scored."""
    return not is_direct(config)


def accepts_candidates(config: Config) -> bool:
    """Return whether candidates are sampled by rejection and paired."""
    return has_candidates(config) and not learns_from_targets(config)


FROM_PROMPTS: Feeds = {"prompts": "prepare/prompts"}
FROM_REFERENCE: Feeds = {"reference": "train_sft/reference"}
FROM_COMPARISONS: Feeds = {"comparisons": ("compare/comparisons", "prepare/comparisons")}
FROM_CANDIDATES: Feeds = {"candidates": "decode/candidates"}
FROM_REWARDS: Feeds = {"rewards": "score/rewards"}
# The ranker of the run: the trained one, or several that `score` has weighed.
FROM_RANKER: Feeds = {"ranker": "train_ranker/ranker", "objectives": "score/objectives"}
# Settings that every stage with a model sees.
COMPUTE = ("seed", "compute", "templates")

TABLE = (
    StageRow(
        "prepare",
        reads={},
        writes=("prompts", "demonstrations", "comparisons", "quarantine"),
        sees=("seed", "model", "prepare"),
        externals=("sources", "model"),
    ),
    StageRow(
        "train_sft",
        reads={"demonstrations": "prepare/demonstrations"},
        writes=("reference",),
        sees=(*COMPUTE, "model", "train_sft"),
        externals=("model",),
    ),
    StageRow(
        "compare",
        reads=FROM_PROMPTS | FROM_REFERENCE,
        writes=("comparisons",),
        sees=(*COMPUTE, "comparisons"),
        when=is_synthetic,
    ),
    StageRow(
        "train_ranker",
        reads=FROM_COMPARISONS | FROM_REFERENCE,
        writes=("ranker",),
        sees=(*COMPUTE, "train_ranker"),
        externals=("init",),
    ),
    StageRow(
        "train_gold_ranker",
        reads=FROM_COMPARISONS | FROM_REFERENCE,
        writes=("ranker",),
        sees=(*COMPUTE, "train_gold_ranker"),
        externals=("init",),
        module="train_ranker",
        when=lambda config: config.train_gold_ranker is not None,
    ),
    StageRow(
        "decode",
        reads=FROM_PROMPTS | FROM_REFERENCE,
        writes=("candidates",),
        sees=(*COMPUTE, "decode"),
        externals=("proposal",),
        when=has_candidates,
    ),
    StageRow(
        "score",
        reads=FROM_PROMPTS | FROM_COMPARISONS | FROM_CANDIDATES | {"ranker": "train_ranker/ranker"},
        writes=("rewards", "objectives", "checks"),
        sees=(*COMPUTE, "objectives", "score"),
        externals=("objectives",),
        when=has_candidates,
    ),
    StageRow(
        "reject",
        reads=FROM_CANDIDATES | FROM_REWARDS,
        writes=("accepted", "diagnostics"),
        sees=("seed", "reject"),
        when=accepts_candidates,
    ),
    StageRow(
        "targets",
        reads=FROM_PROMPTS | FROM_CANDIDATES | FROM_REWARDS,
        writes=("demonstrations",),
        sees=("templates", "targets"),
        when=lambda config: has_candidates(config) and config.targets.method != "none",
    ),
    StageRow(
        "pair",
        reads=FROM_PROMPTS | {"accepted": "reject/accepted"} | FROM_CANDIDATES | FROM_RANKER,
        writes=("pairs",),
        sees=(*COMPUTE, "objectives", "pair"),
        externals=("objectives",),
        when=accepts_candidates,
    ),
    StageRow(
        "pair",
        reads=FROM_COMPARISONS | FROM_REFERENCE,
        writes=("pairs",),
        sees=(*COMPUTE, "pair"),
        when=is_direct,
    ),
    StageRow(
        "logps",
        reads=FROM_REFERENCE | {"pairs": "pair/pairs"},
        writes=("logps",),
        sees=(*COMPUTE, "logps"),
        when=lambda config: not learns_from_targets(config),
    ),
    StageRow(
        "train_policy",
        reads=FROM_PROMPTS
        | FROM_REFERENCE
        | FROM_RANKER
        | {"pairs": "pair/pairs", "logps": "logps/logps"},
        writes=("policy",),
        sees=(*COMPUTE, "objectives", "train_policy"),
        externals=("objectives", "init"),
        when=lambda config: not learns_from_targets(config),
    ),
    StageRow(
        "train_policy",
        reads=FROM_PROMPTS
        | FROM_REFERENCE
        | FROM_RANKER
        | {"demonstrations": "targets/demonstrations"},
        writes=("policy",),
        sees=(*COMPUTE, "objectives", "train_policy"),
        externals=("objectives", "init"),
        when=learns_from_targets,
    ),
    StageRow(
        "evaluate",
        reads=FROM_PROMPTS
        | FROM_REFERENCE
        | FROM_RANKER
        | {"policy": "train_policy/policy", "gold_ranker": "train_gold_ranker/ranker"},
        writes=("generations", "judgements", "metrics"),
        sees=(*COMPUTE, "objectives", "comparisons", "evaluate"),
        externals=("objectives",),
    ),
    # It reads every output of the run.
    StageRow("report", reads={}, writes=("report",), sees=("report",)),
)


def stages(config: Config) -> tuple[Stage, ...]:
    """Return the stages of the run that `config` describes, each after the stages that it reads.

    Raises:
        UserError: see `check_recipe`.
    """
    check_recipe(config)
    rows = [row for row in TABLE if row.when(config)]
    present = {row.name for row in rows}
    absent = {row.name for row in TABLE} - present
    found = [
        Stage(
            row.name,
            reads=_feeds(row, present),
            writes=row.writes,
            sees=tuple(name for name in row.sees if name not in absent),
            externals=row.externals,
            module=row.module or row.name,
        )
        for row in rows
    ]
    *others, report = found
    outputs = [f"{stage.name}/{output}" for stage in others for output in stage.writes]
    return (*others, replace(report, reads={output: output for output in outputs}))


def check_recipe(config: Config) -> None:
    """Refuse settings that together make no run.

    Raises:
        UserError: the labeller or the loss is unknown; the loss has no gamma and one is set;
            targets or objectives are set but nothing is decoded; or the policy learns from targets
            but `targets.method` is none.
    """
    if config.comparisons.labeller is not None:
        labeller(config.comparisons.labeller)
    _check_loss(config.train_policy)
    if learns_from_targets(config) and config.targets.method == "none":
        raise UserError(
            "train_policy.loss: cross_entropy learns from the new targets of RAFT or ReST, and "
            "targets.method is none; set targets.method to raft or rest, or choose another loss."
        )
    if is_direct(config) and config.targets.method != "none":
        raise UserError(
            f"targets.method: {config.targets.method} needs candidates and rewards, and with "
            "pair.source: direct there are none; set targets.method to none, or pair.source to "
            "rso-sample-rank or sft-sample-rank."
        )
    if is_direct(config) and config.objectives.rankers:
        raise UserError(
            "objectives.rankers names rankers, and with pair.source: direct nothing is scored and "
            "none would be used; remove objectives.rankers, or set pair.source to rso-sample-rank "
            "or sft-sample-rank."
        )


def _feeds(row: StageRow, present: set[str]) -> dict[str, str]:
    """Return the feed of each input: the first one whose stage is present."""
    feeds = {}
    for name, given in row.reads.items():
        alternatives = (given,) if isinstance(given, str) else given
        there = [feed for feed in alternatives if feed.split("/")[0] in present]
        if there:
            feeds[name] = there[0]
    return feeds


def _check_loss(settings: TrainPolicy) -> None:
    known = sorted((*LOSSES, CROSS_ENTROPY))
    if settings.loss not in known:
        raise UserError(
            f"train_policy.loss: found {settings.loss!r}, expected one of {', '.join(known)}."
        )
    has_gamma = settings.loss in LOSSES and LOSSES[settings.loss].has_gamma
    if not has_gamma and settings.gamma != TrainPolicy.model_fields["gamma"].default:
        raise UserError(
            f"train_policy.gamma: found {settings.gamma}, and the loss {settings.loss} has no "
            "gamma; remove it, or choose another loss."
        )
