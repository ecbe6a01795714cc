"""Build one artifact, slowly: the process that tests start twice, stop and kill.

`python store_build.py ROOT NUM_SHARDS SECONDS_PER_SHARD`; each shard is a line of its output.
"""

import logging
import sys
import time
from pathlib import Path

import pyarrow as pa

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bucket  # noqa: F401

from rso.artifact import Artifact, Store, Work
from rso.code_digest import CodeDigest
from schemas import SCHEMAS

STAGE = "score"
FINGERPRINT = "ab" * 32
LEASE_SECONDS = 2.0


def rewards(index: int, count: int = 50, shift: float = 0.0) -> pa.Table:
    """Return rows in an order that is not the sorted one."""
    rows = [
        {
            "prompt_id": f"{index:04d}{row % 7:012d}",
            "response_id": f"{row:016x}",
            "reward": row + shift,
            "baseline_id": "b" * 16,
            "objectives": None,
        }
        for row in reversed(range(count))
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMAS["rewards"])


def commit(work: Work) -> Artifact:
    """Commit with the smallest manifest."""
    return work.commit(inputs={}, settings={"beta": 0.5}, code=CodeDigest("c" * 64, {"m": "d"}))


def main(root: str, num_shards: int, seconds: float) -> None:
    """Build, and print what was done."""
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    with Store(root, lease_seconds=LEASE_SECONDS).build(STAGE, FINGERPRINT) as work:
        print("started", flush=True)
        if work.existing is not None:
            print("existing", flush=True)
            return
        for index in range(num_shards):
            if work.has_shard("rewards", index, num_shards):
                print(f"kept {index}", flush=True)
                continue
            work.write_shard("rewards", index, num_shards, rewards(index))
            print(f"wrote {index}", flush=True)
            time.sleep(seconds)
        Path(work.output("report"), "report.html").write_text("report")
        commit(work)
        print("committed", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
