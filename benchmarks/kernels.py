"""Log-probs of the language-model head, forward and backward: error, time and memory of ours and
of every peer that is installed, on the same tensors in one process (on a CPU one process each, so
that the peak memory is its own).

Times are medians over interleaved repetitions, after a warm-up; memory is the peak over what was
allocated before (inputs and their gradients' buffers excluded; results included). Errors are
against float64 (the reference by chunks), on the same rounded inputs. Roofline: 2NDV floating-point
operations forward, 6NDV backward, at the rate of a large matrix product measured in the same run.
"""

from __future__ import annotations

import gc
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from _kernel_peers import Peer, candidates
from torch import Tensor


class Shape(NamedTuple):
    rows: int
    width: int
    vocab: int

    def __str__(self) -> str:
        return f"N {self.rows} D {self.width} V {self.vocab}"


GPU_SHAPES = [
    Shape(8192, 4096, 131072), Shape(8192, 2304, 256000), Shape(8192, 4096, 151936),
    Shape(16384, 896, 151936), Shape(2048, 4096, 128256), Shape(32768, 2048, 151936),
]  # fmt: skip
CPU_SHAPE = Shape(4096, 256, 32000)
LOGIT_STD = 3.0
STEEP_STD = 6.0  # at which the error of ours is held against its bar
SLOW_REPETITIONS = 5
REFERENCE_ROWS = 512
MAIN = GPU_SHAPES[0]
OURS = "rlalign"
SLOW = (
    "rlalign, torch",
    "rlalign, fused",
    "cut-cross-entropy",
    "cut-cross-entropy, exact",
)  # at MAIN only


def run(quick: bool) -> dict[str, Any]:
    """`quick`: one shape and few repetitions."""
    if torch.cuda.is_available():
        rows = _gpu_rows(GPU_SHAPES[:1] if quick else GPU_SHAPES, repetitions=5 if quick else 11)
        return {"name": "kernels", "machine": _machine(), "rows": rows, "bars": _gpu_bars(rows)}
    rows = _cpu_rows(turns=2 if quick else 5)
    return {"name": "kernels", "machine": _machine(), "rows": rows, "bars": _cpu_bars(rows)}


# --- one peer ------------------------------------------------------------------------------------


def draw(
    shape: Shape, device: str, dtype: torch.dtype, logit_std: float = LOGIT_STD
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, target and upstream: fresh, and an upstream for every row, so that nobody
    gains by leaving rows out."""
    hidden = torch.randn(shape.rows, shape.width, device=device).to(dtype)
    scale = logit_std / shape.width**0.5
    weight = torch.randn(shape.vocab, shape.width, device=device).mul_(scale).to(dtype)
    target = torch.randint(0, shape.vocab, (shape.rows,), device=device)
    upstream = torch.empty(shape.rows, device=device).uniform_(0.25, 1.25)
    return hidden.requires_grad_(), weight.requires_grad_(), target, upstream


def forward(peer: Peer, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    out = peer(*inputs[:3])
    return out if isinstance(out, tuple) else (out,)


def full(peer: Peer, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward and backward; returns dH and dW. The entropy gets no gradient, as where it is
    logged."""
    out = forward(peer, inputs)
    return torch.autograd.grad(out[0], inputs[:2], inputs[3].to(out[0].dtype))


def errors(peer: Peer, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Largest logp and entropy error (nats), relative error of dH and of dW by norm."""
    hidden, weight, target, upstream = (x.detach() for x in inputs)
    out = tuple(x.detach().double() for x in forward(peer, inputs))
    grads = full(peer, inputs)
    logp, entropy = torch.empty_like(out[0]), torch.empty_like(out[0])
    d_hidden = torch.empty(hidden.shape, device=hidden.device, dtype=torch.float32)
    d_weight = torch.zeros(weight.shape, device=weight.device, dtype=torch.float32)
    for at in torch.arange(len(target), device=target.device).split(REFERENCE_ROWS):
        logits = hidden[at].double() @ weight.double().T
        all_logp = logits.log_softmax(-1)
        p = all_logp.exp()
        logp[at] = all_logp.gather(1, target[at, None])[:, 0]
        entropy[at] = -(p * all_logp).sum(-1)
        grad = -p * upstream[at, None].double()
        grad[torch.arange(len(at)), target[at]] += upstream[at].double()
        d_hidden[at] = (grad @ weight.double()).float()
        d_weight += (grad.T @ hidden[at].double()).float()
    result = {"logp error": float((out[0] - logp).abs().max())}
    if len(out) > 1:
        result["entropy error"] = float((out[1] - entropy).abs().max())
    for name, got, want in (("dH error", grads[0], d_hidden), ("dW error", grads[1], d_weight)):
        result[name] = float((got.float() - want).norm() / want.norm())
    return result


# --- GPU -----------------------------------------------------------------------------------------


def _gpu_rows(shapes: list[Shape], repetitions: int) -> list[dict[str, Any]]:
    peak = _gpu_peak()
    print(f"matrix product, bf16, 8192 cubed: {peak / 1e12:.0f} TFLOP/s", flush=True)
    rows = []
    for shape in shapes:
        for entropy in (False, True) if shape == MAIN else (True,):
            for row in _gpu_shape(shape, entropy, repetitions, peak):
                print(json.dumps(row), flush=True)
                rows.append(row)
    return rows


def _gpu_shape(
    shape: Shape, entropy: bool, repetitions: int, peak: float
) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    torch._dynamo.reset()  # torch.compile: a graph for this shape alone
    inputs = draw(shape, "cuda", torch.bfloat16)
    peers, accuracy = {}, {}
    for name, build in candidates("cuda", entropy).items():
        if name in SLOW and shape != MAIN:
            continue
        try:
            peer = build()
            full(peer, inputs)  # warm-up: compiles
            accuracy[name] = errors(peer, inputs) if shape == MAIN else {}
            if shape == MAIN and entropy and name == OURS:
                steep = draw(Shape(1024, *shape[1:]), "cuda", torch.bfloat16, STEEP_STD)
                accuracy[name]["steep logp error"] = errors(peer, steep)["logp error"]
                del steep
            peers[name] = peer
        except (
            ImportError,
            AttributeError,
            RuntimeError,
            AssertionError,
            NotImplementedError,
        ) as e:
            if name == OURS:
                raise
            print(f"left out: {name} at {shape}: {type(e).__name__}: {str(e)[:200]}", flush=True)
        _free()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in peers}
    for _ in range(repetitions):
        for name, peer in peers.items():
            if name in SLOW and len(times[name]) >= SLOW_REPETITIONS:
                continue
            with torch.no_grad():
                forward_ms = _gpu_ms(lambda p=peer: forward(p, inputs))
            times[name].append((forward_ms, _gpu_ms(lambda p=peer: full(p, inputs))))
    flops = 2 * shape.rows * shape.width * shape.vocab
    for name, peer in peers.items():
        forward_ms, full_ms = (
            statistics.median(column) for column in zip(*times[name], strict=True)
        )
        yield {
            "shape": str(shape),
            "entropy": entropy,
            "side": name,
            "forward ms": forward_ms,
            "full ms": full_ms,
            "spread ms": "{:.1f} to {:.1f}".format(*_extremes([t for _, t in times[name]])),
            "of roofline": 4 * flops / peak / (full_ms / 1e3),
            "forward MiB": _gpu_extra_mib(lambda p=peer: _no_grad(p, inputs)),
            "full MiB": _gpu_extra_mib(lambda p=peer: full(p, inputs)),
            **accuracy[name],
        }


def _extremes(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def _no_grad(peer: Peer, inputs: tuple[Tensor, ...]) -> Any:
    with torch.no_grad():
        return forward(peer, inputs)


def _gpu_ms(call: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _gpu_extra_mib(call: Callable[[], Any]) -> float:
    _free()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _free() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def _gpu_peak(size: int = 8192, repeats: int = 15) -> float:
    a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    seconds = [_gpu_ms(lambda: a @ b.T) / 1e3 for _ in range(repeats)]
    return 2 * size**3 / statistics.median(seconds[3:])


def _gpu_bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bars of the main shape: H100 or H200."""
    main = [row for row in rows if row["shape"] == str(MAIN) and row["entropy"]]
    without = [row for row in rows if row["shape"] == str(MAIN) and not row["entropy"]]
    mine = next(row for row in main if row["side"] == OURS)
    lower = 2 * MAIN.width * (MAIN.vocab + MAIN.rows)  # dW and dH in bf16
    memory = (lower + 4 * MAIN.rows * MAIN.width) / 2**20 + 256 + 4
    bars = [
        _bar(f"{MAIN}: forward with entropy, ms", mine["forward ms"], 16.0),
        _bar(f"{MAIN}: forward and backward, ms", mine["full ms"], 64.0),
        _bar(f"{MAIN}: extra memory, MiB", mine["full MiB"], memory),
        _bar(
            f"{MAIN}: logp error at logit std {STEEP_STD:g}, nats", mine["steep logp error"], 2e-5
        ),
    ]
    for label, group in (("with entropy", main), ("no entropy", without)):
        mine = next(row for row in group if row["side"] == OURS)
        bars += [_against(mine, row, "full ms", label) for row in group if row is not mine]
    return bars


# --- CPU -----------------------------------------------------------------------------------------


def _cpu_rows(turns: int) -> list[dict[str, Any]]:
    results: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for turn in range(turns):
        for entropy in (False, True):
            for name in candidates("cpu", entropy):
                result = _cpu_process(name, entropy, with_errors=turn == 0)
                if "left out" in result:
                    print(f"left out: {name}: {result['left out']}", flush=True)
                    continue
                results.setdefault((name, entropy), []).append(result)
    rows = []
    for (name, entropy), runs in results.items():
        figures = {
            key: statistics.median(run[key] for run in runs if key in run) for key in runs[0]
        }
        rows.append({"shape": str(CPU_SHAPE), "entropy": entropy, "side": name, **figures})
    return rows


def _cpu_process(name: str, entropy: bool, with_errors: bool) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, name, str(int(entropy)), str(int(with_errors))],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _cpu_measure(
    name: str, entropy: bool, with_errors: bool, repetitions: int = 3
) -> dict[str, Any]:
    """In a process of its own, one thread, float32."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        peer = candidates("cpu", entropy)[name]()
    except (ImportError, AttributeError) as error:
        return {"left out": str(error)}
    if name != "torch.compile":  # whose memory is therefore that of its compiler too
        full(peer, draw(Shape(64, CPU_SHAPE.width, 1000), "cpu", torch.float32))
    inputs = draw(CPU_SHAPE, "cpu", torch.float32)
    before = _peak_kib()
    full(peer, inputs)
    growth = (_peak_kib() - before) / 1024
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        full(peer, inputs)
        seconds.append(time.perf_counter() - start)
    rate = 2 * 1024**3 / _matmul_s()
    flops = 8 * CPU_SHAPE.rows * CPU_SHAPE.width * CPU_SHAPE.vocab
    return {
        "full s": statistics.median(seconds),
        "full MiB": growth,
        "of roofline": flops / rate / statistics.median(seconds),
        **(errors(peer, inputs) if with_errors else {}),
    }


def _peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _matmul_s() -> float:
    a, b = torch.randn(2, 1024, 1024)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def _cpu_bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    plain = {row["side"]: row for row in rows if not row["entropy"]}
    mine = plain[OURS]
    torchs = [row["full MiB"] for side, row in plain.items() if side.startswith("F.linear")]
    bars = [_bar("peak memory growth, MiB", mine["full MiB"], 100.0)]
    if torchs:
        limit = min(torchs)
        bars.append(_bar("the same against F.linear_cross_entropy", mine["full MiB"], limit))
    others = [row for row in plain.values() if row is not mine]
    return bars + [_against(mine, row, "full s", "no entropy") for row in others]


def _bar(what: str, value: float, limit: float) -> dict[str, Any]:
    return {"what": what, "value": value, "bar": f"<= {limit:.4g}", "holds": value <= limit}


def _against(mine: dict[str, Any], peer: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    ratio = peer[key] / mine[key]
    what = f"{where}: times as fast as {peer['side']}"
    return {"what": what, "value": ratio, "bar": ">= 1", "holds": ratio >= 1}


def _machine() -> str:
    if torch.cuda.is_available():
        import triton

        name = torch.cuda.get_device_name()
        return f"{name}, torch {torch.__version__}, triton {triton.__version__}"
    return f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}"


if __name__ == "__main__":
    print(json.dumps(_cpu_measure(sys.argv[1], *(flag == "1" for flag in sys.argv[2:]))))
