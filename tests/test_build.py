"""The library, the wheel and the sdist are what an installation needs."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastrnn
from fastrnn.kernels import instruction_sets

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "build_flags.json",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
)
FOLDERS = ("csrc", "fastrnn", "bench", "triton_kernels")


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=env)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is tracked, with the objects already compiled left out."""
    copy = tmp_path_factory.mktemp("checkout")
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    for name in FOLDERS:
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, copy / name, ignore=skip, symlinks=True)
    for name in ("bench", "triton_kernels"):  # an in-place build's links
        (copy / "fastrnn" / name).unlink(missing_ok=True)
    for name in SOURCES:
        shutil.copy(ROOT / name, copy / name)
    return copy


def test_version_is_one() -> None:
    text = (ROOT / "fastrnn/_version.py").read_text()
    assert re.fullmatch(r'__version__ = "(\d+\.\d+\.\d+)"\n', text)
    assert fastrnn.__version__ == text.split('"')[1]
    assert f"## [{fastrnn.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_runtime() -> None:
    """A second runtime brings a second pool of threads, which fights the first one for the cores."""
    code = """
import re, torch, fastrnn
y, _ = fastrnn.LSTM(16, 16)(torch.randn(5, 3, 16))
y.sum().backward()
maps = open("/proc/self/maps").read()
print(*sorted(set(re.findall(r"/\\S*lib[gi]?omp\\d?[^/\\s]*\\.so\\S*", maps))))
"""
    run = python("-c", code)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.split()) == 1, run.stdout


def test_import_leaves_the_tools_alone() -> None:
    """`import fastrnn` needs torch alone: neither the benchmarks nor the extras' packages."""
    code = "import sys, torch; old = set(sys.modules); import fastrnn; print(*set(sys.modules) - old)"
    run = python("-c", code)
    assert run.returncode == 0, run.stderr
    loaded = set(run.stdout.split())
    assert not loaded & {"fastrnn.bench", "fastrnn.lm", "pytest", "matplotlib", "tqdm", "onnxruntime"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
def test_library_needs_no_python() -> None:
    """The stable ABI's promise: no symbol of CPython, so that one library serves every Python and torch."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    library = ROOT / "fastrnn/_C.abi3.so"
    if not library.exists():
        pytest.skip("not an in-place build")
    undefined = subprocess.run([nm, "-D", "--undefined-only", library], capture_output=True, text=True).stdout
    names = {line.split()[-1] for line in undefined.splitlines()}
    assert any(name.startswith("aoti_torch_") or name.startswith("torch_") for name in names)
    assert not [name for name in names if name.startswith(("Py", "_Py"))]
    # Of the C++ torch libraries nothing may be needed: those symbols change from version to version.
    assert not [name for name in names if re.match(r"_ZNK?(2at|3c10|5torch)", name)]


@pytest.mark.slow
@pytest.mark.parametrize("every", [True, False], ids=["all", "widest"])
def test_what_can_run_is_instrumented(every: bool) -> None:
    """The build and the library agree on what this machine has the instructions for, and which are widest."""
    code = (
        "import runpy, sys; sys.argv = ['setup.py', '--quiet', '--version']; it = runpy.run_path('setup.py');"
        "print(*[isa for isa in ['baseline', *it['FLAGS']['isa']] if it['instrumented'](isa)])"
    )
    told = python("-c", code, FASTRNN_ALL_ISAS="1" if every else "")
    assert told.returncode == 0, told.stderr
    instrumented, used = {*told.stdout.splitlines()[-1].split()}, {*instruction_sets()}
    if not every:
        widths = ["baseline", "avx2", "avx512"]
        used -= {*sorted(used & {*widths}, key=widths.index)[:-1]}
    assert used <= instrumented
    # The system may not lend AMX; other processors have none of these.
    assert instrumented - used <= {"amx"} or platform.machine() != "x86_64"


def test_wheel_and_sdist(checkout: Path, tmp_path: Path) -> None:
    built = python(
        "-c", f"from setuptools import build_meta as b; b.build_sdist({str(tmp_path)!r})", cwd=checkout
    )
    assert built.returncode == 0, built.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "unpacked", filter="data")
    missing = {p.relative_to(checkout).as_posix() for p in (checkout / "csrc").rglob("*.*")} - names
    assert not missing, "the sdist cannot build without these"
    assert {*SOURCES, "bench/test_speed.py", "fastrnn/py.typed"} <= names
    assert not [n for n in names if n.endswith((".so", ".o", ".pyc")) or n.startswith("fastrnn/bench")]

    # From the sdist's own files: what it lacks, the wheel lacks. An in-place build's objects are named by a
    # digest of all that went into them: with those, what the sdist has otherwise is what is compiled.
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    compiled = list((ROOT / "build").glob("temp.*"))
    for folder in compiled:
        shutil.copytree(folder, unpacked / "build" / folder.name)
    code = f"from setuptools import build_meta as b; b.build_wheel({str(tmp_path)!r})"
    built = python("-c", code, cwd=unpacked, **({} if compiled else {"CXXFLAGS": "-O0"}))
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(rf"fastrnn-{re.escape(fastrnn.__version__)}-cp310-abi3-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"fastrnn-{fastrnn.__version__}.dist-info/METADATA").decode()
    modules = {p.relative_to(checkout).as_posix() for p in (checkout / "fastrnn").rglob("*.py")}
    needed = modules | {"fastrnn/_C.abi3.so", "fastrnn/py.typed", "fastrnn/bench/test_speed.py"}
    assert needed <= names
    assert {name.partition("/")[0] for name in names} == {
        "fastrnn",
        f"fastrnn-{fastrnn.__version__}.dist-info",
    }
    required = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line
    ]
    assert required == ["Requires-Dist: torch>=2.11"]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler (no-such-compiler not found)"),
        ({"CXX": "false"}, "g++ 11 or clang 14, or newer, is needed"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS must be a number of 1 or more, got 'many'"),
    ],
    ids=["compiler missing", "compiler useless", "jobs"],
)
def test_build_says_what_is_missing(checkout: Path, environment: dict[str, str], said: str) -> None:
    run = python("setup.py", "-q", "build_ext", cwd=checkout, **environment)
    assert run.returncode != 0
    assert said in run.stderr
    assert "Traceback" not in run.stderr


def write_sources(folder: Path, **files: str) -> None:
    """Files under csrc/, a / in their names for __ and a . for the last _."""
    for name, text in files.items():
        path = folder / "csrc" / ".".join(name.replace("__", "/").rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_what_a_source_includes(checkout: Path, tmp_path: Path) -> None:
    for name in ("setup.py", "build_flags.json"):
        shutil.copy(checkout / name, tmp_path)
    write_sources(
        tmp_path,
        cpu__a_cpp='#include <vector>\n#include "near.h"\n  #  include "torch/far.h"\n// #include "said.h"\n',
        cpu__near_h='#pragma once\n#include "../up.h"\n',
        up_h='#include "cpu/round.h"\n',  # by csrc, which is among the folders searched
        cpu__round_h='#include "near.h"\n',
        cpu__said_h="",
        near_h="",  # the one beside a.cpp comes first
        b_cpp="",
    )
    code = """
import sys, setuptools
setuptools.setup = lambda **options: None
import setup
for name in sys.argv[1:]:
    print(*(p.relative_to(setup.ROOT / "csrc") for p in setup.included(setup.ROOT / "csrc" / name)))
"""
    run = python("-c", code, "cpu/a.cpp", "b.cpp", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["cpu/a.cpp cpu/near.h cpu/round.h up.h", "b.cpp"]


def test_edited_header_is_compiled_again(checkout: Path, tmp_path: Path) -> None:
    """Objects are named by what went into them: the old one must not be found again, and no other is made."""
    for name in ("setup.py", "pyproject.toml", "build_flags.json", "README.md", "LICENSE"):
        shutil.copy(checkout / name, tmp_path)
    (tmp_path / "fastrnn").mkdir()
    for name in ("__init__.py", "_version.py"):
        shutil.copy(checkout / "fastrnn" / name, tmp_path / "fastrnn")
    write_sources(
        tmp_path,
        cpu__value_h="",
        step_h='#include "cpu/value.h"\n',
        cpu__ops_cpp='#include "../step.h"\n#define API __attribute__((visibility("default")))\n'
        'extern "C" API int value() { return VALUE; }\n',
        other_cpp="int other() { return 0; }\n",
    )
    compiled: list[list[str]] = []
    load = "import ctypes, torch; print(ctypes.CDLL('fastrnn/_C.abi3.so').value())"
    for expected in ("20", "21", "20"):
        write_sources(tmp_path, cpu__value_h=f"#define VALUE {expected}\n")
        built = python("setup.py", "-q", "build_ext", "--inplace", cwd=tmp_path)
        assert built.returncode == 0, built.stderr
        assert python("-c", load, cwd=tmp_path).stdout.strip() == expected
        compiled.append(sorted(re.findall(r"^compiling csrc/(.*)$", built.stdout, re.MULTILINE)))
    assert compiled == [["cpu/ops.cpp", "other.cpp"], ["cpu/ops.cpp"], ["cpu/ops.cpp"]]


@pytest.mark.parametrize("value", [0, 1])
def test_teams_where_each_caller_has_threads_of_its_own(checkout: Path, tmp_path: Path, value: int) -> None:
    """Else two callers' teams could wait for each other: without OpenMP a call has one thread."""
    for name in ("setup.py", "build_flags.json"):
        shutil.copy(checkout / name, tmp_path)
    config = tmp_path / "torch/include/ATen/Config.h"
    config.parent.mkdir(parents=True)
    config.write_text(f"#define AT_PARALLEL_OPENMP {value}\n#define AT_PARALLEL_NATIVE {1 - value}\n")
    write_sources(tmp_path, a_cpp="")
    code = """
import setuptools
setuptools.setup = lambda **options: None
import setup
(_, command), = setup.make_plan(setup.find_compiler(), setup.ROOT / "torch", "").units
print("-DFASTRNN_ONE_POOL" in command)
"""
    run = python("-c", code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{value == 0}\n"
