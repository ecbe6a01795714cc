"""The DAG as data: what each stage reads, what it writes and which settings it sees.

This table is the one statement of what feeds what; `rso plan`, the flow and the runner read it.
"""

from dataclasses import dataclass

from rso.config import Config
from rso.errors import UserError

Feeds = dict[str, str]


@dataclass(frozen=True)
class Stage:
    """One stage.

    `inputs` maps the name a stage uses to the `stage/output` it is read from. `sections` are the
    config sections the stage sees; all others are hidden from it and cannot change it.
    `settings` is the section that is this stage's own. `externals` names what comes from outside
    the store: `sources` (raw files), `model` (the base model), `init` (what training starts from,
    when it is not the reference), `proposal` (what `decode` draws from, likewise), or `objectives`
    (the rankers that were not trained in this run).
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
    """Return the stages of the run that `config` describes, every stage after what it reads.

    With human comparisons `compare` is not there; with `pair.source: direct` nothing is decoded;
    `targets` is there when `targets.method` names one, and where the policy learns from them
    (`train_policy.loss: cross_entropy`) there are no pairs. `train_gold_ranker: null` leaves that
    stage out, and `evaluate` judges without it.

    Raises:
        UserError: targets or objectives are wanted where nothing is decoded, or the policy is to
            learn from targets and there are none.
    """
    synthetic = config.comparisons.labeller is not None
    on_targets = config.train_policy.loss == "cross_entropy"
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
    # What compares with the ranker that scored, which may be several.
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
