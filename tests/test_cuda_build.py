"""What nvcc makes of the CUDA kernels: no spills, the planned number of blocks, tensor cores, 16-byte copies."""

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "csrc/ops/cuda").glob("*_kernel.cu"))
ARCHITECTURES = ["sm_80", "sm_90a"]
MATRIX_KERNELS = r"(info_nce|sigmoid_loss|similarity_lse)_(forward|backward)_kernel"
# Kernels whose registers leave room for two blocks of 256 threads on a multiprocessor. With wgmma, of products of half
# precision: info_nce with the usual kind of softmax, forward of similarity_lse by rows alone, and gradients of up to
# 128 columns a block.
TWO_BLOCKS = {
    "sm_80": [r"augment_(forward|grey)_kernel"],
    "sm_90a": [
        r"augment_(forward|grey)_kernel",
        r"info_nce_forward_kernel.*Float16Math.*Lb1E",
        r"info_nce_backward_kernel.*Float16MathELi128ELb1E",
        r"similarity_lse_forward_kernel.*Float16MathELb0E",
        r"(similarity_lse_backward|sigmoid_loss_forward)_kernel.*Float16MathELi128E",
    ],
}


def program(name: str) -> str:
    """A program of the CUDA toolkit, which may also come with torch's triton."""
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin" / name if spec and spec.origin else Path()
    found = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}") or shutil.which(bundled)
    if found is None:
        pytest.skip(f"no {name} on this machine")
    return found


@functools.cache
def compile_kernel(source: Path, architecture: str, folder: Path) -> tuple[Path, str]:
    """→ (cubin, what ptxas -v says)"""
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    command = [program("nvcc"), "-std=c++20", "-O3", f"-I{ROOT}", f"-arch={architecture}", "-Xptxas", "-v", "-cubin"]
    done = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    return cubin, done.stderr


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cubins")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS, ids=lambda p: p.stem)
def test_no_spills_and_two_blocks_where_planned(folder, source, architecture):
    _, log = compile_kernel(source, architecture, folder)
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    kernels = re.findall(pattern, log, re.S)
    assert kernels
    for name, spilled, registers in kernels:
        assert int(spilled) == 0, f"{name}: {spilled} bytes spilled"
        if any(re.search(planned, name) for planned in TWO_BLOCKS[architecture]):
            assert 2 * 256 * int(registers) <= 65536, f"{name}: {registers} registers"


@pytest.fixture(scope="session")
def sass(folder):
    """→ a function: source, architecture → what each kernel of it is there, {name: instructions}"""

    @functools.cache
    def disassemble(source: str, architecture: str = "sm_80") -> dict[str, str]:
        cubin, _ = compile_kernel(ROOT / "csrc/ops/cuda" / source, architecture, folder)
        command = [program("cuobjdump"), "-sass", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return dict(re.findall(r"Function : (\w+)(.*?)(?=Function : |\Z)", text, re.S))

    return disassemble


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", ["info_nce_kernel.cu", "sigmoid_loss_kernel.cu", "similarity_lse_kernel.cu"])
def test_tensor_cores(folder, sass, source, architecture):
    matrix = {name: code for name, code in sass(source, architecture).items() if re.search(MATRIX_KERNELS, name)}
    assert matrix
    for name, code in matrix.items():
        assert re.search(r"LDGSTS\.E\.BYPASS\S*\.128", code), name
        if architecture == "sm_90a":
            assert "HGMMA.64x" in code, name
            assert "HMMA.16" not in code, name
        else:
            assert set(re.findall(r"HMMA\.(\d+)\.F32", code)) == {"16816"}, name
            assert "LDSM.16.M88.4" in code, name
    # (C7510 … C7515) Potential Performance Loss: wgmma instructions wait for each other
    assert "Potential Performance Loss" not in compile_kernel(ROOT / "csrc/ops/cuda" / source, architecture, folder)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "kernel", "instructions"),
    [
        ("info_nce_kernel.cu", "prepare_kernel", [r"LDG\.E\.128", r"STG\.E\.128"]),
        ("info_nce_kernel.cu", "finish_kernel", [r"LDG\.E\.128", r"STG\.E\.128"]),
        ("similarity_lse_kernel.cu", "pack_kernel", [r"LDG\.E\.128", r"STG\.E\.128"]),
        ("similarity_lse_kernel.cu", "finish_kernel", [r"LDG\.E\.128", r"STG\.E\.128"]),
        ("augment_kernel.cu", r"augment_forward_kernel.*Lb1E", [r"LDGSTS\.E\.BYPASS\S*\.128", r"STG\.E\.128"]),
        ("augment_kernel.cu", r"augment_forward_kernel.*Lb0E", [r"STG\.E\.128"]),
        ("augment_kernel.cu", "augment_grey_kernel", [r"LDGSTS\.E\.BYPASS\S*\.128"]),
    ],
)
def test_wide_copies(sass, source, kernel, instructions):
    codes = {name: code for name, code in sass(source).items() if re.search(kernel, name)}
    assert codes
    for name, code in codes.items():
        assert all(re.search(instruction, code) for instruction in instructions), name
