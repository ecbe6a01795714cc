"""Every setting of the system: read from one YAML file, frozen, with unknown keys refused.

A setting marked `RUNTIME` cannot change a result (paths, memory budgets, workers, logging) and is
not in fingerprints. Every other setting is part of the identity of the stages that see it.
"""

import difflib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from rso.errors import UserError

IDENTITY = "identity"
RUNTIME: dict[str, Any] = {IDENTITY: False}

CPUINFO = Path("/proc/cpuinfo")
DEVICES = Path("/dev")

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Split = Literal["train", "validation", "test"]


class Section(BaseModel):
    """A group of settings: immutable, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)


REFERENCE = "reference"


class Source(Section):
    """One raw file. Field names on the right are those of the file."""

    path: str = Field(json_schema_extra=RUNTIME, description="JSONL, CSV or Parquet file.")
    name: str = Field(description="Name of the source, kept in every row.")
    kind: Literal["demonstrations", "comparisons", "prompts"] = Field(
        description="What a row is: prompt and target, prompt and chosen and rejected, or prompt."
    )
    format: Literal["auto", "jsonl", "csv", "parquet"] = Field(
        "auto", description="File format; auto: by the suffix of the path."
    )
    fields: dict[str, str] = Field(
        default_factory=dict,
        description="Our field name to the file's, e.g. {prompt: body, target: summary}.",
    )
    split: Split | None = Field(
        None, description="Put all rows there; null splits by `prepare.split`."
    )
    group: str | None = Field(
        None,
        description="Field whose rows stay on one side of the split, e.g. a module name.",
    )


class SplitShares(Section):
    """Shares of the groups that go to validation and test; the rest is for training."""

    validation: Share = Field(0.1, description="Share of groups for validation.")
    test: Share = Field(0.1, description="Share of groups for test.")


class Prepare(Section):
    """Raw files to prompts, demonstrations and comparisons."""

    task: str = Field("summaries", description="Task name; part of every prompt_id.")
    sources: tuple[Source, ...] = Field(description="Raw files, in order.")
    split: SplitShares = Field(default_factory=SplitShares, description="Split shares.")
    max_prompt_tokens: Count = Field(
        1024,
        description="Prompts with more tokens of the base model's tokenizer are refused.",
    )
    prompts_per_shard: Count = Field(
        1000, description="Fixes the number of shards of every later artifact."
    )


class Templates(Section):
    """Prompt and ranker texts."""

    prompt: str = Field(
        "chat",
        description="`chat` for the model's chat template, or text with {prompt} in it.",
    )
    instruction: str = Field(
        "{prompt}",
        description="User message of the chat template; {prompt} is the prompt.",
    )
    response_prefix: str = Field(
        "",
        description="Put before every response, e.g. a space after a plain text template.",
    )
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (),
        description="Texts that end a decoded response, e.g. the next turn of a dialogue; not part "
        "of its text, but of its tokens, as an end-of-sequence token is.",
    )
    ranker_context: str = Field("[CONTEXT] {prompt}", description="Ranker text before responses.")
    ranker_a: str = Field(" [RESPONSE A] {response}", description="Text of the response in slot A.")
    ranker_b: str = Field(" [RESPONSE B] {response}", description="Text of the response in slot B.")
    ranker_suffix: str = Field(" [BETTER]", description="Text before the label token.")
    label_a: str = Field(" A", description="Label that says A is better; one token.")
    label_b: str = Field(" B", description="Label that says B is better; one token.")
    max_context_tokens: Count = Field(
        1024,
        description="Longer ranker contexts are cut at their right end to this many tokens, and "
        "counted.",
    )


class Compute(Section):
    """How models are held in memory."""

    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="Weights at inference; auto: bfloat16 where the machine computes in it.",
    )
    attention: Literal["branches", "sdpa", "eager"] = Field(
        "branches",
        description="branches: kernels that skip what shared-prefix rows mask; sdpa and eager: one "
        "dense mask, quadratic in the tokens of a batch.",
    )
    ranker_engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="What rankers compare with; vllm takes decoder-only ones.",
    )
    num_processes: Count = Field(
        1,
        json_schema_extra=RUNTIME,
        description="Processes of a training stage on this machine, by `accelerate launch`.",
    )
    accelerate_config: str | None = Field(
        None,
        json_schema_extra=RUNTIME,
        description="File written by `accelerate config`, e.g. for FSDP or several machines.",
    )
    device: str = Field(
        "auto",
        json_schema_extra=RUNTIME,
        description="cpu, cuda, or auto for cuda where present.",
    )
    token_budget: Count = Field(
        4096, json_schema_extra=RUNTIME, description="Tokens per forward pass."
    )
    endpoints: tuple[Annotated[str, Field(pattern=r"^https?://[^@\s]+$")], ...] = Field(
        (),
        json_schema_extra=RUNTIME,
        description="Base URLs of the servers of engine vllm-server, e.g. "
        "http://127.0.0.1:8000/v1; a key for them is in $RSO_SERVER_API_KEY.",
    )
    server_concurrency: Count = Field(
        16,
        json_schema_extra=RUNTIME,
        description="Requests in flight per endpoint. All samples of a prompt are one request.",
    )
    server_patience: float = Field(
        300.0,
        gt=0,
        json_schema_extra=RUNTIME,
        description="The stage stops if no endpoint answers for this many seconds.",
    )
    server_timeout: float = Field(
        3600.0, gt=0, json_schema_extra=RUNTIME, description="Seconds that one answer may take."
    )


class Lora(Section):
    """Low-rank adapters on the linear layers (Hu et al. 2021), by PEFT."""

    rank: Count = Field(16, description="Rank of the update.")
    alpha: float = Field(32.0, gt=0, description="The update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the update.")
    modules: tuple[str, ...] = Field(
        (), description="Names of adapted layers, e.g. q_proj; empty for all linear ones."
    )
    quantise: Literal["none", "nf4"] = Field(
        "none",
        description="nf4: frozen weights in 4 bits while training (QLoRA, by bitsandbytes).",
    )


class Optimisation(Section):
    """Settings that every trainer shares."""

    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate.")
    optimizer: Literal["adamw", "adafactor"] = Field("adafactor", description="Optimiser.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Decay.")
    warmup: Share = Field(0.0, description="Share of the steps that warm up.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient norm is clipped to this.")
    batch_size: Count = Field(32, description="Examples, comparisons or pairs per optimiser step.")
    epochs: float = Field(1.0, gt=0, description="Passes over the data.")
    freeze_embeddings: bool = Field(False, description="Keep the token embeddings as they are.")
    freeze_layers: int = Field(
        0,
        ge=0,
        description="Freeze this many of the lowest layers. An encoder-decoder model freezes them "
        "in the encoder and in the decoder.",
    )
    max_steps: Count | None = Field(
        None, description="Stop after this many optimiser steps; null runs all epochs."
    )
    lora: Lora | None = Field(
        None, description="Train low-rank adapters (PEFT), merged into what is written; null: all."
    )
    token_budget: Count = Field(
        2048, json_schema_extra=RUNTIME, description="Tokens per micro-batch."
    )
    gradient_checkpointing: bool = Field(
        False,
        json_schema_extra=RUNTIME,
        description="Compute activations again in the backward pass: less memory, more time.",
    )
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (),
        json_schema_extra=RUNTIME,
        description="Where the curve is logged besides the manifest and the report; tensorboard "
        "writes to $TENSORBOARD_LOGGING_DIR, by default logs/.",
    )
    checkpoint_steps: Count = Field(
        50,
        json_schema_extra=RUNTIME,
        description="Optimiser steps between resume checkpoints.",
    )


class TrainSft(Optimisation):
    """Supervised fine-tuning of the reference policy on demonstrations."""

    max_examples: Count | None = Field(None, description="Use at most this many; null: all.")
    skip: bool = Field(
        False, description="True where `model` is the SFT policy already: it becomes `reference`."
    )


class DecodeSampling(Section):
    """How responses are drawn."""

    temperature: float = Field(0.7, ge=0, description="0 is greedy.")
    top_k: int = Field(40, ge=0, description="Keep the k most likely tokens; 0 keeps all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus; 1 keeps all.")
    max_new_tokens: Count = Field(128, description="Longest response, end of sequence included.")


EngineName = Literal["auto", "transformers", "vllm", "vllm-server"]


class Comparisons(Section):
    """Where comparisons come from: people (labeller null) or a stated function of the text."""

    labeller: str | None = Field(
        None,
        description="Name of a synthetic labeller (rso.labelling); null where sources hold human "
        "comparisons.",
    )
    num_prompts: Count = Field(1000, description="Training prompts to decode pairs for.")
    num_validation_prompts: Count = Field(
        200, description="Validation prompts to decode pairs for."
    )
    num_samples: int = Field(4, ge=2, description="Responses decoded per prompt.")
    pairs_per_prompt: Count = Field(1, description="Most pairs of different responses per prompt.")
    sampling: DecodeSampling = Field(
        default_factory=DecodeSampling, description="How decodes are drawn."
    )
    engine: EngineName = Field("transformers", description="Decoding engine.")


class TrainRanker(Optimisation):
    """Training of a pairwise ranker."""

    init_from: str = Field(
        REFERENCE,
        json_schema_extra=RUNTIME,
        description="`reference` for the SFT policy, or a model source. Its content, not its name, "
        "is part of the identity.",
    )
    folds: tuple[int, ...] = Field((0,), description="Prompt folds whose comparisons are used.")
    num_folds: Count = Field(2, description="Folds that the prompts are hashed into.")
    max_comparisons: Count | None = Field(None, description="Use at most this many; null: all.")
    num_evaluations: Count = Field(
        1,
        description="Checkpoints compared on held-out comparisons; 1 keeps the last.",
    )
    patience: Count | None = Field(
        None,
        description="Stop after this many evaluations without a better one; null: never stop "
        "early.",
    )
    orders: Literal["margin", "mean", "flip"] = Field(
        "margin",
        description="What a comparison adds to the loss. margin: the loss of the margin averaged "
        "over both orders, which does not see the positional bias. mean: the mean of the losses of "
        "both orders. flip: the loss of one keyed random order.",
    )
    bias_penalty: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Adds this times ((z_AB + z_BA) / 2)² to the loss of a comparison, nats. Not "
        "for orders: flip. null: 0.02 for orders: margin, else 0.",
    )

    @field_validator("orders", mode="before")
    @classmethod
    def _both_is_two_losses(cls, orders: Any) -> Any:
        if orders == "both":
            raise ValueError(
                "found both, expected margin, mean or flip: margin is the loss of the margin "
                "averaged over both orders, mean is the mean of the losses of both orders"
            )
        return orders

    @model_validator(mode="after")
    def _penalty_has_both_orders(self) -> "TrainRanker":
        if self.bias_penalty and self.orders == "flip":
            raise ValueError(
                f"bias_penalty is {self.bias_penalty} and orders is flip; the positional bias of "
                "a comparison is known from both orders only: set orders to mean or margin, or "
                "bias_penalty to 0"
            )
        return self

    @model_validator(mode="after")
    def _patience_has_evaluations(self) -> "TrainRanker":
        if self.patience is not None and self.patience >= self.num_evaluations:
            raise ValueError(
                f"patience is {self.patience} and num_evaluations {self.num_evaluations}, so it "
                "could never stop; raise num_evaluations"
            )
        return self


class TrainGoldRanker(TrainRanker):
    """Training of the gold ranker, on prompts that the ranker has not seen; null: there is none."""

    folds: tuple[int, ...] = Field((1,), description="Prompt folds whose comparisons are used.")


class Decode(Section):
    """Candidates for statistical rejection sampling."""

    policy: str = Field(
        REFERENCE,
        json_schema_extra=RUNTIME,
        description="`reference`, or a model source to decode from: a later round's proposal. Its "
        "content, not its name, is part of the identity.",
    )
    engine: EngineName = Field("auto", description="auto: vllm where it is installed.")
    num_samples: Count = Field(64, description="Candidates per prompt.")
    num_prompts: Count | None = Field(None, description="Training prompts used; null: all.")
    sampling: DecodeSampling = Field(
        default_factory=DecodeSampling, description="How candidates are drawn."
    )


TRAINED = "trained"


class Objective(Section):
    """One of the rankers whose rewards are combined."""

    name: str = Field(
        pattern=r"^[a-z][a-z0-9_]*$",
        description="Key of its rewards in `rewards.objectives`; lower case letters, digits, _.",
    )
    ranker: str = Field(
        TRAINED,
        json_schema_extra=RUNTIME,
        description="`trained` for the ranker of `train_ranker`, or a model source, e.g. the "
        "ranker folder of another run. Its content, not its name, is part of the identity.",
    )
    weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="Share in the mean; divided by the sum of all."
    )


class Objectives(Section):
    """The rankers whose weighted mean is the ranker of the run (appendix A.9)."""

    rankers: tuple[Objective, ...] = Field(
        (), description="The rankers that are combined; empty for the trained one alone."
    )
    standardise: bool = Field(
        False,
        description="Divide each objective by the spread of its rewards within prompts first; "
        "`reject.beta` is then in such units.",
    )

    @model_validator(mode="after")
    def _rankers_are_distinct(self) -> "Objectives":
        names = [objective.name for objective in self.rankers]
        trained = [o.name for o in self.rankers if o.ranker == TRAINED]
        if len(set(names)) < len(names):
            raise ValueError(
                f"rankers: names are {', '.join(names)}; expected each once: rename one"
            )
        if len(trained) > 1:
            raise ValueError(
                f"rankers: {' and '.join(trained)} are all the ranker of train_ranker; expected "
                "one at most: give the others a ranker, the path of a model"
            )
        return self


RewardOrders = Literal["both", "baseline-first"]


class Score(Section):
    """Rewards of candidates against a baseline."""

    orders: RewardOrders = Field(
        "both",
        description="both: a reward is the mean of both orders, so the positional bias cancels. "
        "baseline-first: only with the baseline in slot A, fewer than half the tokens.",
    )


class Reject(Section):
    """Statistical rejection sampling (algorithm 1)."""

    beta: float = Field(
        0.5,
        ge=0,
        description="Sampling temperature in `beta_unit`; 0 best-of-N, .inf uniform.",
    )
    betas: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (),
        description="Other β to try and report on: acceptance, gain in reward, KL. The artifact "
        "is sampled at `beta`.",
    )
    beta_unit: Literal["nats", "spread"] = Field(
        "nats",
        description="Unit of `beta` and `betas`. spread: the median over prompts of the standard "
        "deviation of the rewards within a prompt.",
    )
    num_samples: Count = Field(8, description="Candidates to accept per prompt.")
    duplicates: Literal["keep", "collapse"] = Field(
        "keep",
        description="keep: proposal mass of repeated texts counts; collapse: the listing.",
    )


class Pair(Section):
    """Preference pairs and their labels."""

    source: Literal["rso-sample-rank", "sft-sample-rank", "direct"] = Field(
        "rso-sample-rank", description="Where the two responses of a pair come from."
    )
    ranking: Literal["first-round", "tournament", "best-vs-worst", "best-vs-random"] = Field(
        "first-round",
        description="first-round: k/2 random pairs. tournament: winners are paired again until "
        "one is left, k-1 pairs. best-vs-worst, best-vs-random: one pair, the highest reward "
        "against the lowest, or against a random other one. Not for direct.",
    )
    num_samples: Count = Field(8, description="For sft-sample-rank: random candidates per prompt.")
    min_margin: float = Field(
        0.0,
        ge=0,
        description="Drop pairs whose |logit|, averaged over both orders, is below this, nats. A "
        "logit of exactly 0 is always dropped. Not for direct, which has no logits.",
    )
    max_response_tokens: Count | None = Field(
        None,
        description="For direct only: cut responses to this many tokens, end of sequence included. "
        "A response that is cut loses its end of sequence. null cuts none.",
    )


class Targets(Section):
    """New fine-tuning targets from rewards (RAFT, ReST)."""

    method: Literal["none", "raft", "rest"] = Field(
        "none",
        description="raft: the best candidate per prompt; rest: all candidates above the "
        "threshold; none: the stage is not in the run.",
    )
    threshold: float = Field(
        0.7, ge=0, lt=1, description="For rest: rewards normalised to [0, 1] must exceed this."
    )
    normalise: Literal["prompt", "dataset"] = Field(
        "prompt",
        description="For rest: the lowest and the highest reward per prompt, or of all prompts, "
        "become 0 and 1. The paper leaves it open.",
    )


class Logps(Section):
    """Reference log-probabilities."""


class Choice(Section):
    """How the checkpoint of the policy is chosen."""

    against: Literal["target", "reference"] = Field(
        "target",
        description="What a checkpoint's answers are compared with. target: the human target. "
        "reference: the greedy answer of the SFT policy; it needs no target.",
    )


class TrainPolicy(Optimisation):
    """Preference optimisation of the policy."""

    init_from: str = Field(
        REFERENCE,
        json_schema_extra=RUNTIME,
        description="`reference`, or a model source to go on from, e.g. the policy folder of an "
        "earlier round. The reference policy of the losses stays `reference`. Its content, not its "
        "name, is part of the identity.",
    )
    loss: str = Field(
        "sigmoid_norm",
        description="A name in `LOSSES` of `rso.losses`: sigmoid_norm (eq. 8), hinge (eq. 9), "
        "hinge_norm (eq. 10), rrhf (RRHF's ranking loss); or cross_entropy, on the new targets of "
        "`targets` (RAFT, ReST).",
    )
    gamma: float = Field(
        0.05,
        gt=0,
        description="Scale of the loss logit. Not for rrhf and cross_entropy, which have none.",
    )
    regularisation: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="lambda of eq. 1: each pair adds -lambda log-prob of its prompt's target, "
        "scaled by gamma with the rest.",
    )
    soft_labels: bool = Field(
        False, description="Weigh both orders of a pair by the ranker's `label_probability`."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of labels taken to be wrong (conservative DPO)."
    )
    num_evaluations: Count = Field(1, description="Checkpoints compared, evenly spaced.")
    selection: Choice = Field(default_factory=Choice, description="Choice of the checkpoint.")
    num_validation_prompts: Count = Field(
        64, description="Prompts on which checkpoints are compared."
    )
    max_new_tokens: Count = Field(128, description="Longest validation answer.")
    step_zero_tolerance: float = Field(
        0.05,
        gt=0,
        description="Largest difference allowed between policy and reference before training, "
        "nats per token.",
    )

    @model_validator(mode="after")
    def _cross_entropy_has_no_pairs(self) -> "TrainPolicy":
        given = {
            "regularisation": self.regularisation,
            "soft_labels": self.soft_labels,
            "label_smoothing": self.label_smoothing,
        }
        named = [name for name, value in given.items() if value]
        if self.loss == "cross_entropy" and named:
            raise ValueError(
                f"{named[0]} is for losses on pairs, and loss is cross_entropy; remove it, or "
                "choose a loss on pairs"
            )
        return self


class AnswerSampling(Section):
    """How sampled answers are drawn; the longest one is `evaluate.max_new_tokens`."""

    temperature: float = Field(0.7, gt=0, description="Divides the logits.")
    top_k: int = Field(40, ge=0, description="Keep the k most likely tokens; 0 keeps all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus; 1 keeps all.")


class Evaluate(Section):
    """Win rates on held-out prompts."""

    split: Split = Field("test", description="Prompts to judge.")
    num_prompts: Count | None = Field(None, description="At most this many; null: all.")
    engine: EngineName = Field("transformers", description="Decoding engine.")
    max_new_tokens: Count = Field(128, description="Longest answer.")
    sampling: AnswerSampling | None = Field(
        default_factory=AnswerSampling,
        description="Judge one sampled answer of each system too, beside the greedy one, to every "
        "prompt; null judges greedy answers alone.",
    )
    num_kl_prompts: int = Field(
        64, ge=0, description="Prompts with one untruncated sample of the policy, for the KL."
    )


class Report(Section):
    """The report one reads."""

    title: str = Field("RSO report", description="Heading.")
    num_examples: int = Field(10, ge=0, description="Side-by-side examples.")


class Beam(Section):
    """The Beam runner of the data-parallel stages."""

    runner: str = Field("FnApiRunner", description="FnApiRunner in memory, or any Beam runner.")
    num_workers: Count = Field(
        1,
        description="Worker processes of FnApiRunner, one engine each; on a machine with GPUs, one "
        "GPU each. 1 works in the stage's own process.",
    )
    options: dict[str, str | int | float | bool] = Field(
        default_factory=dict, description="Pipeline options of the runner."
    )

    @model_validator(mode="after")
    def _worker_processes_are_counted_once(self) -> "Beam":
        if self.num_workers > 1 and self.runner != "FnApiRunner":
            raise ValueError(
                f"num_workers is for FnApiRunner, and runner is {self.runner}; remove it, and say "
                "in options what that runner calls it"
            )
        has_workers = self.num_workers > 1 and "direct_num_workers" in self.options
        if has_workers or self.options.get("direct_running_mode") == "multi_processing":
            raise ValueError(
                "options: direct_running_mode multi_processing is num_workers here; remove it and "
                "direct_num_workers, and set num_workers"
            )
        return self


class Config(Section):
    """The whole of a run."""

    store: str = Field(
        "runs/store", json_schema_extra=RUNTIME, description="Local path or fsspec URL."
    )
    seed: int = Field(0, ge=0, description="Seed of every keyed generator.")
    model: str = Field(
        json_schema_extra=RUNTIME,
        description="Base model: a path (of LoRA adapters too), org/name@revision, or "
        "package:module/file.gguf. Its content, not its name, is part of the identity.",
    )
    compute: Compute = Field(default_factory=Compute, description="Models in memory.")
    templates: Templates = Field(default_factory=Templates, description="Texts.")
    prepare: Prepare = Field(description="Raw files.")
    train_sft: TrainSft = Field(default_factory=TrainSft, description="Reference policy.")
    comparisons: Comparisons = Field(default_factory=Comparisons, description="Comparisons.")
    train_ranker: TrainRanker = Field(default_factory=TrainRanker, description="Ranker.")
    train_gold_ranker: TrainGoldRanker | None = Field(
        default_factory=TrainGoldRanker, description="Gold ranker; null judges without one."
    )
    decode: Decode = Field(default_factory=Decode, description="Candidates.")
    objectives: Objectives = Field(
        default_factory=Objectives, description="Rankers that are combined."
    )
    score: Score = Field(default_factory=Score, description="Rewards.")
    reject: Reject = Field(default_factory=Reject, description="Algorithm 1.")
    pair: Pair = Field(default_factory=Pair, description="Pairs.")
    targets: Targets = Field(default_factory=Targets, description="RAFT and ReST targets.")
    logps: Logps = Field(default_factory=Logps, description="Reference log-probs.")
    train_policy: TrainPolicy = Field(default_factory=TrainPolicy, description="Policy.")
    evaluate: Evaluate = Field(default_factory=Evaluate, description="Evaluation.")
    report: Report = Field(default_factory=Report, description="Report.")
    beam: Beam = Field(
        default_factory=Beam,
        json_schema_extra=RUNTIME,
        description="Runner of Beam pipelines.",
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the config in the YAML file `path` with `key.key=value` overrides applied.

    Raises:
        UserError: the file cannot be read or is no YAML mapping, an override is malformed, or a
            setting is unknown, missing or wrong.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"config {path}: cannot be read ({error.strerror}); give the path of a YAML file, "
            "e.g. configs/quickstart.yaml."
        ) from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"config {path}: not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(data, dict):
        raise UserError(
            f"config {path}: expected a mapping of settings, found {type(data).__name__}."
        )
    for override in overrides:
        _apply(data, override)
    return parse_config(data, where=f"config {path}")


def parse_config(data: Mapping[str, Any], *, where: str) -> Config:
    """Return the validated config in `data`.

    Raises:
        UserError: a setting is unknown, missing or wrong; the message begins with `where`.
    """
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {'; '.join(_problem(e) for e in error.errors())}") from None


def view(config: Config, sections: Sequence[str]) -> Config:
    """Return a copy that holds only `sections`; reading another raises `AttributeError`."""
    copy = config.model_copy()
    # Not `model_construct`: it would give hidden sections their defaults.
    for name in set(copy.__dict__) - set(sections):
        del copy.__dict__[name]
    return copy


def identity(settings: BaseModel) -> dict[str, Any]:
    """Return the settings that can change a result, as plain JSON values, None kept."""
    result: dict[str, Any] = {}
    for name in type(settings).model_fields:
        if name in settings.__dict__ and is_identity(type(settings).model_fields[name]):
            result[name] = _plain(getattr(settings, name))
    return result


def is_identity(field: FieldInfo) -> bool:
    """Return whether a setting takes part in fingerprints."""
    extra = field.json_schema_extra
    return not (isinstance(extra, dict) and extra.get(IDENTITY) is False)


def resolve_auto(config: Config) -> Config:
    """Return `config` with each `auto` engine and dtype replaced by its value on this machine.

    An engine becomes vllm if the package is installed, else transformers. The dtype becomes
    bfloat16 if the machine has a GPU or CPU instructions for it, else float32. GPUs do not count if
    `compute.device` is cpu.
    """
    engine = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    update: dict[str, Any] = {}
    for name in ("comparisons", "decode", "evaluate"):
        section = getattr(config, name)
        if section.engine == "auto":
            update[name] = section.model_copy(update={"engine": engine})
    if config.compute.dtype == "auto":
        dtype = "bfloat16" if _computes_bfloat16(config.compute) else "float32"
        update["compute"] = config.compute.model_copy(update={"dtype": dtype})
    return config.model_copy(update=update)


def has_gpu() -> bool:
    """Return whether /dev has an NVIDIA GPU; False if CUDA_VISIBLE_DEVICES is the empty string."""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    return not is_hidden and any(DEVICES.glob("nvidia[0-9]*"))


def dtype_reason(compute: Compute) -> str:
    """Return why `resolve_auto` chooses its dtype for these settings, as words for the user."""
    if compute.dtype == "bfloat16" and not _computes_bfloat16(compute):
        return "compute.dtype says so; this CPU has no bfloat16 and emulates it slowly"
    if compute.dtype != "auto":
        return "compute.dtype says so"
    if _may_use_gpu(compute):
        return "the GPU computes in it"
    flag = _bfloat16_flag()
    return f"this CPU computes in it ({flag})" if flag else "this CPU has no bfloat16"


def _computes_bfloat16(compute: Compute) -> bool:
    return _may_use_gpu(compute) or _bfloat16_flag() is not None


def _may_use_gpu(compute: Compute) -> bool:
    return compute.device != "cpu" and has_gpu()


def _bfloat16_flag() -> str | None:
    """Return the CPU's instruction set for bfloat16, as /proc/cpuinfo names it, or None."""
    flags = CPUINFO.read_text() if CPUINFO.exists() else ""
    return next((flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags), None)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return identity(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _apply(data: dict[str, Any], override: str) -> None:
    import yaml

    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override}: expected stage.key=value, e.g. --set reject.beta=0.25.")
    *parents, last = key.split(".")
    place = data
    for parent in parents:
        child = place.get(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {override}: {parent!r} is a value, it has no keys.")
        # Change a copy: a YAML alias may name the same mapping in another place.
        copied = dict(child)
        place[parent] = copied
        place = copied
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"--set {override}: the value is not YAML: {' '.join(str(error).split())}; quote it."
        ) from None


def _problem(error: Any) -> str:
    location = [part for part in error["loc"]]
    place = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.0)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown key {place!r}; {hint}Known here: {', '.join(known)}."
    if error["type"] == "missing":
        return f"key {place!r} is required and missing."
    if error["type"] == "value_error":
        return f"{place}: {error['ctx']['error']}."
    return f"{place}: {error['msg']} (found {error['input']!r})."


def _known_keys(location: Sequence[str | int]) -> list[str]:
    section: Any = Config
    for part in location:
        if isinstance(part, int):
            continue
        section = section.model_fields[part].annotation
        # In `Section | None` and `tuple[Section, ...]` the section comes first.
        while get_args(section):
            section = get_args(section)[0]
    return list(section.model_fields)
