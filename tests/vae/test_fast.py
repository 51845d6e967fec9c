import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, sys, torch
from tests.conftest import MICRO
from vae import AutoencoderKL
from vae.fast import disable_malloc_trim
torch.set_num_threads(1)
if sys.argv[1] == "disable":
    assert disable_malloc_trim()
model, x = AutoencoderKL(**MICRO).eval(), torch.zeros(1, 3, 256, 256)
with torch.inference_mode():
    for _ in range(3):
        model.encode(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        model.encode(x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_an_image_causes_far_fewer_page_faults() -> None:
    root = Path(__file__).parents[2]
    faults = [
        int(subprocess.run([sys.executable, "-c", SCRIPT, mode], cwd=root, capture_output=True, check=True).stdout)
        for mode in ("disable", "default")
    ]
    assert 5 * faults[0] < faults[1]
