"""The Prefect flow `rso-full`: one task per stage of the table, each stage in its own process."""

import os

# On an offline machine, Prefect would log an error for analytics that it cannot send.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
# For the server that Prefect starts for one run. On busy cores it needs more than the default 20 s.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")

import logging
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from rso.artifact import Store
from rso.config import load_config, resolve_auto
from stages import telling
from stages.process import USER_MISTAKE, run_stage_process
from stages.runner import Graph

# Name of the state of a stage that stopped at a mistake of the user, not at a defect.
REFUSED = "Refused"
# This logger is below Prefect's logger of task runs, so a server keeps the lines about stages.
TELLING = "telling"


def tell_on_stderr(*, is_on_console: bool) -> None:
    """Show the lines about stages on standard error, at any level of Prefect's own lines.

    With `is_on_console` Prefect's console shows them in its own form. Otherwise they are plain.
    """
    logger = logging.getLogger(f"prefect.task_runs.{TELLING}")
    logger.setLevel(logging.INFO)
    if not is_on_console:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="{stage}")
def run_stage_task(stage: str, config: str, overrides: list[str]) -> State[Any]:
    """Run one stage in its own process, unless the store has its artifact."""
    settings = resolve_auto(load_config(config, overrides))
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
    """From raw text to an evaluated policy: run every stage of the config, in order.

    A stage starts after all stages before it have finished. The first failure ends the flow.
    """
    changes = overrides or []
    settings = resolve_auto(load_config(config, changes))
    for name in Graph(settings, Store(settings.store)).table:
        state = run_stage_task(name, config, changes, return_state=True)
        if not state.is_completed():
            return Failed(name=state.name, message=state.message)
    return Completed(message="every stage has its artifact")
