"""`rlalign decode`: the test-time methods, each a call of one function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

err = Console(stderr=True)

decode = typer.Typer(no_args_is_help=True, help="Test-time methods: the weights stay as they are.")

Model = Annotated[str, typer.Option(help="Model folder, hub id, or mini:TASK.")]
Input = Annotated[Path, typer.Option(help="JSONL file with a prompt (or messages) a line.")]
Output = Annotated[Path, typer.Option(help="JSONL file for the records, one a line.")]
Options = Annotated[
    list[str] | None, typer.Argument(help="key=value options; reward.key=value for the reward.")
]
ConfigFile = Annotated[Path | None, typer.Option(help="YAML file of options.")]
RewardName = Annotated[
    str | None, typer.Option(help="A reward's name (docs/rewards.md), or module:function.")
]
Num = Annotated[int | None, typer.Option(help="The first rows only.")]
Shard = Annotated[str, typer.Option(help="I/N: only part I (from 1) of N that do not overlap.")]
Extract = Annotated[
    str | None,
    typer.Option(
        help="Where the answer stands: auto, tag, boxed, json:KEY, number, line, pattern:"
    ),
]
Resume = Annotated[bool, typer.Option(help="Go on with the records in the output.")]
Chat = Annotated[
    bool | None, typer.Option(help="Use the chat template; by default if the model has one.")
]
System = Annotated[str, typer.Option(help="System message, where a row has none.")]
Backend = Annotated[str, typer.Option(help="hf (exact) or vllm (fast).")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
InFlight = Annotated[int, typer.Option(help="Rows that are decoded side by side.")]


def search(
    context: typer.Context,
    model: Model,
    input: Input,
    output: Output,
    options: Options = None,
    reward: RewardName = None,
    config: ConfigFile = None,
    num: Num = None,
    shard: Shard = "",
    extract: Extract = None,
    resume: Resume = False,
    chat: Chat = None,
    system: System = "",
    backend: Backend = "hf",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    in_flight: InFlight = 64,
) -> None:
    """A method that searches with one model; its name is the command's."""
    given = {"config": config, "num": num, "shard": shard, "extract": extract, "resume": resume}
    given |= {"chat": chat, "system": system, "backend": backend, "device": device, "dtype": dtype}
    given |= {"reward": reward, "in_flight": in_flight}
    _run(str(context.info_name), model, input, output, options, given)


SEARCHES = {
    "best-of-n": ("Draw N answers and keep the one with the highest reward.", "--reward math"),
    "majority": ("Draw N answers and keep one with the commonest final answer.", "num_samples=16"),
    "latent-seek": ("LatentSeek: move the first tokens' latents up a (self-)reward.", "rho=0.2"),
    "rain": ("RAIN: search over token sets, judged by the model itself.", "max_tokens=20000"),
}
for _name, (_help, _example) in SEARCHES.items():
    _line = f"rlalign decode {_name} --model DIR --input rows.jsonl --output out.jsonl {_example}"
    decode.command(_name, help=f"{_help}\n\nExample: `{_line}`")(search)


@decode.command("logit-fusion")
def logit_fusion(
    model: Model,
    input: Input,
    output: Output,
    small: Annotated[str, typer.Option(help="The small base model.")],
    expert: Annotated[list[str], typer.Option(help="A tuned small model; may be repeated.")],
    options: Options = None,
    config: ConfigFile = None,
    num: Num = None,
    shard: Shard = "",
    extract: Extract = None,
    resume: Resume = False,
    chat: Chat = None,
    system: System = "",
    backend: Backend = "hf",
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Steer a large model by what small experts learned, as strongly as they moved.

    Example: `rlalign decode logit-fusion --model LARGE --small SMALL --expert TUNED
    --input rows.jsonl --output out.jsonl`
    """
    given = {"config": config, "num": num, "shard": shard, "extract": extract, "resume": resume}
    given |= {"chat": chat, "system": system, "backend": backend, "device": device, "dtype": dtype}
    given |= {"small": small, "experts": tuple(expert)}
    _run("logit-fusion", model, input, output, options, given)


def _run(
    method: str,
    model: str,
    source: Path,
    out: Path,
    options: list[str] | None,
    given: dict[str, Any],
) -> None:
    from rlalign.testtime.decode_text import Progress, TextJob, decode_text

    job = TextJob(method, model, source, out, options or [], **given)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    columns += (TextColumn("{task.fields[cost]}"), TimeElapsedColumn())
    reached = 0
    with Bars(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        bar = bars.add_task(method, total=None, cost="")

        def move(progress: Progress) -> None:
            nonlocal reached
            reached = progress.done
            cost = f"{progress.tokens} tokens, {progress.requests} requests"
            bars.update(bar, completed=progress.done, total=progress.total, cost=cost)

        try:
            summary = decode_text(job, on_progress=move)
        except KeyboardInterrupt:
            err.print(
                escape(
                    f"interrupted with {reached} records in {out}; the same command with --resume "
                    "goes on"
                ),
                soft_wrap=True,
            )
            raise typer.Exit(130) from None
    _show(method, summary.rows())
    err.print(escape(f"wrote {out}; rlalign report {out} makes a page of it"), soft_wrap=True)
    if summary.nothing_came_of_it:
        raise typer.Exit(1)


def _show(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table("", title, box=None)
    for row in rows:
        table.add_row(*map(escape, row))
    err.print(table)


@decode.command("reflect")
def decode_reflect(
    domain: Annotated[str, typer.Argument(help="sudoku or driving.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value options, e.g. max_iters=4 regen=window")
    ] = None,
    num: Annotated[int | None, typer.Option(help="Problems; 20 by default.")] = None,
    input: Annotated[
        str | None, typer.Option(help="JSONL file of problems, - for stdin; else own ones.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.jsonl and index.html; else stdout.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option(help="Leave out lines that cannot be used.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with the results in --out.")] = False,
    steps: Annotated[int | None, typer.Option(help="Forward passes that fill a canvas.")] = None,
    drafts: Annotated[int | None, typer.Option(help="First sequences to choose from.")] = None,
    blanks: Annotated[int | None, typer.Option(help="sudoku: blank cells of its puzzles.")] = None,
    oracle: Annotated[str | None, typer.Option(help="driving: cv or gt.")] = None,
    size: Annotated[str | None, typer.Option(help="driving: planner, full or smoke.")] = None,
) -> None:
    """Repair what a masked-diffusion model writes, where a verifier finds fault.

    Example: `rlalign decode reflect sudoku --num 20 --blanks 12 --steps 2`
    """
    from rlalign.testtime.decode import decode_reflect as run

    settings = [*(overrides or []), *([f"steps={steps}"] if steps is not None else [])]
    options = {"drafts": drafts, "blanks": blanks, "oracle": oracle, "size": size}
    given = {name: value for name, value in options.items() if value is not None}
    shared: dict[str, Any] = {"num": num, "source": input, "out": out}
    shared |= {"skip_bad": skip_bad, "resume": resume}
    show = None if out else lambda record: typer.echo(json.dumps(record))
    with Bars(console=err, transient=True, disable=not err.is_terminal) as bars:
        bar = bars.add_task(domain, total=None)

        def move(done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total)

        summary = run(domain, settings, **shared, on_record=show, on_progress=move, **given)
    _show(domain, summary.rows())
    for problem in summary.skipped:
        err.print(escape(f"skipped: {problem}"), soft_wrap=True)
    if summary.page:
        err.print(escape(f"wrote {summary.page}, and results.jsonl beside it"), soft_wrap=True)
