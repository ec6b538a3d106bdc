"""The tests on another processor: fastrnn cross-compiled for aarch64, a Python and a torch for it, in qemu.

python tests/aarch64.py torch==2.13.0 [pytest's arguments], as by `./run aarch64`. What it fetches, Debian's
Python and torch, lies in out/aarch64: nothing is installed on this machine, and root is not needed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "out/aarch64"
SYSROOT, SITE, TREE = HOME / "sysroot", HOME / "site", HOME / "tree"
LIBRARIES = SYSROOT / "usr/lib/aarch64-linux-gnu"
COMPILER, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
# A processor without SVE: no kernel of ours uses it, and torch's are no concern here.
PYTHON = [QEMU, "-cpu", "neoverse-n1", "-L", str(SYSROOT), str(SYSROOT / "usr/bin/python3")]
STACKS = ("any_number_of_threads", "masks_and_dtypes", "short_and_wide", "packed_weights_with_strides")
# Of two processes side by side. Left out: long calls, and what starts an interpreter or a compiler.
SELECTIONS = [
    [
        "tests/test_kernels.py",
        *(f"tests/test_stacks.py::test_{name}" for name in STACKS),
        "-k",
        "not 300 and not every_element and not 48 and not 20"
        " and not (any_number and (-2- or -5-)) and not (masks_and_dtypes and not packed)",
    ],
    [
        *(f"tests/test_{name}.py" for name in ("bfloat16", "streaming", "inference", "attention")),
        *(f"tests/test_{name}.py::test_each_instruction_set" for name in ("decoder", "trees")),
        *(
            f"tests/test_vanished.py::test_{name}"
            for name in ("chunks_are_left_out", "bits_are_those_of_the_whole")
        ),
        *("-k", "not every_element and not graphs and not opcheck and not compiles"),
    ],
]
# What torch and the tests import. Torch itself may ask for gigabytes of CUDA libraries.
NEEDED = ["filelock", "fsspec", "jinja2", "networkx", "numpy", "sympy", "typing-extensions"]
NEEDED += ["hypothesis", "pytest"]


def fail(message: str) -> SystemExit:
    return SystemExit(f"aarch64: {message}")


def run(*command: str | Path, **options: Any) -> str:
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, **options)
    if done.returncode:
        raise fail(f"{' '.join(map(str, command))[:200]}: exit status {done.returncode}\n{done.stdout}")
    return done.stdout


def fetch_python() -> None:
    """Debian's arm64 packages, unpacked; apt's state is kept apart from this machine's."""
    print("aarch64: fetching Debian's Python for arm64 (once)", flush=True)
    apt = HOME / "apt"
    for folder in (apt, SYSROOT):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in ("lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True)
    (apt / "status").touch()
    (apt / "apt.conf").write_text(f"""
        APT::Architecture "arm64";
        APT::Architectures {{ "arm64"; }};
        APT::Sandbox::User "";
        Debug::NoLocking "1";
        Dir::State::Lists "{apt}/lists";
        Dir::State::status "{apt}/status";
        Dir::Cache "{apt}/cache";
    """)
    environment = {**os.environ, "APT_CONFIG": str(apt / "apt.conf")}
    # A private archive among the machine's may lack arm64: what counts is whether the packages come.
    subprocess.run(["apt-get", "-qq", "update"], env=environment, check=False)
    options = ("-qq", "-y", "--no-install-recommends", "--download-only")
    try:
        wanted = ("python3-minimal", "libpython3-stdlib", "libstdc++6")
        run("apt-get", *options, "install", *wanted, env=environment)
    except SystemExit as error:
        raise fail(f"{error}\nThe archives in /etc/apt must have arm64, as Debian's do") from None
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        run("dpkg-deb", "-x", package, SYSROOT)
    # Torch asks what processors there are. To qemu a file of the sysroot comes before this machine's.
    one = (
        "processor\t: {}\nFeatures\t: fp asimd crc32 atomics fphp asimdhp asimddp\nCPU implementer\t: 0x41\n"
    )
    one += "CPU architecture: 8\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\nCPU revision\t: 1\n\n"
    (SYSROOT / "proc").mkdir()
    (SYSROOT / "proc/cpuinfo").write_text("".join(one.format(i) for i in range(os.cpu_count() or 1)))
    identity = SYSROOT / "sys/devices/system/cpu/cpu0/regs/identification"
    identity.mkdir(parents=True)
    (identity / "midr_el1").write_text("0x00000000413fd0c1\n")
    shutil.rmtree(apt)


def fetch_packages(torch: str) -> None:
    """torch and pytest for that Python."""
    print("aarch64: fetching torch for aarch64 (once)", flush=True)
    shutil.rmtree(SITE, ignore_errors=True)
    asked = "import os, sys; print('%d.%d' % sys.version_info[:2], os.confstr('CS_GNU_LIBC_VERSION'))"
    python, _, glibc = run(*PYTHON, "-c", asked).split()
    minors = range(int(glibc.split(".")[1]), 16, -1)
    platforms = [*(f"manylinux_2_{minor}_aarch64" for minor in minors), "manylinux2014_aarch64"]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--target", str(SITE)]
    pip += [*(f"--platform={p}" for p in platforms), f"--python-version={python}", "--only-binary=:all:"]
    run(*pip, "--no-deps", torch)
    run(*pip, *NEEDED)


def names(kinds: str, files: Iterable[Path]) -> set[str]:
    """The dynamic symbols of these kinds (see nm), without their versions."""
    command = ["aarch64-linux-gnu-nm", "-D", *map(str, files)]  # fails where one of them is no library
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return set(re.findall(rf" [{kinds}] ([\w$.]+)", listed))


def stand_in_for_cuda() -> None:
    """Where torch is a CUDA build, what its libraries need of others that are not there: empty ones of those
    names, which load one more that has the functions. Each says cudaErrorNoDevice (100)."""
    theirs = sorted((SITE / "torch/lib").glob("*.so*"))
    library = re.compile(r"\.so\b|^python3\.\d+$")
    there = [*theirs, *(p for p in SYSROOT.rglob("*") if library.search(p.name) and p.is_file())]
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", run("aarch64-linux-gnu-readelf", "-d", *theirs)))
    absent = names("U", theirs) - names("A-TV-Ziu", there)
    functions = "".join(f"long {name}(void) {{ return 100; }}\n" for name in sorted(absent))
    build = ("aarch64-linux-gnu-gcc", "-w", "-fno-builtin", "-shared", "-fPIC", "-nostdlib", "-x", "c", "-")
    run(*build, "-o", LIBRARIES / "libabsent.so", "-Wl,-soname,libabsent.so", input=functions)
    link = ("-Wl,--no-as-needed", f"-L{LIBRARIES}", "-labsent")
    for name in sorted(needed - {p.name for p in there}):
        run(*build, "-o", LIBRARIES / name, f"-Wl,-soname,{name}", *link, input="")


def build() -> None:
    """fastrnn beside a copy of its tests."""
    shutil.rmtree(TREE, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "bench", "triton_kernels")
    for folder in ("fastrnn", "tests"):
        shutil.copytree(ROOT / folder, TREE / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", TREE)
    cross = {"CXX": COMPILER, "FASTRNN_CUDA": "0", "FASTRNN_TORCH_DIR": str(SITE / "torch")}
    command = ("setup.py", "-q", "build_ext", "--build-lib", TREE, "--build-temp", HOME / "objects")
    print(run(sys.executable, *command, cwd=ROOT, env={**os.environ, **cross}), end="", flush=True)


def start(*arguments: str, log: Path | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{TREE}:{SITE}", "OMP_NUM_THREADS": "1"}
    output = log.open("w") if log else None
    return subprocess.Popen([*PYTHON, *arguments], cwd=TREE, env=environment, stdout=output, stderr=output)


def test(selections: list[list[str]]) -> bool:
    logs = [HOME / f"tests{i}.log" for i in range(len(selections))] if len(selections) > 1 else [None]
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    processes = [start(*pytest, *s, log=log) for s, log in zip(selections, logs, strict=True)]
    passed = True
    for process, log in zip(processes, logs, strict=True):
        passed = process.wait() == 0 and passed
        if log:
            print(log.read_text(), end="", flush=True)
    return passed


def main(torch: str, arguments: list[str]) -> int:
    # Written last, so that a fetch that was cut off begins anew; what the fetching does is a part of it.
    stamp, wanted = HOME / "fetched", torch + "\n" + Path(__file__).read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        fetch_python()
        fetch_packages(torch)
        stand_in_for_cuda()
        stamp.write_text(wanted)
    build()
    if start("-m", "fastrnn", "info").wait():
        raise fail("fastrnn does not run")
    return 0 if test([arguments] if arguments else SELECTIONS) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
