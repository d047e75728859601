"""Checks an environment from inside: every pinned version is there, and what must import imports.

    .venv/bin/python scripts/check_env.py requirements/cpu.txt ...

The imports also write the bytecode of what every run needs, so the first run does not wait for it.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib import metadata
from pathlib import Path

MODULES = ("torch", "transformers", "deepspeed", "peft", "datasets", "vllm.v1.engine.llm_engine")


def main(lock_files: list[str]) -> int:
    wrong = [problem for path in lock_files for problem in _differences(Path(path))]
    for problem in wrong:
        print(problem)
    if wrong:
        return 1
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if any(path.endswith("cpu.txt") for path in lock_files):
        os.environ["DS_ACCELERATOR"] = "cpu"
    for name in (*MODULES, "rlalign"):
        print("importing", name, flush=True)
        importlib.import_module(name)
    return 0


def _differences(lock_file: Path) -> list[str]:
    """One sentence for every package that is not the one of the lock."""
    found = []
    for line in lock_file.read_text().splitlines():
        pin = line.split("#")[0].strip()
        if not pin:
            continue
        name, _, version = pin.partition("==")
        name = name.split("[")[0]
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed = "missing"
        if installed != version:
            found.append(f"{name}: {installed}, pinned is {version}")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
