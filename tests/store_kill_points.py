"""One process of the test that kills a build at its n-th file operation.

`python store_kill_points.py ROOT ACTION NUMBER OLD`: `build` writes the rows shifted by a number,
`kill` rebuilds by force and dies at the numbered operation, `check` looks at what is left, builds
again and looks once more. OLD is a copy of the manifest that must not get lost.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from store_build import FINGERPRINT, STAGE, commit, rewards

from rso.artifact import Store

OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.listdir")
LEASE_SECONDS = 2.0


def open_store(root: str) -> Store:
    return Store(root, lease_seconds=LEASE_SECONDS)


def build(root: str, shift: float) -> None:
    """Build, by force; a build that was killed after its manifest counts."""
    with open_store(root).build(STAGE, FINGERPRINT, force=True) as work:
        if work.existing is None:
            for index in range(2):
                work.write_shard("rewards", index, 2, rewards(index, shift=shift))
            Path(work.scratch, "checkpoint").write_text("x")
            commit(work)


def build_until(root: str, operation: int) -> None:
    """Build, and die at the given file operation."""
    left = operation

    def count(event: str, _: tuple[Any, ...]) -> None:
        nonlocal left
        if event in OPERATIONS:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    build(root, 1.0)


def manifests(store: Store) -> list[bytes | None]:
    names = store._files.children(STAGE)
    return [store._files.read(f"{STAGE}/{name}/manifest.json") for name in names]


def look(root: str, old: bytes) -> None:
    """Check that the old artifact is somewhere, and that nothing that is found is half there."""
    store = open_store(root)
    assert old in manifests(store), "the old artifact is lost"
    found = store.find(STAGE, FINGERPRINT, verify=True)
    assert found is None or store.verify(found) == []
    assert not any(".corrupt-" in name for name in store._files.children(STAGE))


def build_again(root: str, old: bytes) -> None:
    """Check that the next run completes and leaves nothing behind."""
    build(root, 1.0)
    store = open_store(root)
    found = store.find(STAGE, FINGERPRINT, verify=True)
    assert found is not None and found.read("rewards")["reward"][0].as_py() >= 1.0
    assert old in manifests(store), "the old artifact is lost"
    left = {n for n in store._files.children(STAGE) if store._files.sizes(f"{STAGE}/{n}")}
    assert not [name for name in left if name.endswith((".work", ".lease", ".lock"))], left


if __name__ == "__main__":
    root, action, number, kept = sys.argv[1:]
    if action == "build":
        build(root, float(number))
    elif action == "kill":
        build_until(root, int(number))
    else:
        look(root, Path(kept).read_bytes())
        build_again(root, Path(kept).read_bytes())
