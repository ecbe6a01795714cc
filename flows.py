"""The Prefect flow `rso-full`: the stage table turned into tasks, each stage its own process."""

import os

# Offline machines would log errors for analytics that cannot be sent.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
# Of the server that Prefect starts for one run: 20 s, its default, pass on busy cores.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")

import logging
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from rso.artifact import Store
from rso.config import load_config, resolve
from stages import telling
from stages.process import USER_MISTAKE, run_stage_process
from stages.runner import Graph

# The name of the state that says that the user's input, not a defect, stopped a stage.
REFUSED = "Refused"
# Below Prefect's logger of task runs, so that a server keeps what stages tell.
TELLING = "telling"


def tell_on_stderr(*, is_on_console: bool) -> None:
    """Show what stages tell on standard error, whatever the level of Prefect's own lines.

    They are plain lines, unless Prefect's console shows them in its own form (`is_on_console`).
    """
    logger = logging.getLogger(f"prefect.task_runs.{TELLING}")
    logger.setLevel(logging.INFO)
    if not is_on_console:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="{stage}")
def run_stage_task(stage: str, config: str, overrides: list[str]) -> State[Any]:
    """Run one stage in its own process; the store alone says whether there is anything to do."""
    settings = resolve(load_config(config, overrides))
    graph = Graph(settings, Store(settings.store))
    run_logger: Any = get_run_logger()
    names, logger = list(graph.table), run_logger.getChild(TELLING)
    artifact = graph.find(stage)
    if artifact is not None:
        logger.info(telling.ended(names, artifact, is_cached=True))
        return Completed(name="Cached", message=f"{stage}: {artifact.directory}")
    logger.info(telling.began(names, stage))
    code = run_stage_process(stage, config, overrides)
    if code == USER_MISTAKE:
        return Failed(name=REFUSED, message=f"stage {stage}: see the error above.")
    if code:
        return Failed(message=f"stage {stage} ended with exit code {code}, see above.")
    artifact = graph.find_again(stage)
    if artifact is not None:
        logger.info(telling.ended(names, artifact, is_cached=False))
    return Completed(message=stage)


@flow(name="rso-full", validate_parameters=True)
def rso_full(config: str, overrides: list[str] | None = None) -> State[Any]:
    """From raw text to an evaluated policy: every stage of the config, in order.

    Stages above are finished when a stage starts. The first failure ends the flow.
    """
    changes = overrides or []
    settings = resolve(load_config(config, changes))
    for name in Graph(settings, Store(settings.store)).table:
        state = run_stage_task(name, config, changes, return_state=True)
        if not state.is_completed():
            return Failed(name=state.name, message=state.message)
    return Completed(message="every stage has its artifact")
