"""The kernels are compiled for GPUs, which needs none, and their machine code is inspected."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vae import triton_kernels as kernels

TYPES = {name: "*fp32" for name in ("mean_ptr", "m2_ptr", "center_ptr", "scale_ptr")} | {"eps": "fp32"}


def inspect(kernel, capability, constants):
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else TYPES.get(name, "*fp16" if "_ptr" in name else "i32")
        if name not in constants and (name.endswith(("_ptr", "_stride"))):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}).asm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {
        "kernel": f"{kernel.__name__} {constants} for {capability}",
        "loads": len(re.findall(r"ld\\.global\\.v4\\.b32", code["ptx"])),
        "stores": len(re.findall(r"st\\.global\\.v4\\.b32", code["ptx"])),
        "stack": int(re.search(r"STACK:(\\d+)", usage)[1]),
        "local": int(re.search(r"LOCAL:(\\d+)", usage)[1]),
    }


found = []
for capability in (80, 90):
    for channels in (128, 512, 96):
        tile = {"CHANNELS": channels, "TILE_ROWS": 4096 // max(128, channels), "TILE_CHANNELS": max(128, channels)}
        no_moments = {"mean_ptr": None, "m2_ptr": None}
        merged = {"CHANNELS": channels, "PER_GROUP": channels // 32, "TILE_BLOCKS": 64, "TILE_CHANNELS": 16}
        found += [
            inspect(kernels.sum_moments, capability, tile),
            inspect(kernels.normalize, capability, {**tile, "SILU": True}),
            inspect(kernels.normalize, capability, {**tile, "SILU": False, "rows": 1, "tiles": 1}),
            inspect(kernels.add_residual, capability, {**tile, "HAS_BIAS": True, "PADDED": False}),
            inspect(kernels.add_residual, capability, {**tile, **no_moments, "HAS_BIAS": True, "PADDED": True}),
            inspect(kernels.merge_moments, capability, {**merged, "HAS_BIAS": True}),
            inspect(kernels.merge_moments, capability, {**merged, "HAS_BIAS": False, "bias_ptr": None, "blocks": 1}),
        ]
print(json.dumps(found))
"""


def test_the_kernels_access_memory_in_128_bits_and_spill_nothing(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    script = tmp_path / "inspect_kernels.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kernels = json.loads(run.stdout)
    assert len(kernels) == 2 * 3 * 7
    for kernel in kernels:
        assert kernel["stack"] == kernel["local"] == 0, kernel
        if "merge" not in kernel["kernel"]:
            assert kernel["loads"] >= 4, kernel
        if kernel["kernel"].startswith(("normalize", "add")):
            assert kernel["stores"] >= 4, kernel
