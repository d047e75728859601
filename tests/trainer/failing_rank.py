"""One of two processes of test_two_processes.py: a function fails on one rank, and the run with it.

`python failing_rank.py CONFIG MODULE FUNCTION RANK` prints the error; the status is 0 when
the run failed, as it should.
"""

from __future__ import annotations

import importlib
import os
import sys

import rlalign


def main(config: str, module: str, name: str, rank: str) -> None:
    def fail(*args, **kwargs):
        raise OSError(f"no room on rank {rank}")

    if os.environ["RANK"] == rank:
        setattr(importlib.import_module(module), name, fail)
    try:
        rlalign.train(rlalign.load_config(config), quiet=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    else:
        sys.exit("the run did not fail")


if __name__ == "__main__":
    main(*sys.argv[1:])
