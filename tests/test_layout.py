"""The rules of the tree: one op, one name, eight places; and nothing imports upwards."""

import ast
import re
from pathlib import Path

import pytest

from sslfast import selftest

ROOT = Path(__file__).resolve().parent.parent
OPS = sorted(path.stem for path in (ROOT / "csrc/ops").glob("*.h"))

PLACES = [
    "csrc/ops/{op}.h",
    "csrc/ops/{op}.cpp",
    "csrc/ops/cpu/{op}_kernel.cpp",
    "csrc/ops/cuda/{op}_kernel.cu",
    "sslfast/ops/{op}.py",
    "sslfast/reference/{op}.py",
    "tests/test_{op}.py",
    "benchmarks/bench_{op}.py",
]

# What a module may import of sslfast: its own package, and what stands above its own line.
LAYERS = [
    {"_built_for", "_C"},
    {"reference"},
    {"ops"},
    {"distributed"},
    {"losses", "transforms", "schedulers"},
    {"patch"},
    {"gan", "models", "unet"},
    {"training"},
    {"evaluation"},
    {"methods"},
    {"cli", "info"},
    {"selftest"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "sslfast").rglob("*.py")
    if path != ROOT / "sslfast/__init__.py" and path.name != "_built_for.py"
)


def test_there_are_ops():
    assert "info_nce" in OPS


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("op", OPS)
def test_op_is_in_its_eight_places(op, place):
    assert (ROOT / place.format(op=op)).is_file()


@pytest.mark.parametrize("op", OPS)
def test_selftest_checks_the_op(op):
    assert op in selftest.CHECKS


@pytest.mark.parametrize(
    ("pattern", "name_of_op"),
    [
        ("csrc/ops/*.cpp", r"(.+)\.cpp"),
        ("csrc/ops/cpu/*", r"(.+)_kernel\.cpp"),
        ("csrc/ops/cuda/*", r"(.+)_kernel\.(?:cu|h)"),
        ("sslfast/ops/[!_]*.py", r"(.+)\.py"),
        ("sslfast/reference/[!_]*.py", r"(.+)\.py"),
        ("benchmarks/bench_*.py", r"bench_(.+)\.py"),
    ],
)
def test_files_of_ops_carry_the_name_of_an_op(pattern, name_of_op):
    for path in ROOT.glob(pattern):
        match = re.fullmatch(name_of_op, path.name)
        assert match, f"{path.relative_to(ROOT)}: expected a name like {name_of_op}"
        # A kernel may take several files: info_nce_kernel.cpp, info_nce_bf16_kernel.cpp.
        assert any(match[1] == op or ("_kernel" in name_of_op and match[1].startswith(op + "_")) for op in OPS), path


def imported_modules(path: Path) -> set[str]:
    """The modules of sslfast that a file imports, anywhere in it, such as "ops.info_nce"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write the whole name of the module that you import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("sslfast.") for name in names if name.startswith("sslfast.")}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_upwards(module):
    own = module.removeprefix("sslfast/").removesuffix(".py").split("/")[0]
    assert own in RANK, f"{module}: give it a line in LAYERS"
    for name in imported_modules(ROOT / module):
        top = name.split(".")[0]
        if top in RANK:  # else a name of the package itself, such as sslfast.__version__
            assert top == own or RANK[top] < RANK[own], f"{module} imports sslfast.{name}, which stands above it"


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("sslfast/methods/")])
def test_methods_import_no_other_method(module):
    assert not {name for name in imported_modules(ROOT / module) if name.startswith("methods")}


def test_only_bindings_know_pybind11():
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.name != "bindings.cpp":
            assert not re.search(r"pybind11|torch/extension\.h", path.read_text()), path


def test_kernels_know_no_tensors():
    for path in [*(ROOT / "csrc/ops/cpu").iterdir(), *(ROOT / "csrc/ops").glob("cuda/*")]:
        code = re.sub(r"//.*", "", path.read_text())
        assert not re.search(r"\bTensor\b|<torch/|ATen/ATen\.h", code), path
