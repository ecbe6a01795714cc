"""`python -m stages NAME --config FILE`: run one stage in this process, as the flow does."""

import argparse
import logging
import sys
import traceback

from stages.process import DEFECT, USER_MISTAKE, die_with_parent


def main() -> int:
    """Run the stage and return the exit code: 2 for a mistake of the user, 1 for a defect."""
    die_with_parent()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    parser = argparse.ArgumentParser(prog="python -m stages", description=__doc__)
    parser.add_argument("stage", help="name of the stage, see `rso plan`")
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()

    from rso.artifact import Store
    from rso.config import load_config, resolve_auto
    from rso.errors import UserError
    from stages.runner import Graph, run_stage

    try:
        config = resolve_auto(load_config(arguments.config, arguments.set))
        run_stage(Graph(config, Store(config.store)), arguments.stage)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_MISTAKE
    except Exception:
        traceback.print_exc()
        return DEFECT
    return 0


if __name__ == "__main__":
    sys.exit(main())
