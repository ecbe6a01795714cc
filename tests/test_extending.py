"""The examples of docs/extending.md, applied to a copy of the packages and run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import system

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
PLACES = {
    "LOSSES": ("rso/losses.py", "LOSSES: Mapping[str, Loss] = {\n"),
    "TABLE": ("stages/__init__.py", "TABLE = (\n"),
}
CHECKS = {
    "loss": """
import torch
from rso.config import parse_config
from rso.losses import LOSSES, Side
from stages import stages

chosen, rejected = (Side(torch.tensor([p]), torch.tensor([-5.0]), None) for p in (-3.0, -9.0))
assert LOSSES["ipo"].of_pairs(chosen, rejected, 0.1).tolist() == [1.0]  # (6 - 1 / 0.2)**2
data = {"model": "m", "prepare": {"sources": []}, "train_policy": {"loss": "ipo", "gamma": 0.1}}
assert stages(parse_config(data, where="here"))
""",
    "labeller": """
from rso.labelling import labeller

assert labeller("few_commas").score("p", "a, b, c") == -2.0
""",
    "ranker engine": """
import sys
import numpy as np
from rso.config import Templates
from rso.ranking import Comparison, load_ranker

items = [Comparison("a fox", "the list", "the error of the file"), Comparison("b", "value", "fox")]
rankers = [
    load_ranker(sys.argv[1], Templates(), dtype="float32", token_budget=64, engine=engine)
    for engine in ("transformers", "plain")
]
found = [ranker.compare(items) for ranker in rankers]
assert np.abs(found[0]).max() > 0.01
np.testing.assert_allclose(*found, atol=1e-5)
""",
}


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages with every block of the page in its place."""
    root = tmp_path_factory.mktemp("extended")
    for name in ("rso", "schemas", "pipelines", "stages"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "flows.py", root)
    blocks = re.findall(r"([^\n]+):\n\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == PAGE.count("```python") == 9
    for words, block in blocks:
        (place,) = re.findall(r"`([^`]+)`$", words)
        if place in PLACES:
            place, start = PLACES[place]
            text = (root / place).read_text()
            assert text.count(start) == 1
            (root / place).write_text(text.replace(start, start + block))
        elif words.startswith("At the end of"):
            with open(root / place, "a", encoding="utf-8") as file:
                file.write(f"\n\n{block}")
        else:
            assert not (root / place).exists(), place
            (root / place).write_text(block)
    return root


def run(root: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("what", list(CHECKS))
def test_example_works(extended: Path, what: str, tiny_llama_dir: str) -> None:
    run(extended, "-c", CHECKS[what], tiny_llama_dir)


def test_example_of_a_stage_runs(extended: Path, finished: system.Run, tmp_path: Path) -> None:
    candidates = finished.artifact("decode").output("candidates")
    command = ["-c", "from rso.cli import main; main()", "stage", "lengths"]
    command += ["--config", str(finished.path)]
    command += ["--set", f"store={tmp_path}", "--input", f"candidates={candidates}"]
    run(extended, *command)
    (made,) = (tmp_path / "lengths").glob("*/lengths")
    found = pd.read_parquet(made).set_index("response_id")["num_words"]
    responses = pd.read_parquet(candidates).set_index("response_id")["response"]
    assert found.to_dict() == responses.str.split().str.len().to_dict()
