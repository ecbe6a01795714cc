"""`python -m pipelines.worker NUMBER NUM_WORKERS PARENT`: a worker of `pipelines.workers`."""

import logging
import os
import signal
import sys

from rso.allocator import keep_freed_memory
from rso.gpus import WORKERS
from rso.parent import die_with
from rso.progress import WORKER


def main() -> None:
    """Work for Beam until it has no more work, or until the parent process ends."""
    number, num_workers, parent = map(int, sys.argv[1:])
    die_with(parent)
    # Ctrl-C goes to the whole process group. With Python's handler Beam's worker would continue.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ[WORKER], os.environ[WORKERS] = str(number), str(num_workers)
    # Before torch and tokenizers are imported: use a share of the cores, as `stages.launch` does.
    num_threads = max(1, len(os.sched_getaffinity(0)) // num_workers)
    for setting in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ.setdefault(setting, str(num_threads))
    keep_freed_memory("auto")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    # Set the level of the handler, because Beam lowers that of the root logger.
    logging.getLogger().handlers[0].setLevel(logging.WARNING)
    # This logger warns that nothing was staged for the worker. On one machine nothing needs to be.
    logging.getLogger("apache_beam.runners.worker.sdk_worker_main").setLevel(logging.ERROR)

    from apache_beam.runners.worker import sdk_worker_main

    sdk_worker_main.main([])


if __name__ == "__main__":
    main()
