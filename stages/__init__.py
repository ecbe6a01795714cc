"""The DAG as data: what each stage reads, what it writes and which settings it sees.

Only this table says which stage feeds which. `rso plan`, the flow and the runner read it.
"""

from dataclasses import dataclass

from rso.config import Config, TrainPolicy
from rso.errors import UserError
from rso.labelling import labeller
from rso.losses import CROSS_ENTROPY, LOSSES

Feeds = dict[str, str]


@dataclass(frozen=True)
class Stage:
    """One stage of the DAG.

    `inputs` maps each input name that the stage uses to the `stage/output` that it reads.
    `sections` are the config sections that the stage sees. All others are hidden from it and cannot
    change its result. `settings` is the stage's own section. `externals` names what the stage reads
    from outside the store: `sources` (raw files), `model` (the base model), `init` (the model that
    training starts from, if not the reference), `proposal` (the model that `decode` draws from, if
    not the reference), or `objectives` (the rankers that this run did not train).
    """

    name: str
    module: str
    inputs: Feeds
    outputs: tuple[str, ...]
    sections: tuple[str, ...]
    settings: str
    externals: tuple[str, ...] = ()


MODELS = ("reference", "ranker", "policy")
DOCUMENTS = ("report",)


def stages(config: Config) -> tuple[Stage, ...]:
    """Return the stages of the run that `config` describes, each after the stages that it reads.

    - With human comparisons there is no `compare`.
    - With `train_policy.loss: cross_entropy` the policy learns from targets: there are no `reject`,
      `pair` and `logps`.
    - With `pair.source: direct` and any other loss there are no `decode`, `score` and `reject`.
    - `targets` is a stage unless `targets.method` is none.
    - With `train_gold_ranker: null` that stage is left out, and `evaluate` judges without it.

    Raises:
        UserError: the labeller or the loss is unknown; the loss has no gamma and one is set;
            targets or objectives are set but nothing is decoded; or the policy learns from targets
            but `targets.method` is none.
    """
    synthetic = config.comparisons.labeller is not None
    _check_loss(config.train_policy)
    if synthetic:
        labeller(str(config.comparisons.labeller))
    on_targets = config.train_policy.loss == CROSS_ENTROPY
    direct = config.pair.source == "direct" and not on_targets
    if on_targets and config.targets.method == "none":
        raise UserError(
            "train_policy.loss: cross_entropy learns from the new targets of RAFT or ReST, and "
            "targets.method is none; set targets.method to raft or rest, or choose another loss."
        )
    if direct and config.targets.method != "none":
        raise UserError(
            f"targets.method: {config.targets.method} needs candidates and rewards, and with "
            "pair.source: direct there are none; set targets.method to none, or pair.source to "
            "rso-sample-rank or sft-sample-rank."
        )
    if direct and config.score.objectives:
        raise UserError(
            "score.objectives names rankers, and with pair.source: direct nothing is scored and "
            "none would be used; remove score.objectives, or set pair.source to rso-sample-rank "
            "or sft-sample-rank."
        )
    comparisons = "compare/comparisons" if synthetic else "prepare/comparisons"
    models = ("seed", "compute", "templates")

    def ranker(name: str) -> Stage:
        inputs = {"comparisons": comparisons, "reference": "train_sft/reference"}
        return Stage(
            name,
            "train_ranker",
            inputs,
            ("ranker",),
            (*models, name),
            name,
            ("init",),
        )

    reference = {"reference": "train_sft/reference"}
    table = [
        Stage(
            "prepare",
            "prepare",
            {},
            ("prompts", "demonstrations", "comparisons", "quarantine"),
            ("seed", "model", "prepare"),
            "prepare",
            ("sources", "model"),
        ),
        Stage(
            "train_sft",
            "train_sft",
            {"demonstrations": "prepare/demonstrations"},
            ("reference",),
            (*models, "model", "train_sft"),
            "train_sft",
            ("model",),
        ),
    ]
    if synthetic:
        table.append(
            Stage(
                "compare",
                "compare",
                {"prompts": "prepare/prompts", **reference},
                ("comparisons",),
                (*models, "comparisons"),
                "comparisons",
            )
        )
    table.append(ranker("train_ranker"))
    gold_ranker = {}
    if config.train_gold_ranker is not None:
        table.append(ranker("train_gold_ranker"))
        gold_ranker = {"gold_ranker": "train_gold_ranker/ranker"}
    rankers = {"ranker": "train_ranker/ranker"}
    # Inputs of the stages that compare responses by the run's ranker, which may combine several.
    scored = rankers if direct else {**rankers, "objectives": "score/objectives"}
    ranking = () if direct else ("score",)
    objectives = () if direct else ("objectives",)
    candidates = {"candidates": "decode/candidates"}
    if direct:
        pair_inputs = {"comparisons": comparisons, "reference": "train_sft/reference"}
    else:
        table += [
            Stage(
                "decode",
                "decode",
                {"prompts": "prepare/prompts", **reference},
                ("candidates",),
                (*models, "decode"),
                "decode",
                ("proposal",),
            ),
            Stage(
                "score",
                "score",
                {
                    "prompts": "prepare/prompts",
                    "comparisons": comparisons,
                    **candidates,
                    **rankers,
                },
                ("rewards", "objectives", "checks"),
                (*models, "score"),
                "score",
                objectives,
            ),
        ]
        if not on_targets:
            table.append(
                Stage(
                    "reject",
                    "reject",
                    {**candidates, "rewards": "score/rewards"},
                    ("accepted", "diagnostics"),
                    ("seed", "reject"),
                    "reject",
                ),
            )
        if config.targets.method != "none":
            table.append(
                Stage(
                    "targets",
                    "targets",
                    {"prompts": "prepare/prompts", **candidates, "rewards": "score/rewards"},
                    ("demonstrations",),
                    ("templates", "targets"),
                    "targets",
                )
            )
        pair_inputs = {
            "prompts": "prepare/prompts",
            "accepted": "reject/accepted",
            **candidates,
            **scored,
        }
    learnt = {"demonstrations": "targets/demonstrations"}
    if not on_targets:
        table += [
            Stage(
                "pair",
                "pair",
                pair_inputs,
                ("pairs",),
                (*models, *ranking, "pair"),
                "pair",
                objectives,
            ),
            Stage(
                "logps",
                "logps",
                {"pairs": "pair/pairs", **reference},
                ("logps",),
                (*models, "logps"),
                "logps",
            ),
        ]
        learnt = {"pairs": "pair/pairs", "logps": "logps/logps"}
    table += [
        Stage(
            "train_policy",
            "train_policy",
            {**learnt, "prompts": "prepare/prompts", **reference, **scored},
            ("policy",),
            (*models, *ranking, "train_policy"),
            "train_policy",
            (*objectives, "init"),
        ),
        Stage(
            "evaluate",
            "evaluate",
            {
                "prompts": "prepare/prompts",
                "policy": "train_policy/policy",
                **reference,
                **scored,
                **gold_ranker,
            },
            ("generations", "judgements", "metrics"),
            (*models, *ranking, "comparisons", "evaluate"),
            "evaluate",
            objectives,
        ),
    ]
    everything = {
        f"{stage.name}/{output}": f"{stage.name}/{output}"
        for stage in table
        for output in stage.outputs
    }
    table.append(Stage("report", "report", everything, ("report",), ("report",), "report"))
    return tuple(table)


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
