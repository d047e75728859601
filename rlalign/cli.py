"""The command line: each command is one call of a function of the same name."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from rlalign.cli_decode import decode

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Reinforcement-learning alignment, from a laptop CPU to a cluster.",
)
out, err = Console(), Console(stderr=True)

app.add_typer(decode, name="decode")

ConfigPath = Annotated[Path, typer.Argument(help="YAML file, e.g. configs/grpo/mini.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value overrides, e.g. trainer.max_steps=20")
]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with the newest unfinished run of this name.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Print the resolved config and stop.")] = False,
) -> None:
    """Train one run, end to end.

    Example: `rlalign train configs/grpo/mini.yaml seed=1 trainer.max_steps=40`
    """
    from rlalign import api
    from rlalign.config import to_yaml

    resolved = api.load_config(config, overrides or [])
    if dry_run:
        out.print(to_yaml(resolved), end="", markup=False, highlight=False, soft_wrap=True)
        return
    try:
        result = api.train(resolved, resume=resume)
    except KeyboardInterrupt:
        err.print("interrupted; the same command with --resume goes on from the last checkpoint")
        raise typer.Exit(130) from None
    if _is_main_process():
        _print_result(result)


@app.command("eval")
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Model folder, e.g. runs/x/checkpoints/step_80")
    ] = None,
) -> None:
    """Held-out figures of a model: pass@1 with its interval, pass@k, majority vote.

    Example: `rlalign eval configs/grpo/mini.yaml trainer.eval_samples=8 --checkpoint DIR`
    """
    from rlalign import api

    figures = api.evaluate(api.load_config(config, overrides or []), checkpoint=checkpoint)
    for name, value in figures.items() if _is_main_process() else ():
        out.print(f"{name:10} {value:.4f}")


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Model folder, hub id, or mini:<task>.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value options, e.g. name=b vllm.kv_cache_gib=4")
    ] = None,
) -> None:
    """Serve rollouts to job after job, from one engine, until interrupted.

    Example: `rlalign serve mini:chain`, and in another terminal
    `rlalign train configs/grpo/mini.yaml rollout.engine=server`
    """
    from rlalign import api

    def ready(url: str, connection: Path) -> None:
        out.print(f"serving {escape(model)} at {url}; jobs find it by {connection}", soft_wrap=True)
        out.print(
            f"status page: {url}/#token=TOKEN, where TOKEN is tokens.generate in that file",
            soft_wrap=True,
        )

    api.serve(model, overrides or [], on_ready=ready)


@app.command()
def verify(
    algorithm: Annotated[str | None, typer.Argument(help="One algorithm; all by default.")] = None,
) -> None:
    """Compare the shipped algorithms with float64 references, property by property.

    Example: `rlalign verify gspo`
    """
    from rlalign import verify as verification

    checks = verification.run(algorithm)
    out.print(verification.render(checks))
    failed = [check for check in checks if not check.ok]
    if failed:
        raise typer.Exit(1)


@app.command()
def algos() -> None:
    """List the algorithms and what each preset expands to.

    Example: `rlalign algos`
    """
    from rlalign import algos as registry

    for name in registry.names():
        fields = ", ".join(f"{key}={value}" for key, value in registry.expansion(name))
        out.print(f"[bold]{name}[/bold]  {fields}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run directory, or records of rlalign decode.")],
) -> None:
    """Write one self-contained HTML page: a run's curves and samples, or what a test-time method
    answered and how it came to it.

    Examples: `rlalign report runs/grpo-mini`, `rlalign report out.jsonl`
    """
    if run.suffix == ".jsonl":
        from rlalign.testtime.text_page import write_text_page as write
    else:
        from rlalign.tracking.report import write_report as write
    out.print(escape(f"wrote {write(run)}"), soft_wrap=True)


@app.command()
def doctor(
    run: Annotated[Path | None, typer.Argument(help="A run directory to diagnose.")] = None,
) -> None:
    """Is this machine ready? With a run: why is it flat?

    Example: `rlalign doctor runs/grpo-mini`
    """
    from rlalign.tracking import doctor as checks

    findings = checks.examine_run(run) if run else checks.examine_machine()
    out.print(checks.render(findings))
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="Which benchmark, e.g. train.")],
    quick: Annotated[bool, typer.Option(help="Fewer repetitions.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write the result here.")] = None,
) -> None:
    """Measure against the named peers in one run; medians and spreads.

    Example: `rlalign bench train --quick`
    """
    from rlalign import bench as benchmarks

    result = benchmarks.run(name, quick=quick, json_path=json)
    out.print(benchmarks.render(result))
    if not all(bar["holds"] for bar in result["bars"]):
        raise typer.Exit(1)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _print_result(result) -> None:
    before, after = result.summary["eval"]["before"], result.summary["eval"]["after"]
    out.print(
        f"\n[bold]{result.path}[/bold]: {result.summary['steps']} steps in "
        f"{result.summary['wall_s']:.0f} s"
    )
    for name in sorted(set(before) & set(after) - {"ci95"}):
        out.print(f"  held-out {name}: {before[name]:.3f} -> {after[name]:.3f}")
    out.print(
        f"Look next: [bold]rlalign report {result.path}[/bold] draws it into one HTML page; "
        f"samples are in {result.path}/rollouts, the model in {result.path}/checkpoints; "
        "docs/quickstart.md shows how to bring your own model, data and reward."
    )


def main() -> None:
    """Run a command; expected failures end with their cause and fix, and exit status 1."""
    from rlalign.errors import RlalignError
    from rlalign.process import leaving_at_once

    # A reward or algorithm of one's own lies in the working directory, which a console script does
    # not search; last, so that it shadows nothing that is installed.
    sys.path.append(os.getcwd())
    with leaving_at_once(when=int(os.environ.get("WORLD_SIZE") or 1) > 1):
        try:
            app()
        except RlalignError as error:
            text = escape(f"{type(error).__name__}: {error}")
            err.print(f"[red]error:[/red] {text}", soft_wrap=True, highlight=False)
            sys.exit(1)


if __name__ == "__main__":
    main()
