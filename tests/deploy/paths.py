"""Where the things under test are."""

from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
OVERLAYS = DEPLOY / "kubernetes" / "overlays"
