"""vLLM 0.33 moved modules; both places are known, and a version that was not tested warns."""

import subprocess
import sys

import pytest

# The functions of the installed vLLM at the addresses of 0.33, its own addresses gone. (Checked by hand against the
# wheel vllm-0.33.0: docs/decisions/engine.md.)
MOVED = """
import logging, sys
import vllm.entrypoints.cli.serve
from vllm.entrypoints.launchers import cli_args
from vllm.entrypoints.serve.utils import api_utils
sys.modules |= {
    "vllm.entrypoints.common.cli_args": cli_args, "vllm.entrypoints.common.startup": api_utils,
    "vllm.entrypoints.launchers.cli_args": None, "vllm.entrypoints.serve.utils.api_utils": None,
}
from server.engine import compat as vllm_compat
args = vllm_compat.parse_arguments(["somewhere", "--port", "7"], {"host": "::1"})
assert (args.model, args.host, args.port) == ("somewhere", "::1", 7)
logging.basicConfig(format="%(message)s")
vllm_compat.warn_if_untested()
vllm_compat.VERSION = "0.33.0"
vllm_compat.warn_if_untested()
"""


@pytest.mark.slow
def test_the_import_paths_of_0_33_and_a_warning_for_it():
    done = subprocess.run([sys.executable, "-c", MOVED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "was not tested" in line]
    assert warnings == ["vLLM 0.33.0 was not tested with this release (tested: 0.32.*)"]
