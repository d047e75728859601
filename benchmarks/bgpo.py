"""Diffusion language models: memory, bias and variance of the estimators, reward for equal compute.

Memory: the gradient of 16 completions of 256 tokens, by a transformer of 2 layers, 128 wide, as the
number of masks grows. Every tensor is counted from its making to its end, weights and moments of
the optimizer with them; micro-batches hold 16 passes throughout. Beside ours, the same objective in
one autograd call.

Estimators: the warm-start model of `mini:sort6` on right answers. With six tokens there are 63
masks, so the bound and its gradient are known exactly. Standard deviations are those of 16 passes,
the gradient's as a share of its mean's norm.

Decoding: several tokens a forward pass, where the model is sure, against one.

Curves: whole trainings on `mini:sort6`, each method with its own published settings but for the
learning rate, which is the same for all; on-policy, and with four optimizer steps a batch. And on
`mini:sort16` with few completions a step, where the number of masks tells.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _memory import PeakBytes

import rlalign
from rlalign import algos
from rlalign.algos.elbo import row_advantage, row_weight
from rlalign.config.schema import LikelihoodConfig, ModelConfig
from rlalign.models.load import load_tokenizer
from rlalign.models.masked_diffusion import Canvas, MaskedDiffusionLM
from rlalign.models.masked_load import load_masked_lm
from rlalign.models.masked_random import write_random_masked
from rlalign.rollout.unmask import UnmaskParams
from rlalign.rollout.unmask_compare import compare
from rlalign.tasks.mini import get_mini_task
from rlalign.trainer.build import open_job

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
QUIET = ["trainer.engine=torch", "trainer.num_threads=1", "tracking.live=false"]
PASSES = 16
ELBO = ("bernoulli", "count", "count_strat", "count_anti", "coupled")

REGIMES = (
    ("on-policy", [], 80),
    ("4 updates", ["algo.num_iterations=4"], 60),
)
RAW = ["algo.policy_loss=unclipped", "algo.likelihood.norm=none"]
SIDES = {
    "BGPO": ("bgpo/mini.yaml", []),
    "BGPO, raw bound": ("bgpo/mini.yaml", RAW),
    "exact objective, clipped": ("bgpo/mini.yaml", ["algo.likelihood.surrogate=exact"]),
    "VRPO-OL (exact, raw, 4 masks)": ("bgpo/vrpo_ol.yaml", []),
    "diffu-GRPO": ("diffu_grpo/mini.yaml", []),
    "coupled GRPO": ("coupled_grpo/mini.yaml", []),
    "wd1": ("wd1/mini.yaml", []),
    "SPG": ("spg/mini.yaml", []),
    "ESPO": ("espo/mini.yaml", []),
    "TraceRL": ("tracerl/mini.yaml", []),
}
BOTH = ("BGPO", "BGPO, raw bound", "exact objective, clipped", "diffu-GRPO")
OURS, NAIVE = "BGPO", "all passes in one graph"


def run(quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    rows, bars = memory((1, 4, 16) if quick else (1, 4, 16, 64))
    more, checks = estimators(completions=4 if quick else 16)
    rows, bars = rows + more, bars + checks
    more, checks = decoding()
    rows, bars = rows + more, bars + checks
    if not quick:
        for part in (curves, masks):
            more, checks = part(range(3))
            rows, bars = rows + more, bars + checks
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    return {"name": "bgpo", "machine": machine, "rows": rows, "bars": bars}


def memory(counts: tuple[int, ...]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Peak bytes of a gradient."""
    peaks: dict[tuple[str, int], int] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_random_masked(
            folder, "native", hidden=128, layers=2, mlp=384, max_positions=512
        )
        for side, n in itertools.product((OURS, NAIVE), counts):
            if side == NAIVE and n > 16:
                continue
            engine, likelihood, batch, config = _step_of(path, n)
            with PeakBytes() as counted:
                began = time.perf_counter()
                if side == OURS:
                    likelihood.accumulate(engine, batch, config, engine.world, [])
                else:
                    _naive(engine, likelihood, batch)
                seconds = time.perf_counter() - began
            kept = sum(3 * p.nbytes for p in engine.module.parameters())  # with Adam's moments
            peaks[side, n] = kept + counted.peak
            figures = {"peak MB": peaks[side, n] / 1e6, "seconds": seconds}
            rows.append({"part": "memory", "side": side, "masks": n, **figures})
            print(rows[-1], file=sys.stderr, flush=True)
    last = counts[-1]
    return rows, [
        _bar(f"peak memory, {last} masks against 1", peaks[OURS, last] / peaks[OURS, 1], 1.03),
        _bar(
            "the same in one graph, 16 against 1", peaks[NAIVE, 16] / peaks[NAIVE, 1], 8, least=True
        ),
    ]


def _step_of(path: Path, n: int) -> Any:
    """A training engine, its likelihood, and 16 random completions with n masks."""
    from rlalign.trainer.elbo import ElboLikelihood
    from rlalign.trainer.engine import TorchEngine
    from rlalign.trainer.masked_policy import MaskedPolicy

    rows, prompt, length = 16, 8, 256
    settings = ["name=memory", f"model.path={path}", *QUIET]
    settings += [f"algo.likelihood.num_mc_samples={n}", "algo.likelihood.norm=valid"]
    settings += [f"trainer.micro_batch_tokens={rows * (prompt + length)}"]
    settings += [f"rollout.max_completion_length={length}"]
    config = rlalign.load_config(CONFIGS / "bgpo/mini.yaml", settings)
    policy = MaskedPolicy.from_config(config)
    engine = TorchEngine(policy, config.trainer.optim)
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(6, 200, (rows, prompt + length), generator=generator)
    batch = _batch(ids_BS, length, torch.randn(rows, generator=generator))
    seeds = list(range(rows))
    masks = algos.draw_masks(batch.mask_BT.bool(), [prompt] * rows, seeds, config.algo.likelihood)
    return engine, ElboLikelihood(policy, frozenset()), batch.replace(masks=masks), config


def _batch(ids_BS: torch.Tensor, length: int, advantage_B: torch.Tensor) -> Any:
    from rlalign.trainer.batch import bare_batch

    rows = [tuple(row) for row in ids_BS.tolist()]
    batch = bare_batch(rows, [length] * len(rows))
    return batch.replace(
        advantage_BT=advantage_B[:, None] * batch.mask_BT,
        weight_BT=batch.mask_BT / batch.mask_BT.sum(),
    )


def _naive(engine: Any, likelihood: Any, batch: Any) -> None:
    """The non-linear objective exp(mean d) A with every pass in the graph."""
    from rlalign.trainer.masked_policy import make_passes

    rows, count = batch.masks.weight_BJT.shape[:2]
    pairs = torch.cartesian_prod(torch.arange(rows), torch.arange(count))
    passes = make_passes(batch, pairs[:, 0], pairs[:, 1], likelihood.policy.lm.mask_id)
    logp_M = engine.forward(passes)
    weight_M = batch.masks.weight_BJT.flatten()[passes.cell_M]
    row_M = pairs[:, 0][passes.row_M]
    bound_B = torch.zeros(rows).index_add(0, row_M, weight_M * logp_M) / batch.mask_BT.sum(1)
    ratio_B = (bound_B - bound_B.detach()).exp()
    engine.backward(-(row_weight(batch) * row_advantage(batch) * ratio_B).sum())


def estimators(completions: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Exact means and standard deviations of every estimator, from a table of all masks."""
    settings = ["name=estimators", *QUIET, "task.eval=null"]
    config = rlalign.load_config(CONFIGS / "bgpo/mini.yaml", settings)
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in ELBO}
    with open_job(config) as job:
        for prompt in job.train_prompts.take(0, completions):
            text = prompt.answer
            target = tuple(job.tokenizer(text)["input_ids"])
            table, slopes = _tables(job.policy.lm, prompt.token_ids, target)
            exact, slope = _mean_over_orders(table), _mean_over_orders(slopes)
            for name in ELBO:
                found[name].append(_spread(name, table, slopes, exact, slope))
    rows = []
    for name, parts in found.items():
        error, std, slope_std = (statistics.mean(values) for values in zip(*parts, strict=True))
        figures = {"error in standard errors": error, "std, nats": std, "std of slope": slope_std}
        rows.append({"part": "estimators", "side": name, **figures})
        print(rows[-1], file=sys.stderr, flush=True)
    spread = {row["side"]: row["std, nats"] for row in rows}
    worst = max(row["error in standard errors"] for row in rows)
    return rows, [
        _bar("bias of the worst estimator, standard errors", worst, 4),
        _bar(
            "count_strat against bernoulli, std", spread["count_strat"] / spread["bernoulli"], 0.4
        ),
    ]


def _tables(
    lm: MaskedDiffusionLM, prompt: tuple[int, ...], target: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each set of masked tokens, as bits of its index: the sum of their log-probs [S], and its
    gradient [S, parameters]."""
    length, params = len(target), [p for p in lm.parameters() if p.requires_grad]
    sums, slopes = [torch.tensor(0.0)], [torch.zeros(sum(p.numel() for p in params))]
    for bits in range(1, 2**length):
        masked = [i for i in range(length) if bits >> i & 1]
        ids = list(prompt + target)
        for i in masked:
            ids[len(prompt) + i] = lm.mask_id
        column_M = torch.tensor([len(prompt) + i for i in masked])
        target_M = torch.tensor([target[i] for i in masked])
        total = lm.logp(
            Canvas(torch.tensor([ids])), torch.zeros_like(column_M), column_M, target_M, 1.0
        ).sum()
        grads = torch.autograd.grad(total, params)
        sums.append(total.detach())
        slopes.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(sums).double(), torch.stack(slopes)


def _mean_over_orders(value_S: torch.Tensor) -> torch.Tensor:
    """sum over l of 1/l times the mean over the sets of l tokens: the bound, from its terms."""
    size_S = torch.tensor([bits.bit_count() for bits in range(len(value_S))])
    parts = [value_S[size_S == n].mean(0) / n for n in range(1, int(size_S.max()) + 1)]
    return torch.stack(parts).sum(0)


def _spread(
    name: str, table_S: torch.Tensor, slope_SP: torch.Tensor, exact: Any, slope_P: Any
) -> tuple[float, float, float]:
    """Error of the mean over 1000 estimates in standard errors, their standard deviation, and that
    of the gradient over the norm of its mean."""
    length, trials = (len(table_S) - 1).bit_length(), 1000
    config = LikelihoodConfig(estimator=name, num_mc_samples=PASSES)
    masks = algos.draw_masks(
        torch.ones(trials, length, dtype=torch.bool), [0] * trials, range(trials), config
    )
    index_BJ = (masks.hidden_BJT.long() * 2 ** torch.arange(length)).sum(2)
    weight_BJ = masks.weight_BJT.amax(2).double()
    bound_B = (weight_BJ * table_S[index_BJ]).sum(1)
    count_BS = torch.zeros(trials, len(table_S), dtype=torch.float64)
    count_BS.scatter_add_(1, index_BJ, weight_BJ)
    centred_SP = slope_SP.double()
    gram_SS = centred_SP @ centred_SP.T
    error_BS = count_BS - _exact_counts(len(table_S))
    squared_B = ((error_BS @ gram_SS) * error_BS).sum(1)
    error = abs(float(bound_B.mean() - exact)) / float(bound_B.std() / trials**0.5)
    return error, float(bound_B.std()), float(squared_B.mean().sqrt() / slope_P.norm())


def _exact_counts(num_sets: int) -> torch.Tensor:
    """What the bound weighs each set with: [S]."""
    eye = torch.eye(num_sets, dtype=torch.float64)
    return torch.stack([_mean_over_orders(column) for column in eye])


def decoding() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The 200 held-out questions of `mini:sort16`, greedy: one token a step against parallel."""
    spec = ModelConfig(path="mini:sort16")
    lm, tokenizer = load_masked_lm(spec).eval(), load_tokenizer(spec)
    questions = get_mini_task("sort16").make_rows("eval")
    prompt_BP = torch.tensor([tokenizer(row["prompt"])["input_ids"] for row in questions])
    answer_BL = torch.tensor([tokenizer(row["answer"])["input_ids"] for row in questions])
    length, masked_BL = answer_BL.shape[1], torch.full_like(answer_BL, lm.mask_id)
    ways = {
        "one token a step": UnmaskParams(length),
        "two": UnmaskParams(length // 2),
        "threshold .9": UnmaskParams(length, threshold=0.9),
        "factor 1": UnmaskParams(length, factor=1.0),
    }
    found = compare(
        lm,
        Canvas(torch.cat([prompt_BP, masked_BL], 1)),
        ways,
        torch.arange(len(questions)),
        lambda ids_BT: (ids_BT[:, -length:] == answer_BL).all(1),
        start=prompt_BP.shape[1],
    )
    rows = [
        {"part": "decoding", "side": side, "tokens per forward": fill.tokens_per_forward,
         "accuracy": fill.accuracy, "seconds": fill.seconds}
        for side, fill in found.items()
    ]  # fmt: skip
    one, many = found["one token a step"], found["threshold .9"]
    return rows, [
        _bar("threshold .9: times fewer forwards", one.forwards / many.forwards, 3, least=True),
        _bar("the same: accuracy lost", one.accuracy - many.accuracy, 0.01),
    ]


def curves(seeds: range) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for (regime, settings, batches), seed in itertools.product(REGIMES, seeds):
        for side, (config, more) in SIDES.items():
            if seed and side not in BOTH:  # the others on one seed: minutes each
                continue
            rows.append(_training(side, regime, config, [*settings, *more], batches, seed))
            print(rows[-1], file=sys.stderr, flush=True)

    def ends(side: str, regime: str) -> list[float]:
        return [row["end"] for row in rows if (row["side"], row["regime"]) == (side, regime)]

    first, second = min(ends(OURS, "on-policy")), min(ends(OURS, "4 updates"))
    return rows, [
        _bar("BGPO after 80 updates, worst seed", first, 0.90, least=True),
        _bar("the same, 4 updates a batch, after 60 batches", second, 0.93, least=True),
    ]


def masks(seeds: range) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Equal updates with 1, 4 and 16 masks a completion, where few completions of 16 tokens make a
    batch."""
    rows = []
    for seed, n in itertools.product(seeds, (1, 4, 16)):
        settings = [f"algo.likelihood.num_mc_samples={n}"]
        row = _training(f"{OURS}, n_t {n}", "sort16", "bgpo/sort16.yaml", settings, 80, seed)
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    ends = {row["side"]: [r["end"] for r in rows if r["side"] == row["side"]] for row in rows}
    many, one = ends[f"{OURS}, n_t 16"], ends[f"{OURS}, n_t 1"]
    gains = [a - b for a, b in zip(many, one, strict=True)]
    return rows, [
        _bar("16 masks against 1 at equal updates, worst seed", min(gains), 0, least=True)
    ]


def _training(
    side: str, regime: str, config: str, settings: list[str], batches: int, seed: int
) -> dict[str, Any]:
    """Held-out sampled accuracy every 20 batches."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"seed={seed}", f"tracking.runs_dir={folder}", "trainer.eval_every=20"]
        fixed += [f"trainer.max_steps={batches}", "tracking.save_rollouts=false"]
        run_config = rlalign.load_config(CONFIGS / config, [*fixed, *QUIET, *settings])
        result = rlalign.train(run_config, quiet=True)
        lines = (result.path / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    curve = {f"at {s['step']}": v for s in steps for k, v in s.items() if k.endswith("pass@1")}
    held_out = result.summary["eval"]
    return {
        "part": "curves", "side": side, "regime": regime, "seed": seed,
        "start": held_out["before"]["pass@1"], **curve, "end": held_out["after"]["pass@1"],
        "seconds a batch": statistics.median(s["time/total_s"] for s in steps),
        "tokens trained, M": result.summary["train_tokens"] / 1e6,
    }  # fmt: skip


def _bar(what: str, value: float, bar: float, *, least: bool = False) -> dict[str, Any]:
    holds = value >= bar if least else value <= bar
    return {"what": what, "value": value, "bar": f"{'>=' if least else '<='} {bar}", "holds": holds}
