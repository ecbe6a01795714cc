"""The report: self-contained, escaped, and complete with much and with little data."""

import html
import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

import schemas
from rso import calibration, charts, evaluation, report
from rso.diagnostics import curve
from rso.labelling import labeller
from rso.rejection import select
from rso.report import (
    ReportData,
    ScoringRanker,
    ShownCurve,
    StageSummary,
    build,
    pick_examples,
    rejection_summary,
)
from tests.test_diagnostics import gaussian, totals_of

Rows = list[dict[str, Any]]
NASTY = '<script>alert("x")</script> & <b>bold</b>'
VOID = {"meta", "br", "hr", "img", "link", "input", "line", "circle", "rect", "polyline"}


class Balance(HTMLParser):
    """Raises where tags do not close in order; keeps what would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [str(v) for k, v in attrs if k in ("src", "href")]
        assert tag not in ("script", "link", "img", "b.bold")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def rows_of_a_run(num_prompts: int = 60) -> tuple[Rows, Rows, Rows]:
    prompts: Rows = []
    generations: Rows = []
    for i in range(num_prompts):
        prompt_id = f"{i:016x}"
        text = f"The reader number {i} reads the lines of a file and keeps them. {NASTY}"
        target = f"Read the lines of file {i}." if i % 5 else None
        prompts.append({"prompt_id": prompt_id, "prompt": text, "target": target})
        answers = {
            "reference": f"Return the reader of {i}.",
            "policy": f"Keep the lines that reader {i} reads." if i % 3 else "Return a value.",
        }
        for system, response in answers.items():
            for sampling in ("greedy", "sampled", "ancestral"):
                generations.append(
                    {
                        "prompt_id": prompt_id,
                        "response_id": f"{system}-{sampling}-{i}",
                        "system": system,
                        "sample_index": 0,
                        "sampling": sampling,
                        "response": response,
                        "finish_reason": "stop" if i % 7 else "length",
                        "policy_logps": -10.0 - i % 4,
                        "reference_logps": -11.0 - i % 5,
                    }
                )
    gold = labeller("summary_quality")
    played = evaluation.matches(generations, prompts)
    judgements = evaluation.judge_by_gold(gold, played) + evaluation.judge_by_length(played)
    generator = np.random.default_rng(0)
    for judge in ("ranker", "gold_ranker"):
        logits = generator.normal(0.5, 1.0, len(played))
        judgements += evaluation.judge_by_logits(judge, played, logits)
    return prompts, generations, judgements


def metrics_of_a_collapse() -> Rows:
    """The figures of answers that all begin with one word, where SFT's have one each."""
    prompts, generations, _ = rows_of_a_run(40)
    for row in generations:
        number = int(row["prompt_id"], 16)
        row["response"] = f"<b>Return {number}" if row["system"] == "policy" else f"verb{number} it"
    played = evaluation.matches(generations, prompts)
    return evaluation.metrics(generations, evaluation.judge_by_length(played), prompts, seed=0)


def accepted_table(num_prompts: int = 30, beta: float = 0.5) -> pa.Table:
    generator = np.random.default_rng(1)
    rows: Rows = []
    for i in range(num_prompts):
        prompt_id = f"{i:016x}"
        ids = [f"{i}-{j}" for j in range(16)]
        rewards = generator.normal(0, 1, 16).astype(np.float32)
        chosen = select(
            ids,
            ids,
            rewards,
            prompt_id=prompt_id,
            beta=beta,
            num_samples=4,
            seed=0,
            duplicates="keep",
        )
        for j in range(16):
            rows.append(
                {
                    "prompt_id": prompt_id,
                    "response_id": ids[j],
                    "reward": float(rewards[j]),
                    "is_accepted": bool(chosen.is_accepted[j]),
                    "round": int(chosen.round[j]),
                    "position": int(chosen.position[j]),
                    "acceptance_probability": float(chosen.acceptance_probability[j]),
                }
            )
    return pa.Table.from_pylist(rows, schema=schemas.SCHEMAS["accepted"])


def betas() -> list[dict[str, float]]:
    return curve({beta: totals_of(gaussian(), beta) for beta in (0.0, 0.5, float("inf"))})


def scoring(margins: list[float], flips: list[tuple[float, float]]) -> ScoringRanker:
    """What `score` leaves of such margins on held-out comparisons and such flipped pairs."""
    counters: dict[str, float] = {
        "held_out_comparisons": len(margins),
        "flipped_pairs": len(flips),
    }
    bins = []
    if margins:
        held_out = calibration.judge(margins, [0] * len(margins))
        counters |= held_out.figures
        bins = [found.figures for found in held_out.by_margin]
    if flips:
        forward, backward = zip(*flips, strict=True)
        counters |= calibration.positional_bias(forward, backward, seed=0).figures
    return ScoringRanker(counters, bins)


def full_data(num_prompts: int = 60) -> ReportData:
    prompts, generations, judgements = rows_of_a_run(num_prompts)
    gold = labeller("summary_quality")
    metrics = evaluation.metrics(generations, judgements, prompts, seed=0, labeller=gold)
    return ReportData(
        title=f"Docstrings {NASTY}",
        config={"seed": 0, "reject": {"beta": 0.5}, "model": NASTY, "store": None},
        metrics=metrics,
        examples=pick_examples(generations, judgements, prompts, num_examples=10, seed=0),
        stages=[
            StageSummary("prepare", 3.2, 300 * 2**20, {"prompts": 2061}, {"rows_read": 2061}),
            StageSummary("decode", 312.0, 3 * 2**30, {"candidates": 9600}, {}, fingerprint="ab12"),
            StageSummary("train_policy", 4000.0, 5 * 2**30, {}, {"pairs": 400}, cached=True),
        ],
        curves=[
            ShownCurve("train_sft", "loss", [(i, 3.0 / (i + 1)) for i in range(30)]),
            ShownCurve("train_policy", "margin, nats", [(i, i**0.5) for i in range(12)]),
        ],
        scoring=scoring([*[1.0] * 24, *[-3.0] * 12], [(1.5, -0.5), (0.25, 0.75)]),
        rejection=rejection_summary(
            accepted_table(), beta=0.5, points=betas(), advice=[f"Lower beta {NASTY}"]
        ),
        quarantine={f"prompt is missing {NASTY}": 3},
        versions={"torch": "2.13.0"},
        hardware="2 cores",
        labeller="summary_quality",
    )


@pytest.fixture(scope="module")
def page() -> str:
    return build(full_data())


def test_build_is_well_formed_and_loads_nothing(page: str) -> None:
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    assert balance.references == []
    assert not re.search(r"url\(|@import|https?://", page)


def test_build_shows_every_beta_and_the_advice(page: str) -> None:
    shown = re.findall(r'<tr(?: class="chosen")?>\n<td class="number">([^<]*)</td>', page)
    assert shown == ["0", "0.5", "inf"]
    assert page.count('<tr class="chosen">') == 1
    assert '<p class="warning">Lower beta' in page and "pass by pass" in page


def place(svg: str) -> list[tuple[float, float]]:
    """Centres of the points of the reliability curve in `svg`, rising to the right."""
    found = re.findall(r'<circle class="estimate" cx="([\d.]+)" cy="([\d.]+)"', svg)
    return sorted((float(x), float(y)) for x, y in found)


def test_reliability_curve_has_its_points_where_the_ranker_is_too_sure(page: str) -> None:
    """At 1 nat it is always right, at 3 nats always wrong, so the points are above and below."""
    (svg,) = re.findall(r'<svg class="plot"[^>]*aria-label="share of right.*?</svg>', page)
    (sure, right), (surer, wrong) = place(svg)
    assert sure < surer and right < wrong
    assert re.findall(r'<g class="(\w+)"><title>(\d+) comparisons: believed ([\d.]+)', svg) == [
        ("above", "24", "73.1"),
        ("below", "12", "95.3"),
    ]


def test_reliability_curve_of_a_calibrated_ranker_lies_on_the_diagonal() -> None:
    believed = [0.55, 0.65, 0.75, 0.85, 0.95]
    svg = charts.reliability(believed, [(p, p - 0.1, min(1.0, p + 0.1)) for p in believed], [9] * 5)
    (line,) = re.findall(r'class="half" x1="(.*?)" x2="(.*?)" y1="(.*?)" y2="(.*?)"', svg)
    left, right, low, high = map(float, line)
    for x, y in place(svg):
        assert y == pytest.approx(low + (x - left) / (right - left) * (high - low), abs=0.2)
    assert len(place(svg)) == svg.count('<g class="open">') == 5


def test_build_says_what_the_slot_is_worth_or_that_it_is_not_known(page: str) -> None:
    text = " ".join(page.split())
    assert "On 2 pairs of a baseline and a candidate" in text
    assert "worth +0.50 nats to slot A [+0.50, +0.50], with a spread of 0.00 nats" in text
    assert "In 50.0 % of them" in text
    unknown = build(replace(full_data(5), scoring=scoring([], [])))
    assert "No comparison was held out" in unknown and "no pair to flip" in unknown
    assert "share of right preferences" not in unknown
    assert "the ranker that scored" not in build(replace(full_data(5), scoring=None))


def test_build_escapes_every_text(page: str) -> None:
    assert "<script" not in page and "<b>bold" not in page
    assert page.count("&lt;script&gt;") >= 13


def test_build_says_synthetic_and_shows_every_part(page: str) -> None:
    for said in (
        "Known gold (synthetic)",
        "Gold points (synthetic)",
        "Length alone",
        "labeller summary_quality",
        "KL from SFT",
        "Rejection sampling",
        "10 prompts side by side",
        "Refused rows",
        "reject.beta",
        "2.13.0",
        "1 h 06 min",
    ):
        assert said in page
    assert page.count("<article>") == 10


def test_build_is_the_same_twice_and_works_without_data() -> None:
    empty = ReportData(title="t", config={}, metrics=[])
    assert build(empty) == build(empty)
    assert "Nothing was judged" in build(empty)


def test_build_names_a_collapse_in_boxes_above_the_gain() -> None:
    page = build(replace(full_data(5), metrics=metrics_of_a_collapse()))
    boxes = re.findall(r'class="(warning first|conclusion)">(?:\s*<p>)?(.*?)</p>', page)
    assert [kind for kind, _ in boxes] == ["warning first", "warning first", "conclusion"]
    said = "All answers begin alike (`b`, SFT 2 of 100 with `verb0`): the policy has collapsed."
    assert boxes[0][1] == said
    assert boxes[1][1].startswith("All sampled answers begin alike (`b`")
    assert "Nothing was judged" in boxes[2][1]


def test_build_names_the_gain_on_greedy_and_on_sampled_answers(page: str) -> None:
    box = page.partition('<div class="conclusion">')[2].partition("</div>")[0]
    greedy, sampled = re.findall(r"<p>(.*?)</p>", box)
    assert greedy.startswith("Under the known synthetic gold the policy beats SFT: it wins 66.7 %")
    said = "On sampled answers, under the same judge, the policy beats SFT: it wins 66.7 %"
    assert sampled.startswith(said)


def test_build_without_a_collapse_has_no_box_above_the_gain(page: str) -> None:
    assert '<p class="warning first">' not in page
    assert page.index('<div class="conclusion">') < page.index("Who wins")


def table_after(page: str, heading: str) -> list[str]:
    """Return the headings of the blocks and rows of the table below a heading of the page."""
    table = page.partition(f"<h2>{heading}</h2>")[2].partition("</table>")[0]
    return re.findall(r"<tr[^>]*>\s*<th[^>]*>(.*?)</th>", table.partition("<tbody>")[2])


def test_build_shows_sampled_answers_beside_greedy_ones(page: str) -> None:
    judges = [judge.heading for judge in report.JUDGES.values()]
    wins = table_after(page, "Who wins")
    blocks = [name for name in wins if name not in judges]
    assert blocks == [
        "Policy against SFT",
        "Policy against SFT, sampled",
        "Policy against the human line",
        "SFT against the human line",
    ]
    assert sorted(wins) == sorted([*blocks, *judges * 4])
    answers = table_after(page, "What the answers became")
    figures = [figure.name for figure in report.TEXT_FIGURES]
    assert [html.unescape(name) for name in answers] == [
        "Greedy answers",
        *figures,
        "Sampled answers",
        *figures,
        "Samples at temperature 1, untruncated",
        report.KL_NAME,
    ]


def test_text_rows_show_the_words_that_are_most_common() -> None:
    rows = {row["name"]: row["cells"] for row in report.text_rows(full_data().metrics, "sampled")}
    assert rows["Most common first word, %"] == [
        ("66.7", "`keep`"),
        ("100.0", "`return`"),
        ("100.0", "`read`"),
    ]
    assert rows["Different first words"] == [("2", ""), ("1", ""), ("1", "")]
    assert rows["Repeat SFT's answer, %"] == [("0.0", ""), ("–", ""), ("–", "")]


def test_build_without_sampled_answers_has_no_empty_block() -> None:
    data = full_data(10)
    greedy = [row for row in data.metrics if row["sampling"] in ("greedy", "")]
    page = build(replace(data, metrics=greedy))
    assert "Greedy answers" in page
    assert "sampled</th>" not in page and "Sampled answers" not in page
    assert report.KL_NAME not in page


def test_build_warns_of_the_slot_above_the_checks_of_the_ranker(page: str) -> None:
    box = '<p class="warning">The slot decides &amp; not the text.</p>'
    data = full_data(5)
    assert data.scoring is not None and data.scoring.advice is None
    advised = replace(data.scoring, advice="The slot decides & not the text.")
    text = build(replace(data, scoring=advised))
    assert text.index("the ranker that scored can be believed") < text.index(box)
    assert text.index(box) < text.index("Held-out comparisons")
    assert box not in page


def test_terminal_table_names_a_collapse_above_the_gain() -> None:
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(report.terminal_table(metrics_of_a_collapse()))
    text = console.export_text()
    said = "All answers begin alike (`b`, SFT 2 of 100 with `verb0`): the policy has collapsed."
    collapse = text.index(said)
    sampled = text.index("All sampled answers begin alike")
    assert collapse < sampled < text.index("Nothing was judged")
    assert "Policy against SFT, sampled" in text
    assert text.index("Greedy answers") < text.index("Sampled answers")


def test_terminal_table_holds_the_figures_of_the_page() -> None:
    data = full_data()
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(report.terminal_table(data.metrics, data.stages))
    text = console.export_text()
    row = evaluation.find(data.metrics, "win_rate", opponent="reference", judge="gold")
    assert row is not None
    assert f"{100 * row['value']:.1f} %" in text
    assert "Known gold (synthetic)" in text and "train_policy" in text and "ROUGE-L" in text


def test_rejection_summary_by_hand() -> None:
    rows = [
        {"reward": 0.0, "is_accepted": False, "round": -1},
        {"reward": 2.0, "is_accepted": True, "round": 1},
    ]
    fixed = {"prompt_id": "p", "position": 0, "acceptance_probability": 0.5}
    table = pa.Table.from_pylist(
        [row | fixed | {"response_id": str(i)} for i, row in enumerate(rows)],
        schema=schemas.SCHEMAS["accepted"],
    )
    found = rejection_summary(table, beta=0.5)
    assert (found.num_prompts, found.num_candidates, found.num_accepted) == (1, 2, 1)
    assert (sum(found.candidate_counts), sum(found.accepted_counts)) == (2, 1)
    assert found.accepted_counts[0] == 1


@pytest.mark.parametrize("beta", [0.0, float("inf")])
def test_rejection_summary_extreme_beta_is_finite(beta: float) -> None:
    found = rejection_summary(accepted_table(3, beta), beta=beta)
    assert all(np.isfinite(found.edges))
    assert found.num_accepted == 12


@pytest.mark.parametrize(
    ("beta", "unit"), [(0.5, "in units of β"), (0.0, "nats"), (math.inf, "nats")]
)
def test_build_names_the_unit_of_rewards(beta: float, unit: str) -> None:
    found = rejection_summary(accepted_table(3, beta or 1.0), beta=0.5)
    page = build(replace(full_data(5), rejection=replace(found, beta=beta)))
    assert f"reward below the prompt&#39;s best, {unit}" in page


def test_pick_examples_is_keyed_and_order_free() -> None:
    prompts, generations, judgements = rows_of_a_run()
    some = pick_examples(generations, judgements, prompts, num_examples=10, seed=1)
    assert some == pick_examples(
        generations[::-1], judgements[::-1], prompts[::-1], num_examples=10, seed=1
    )
    assert some != pick_examples(generations, judgements, prompts, num_examples=10, seed=2)
    # sampled answers and the verdicts on them are not mixed in
    others = [row for row in judgements if row["sampling"] == "greedy"]
    assert some == pick_examples(generations, others, prompts, num_examples=10, seed=1)
    assert all(set(e.verdicts) == {"ranker", "gold_ranker", "gold", "length"} for e in some)
