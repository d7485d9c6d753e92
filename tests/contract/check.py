"""Check Shoal's contract with vLLM against a newer version's sources, which are downloaded and read, not installed.

    python tests/contract/check.py vllm==0.33.0 --keep DIR     # or a wheel's path

Exit code 1 where something that Shoal takes is gone or called otherwise.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from server.engine.contract import CONTRACT
from tests.contract.reading import Sources, breaches
from tests.contract.test_contract import seams


def fetched(requirement: str, directory: Path) -> Path:
    """The wheel of a requirement, downloaded once."""
    stem = requirement.replace("==", "-").rstrip("*").rstrip(".")
    if not (found := sorted(directory.glob(f"{stem}*.whl"))):
        directory.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement, "-d", str(directory)]
        subprocess.run(command, check=True)
        found = sorted(directory.glob(f"{stem}*.whl"))
    return found[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what")
    parser.add_argument("--keep", type=Path, default=Path("build/contract"))
    options = parser.parse_args()
    path = Path(options.what) if options.what.endswith(".whl") else fetched(options.what, options.keep)
    contract = CONTRACT + seams()
    found = breaches(Sources.wheel(path), contract)
    print("\n".join(found) if found else f"{path.name}: all {len(contract)} names are as Shoal takes them")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
