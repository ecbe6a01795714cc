"""The paper's baselines and further rounds, as settings of the same stages, on the tiny run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import system
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from rso.errors import UserError
from rso.models import model_digest
from stages import stages
from stages.runner import run_stage

RAFT = ("targets.method=raft", "train_policy.loss=cross_entropy")
REST = ("targets.method=rest", "train_policy.loss=cross_entropy")


@pytest.mark.parametrize("recipe", [RAFT, REST], ids=["raft", "rest"])
def test_policy_learns_from_selected_responses(
    finished: system.Run, tmp_path: Path, recipe: tuple[str, ...]
) -> None:
    run = finished.copy(tmp_path / "store")
    names = [stage.name for stage in stages(run.config(*recipe))]
    assert not {"reject", "pair", "logps"} & set(names)
    made = [name for name, cached in system.run_all(run.config(*recipe)).items() if not cached]
    assert made == ["targets", "train_policy", "evaluate", "report"]
    trained = run.artifact("train_policy", *recipe)
    curve = trained.manifest.curves["train_policy"]
    num_targets = run.artifact("targets", *recipe).manifest.rows["demonstrations"]
    assert sum(entry["num_items"] for entry in curve) == num_targets
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert trained.manifest.curves["train_policy_evaluations"]
    report = Path(run.artifact("report", *recipe).output("report")) / "report.html"
    assert "train_policy" in report.read_text()


def test_policy_from_targets_that_are_not_made_is_refused(finished: system.Run) -> None:
    with pytest.raises(UserError, match=r"targets.method is none; set targets.method to raft"):
        finished.graph("train_policy.loss=cross_entropy")


def test_soft_labels_without_pairs_are_refused(finished: system.Run) -> None:
    with pytest.raises(UserError, match="soft_labels is for losses on pairs"):
        finished.config(*RAFT, "train_policy.soft_labels=true")


def test_slic_with_its_regulariser_runs(finished: system.Run, tmp_path: Path) -> None:
    run = finished.copy(tmp_path / "store")
    plain = ("train_policy.loss=hinge",)
    losses = []
    for changes in (plain, (*plain, "train_policy.regularisation=0.5")):
        ran = run_stage(run.graph(*changes), "train_policy")
        losses.append(ran.artifact.manifest.curves["train_policy"][0]["loss"])
    assert losses[1] > losses[0]


def test_second_round_names_policy_reference_and_proposal(
    finished: system.Run, tmp_path: Path
) -> None:
    """Round 2 draws from the policy of round 1 and trains it on, against the first reference."""
    run = finished.copy(tmp_path / "store")
    first = run.artifact("train_policy").output("policy")
    changes = (f"decode.policy={first}", f"train_policy.init_from={first}")
    made = [name for name, cached in system.run_all(run.config(*changes)).items() if not cached]
    assert made[0] == "decode" and {"logps", "train_policy"} <= set(made)
    second = run.artifact("train_policy", *changes)
    # The policy is not the reference now, so nothing is compared before the first step.
    assert "max_step_zero_nats_per_token" not in second.manifest.counters
    assert run.artifact("train_sft", *changes).directory == run.artifact("train_sft").directory
    assert model_digest(second.output("policy")) != model_digest(first)


def test_later_round_knows_a_policy_by_its_content(finished: system.Run, tmp_path: Path) -> None:
    run = finished.copy(tmp_path / "store")
    first = Path(run.artifact("train_policy").output("policy"))
    ran = run_stage(run.graph(f"train_policy.init_from={first}"), "train_policy")
    elsewhere = tmp_path / "moved"
    elsewhere.symlink_to(first)
    again = run_stage(run.graph(f"train_policy.init_from={elsewhere}"), "train_policy")
    assert again.is_cached and again.artifact.directory == ran.artifact.directory


def test_sft_policy_that_exists_becomes_the_reference(finished: system.Run, tmp_path: Path) -> None:
    run = finished.copy(tmp_path / "store")
    given = Path(run.artifact("train_sft").output("reference"))
    ran = run_stage(run.graph(f"model={given}", "train_sft.skip=true"), "prepare")
    ran = run_stage(run.graph(f"model={given}", "train_sft.skip=true"), "train_sft")
    assert ran.artifact.manifest.counters["steps"] == 0
    written = load_file(Path(ran.artifact.output("reference")) / "model.safetensors")
    expected = load_file(given / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all((written[name] == expected[name]).all() for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train_sft", "train_ranker", "train_policy"])
def test_stage_on_two_processes_gives_the_curves_of_one(
    finished: system.Run, tmp_path: Path, stage: str
) -> None:
    """`compute.num_processes` is no identity, so only `force` makes the artifact again."""
    run = finished.copy(tmp_path / "store")
    two = "compute.num_processes=2"
    assert set(system.statuses(run, two).values()) == {"cached"}
    before = run.artifact(stage).manifest
    ran = run_stage(run.graph(two), stage, force=True)
    assert not ran.is_cached
    for name in (stage, f"{stage}_evaluations"):
        curves = (ran.artifact.manifest.curves.get(name, []), before.curves.get(name, []))
        for ours, theirs in zip(*curves, strict=True):
            for figure in ours.keys() & {"step", "loss", "margin", "num_tokens", "win_rate"}:
                assert ours[figure] == pytest.approx(theirs[figure], rel=1e-3, abs=1e-3)
    assert ran.artifact.manifest.counters["tokens"] == before.counters["tokens"]


@pytest.mark.slow
def test_mistake_found_by_one_of_two_processes_is_a_sentence(
    finished: system.Run, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "store")
    changes = ("compute.num_processes=2", "train_sft.freeze_layers=9")
    with pytest.raises(UserError, match=r"train_sft.freeze_layers is 9, but the model has 2"):
        run_stage(run.graph(*changes), "train_sft")


def test_encoder_decoder_runs_the_whole_recipe(
    make_t5: Callable[..., str], tiny_run: system.Run, tmp_path: Path
) -> None:
    """T5 as policy and as both rankers, as in the paper."""
    model = make_t5(tmp_path / "t5")
    run = system.Run(tiny_run.path, tmp_path / "store")
    changes = (f"model={model}", "templates.prompt='{prompt}'", "prepare.max_prompt_tokens=200")
    assert not any(system.run_all(run.config(*changes)).values())
    rows = {name: run.artifact(name, *changes).manifest.rows for name in ("decode", "score")}
    assert rows["decode"]["candidates"] == rows["score"]["rewards"] == 16 * 6
    pairs = run.artifact("pair", *changes)
    assert pairs.manifest.rows["pairs"] > 0
    policy = run.artifact("train_policy", *changes)
    assert policy.manifest.counters["max_step_zero_nats_per_token"] < 1e-4
    opened = AutoModelForSeq2SeqLM.from_pretrained(policy.output("policy"))
    assert opened.config.model_type == "t5"
