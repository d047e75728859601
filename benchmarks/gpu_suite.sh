#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under nine minutes on one H100 or H200:
#
#   benchmarks/gpu_suite.sh [FOLDER]     results go to FOLDER (default: benchmarks/results)
#
# It needs python3 with torch, triton and transformers. Peers are measured where they are installed,
# and the tests run where pytest is (with pytest-xdist, or they may not end within their 200 s).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-benchmarks/results}
python=${PYTHON:-python3}
export PYTHONPATH=.:${PYTHONPATH:-} PYTHONUNBUFFERED=1 RLALIGN_TEST_DEVICE=cuda
failed=0

nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv
if "$python" -c "import pytest" 2> /dev/null; then
    # Mostly the compiler's time: eight processes take under a minute, one takes about four.
    workers=()
    if "$python" -c "import xdist" 2> /dev/null; then workers=(-n 8); fi
    timeout 200 "$python" -m pytest -q "${workers[@]}" -p no:cacheprovider -o addopts=--import-mode=importlib \
        -m "not slow" tests/kernels/test_linear_logprob.py tests/kernels/test_head_parts.py \
        tests/kernels/gpu_triton.py tests/kernels/interpreted_alpha_search.py tests/kernels/test_peer_defects.py tests/models/gpu_packed.py || failed=1
else
    echo "pytest is not installed: the tests are left out"
fi
timeout 320 "$python" benchmarks/_run.py kernels "$out/kernels_gpu_$(date +%F).json" || failed=1
exit $failed
