"""The table of properties: what is checked, against what bound, and the verdict.

A property is a function that measures how far the shipped code is from what it claims, as one
non-negative number: the largest difference from a reference, or the largest violation of an
inequality. It holds when the number is within its bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from rlalign import algos

SHARED = "shared"  # the algorithm column of a property of the shared pieces

Applies = Callable[[str], bool]  # of an algorithm's name


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report.

    >>> Check("equal rewards give exactly 0", "grpo", 0.0, 0.0, True, "definition")
    """

    name: str
    algorithm: str
    max_error: float
    bound: float
    ok: bool
    source: str


@dataclass(frozen=True, slots=True)
class Property:
    """`measure` takes an algorithm's name when `applies` is set and nothing otherwise."""

    name: str
    source: str
    bound: float
    measure: Callable[..., float]
    applies: Applies | None


PROPERTIES: list[Property] = []


def shared(name: str, *, source: str, bound: float) -> Callable:
    """Register `measure() -> error`, a property of the pieces all algorithms use."""

    def register(measure: Callable[[], float]) -> Callable[[], float]:
        PROPERTIES.append(Property(name, source, bound, measure, None))
        return measure

    return register


def per_algorithm(
    name: str,
    *,
    source: str,
    bound: float,
    applies: Applies = lambda _: True,
    kind: str = "tokens",
) -> Callable:
    """Register `measure(algorithm_name) -> error`, a property of each algorithm of a kind (see
    `kind_of`) that it applies to."""

    def of_kind(algorithm: str) -> bool:
        return kind_of(algorithm) == kind and applies(algorithm)

    def register(measure: Callable[[str], float]) -> Callable[[str], float]:
        PROPERTIES.append(Property(name, source, bound, measure, of_kind))
        return measure

    return register


def kind_of(name: str) -> str:
    """`trees`: credit in trees. `estimates`: a loss of a diffusion language model's estimates.
    `tokens`: a loss of log-probs, whoever knows or estimates them."""
    algorithm = algos.get(name)
    if algorithm.defaults.get("adv_estimator") == "tree":
        return "trees"
    return "tokens" if algorithm.estimate_loss is None else "estimates"


def run(algorithm: str | None = None) -> list[Check]:
    """Measure every property: of the shared pieces and of each algorithm, or of `algorithm` only
    (a name, an alias, or an import path). Raises AlgoError for a name that is none."""
    wanted = algos.names() if algorithm is None else [algorithm]
    labels = {name: algos.get(name).name for name in wanted}
    checks = [_check(p, SHARED, p.measure()) for p in PROPERTIES if p.applies is None]
    for name, label in labels.items():
        for p in PROPERTIES:
            if p.applies is not None and p.applies(name):
                checks.append(_check(p, label, p.measure(name)))
    return checks


def render(checks: Sequence[Check]) -> Table:
    """The report as a rich table, one section per algorithm, with the totals in the caption."""
    table = Table(title="rlalign verify", caption=_totals(checks), title_justify="left")
    table.add_column("property", overflow="fold")
    table.add_column("error", justify="right")
    table.add_column("bound", justify="right")
    table.add_column("", justify="center")
    table.add_column("source", overflow="fold", style="dim")
    for algorithm in dict.fromkeys(check.algorithm for check in checks):
        table.add_section()
        table.add_row(f"[bold]{algorithm}[/bold]", "", "", "", "")
        for check in checks:
            if check.algorithm == algorithm:
                verdict = "[green]ok[/green]" if check.ok else "[bold red]FAILS[/bold red]"
                table.add_row(
                    escape(check.name),
                    f"{check.max_error:.1e}",
                    f"{check.bound:.0e}",
                    verdict,
                    escape(check.source),
                )
    return table


def _check(p: Property, algorithm: str, error: float) -> Check:
    # A NaN error compares false, so a property that cannot be measured does not hold.
    return Check(p.name, algorithm, error, p.bound, error <= p.bound, p.source)


def _totals(checks: Iterable[Check]) -> str:
    verdicts = [check.ok for check in checks]
    return f"{sum(verdicts)} of {len(verdicts)} properties hold"
