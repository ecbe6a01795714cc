"""`python -m pipelines.worker NUMBER OF PARENT`: a worker process of `pipelines.workers`."""

import logging
import os
import signal
import sys

from rso.allocator import keep_freed_memory
from rso.gpus import WORKERS
from rso.parent import die_with
from rso.progress import WORKER


def main() -> None:
    """Serve Beam until it says that there is no more work, or is gone."""
    number, num_workers, parent = map(int, sys.argv[1:])
    die_with(parent)
    # Ctrl-C goes to the whole group, and Beam's worker would go on.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ[WORKER], os.environ[WORKERS] = str(number), str(num_workers)
    # Before torch and tokenizers are imported: a share of the cores, as processes of a training.
    num_threads = max(1, len(os.sched_getaffinity(0)) // num_workers)
    for setting in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ.setdefault(setting, str(num_threads))
    keep_freed_memory("auto")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    # Beam lowers the level of the root.
    logging.getLogger().handlers[0].setLevel(logging.WARNING)
    # It warns that nothing was staged for it, as nothing is on this machine.
    logging.getLogger("apache_beam.runners.worker.sdk_worker_main").setLevel(logging.ERROR)

    from apache_beam.runners.worker import sdk_worker_main

    sdk_worker_main.main([])


if __name__ == "__main__":
    main()
