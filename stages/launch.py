"""A training stage on several processes of this machine, started by `accelerate launch`.

The process of the stage holds the build and commits it. The launched processes run the stage's code
on the same work folder. Only the first of them writes the outcome. Each launched process is
`python -m stages.launch JOB`.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from rso.allocator import keep_freed_memory
from rso.config import Config, parse_config, view
from rso.errors import UserError
from rso.parent import die_with
from rso.work import Work
from stages import Stage
from stages.context import Context, Input, Outcome
from stages.process import USER_MISTAKE

TRAINING = frozenset(("train_sft", "train_ranker", "train_policy"))
_JOB, _OUTCOME, _FAILURE = "job.json", "outcome.json", "failure-{rank}.txt"


def run_on_processes(
    stage: Stage, config: Config, inputs: Mapping[str, Input], work: Work
) -> Outcome:
    """Run a training stage on `compute.num_processes` processes and return the first one's outcome.

    Raises:
        UserError: a process found a mistake of the user; the message is that of the lowest rank.
        RuntimeError: the processes failed for another reason.
    """
    for name in os.listdir(work.scratch):
        if name == _OUTCOME or name.startswith("failure-"):
            os.remove(f"{work.scratch}/{name}")
    job = {
        "stage": stage.name,
        "module": stage.module,
        "sections": stage.sees,
        "config": config.model_dump(mode="json"),
        "inputs": {name: [given.output, given.directory] for name, given in inputs.items()},
        "directory": work.directory,
        "fingerprint": work.fingerprint,
    }
    path = f"{work.scratch}/{_JOB}"
    with open(path, "w", encoding="utf-8") as file:
        json.dump(job, file)
    code = subprocess.run(
        _command(config, path), preexec_fn=partial(die_with, os.getpid()), check=False
    ).returncode
    if code == 0:
        with open(f"{work.scratch}/{_OUTCOME}", encoding="utf-8") as file:
            return Outcome(**json.load(file))
    for rank in range(config.compute.num_processes):
        failure = f"{work.scratch}/{_FAILURE.format(rank=rank)}"
        if os.path.exists(failure):
            with open(failure, encoding="utf-8") as file:
                raise UserError(file.read())
    raise RuntimeError(f"{stage.name}: its processes ended with {code}; their output says why")


def _command(config: Config, job: str) -> list[str]:
    compute = config.compute
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if compute.accelerate_config is not None:
        command += ["--config_file", compute.accelerate_config]
    else:
        # `--multi_gpu` also starts several processes on a machine without GPUs.
        command += ["--multi_gpu", "--num_machines", "1", "--main_process_port", "0"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    threads = max(1, len(os.sched_getaffinity(0)) // compute.num_processes)
    command += ["--num_cpu_threads_per_process", str(threads)]
    command += ["--num_processes", str(compute.num_processes)]
    return [*command, "--module", "stages.launch", job]


def main() -> int:
    """Run the stage as one of the launched processes and return the exit code.

    This process ends when the launcher ends, and the launcher ends when the stage ends.
    """
    die_with(os.getppid())
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    # The config was resolved before the launch, so all processes compute in the same dtype.
    config = parse_config(job["config"], where="job")
    inputs = {
        name: Input(output, directory, None) for name, (output, directory) in job["inputs"].items()
    }
    work = Work(job["stage"], job["fingerprint"], job["directory"], _refuse)
    context = Context(job["stage"], view(config, job["sections"]), inputs, work, config.beam)
    keep_freed_memory(config.compute.device)
    rank = int(os.environ["RANK"])
    try:
        outcome = importlib.import_module(f"stages.{job['module']}").run(context)
    except UserError as error:
        path = f"{work.scratch}/{_FAILURE.format(rank=rank)}"
        with open(path, "w", encoding="utf-8") as file:
            file.write(str(error))
        return USER_MISTAKE
    if rank == 0:
        with open(f"{work.scratch}/{_OUTCOME}", "w", encoding="utf-8") as file:
            json.dump({"counters": outcome.counters, "curves": outcome.curves}, file)
    return 0


def _refuse(manifest: Any) -> Any:
    raise AssertionError("only the process that holds the build commits it")


if __name__ == "__main__":
    sys.exit(main())
