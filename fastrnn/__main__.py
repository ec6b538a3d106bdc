"""`python -m fastrnn info|bench|tune|lm|diagnose`."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

from .lm.errors import USER_ERROR, LostProcessError, Parser, UserError

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def _parser() -> Parser:
    from ._version import __version__
    from .lm.cli import add_diagnose, add_parser

    parser = Parser(
        prog="python -m fastrnn", description="Faster LSTM, GRU and RNN for PyTorch.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,bench,tune,lm,diagnose}")
    info = commands.add_parser("info", help="versions, build, instruction sets, GPUs, kernels")
    info.set_defaults(run=_info)
    # The benchmark reads its own options, --help included.
    bench = commands.add_parser("bench", help="speed against torch.nn on this machine", add_help=False)
    bench.set_defaults(run=_bench)
    tune = commands.add_parser("tune", help="the fastest Triton configuration of given layers on this GPU")
    tune.set_defaults(run=_tune)
    _tune_options(tune)
    add_parser(commands)
    add_diagnose(commands)
    return parser


def _info(args: argparse.Namespace) -> int:
    from . import info

    print(info.report())
    return 0


def _bench(args: argparse.Namespace) -> int:
    try:
        bench = importlib.import_module("fastrnn.bench")
    except ImportError as error:
        if error.name is not None and not error.name.startswith("fastrnn"):
            raise UserError(
                f"bench needs {error.name}: in fastrnn's clone, pip install -e '.[bench]'"
            ) from error
        raise UserError("this installation of fastrnn has no benchmarks") from error
    if not hasattr(bench, "main"):  # an empty folder imports as a namespace package
        raise UserError("this installation of fastrnn has no benchmarks")
    return int(bench.main(args.rest))


def _tune_options(parser: argparse.ArgumentParser) -> None:
    from .reference import CELLS

    parser.add_argument("--cell", choices=CELLS, default="lstm")
    parser.add_argument("--hidden", type=int, nargs="+", required=True, metavar="H", help="hidden sizes")
    parser.add_argument("--batch", type=int, nargs="+", default=[16], metavar="B")
    parser.add_argument("--steps", type=int, default=256, metavar="T", help="length to measure with")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--proj-size", type=int, default=0, metavar="P")
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--forward", action="store_true", help="for inference, else for training")


def _tune(args: argparse.Namespace) -> int:
    from .backends import TRITON_MISSING

    if TRITON_MISSING is not None:
        raise UserError(f"tune needs the triton backend: {TRITON_MISSING}")
    tune = importlib.import_module("fastrnn.triton_kernels.tune")
    tune.run(args)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; only --help and wrong options raise SystemExit."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # A generated character or a path that the terminal's encoding lacks must not end the program.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        rest = argv[1:] if argv[:1] == ["bench"] else []
        args = _parser().parse_args(argv[: len(argv) - len(rest)], argparse.Namespace(rest=rest))
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"fastrnn: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        if isinstance(error, LostProcessError):
            os._exit(USER_ERROR)  # gloo's threads would abort an orderly exit
        return USER_ERROR
    except KeyboardInterrupt:
        print("fastrnn: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `| head` has read enough; Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
