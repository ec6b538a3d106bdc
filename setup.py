"""Builds fastrnn._C, one library against torch's stable ABI; the flags are in build_flags.json.

Environment: CXX, CXXFLAGS, LDFLAGS, MAX_JOBS. FASTRNN_INSTRUMENT: options, a sanitizer's, for all but what
this machine lacks the instructions for and, unless FASTRNN_ALL_ISAS is set, kernels for narrower ones than
its widest. The CUDA sources take part where torch is a CUDA build and nvcc is
there; FASTRNN_CUDA=0 leaves them out, FASTRNN_CUDA=1 insists on them, FASTRNN_CUDA_ARCHS="80;90a" names the
GPU architectures. FASTRNN_TORCH_DIR: the torch to build with where it is not this interpreter's, as for
another processor (CXX=aarch64-linux-gnu-g++).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
FLAGS = json.loads((ROOT / "build_flags.json").read_text())
MIN_TORCH = (2, 11)
MIN_COMPILER = {"g++": 11, "clang": 14}
CUDA_ARCHS = "80;86;89;90a;100;120"
# `triton_kernels` and `bench` are too common as top-level names to be installed under them.
MAPPED = {
    f"fastrnn.{name}": name for name in ("bench", "triton_kernels") if (ROOT / name / "__init__.py").exists()
}


def fail(message: str) -> SystemExit:
    return SystemExit(f"\nfastrnn: {message}\n")


def say(text: str) -> None:
    """A line or more in one write: `print` makes two, and lines of compilers side by side would mix."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def words(variable: str, default: str = "") -> list[str]:
    """The words of an environment variable, quoted as in a shell."""
    text = os.environ.get(variable, default)
    try:
        return shlex.split(text)
    except ValueError as error:
        raise fail(f"{variable}={text}: {error}") from None


def output(*command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, cwd="/", stdin=subprocess.DEVNULL)
    return run.stdout if run.returncode == 0 else ""


def find_torch() -> Path:
    """torch's folder, without importing it. -I: pip's isolated build hides the environment's packages by
    PYTHONPATH, which -I ignores; without -I second, for a torch in the user's site or on PYTHONPATH."""
    if os.environ.get("FASTRNN_TORCH_DIR"):
        return Path(os.environ["FASTRNN_TORCH_DIR"])
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
    for options in (["-I"], []):
        found = output(sys.executable, *options, "-c", code).strip()
        if found:
            return Path(found).parent
    raise fail(
        f"PyTorch is not installed for {sys.executable}: run `pip install torch==2.13.0` (2.11 or newer) "
        "first; if it is installed, add --no-build-isolation (pip, uv) or --no-isolation (build)"
    )


def check_torch(torch: Path) -> str:
    text = (torch / "version.py").read_text()
    match = re.search(r"__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", text)
    if not match or (int(match[2]), int(match[3])) < MIN_TORCH:
        found = match[1] if match else "an unknown version"
        raise fail(f"PyTorch 2.11 or newer is needed, {found} is installed in {torch}")
    return text


def has_teams(torch: Path) -> bool:
    """Whether each caller of torch's parallel loops has threads of its own: with OpenMP, as in the wheels."""
    return "#define AT_PARALLEL_OPENMP 0" not in (torch / "include/ATen/Config.h").read_text()


@dataclass
class Compiler:
    command: list[str]
    target: str
    version: str


def find_compiler() -> Compiler:
    named = words("CXX")
    candidates = [named] if named else [["g++"], ["c++"], ["clang++"]]
    command = next((c for c in candidates if shutil.which(c[0])), None)
    if command is None:
        looked = ", ".join(c[0] for c in candidates)
        raise fail(
            f"no C++ compiler ({looked} not found): install g++ 11 or clang 14, or newer "
            "(Debian, Ubuntu: apt install g++)"
        )
    macros = dict(re.findall(r"#define (\S+) (.*)", output(*command, "-dM", "-E", "-x", "c++", "/dev/null")))
    kind = "clang" if "__clang_major__" in macros else "g++"
    major = int(macros.get("__clang_major__" if kind == "clang" else "__GNUC__", 0))
    if major < MIN_COMPILER[kind]:
        raise fail(
            f"{command[0]} is {kind} {major}: g++ 11 or clang 14, or newer, is needed (set CXX to choose)"
        )
    target = next((t for t in ("x86_64", "aarch64") if f"__{t}__" in macros), "other")
    return Compiler(command, target, output(*command, "--version"))


def find_cuda(torch_version: str) -> tuple[str, Path] | None:
    """nvcc and the toolkit's folder; None where CUDA stays out of the library. torch_version: its
    version.py."""
    wish = os.environ.get("FASTRNN_CUDA", "auto")
    if wish == "auto" and not re.search(r"^cuda\b[^=\n]*= ['\"]", torch_version, re.MULTILINE):
        return None  # torch has no use for them
    sources = list((ROOT / "csrc/cuda").glob("*.cu"))
    if wish == "1" and not sources:
        raise fail("FASTRNN_CUDA=1, but this version of fastrnn has no CUDA sources")
    if wish == "0" or not sources:
        return None
    homes = [Path(h) for h in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if h]
    nvcc = shutil.which("nvcc") or next(
        (str(h / "bin/nvcc") for h in homes if (h / "bin/nvcc").exists()), None
    )
    if nvcc:
        homes.insert(0, Path(nvcc).resolve().parents[1])
        home = next((h for h in homes if (h / "include/cuda_runtime.h").exists()), None)
        if home:
            return nvcc, home
    if wish == "1":
        raise fail("FASTRNN_CUDA=1, but no CUDA toolkit was found: put nvcc on PATH or set CUDA_HOME")
    return None


def runs(options: list[str], unknown: bool = True) -> bool:
    """Whether this machine has the instructions of these options; `unknown` where it does not say."""
    flags = re.search(r"^flags\s*:(.*)", output("cat", "/proc/cpuinfo"), re.MULTILINE)
    needed = {o.removeprefix("-m").replace("-", "") for o in options if "=" not in o}
    return needed <= {flag.replace("_", "") for flag in flags[1].split()} if flags else unknown


def instrumented(isa: str) -> bool:
    """Of the kernels for several x86-64 instruction sets, whether FASTRNN_INSTRUMENT is for those of this."""
    widths = ("baseline", "avx2", "avx512")
    wider = widths[widths.index(isa) + 1 :] if isa in widths else ()
    if any(runs(FLAGS["isa"][w], unknown=False) for w in wider) and not os.environ.get("FASTRNN_ALL_ISAS"):
        return False
    return isa not in FLAGS["isa"] or runs(FLAGS["isa"][isa])


@dataclass
class Plan:
    """What to compile, each source with its whole command, and what to link."""

    units: list[tuple[Path, list[str]]] = field(default_factory=list)
    link: list[str] = field(default_factory=list)


def make_plan(compiler: Compiler, torch: Path, torch_version: str) -> Plan:
    include = [f"-isystem{torch / 'include'}"]
    pool = [] if has_teams(torch) else ["-DFASTRNN_ONE_POOL"]
    common = [*compiler.command, *FLAGS["common"], *pool, *include, *words("CXXFLAGS")]
    instrument, x86 = words("FASTRNN_INSTRUMENT"), compiler.target == "x86_64"
    plan = Plan(link=[f"-L{torch / 'lib'}", *FLAGS["link"], *words("LDFLAGS", "-s")])
    isa: list[tuple[Path, list[str]]] = []
    for source in sorted([*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc/cpu").glob("*.cpp")]):
        name = source.stem.rpartition("_")[2]
        command = [*common, *(instrument if not x86 or instrumented(name) else [])]
        if name not in FLAGS["isa"]:
            plan.units.append((source, [*command, "-c"]))
        elif x86:
            isa.append((source, [*command, *FLAGS["isa"][name], "-c"]))
    # Last: of an inline function that several units emit, the linker keeps the first copy, and that one must
    # run on every machine.
    plan.units += sorted(isa, key=lambda unit: list(FLAGS["isa"]).index(unit[0].stem.rpartition("_")[2]))
    cuda = find_cuda(torch_version)
    if cuda:
        nvcc, home = cuda
        archs = os.environ.get("FASTRNN_CUDA_ARCHS", CUDA_ARCHS).split(";")
        gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        newest = max((a for a in archs if a.isdecimal()), key=int, default=None)
        if newest:  # for GPUs to come; what ends in a letter is for one architecture alone
            gencode.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        options = [*FLAGS["cuda"], "-Xcompiler=-fPIC,-fvisibility=hidden", *gencode]
        # First in line: they take the longest.
        plan.units += [(s, [nvcc, *options, "-c"]) for s in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
        plan.link += [f"-L{home / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return plan


def headers() -> list[Path]:
    return sorted(p for pattern in ("*.h", "*.cuh", "*.inc") for p in (ROOT / "csrc").rglob(pattern))


def included(source: Path) -> list[Path]:
    """The source, and all that it includes of ours."""
    found, left = set(), [source]
    while left:
        file = left.pop()
        if file in found:
            continue
        found.add(file)
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', file.read_text(), re.MULTILINE):
            folders = (file.parent, ROOT / "csrc", ROOT / "csrc" / "cuda", ROOT)  # those of build_flags.json
            left += [(folder / name).resolve() for folder in folders if (folder / name).is_file()][:1]
    return sorted(found)


class BuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if not sys.platform.startswith("linux"):
            raise fail(f"{sys.platform} is not supported: fastrnn builds on Linux (x86-64, aarch64)")
        import fcntl  # here: other platforms have none, and get the message above

        torch = find_torch()
        torch_version = check_torch(torch)
        compiler = find_compiler()
        plan = make_plan(compiler, torch, torch_version)
        if not plan.units:
            raise fail("no sources under csrc/: an incomplete checkout or archive")
        # An object's name is a digest of all that went into it, so that a stale one cannot be picked up.
        compiled_with = (torch_version + compiler.version).encode()
        temporary = Path(self.build_temp)
        if self.editable_mode:  # pip's is a new folder: all that an in-place build has would be compiled anew
            temporary = ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
        objects = temporary.absolute() / "fastrnn"
        objects.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        with (objects / "lock").open("w") as lock:
            # Two builds of one checkout at a time would tidy away each other's objects.
            fcntl.flock(lock, fcntl.LOCK_EX)
            names = [self.object_path(objects, unit, hashlib.sha256(compiled_with)) for unit in plan.units]
            wish = os.environ.get("MAX_JOBS") or str(max(2, os.cpu_count() or 1))
            if not wish.isdecimal() or int(wish) < 1:
                raise fail(f"MAX_JOBS must be a number of 1 or more, got {wish!r}")
            jobs = int(wish)
            with ThreadPoolExecutor(jobs) as pool:
                # Those that take the longest first: the kernels, and the vector units of the rest.
                work = list(reversed(list(zip(plan.units, names, strict=True))))
                work.sort(
                    key=lambda item: item[0][0].name.startswith("kernels_") or item[0][0].suffix == ".cu",
                    reverse=True,
                )
                results = list(pool.map(lambda item: self.compile(*item), work))
            if not all(results):
                raise fail("the C++ compiler failed (its messages are above)")
            for old in set(objects.glob("*.o")) - set(names):
                old.unlink()
            part = target.with_suffix(".part")
            self.execute([*compiler.command, "-shared", *map(str, names), *plan.link, "-o", str(part)])
            part.replace(target)  # a process that has the old library loaded keeps it

    def run(self) -> None:
        for variable in ("CXX", "CXXFLAGS", "FASTRNN_INSTRUMENT", "LDFLAGS"):
            words(variable)  # before setuptools reads them, with a traceback for an open quote
        super().run()
        if self.inplace:
            for package, folder in MAPPED.items():
                link = ROOT / package.replace(".", "/")
                if not link.exists():
                    link.unlink(missing_ok=True)
                    link.symlink_to(f"../{folder}")

    @staticmethod
    def object_path(folder: Path, unit: tuple[Path, list[str]], digest: hashlib._Hash) -> Path:
        source, command = unit
        digest.update("\0".join(command).encode())
        for file in included(source):
            digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
        return folder / f"{source.stem}-{digest.hexdigest()[:20]}.o"

    def compile(self, unit: tuple[Path, list[str]], target: Path) -> bool:
        source, command = unit
        if target.exists():
            return True
        say(f"compiling {source.relative_to(ROOT)}")
        part = target.with_suffix(".part")
        done = self.execute([*command, str(source.relative_to(ROOT)), "-o", str(part)], check=False)
        if done:
            part.replace(target)
        return done

    @staticmethod
    def execute(command: list[str], check: bool = True) -> bool:
        run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if run.stdout or run.returncode:
            say(f"{shlex.join(command)}\n{run.stdout}".rstrip())
        if check and run.returncode:
            raise fail("the linker failed (its messages are above)")
        return run.returncode == 0


class BuildPy(build_py):
    def run(self) -> None:
        if not self.editable_mode:  # a module removed from the sources must not live on in the next wheel
            shutil.rmtree(Path(self.build_lib) / "fastrnn", ignore_errors=True)
        super().run()


setup(
    packages=sorted({*find_packages(include=["fastrnn", "fastrnn.*"]), *MAPPED}),
    package_dir=MAPPED,
    package_data={"fastrnn": ["py.typed"], "fastrnn.bench": ["peaks.cpp", "results/README.md"]},
    ext_modules=[
        Extension(
            "fastrnn._C",
            [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*.cpp"))],
            depends=[str(p.relative_to(ROOT)) for p in headers()],
            language="c++",
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
