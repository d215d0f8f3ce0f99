"""The extension as built, what an import says when it does not fit, and what a build says when it cannot be done."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import sslfast
from sslfast import _C
from sslfast.info import info

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    """Run a command with changes to the environment; None removes a variable."""
    environment = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def python(code: str, **env) -> str:
    """The output of a piece of Python in a process of its own."""
    done = run(sys.executable, "-c", code, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ------------------------------------------------------------------------------------------------- the built module


def test_info_says_what_was_built():
    text = info()
    for part in (sslfast.__version__, torch.__version__, _C.build_info()["compiler"], _C.cpu_capability()):
        assert part in text
    assert "CUDA" in text


def test_one_openmp_runtime_in_the_process():
    code = """
        import re, torch
        from sslfast.ops import nt_xent
        nt_xent(torch.randn(64, 8), torch.randn(64, 8))
        maps = open("/proc/self/maps").read()
        print(*sorted(set(re.findall(r"/\\S*/lib(?:gomp|iomp5|omp)\\b\\S*", maps))), sep="\\n")
    """
    found = python("\n".join(line.strip() for line in code.splitlines())).splitlines()
    assert len(found) == 1, found


BUSY_THREADS = """
import os, time, torch
from sslfast.ops import nt_xent

def cpu_time():  # of each thread, in clock ticks
    stats = {task: open(f"/proc/self/task/{task}/stat").read() for task in os.listdir("/proc/self/task")}
    fields = {task: stat.rsplit(")", 1)[1].split() for task, stat in stats.items()}
    return {task: int(f[11]) + int(f[12]) for task, f in fields.items()}

torch.set_num_threads(%d)
z = torch.randn(2, 1024, 128)
nt_xent(*z)
before, end = cpu_time(), time.monotonic() + 0.7
while time.monotonic() < end:
    nt_xent(*z)
used = [ticks - before.get(task, 0) for task, ticks in cpu_time().items()]
print(sum(ticks > max(used) / 4 for ticks in used))
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_runs_on_as_many_threads_as_torch(threads):
    assert int(python(BUSY_THREADS % threads, OMP_WAIT_POLICY="passive")) == threads


needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")


@needs_readelf
def test_module_brings_no_openmp_and_no_search_path():
    dynamic = run("readelf", "-d", "-W", _C.__file__).stdout
    assert "libtorch_cpu" in dynamic
    assert not re.search(r"libgomp|libomp|libiomp", dynamic)
    assert not re.search(r"RPATH|RUNPATH", dynamic)


def test_kernels_have_no_static_initialisers():
    """An initialiser compiled for AVX-512 would run on any machine, and crash; that of <iostream> is harmless."""
    build = [folder for folder in (ROOT / "build").glob(f"torch{torch.__version__}-*") if "address" not in folder.name]
    objects = [path for folder in build for path in folder.glob("CMakeFiles/kernels_*.dir/**/*_kernel.cpp.o")]
    if not objects or shutil.which("objdump") is None:
        pytest.skip("the extension was not built in this folder, or objdump is not installed")
    for path in objects:
        startup = run("objdump", "-d", "-r", "-C", "-j", ".text.startup", path).stdout
        called = set(re.findall(r"R_X86_64_(?:PLT32|REX_GOTPCRELX)\s+(.*?)-0x", startup))
        assert all(name.startswith(("std::ios_base::Init::", "__cxa_atexit")) for name in called), (path, called)
        assert not re.search(r"%[xyz]mm", startup), path


def test_capability_can_be_forced():
    code = "from sslfast import _C; print(_C.cpu_capability())"
    for name in _C.available_cpu_capabilities():
        assert python(code, SSLFAST_CPU_CAPABILITY=name) == name
    assert python(code, SSLFAST_CPU_CAPABILITY=None) == _C.available_cpu_capabilities()[-1]


def test_unknown_capability_is_refused():
    done = run(sys.executable, "-c", "from sslfast import _C; _C.cpu_capability()", SSLFAST_CPU_CAPABILITY="avx9")
    assert done.returncode != 0
    assert "SSLFAST_CPU_CAPABILITY" in done.stderr
    assert "'avx9'" in done.stderr
    assert "default" in done.stderr
    assert "ValueError" in done.stderr


# ------------------------------------------------------------------------------------------------- importing


@pytest.fixture
def package(tmp_path):
    """A copy of the installed package that a test may spoil."""
    folder = Path(sslfast.__file__).parent
    return Path(shutil.copytree(folder, tmp_path / "sslfast", ignore=shutil.ignore_patterns("__pycache__")))


def import_error(package: Path) -> str:
    # Without the finder of an editable install, which would fill gaps of this copy from the source tree.
    script = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in str(f)]; import sslfast"
    done = run(sys.executable, "-c", script, cwd=package.parent, PYTHONPATH=package.parent)
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def test_another_torch_is_a_sentence(package):
    (package / "_built_for.py").write_text('TORCH_VERSION = "2.12.0+cpu"\n')
    error = import_error(package)
    assert "was built for torch 2.12.0+cpu" in error
    assert f"torch {torch.__version__} is installed" in error
    assert "pip install --no-build-isolation" in error


def test_unbuilt_package_is_a_sentence(package):
    (package / "_built_for.py").unlink()
    assert "is not built: build it with `pip install --no-build-isolation" in import_error(package)


def test_unloadable_module_is_a_sentence(package):
    (package / Path(_C.__file__).name).write_bytes(b"no library")
    assert re.search("does not load .*pip install --no-build-isolation", import_error(package))


# ------------------------------------------------------------------------------------------------- building


@pytest.fixture
def source(tmp_path):
    """A copy of what a build needs."""
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "sslfast").mkdir()
    (tmp_path / "sslfast" / "__init__.py").touch()
    return tmp_path


def build_error(source: Path, **env) -> str:
    """The sentence that a build stops with."""
    done = run(sys.executable, "setup.py", "-q", "build_ext", cwd=source, **env)
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr
    # CMake breaks its lines.
    return " ".join((done.stdout + done.stderr).split())


def fake_torch(source: Path, code: str) -> str:
    (source / "fake").mkdir()
    (source / "fake" / "torch.py").write_text(code)
    return str(source / "fake")


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_build_without_torch_stops(source):
    """What an isolated build meets: torch is not in build-system.requires."""
    error = build_error(source, PYTHONPATH=fake_torch(source, "raise ImportError"))
    assert "torch is not installed where the build runs" in error
    assert "pip install --no-build-isolation" in error


def test_build_with_an_old_torch_stops(source):
    error = build_error(source, PYTHONPATH=fake_torch(source, "__version__ = '2.4.1+cpu'"))
    assert "torch 2.11 or newer and found 2.4.1+cpu" in error


def test_build_with_a_compiler_that_is_not_there_stops(source):
    assert "CXX is '/nonexistent/c++', which is no program" in build_error(source, CXX="/nonexistent/c++")


def test_build_without_a_compiler_stops(source):
    tools = source / "tools"
    tools.mkdir()
    executable(tools / "cmake", "#!/bin/sh\nexit 1\n")
    error = build_error(source, CXX=None, PATH=str(tools))
    assert "no C++ compiler was found. Install g++ 11 or newer" in error


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_build_with_an_old_compiler_stops(source):
    old = executable(source / "old-g++", '#!/bin/sh\nexec g++ -U__GNUC__ -D__GNUC__=9 "$@"\n')
    assert "sslfast needs g++ 11 or clang 14 or newer; found GNU 9." in build_error(source, CXX=str(old))


def test_build_refuses_what_cuda_cannot_be(source):
    assert "SSLFAST_CUDA must be auto, on or off, and is 'yes'" in build_error(source, SSLFAST_CUDA="yes")


def test_build_with_cuda_but_without_what_it_needs_stops(source):
    shutil.rmtree(source / "csrc/ops/cuda", ignore_errors=True)
    assert "SSLFAST_CUDA=on, but this version has no CUDA kernels" in build_error(source, SSLFAST_CUDA="on")


@pytest.mark.slow
def test_wheel_is_complete(tmp_path):
    if not (ROOT / "build").exists():
        pytest.skip("the extension was not built in this folder")
    options = ("--no-build-isolation", "--no-deps", "--no-index", "-w", tmp_path)
    done = run(sys.executable, "-m", "pip", "wheel", *options, ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = tmp_path.glob("sslfast-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert f"sslfast/{Path(_C.__file__).name}" in names
    assert "sslfast/_built_for.py" in names
    assert "sslfast/ops/info_nce.py" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sslfast"}, "the wheel holds more than the package"
