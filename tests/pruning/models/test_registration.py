"""Importing `pruning` is all transformers needs, in whatever order things are imported."""

import subprocess
import sys

import pytest

LOAD = "AutoModelForCausalLM.from_pretrained({0!r})"


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import pruning; from transformers import AutoModelForCausalLM; " + LOAD,
        "from transformers import AutoModelForCausalLM; import pruning; " + LOAD,
        "import pruning; from transformers import AutoConfig; AutoConfig.from_pretrained({0!r})",
        "import pruning.models.configuration as c; c.register_configs(); from transformers import AutoConfig; "
        "AutoConfig.from_pretrained({0!r})",
        "import pruning; from transformers import PreTrainedModel, AutoModelForCausalLM; " + LOAD,
        "import pruning.pipeline; from transformers import AutoModelForCausalLM; " + LOAD,
        "import pruning, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules",
    ],
)
def test_import_order_does_not_matter(code, pico_checkpoint):
    directory = str(pico_checkpoint("llama")[0])
    done = subprocess.run([sys.executable, "-c", code.format(directory)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
