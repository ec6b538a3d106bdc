"""The options of `python -m fastrnn lm train|sample|demo`."""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch

from . import baseline, checkpoint, demo, diagnose, generate, report, train
from .corpus import VALID_MAX, Corpus, read_text
from .errors import UserError
from .model import CELLS, IMPLEMENTATIONS, Config
from .world import joined, local_device

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[Any]

STEPS = 2000
CHECKPOINT = "lm.pt"
# Small enough for ten seconds with everything, large enough to learn something.
QUICK = Config(hidden=64, batch=16, bptt=50, lr=1e-2)
QUICK_SECONDS = 2.5
QUICK_VALID = 10_000
DEMO_SECONDS = 95.0


def _config_options(parser: argparse.ArgumentParser, defaults: Config, quick: Config | None = None) -> None:
    """The fields of Config as options; an option not given stays None."""

    def default(name: str) -> str:
        plain = getattr(defaults, name)
        other = plain if quick is None else getattr(quick, name)
        return f"(default {plain})" if other == plain else f"(default {plain}, with --quick {other})"

    help_of: dict[str, tuple[type, str]] = {
        "layers": (int, "recurrent layers"),
        "hidden": (int, "hidden and embedding size"),
        "dropout": (float, "between the recurrent layers"),
        "batch": (int, "parallel streams of text"),
        "bptt": (int, "characters per chunk, through which the gradient flows"),
        "lr": (float, "Adam's learning rate"),
        "clip": (float, "largest norm of the gradient"),
        "seed": (int, "of the start and of dropout"),
    }
    parser.add_argument("--cell", choices=tuple(CELLS), help=default("cell"))
    for name, (kind, text) in help_of.items():
        parser.add_argument(f"--{name}", type=kind, help=f"{text} {default(name)}")


def _given(args: argparse.Namespace) -> dict[str, Any]:
    values = {field.name: getattr(args, field.name, None) for field in fields(Config)}
    return {name: value for name, value in values.items() if value is not None}


def add_parser(commands: Subparsers) -> None:
    """Adds `lm` with its own subcommands; each sets `run`, a function of the parsed arguments."""
    lm = commands.add_parser("lm", help="train and sample a character language model", allow_abbrev=False)
    parts = lm.add_subparsers(dest="lm_command", required=True, metavar="{train,sample,demo}")

    p = parts.add_parser("train", help="train on a text file", allow_abbrev=False)
    p.add_argument("--data", metavar="FILE", help="UTF-8 text (default: the standard library's sources)")
    p.add_argument("--steps", type=int, default=STEPS, help="steps in all (default %(default)s)")
    p.add_argument("--implementation", choices=IMPLEMENTATIONS, help="of the layers (default fastrnn)")
    _config_options(p, Config())
    p.add_argument("--checkpoint", metavar="PATH", default=CHECKPOINT, help="(default %(default)s)")
    p.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    p.add_argument("--overwrite", action="store_true", help="begin anew though --checkpoint exists")
    p.add_argument("--save-every", type=int, default=200, metavar="STEPS", help="(default %(default)s)")
    p.add_argument("--valid-every", type=int, default=500, metavar="STEPS", help="(default %(default)s)")
    p.add_argument("--plot", metavar="PNG", help="draw the loss curve and the speed at the end")
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default %(default)s)")
    p.set_defaults(run=_train)

    p = parts.add_parser("sample", help="write text with a trained model", allow_abbrev=False)
    p.add_argument("--checkpoint", metavar="PATH", default=CHECKPOINT, help="(default %(default)s)")
    p.add_argument("--length", type=int, default=500, help="characters (default %(default)s)")
    p.add_argument("--prompt", default="", help="text to continue")
    p.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest (default %(default)s)")
    p.add_argument("--top-k", type=int, default=0, help="choose among the k likeliest; 0: among all")
    p.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    p.add_argument("--device", default="cpu", help="(default %(default)s)")
    p.set_defaults(run=_sample)

    p = parts.add_parser(
        "demo", help="fastrnn and torch.nn side by side: same loss curve, less time", allow_abbrev=False
    )
    p.add_argument("--quick", action="store_true", help="a small model and a few seconds")
    p.add_argument("--out", metavar="DIR", default="./out", help="for the files (default %(default)s)")
    p.add_argument("--data", metavar="FILE", help="UTF-8 text (default: the standard library's sources)")
    p.add_argument(
        "--seconds",
        type=float,
        help=f"of training (default {DEMO_SECONDS:g}, with --quick {QUICK_SECONDS:g})",
    )
    _config_options(p, Config(), QUICK)
    p.add_argument("--device", default="cpu", help="(default %(default)s)")
    p.set_defaults(run=_demo)


def add_diagnose(commands: Subparsers) -> None:
    """Adds `diagnose`: the gradient flow of a checkpoint of `lm train`."""
    p = commands.add_parser(
        "diagnose", help="whether the gradients of a trained language model vanish", allow_abbrev=False
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="of lm train or lm demo")
    p.add_argument("--data", metavar="FILE", help="UTF-8 text (default: the standard library's sources)")
    p.add_argument("--steps", type=int, default=200, help="characters back in time (default %(default)s)")
    p.add_argument("--batch", type=int, default=16, help="stretches of the text (default %(default)s)")
    p.add_argument("--plot", metavar="PNG", help="draw norms against lag and the Jacobians' spectrum")
    p.add_argument("--device", default="cpu", help="(default %(default)s)")
    p.set_defaults(run=_diagnose)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: unknown device, expected cpu, cuda or cuda:N") from error
    device = local_device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} sees no CUDA device here")
    try:
        torch.zeros(1, device=device).item()  # a device that cannot give a number back cannot train
    except Exception as error:  # each kind of device has its own way to be absent
        raise UserError(f"--device {name}: this device cannot be used here") from error
    return device


def _note_idle_dropout(config: Config) -> None:
    if config.dropout and config.layers == 1:
        print(
            f"fastrnn: --dropout {config.dropout:g} falls between layers, and there is one", file=sys.stderr
        )


def _at_least(option: str, value: int, low: int) -> None:
    if value < low:
        raise UserError(f"{option} must be {low} or more, got {value}")


def _train(args: argparse.Namespace) -> int:
    for option, value in (
        ("steps", args.steps),
        ("save-every", args.save_every),
        ("valid-every", args.valid_every),
    ):
        _at_least(f"--{option}", value, 1)
    # The vocabulary is not known yet; what can be said without reading the text is said first.
    Config(**_given(args)).check(vocab_size=1)
    device = _device(args.device)
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    saved = checkpoint.load(args.checkpoint) if args.resume else None
    checkpoint.check_writable(args.checkpoint)
    if saved is None and not args.overwrite and os.path.exists(args.checkpoint):
        raise UserError(
            f"{args.checkpoint} exists: give --resume to go on from it, --overwrite to begin anew"
        )
    _check_plot(args.plot)
    config = Config(**_given(args)) if saved is None else _resumed(args, saved)
    if saved is not None and saved["step"] >= args.steps:
        raise UserError(f"{args.checkpoint} is at step {saved['step']} already: give a larger --steps")
    corpus = Corpus.from_text(read_text(args.data))
    corpus.check_size(config.batch, config.bptt, args.data or "the standard library")
    config.check(len(corpus.vocabulary))

    with joined(device, args.checkpoint, resumed=saved is not None) as world:
        if world.first:
            _note_idle_dropout(config)
        trainer = train.Trainer(config, corpus, device, world)
        if saved is not None:
            trainer.restore(saved, args.checkpoint)
        whole = train.run(
            trainer, args.steps, args.checkpoint, save_every=args.save_every, valid_every=args.valid_every
        )
        trainer.leave()
    if not world.first:
        return 0 if whole else 130
    name = f"{IMPLEMENTATIONS[config.implementation]}.{CELLS[config.cell]}"
    comparison = None
    if whole:
        comparison = baseline.compare({name: trainer.validations[-1][1]}, trainer.model, corpus)
        print(baseline.table(comparison))
    if args.plot is not None and trainer.losses:
        report.plot(args.plot, [trainer.curve(name)], f"{name} {config.hidden} on characters", comparison)
    state = "trained" if whole else "interrupted"
    print(
        f"{state} at step {trainer.step}, saved to {args.checkpoint}"
        + ("" if whole else "; go on with --resume")
    )
    return 0 if whole else 130


def _resumed(args: argparse.Namespace, saved: dict[str, Any]) -> Config:
    config = train.config_of(saved, args.checkpoint)
    for name, value in _given(args).items():
        if value != getattr(config, name):
            raise UserError(f"--{name} {value} differs from the checkpoint's {getattr(config, name)}")
    return config


def _sample(args: argparse.Namespace) -> int:
    _at_least("--length", args.length, 0)
    _at_least("--top-k", args.top_k, 0)
    if not (args.temperature >= 0 and math.isfinite(args.temperature)):
        raise UserError(f"--temperature must be a finite number, 0 or more, got {args.temperature}")
    replace(Config(), seed=args.seed).check(vocab_size=1)
    model, vocabulary = train.load_model(args.checkpoint, _device(args.device))
    text = generate.generate(
        model,
        vocabulary,
        args.length,
        prompt=args.prompt,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
    )
    print(text)
    return 0


def _demo(args: argparse.Namespace) -> int:
    config = replace(QUICK if args.quick else Config(), **_given(args))
    config.check(vocab_size=1)
    seconds = args.seconds
    if seconds is None:
        seconds = QUICK_SECONDS if args.quick else DEMO_SECONDS
    if not (seconds > 0 and math.isfinite(seconds)):
        raise UserError(f"--seconds must be a finite number above 0, got {seconds}")
    valid_max = QUICK_VALID if args.quick else VALID_MAX
    _note_idle_dropout(config)
    demo.demo(config, args.data, args.out, seconds, valid_max, _device(args.device))
    return 0


def _check_plot(path: str | None) -> None:
    """Before the work whose plot it is."""
    if path is not None:
        checkpoint.check_writable(path)
        if not report.available():
            raise UserError(f"--plot: {report.MISSING}")


def _diagnose(args: argparse.Namespace) -> int:
    _at_least("--steps", args.steps, 2)
    _at_least("--batch", args.batch, 1)
    device = _device(args.device)
    _check_plot(args.plot)
    diagnose.diagnose(args.checkpoint, args.data, args.steps, args.batch, args.plot, device)
    return 0
