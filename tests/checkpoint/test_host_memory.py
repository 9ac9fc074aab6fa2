"""Loading streams: the host never holds the file beside the model."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jpd.checkpoint import param_bytes, read_config
from tests import tiny_models

MIB = 1 << 20
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2000,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
LARGEST_BYTES = 2 * 2048 * 512 * 4  # gate and up in float32

# Loads once to have everything imported and compiled, then again, and prints the growth of the
# resident memory at its peak; pages of files that somebody mapped would count.
CODE = """
import sys
from jpd.checkpoint import load

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(l for l in lines if l.startswith(field)).split()[1]) * 1024

tiny, folder, dtype = sys.argv[1:]
load(tiny, dtype=dtype, show_progress=False)
before = status("VmRSS")
params = load(folder, dtype=dtype, show_progress=False)
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """About 200 MB of float32 in two shards."""
    path = tmp_path_factory.mktemp("large")
    (path / "config.json").write_text(json.dumps(CONFIG))
    random = np.random.default_rng(0)
    tensors = {
        name: random.random(shape, np.float32)
        for name, shape in tiny_models.tensor_shapes(CONFIG).items()
    }
    for shard in (0, 1):
        tiny_models.write_safetensors(
            path / f"part{shard}.safetensors", dict(list(tensors.items())[shard::2]), "float32"
        )
    return path


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_is_the_model_and_two_tensors(dtype, folder, tmp_path):
    tiny = tiny_models.make_checkpoint("llama2", tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", CODE, str(tiny), str(folder), dtype],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    grown, model = int(result.stdout), param_bytes(read_config(folder), dtype)
    print(f"{dtype}: model {model / MIB:.0f} MiB, peak growth {grown / MIB:.0f} MiB")
    # The piece that is converted, and what Python and malloc need besides: 24 MiB.
    assert model < grown < model + 2 * LARGEST_BYTES + 24 * MIB
