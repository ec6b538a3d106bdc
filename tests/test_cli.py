"""`python -m fastrnn` from the outside: exit codes, one line per error, Ctrl-C, resuming."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastrnn
import fastrnn.lm.checkpoint as checkpoint
from fastrnn import __main__ as cli
from fastrnn.lm import diagnose, report
from fastrnn.lm.cli import add_parser

SMALL = ("--hidden", "8", "--batch", "2", "--bptt", "5")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 20, encoding="utf-8")
    return str(path)


def call(capsys, *arguments):
    """Exit code, stdout and stderr of the command line, in this process."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def assert_one_line(result, *parts):
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("fastrnn: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    for part in parts:
        assert part in err


def train(capsys, text, path, *more):
    return call(capsys, "lm", "train", "--data", text, "--checkpoint", str(path), *SMALL, *more)


def spoil(path):
    """Makes a checkpoint of one whose training has diverged, as earlier versions saved them."""
    saved = torch.load(path, weights_only=True)
    for weight in saved["model"].values():
        weight.fill_(torch.nan)
    torch.save(saved, path)


def test_info(capsys):
    code, out, _ = call(capsys, "info")
    assert code == 0
    for part in ("fastrnn", torch.__version__, "instruction sets", "threads", "GPUs", "kernels: cpu"):
        assert part in out


def test_train_then_resume_then_sample(capsys, text, tmp_path):
    straight, parts = tmp_path / "straight.pt", tmp_path / "parts.pt"
    assert train(capsys, text, straight, "--steps", "30")[0] == 0
    assert train(capsys, text, parts, "--steps", "11")[0] == 0
    code, out, _ = train(capsys, text, parts, "--steps", "30", "--resume")
    assert code == 0
    assert "validation perplexity" in out
    assert "Markov order 4" in out
    losses = [checkpoint.load(str(path))["losses"] for path in (straight, parts)]
    assert len(losses[0]) == 30
    assert torch.equal(*losses)

    sample = ("lm", "sample", "--checkpoint", str(parts), "--length", "40", "--prompt", "the ", "--seed", "3")
    code, out, err = call(capsys, *sample, "--top-k", "5", "--temperature", "0.8")
    assert (code, err) == (0, "")
    assert out.startswith("the ")
    assert len(out) == 4 + 40 + 1
    assert call(capsys, *sample, "--top-k", "5", "--temperature", "0.8")[1] == out


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("implementation", ["fastrnn", "torch"])
def test_train_every_cell(capsys, text, tmp_path, cell, implementation):
    more = ("--cell", cell, "--implementation", implementation, "--layers", "1", "--dropout", "0.5")
    code, _, err = train(capsys, text, tmp_path / "sub" / "lm.pt", "--steps", "2", *more)
    assert code == 0
    assert err.count("fastrnn: --dropout 0.5 falls between layers, and there is one\n") == 1


def test_plot_of_a_training(capsys, text, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    assert train(capsys, text, tmp_path / "lm.pt", "--steps", "2", "--plot", str(plot))[0] == 0
    assert plot.stat().st_size > 1000


def test_demo(capsys, text, tmp_path):
    out = tmp_path / "out"
    code, printed, _ = call(
        capsys, "lm", "demo", "--quick", "--data", text, "--out", str(out), "--seconds", "0.1", *SMALL
    )
    assert code == 0
    assert "trained in turns, 0.1 s in all" in printed
    assert "torch.nn.LSTM / fastrnn.LSTM training time: " in printed
    assert "Markov order 1" in printed
    assert "parameters, the same for any context" in printed
    assert "largest relative difference of the loss curves" in printed
    assert {"demo.pt", "sample.txt"} <= {file.name for file in out.iterdir()}
    assert call(capsys, "lm", "sample", "--checkpoint", str(out / "demo.pt"), "--length", "5")[0] == 0


def test_help_of_the_demo_has_both_defaults(capsys):
    code, out, _ = call(capsys, "lm", "demo", "--help")
    assert code == 0
    words = " ".join(out.split())
    assert "hidden and embedding size (default 256, with --quick 64)" in words
    assert "recurrent layers (default 2)" in words


def test_demo_without_matplotlib(capsys, text, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "available", lambda: False)
    arguments = ("lm", "demo", "--data", text, "--out", str(tmp_path), "--seconds", "0.1", *SMALL)
    code, _, err = call(capsys, *arguments)
    assert code == 0
    assert "pip install -e '.[lm]'" in err
    assert not (tmp_path / "demo.png").exists()
    assert_one_line(train(capsys, text, tmp_path / "lm.pt", "--plot", str(tmp_path / "p.png")), "matplotlib")


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("implementation", ["fastrnn", "torch"])
def test_diagnose(capsys, text, tmp_path, cell, implementation):
    path, plot = str(tmp_path / "lm.pt"), tmp_path / "sub" / "flow.png"
    more = ("--cell", cell, "--implementation", implementation, "--layers", "2")
    assert train(capsys, text, path, "--steps", "2", *more)[0] == 0
    drawn = ("--plot", str(plot)) if report.available() else ()
    code, out, err = call(capsys, "diagnose", path, "--data", text, "--steps", "30", "--batch", "3", *drawn)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "over 3 stretches of 30 characters" in lines[0]
    for k in range(2):
        assert lines[1 + k].startswith(f"{cell.upper()} layer {k}: gradients vanish: ")
    assert lines[3].startswith("against vanishing: ")
    if drawn:
        assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_the_advice_can_be_followed(kind):
    """Its functions take the layer, its options are lm train's, and the guide says the same."""
    guide = (Path(__file__).parent.parent / "docs" / "guide" / "gradients.md").read_text(encoding="utf-8")
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    for text in (diagnose.VANISHING[kind], diagnose.EXPLODING):
        functions, options = re.findall(r"fastrnn\.init\.(\w+)", text), re.findall(r"--\w+", text)
        assert functions or options
        for name in functions:
            assert f"{name}(" in guide
            for gated in ("LSTM", "GRU") if kind == "RNN" else (kind,):
                getattr(fastrnn.init, name)(getattr(fastrnn, gated)(3, 4), 200)
        for option in options:
            value = {"--cell": "gru", "--clip": "0.1", "--lr": "1e-4"}[option]
            assert parser.parse_args(["lm", "train", option, value])


def test_diagnose_says_what_is_wrong(capsys, text, tmp_path, monkeypatch):
    path = str(tmp_path / "lm.pt")
    assert train(capsys, text, path, "--steps", "2")[0] == 0
    other = tmp_path / "other.txt"
    other.write_text("QUITE ANOTHER TEXT", encoding="utf-8")
    given = ("diagnose", path, "--data", text, "--steps", "9")
    _, _, err = foreign = call(capsys, "diagnose", path, "--data", str(other))
    assert_one_line(foreign, "does not occur")
    assert "--data" not in err
    with monkeypatch.context() as m:
        m.setattr(diagnose, "read_text", lambda path: "QUITE ANOTHER TEXT" if path is None else "")
        without = call(capsys, "diagnose", path)
    assert_one_line(without, "this text is the standard library's sources: name another with --data")
    assert_one_line(call(capsys, "diagnose", path, "--data", text, "--steps", "880"), "needs 881 characters")
    assert_one_line(call(capsys, *given, "--plot", str(tmp_path)), "directory")
    if report.available():
        code, _, err = call(capsys, *given, "--plot", str(tmp_path / "flow.abc"))
        assert code == 2
        assert "cannot write" in err
        assert "abc" in err
    monkeypatch.setattr(report, "available", lambda: False)
    assert_one_line(call(capsys, *given, "--plot", str(tmp_path / "p.png")), "matplotlib")
    # As many stretches as a text has: 880 characters have two of 879.
    code, out, _ = call(capsys, "diagnose", path, "--data", text, "--steps", "878", "--batch", "9")
    assert code == 0
    assert "over 2 stretches" in out
    spoil(path)
    assert_one_line(call(capsys, *given), "diverged")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "required"),
        (("lm",), "required"),
        (("lm", "fly"), "fly"),
        (("lm", "train", "--hidden", "0"), "--hidden"),
        (("lm", "train", "--hidden", "-3"), "--hidden"),
        (("lm", "train", "--hidden", "x"), "--hidden"),
        (("lm", "train", "--hidden", "9999999"), "parameters"),
        (("lm", "train", "--layers", "0"), "--layers"),
        (("lm", "train", "--batch", "0"), "--batch"),
        (("lm", "train", "--bptt", "0"), "--bptt"),
        (("lm", "train", "--steps", "0"), "--steps"),
        (("lm", "train", "--save-every", "0"), "--save-every"),
        (("lm", "train", "--lr", "nan"), "--lr"),
        (("lm", "train", "--clip", "-1"), "--clip"),
        (("lm", "train", "--dropout", "1"), "--dropout"),
        (("lm", "train", "--seed", "-1"), "--seed"),
        (("lm", "train", "--cell", "cnn"), "--cell"),
        (("lm", "train", "--device", "abacus"), "abacus"),
        (("lm", "train", "--device", "meta"), "meta"),
        (("lm", "train", "--device", "cuda:99"), "cuda:99"),
        (("lm", "train", "--resume", "--overwrite"), "exclude"),
        (("lm", "train", "--resume", "--checkpoint", "none.pt"), "none.pt"),
        (("lm", "train", "--data", "none.txt"), "No such file"),
        (("lm", "train", "--data", "."), "directory"),
        (("lm", "train", "--data", os.devnull), "regular"),
        (("lm", "train", "--data", "a\0b"), "null"),
        (("lm", "demo", "--data", "none.txt"), "No such file"),
        (("lm", "demo", "--seconds", "0"), "--seconds"),
        (("lm", "demo", "--seconds", "inf"), "--seconds"),
        (("lm", "demo", "--layers", "0"), "--layers"),
        (("lm", "sample", "--checkpoint", "none.pt"), "No such file"),
        (("lm", "sample", "--checkpoint", "."), "directory"),
        (("lm", "sample", "--length", "-1"), "--length"),
        (("lm", "sample", "--top-k", "-1"), "--top-k"),
        (("lm", "sample", "--temperature", "-0.5"), "--temperature"),
        (("lm", "sample", "--seed", "-1"), "--seed"),
        (("diagnose",), "CHECKPOINT"),
        (("diagnose", "none.pt"), "No such file"),
        (("diagnose", "none.pt", "--steps", "1"), "--steps"),
        (("diagnose", "none.pt", "--batch", "0"), "--batch"),
        (("diagnose", "none.pt", "--device", "abacus"), "abacus"),
    ],
)
def test_bad_options_give_one_line(capsys, tmp_path, monkeypatch, arguments, part):
    monkeypatch.chdir(tmp_path)
    assert_one_line(call(capsys, *arguments), part)
    assert not (tmp_path / "lm.pt").exists()


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"", "empty"), (b"abc", "too short"), (b"good \xff bad", "byte 0xff at offset 5")],
)
def test_bad_text_gives_one_line(capsys, tmp_path, content, part):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    assert_one_line(train(capsys, str(path), tmp_path / "lm.pt"), str(path), part)
    assert_one_line(call(capsys, "lm", "demo", "--data", str(path), "--out", str(tmp_path / "o")), part)


def test_bad_checkpoints_give_one_line(capsys, text, tmp_path):
    path = tmp_path / "lm.pt"
    assert train(capsys, text, path, "--steps", "3")[0] == 0
    good = path.read_bytes()
    foreign = tmp_path / "foreign.pt"
    torch.save({"weight": torch.ones(2)}, foreign)
    for content in (b"", b"text", good[: len(good) // 2], good[1000:], foreign.read_bytes()):
        bad = tmp_path / "bad.pt"
        bad.write_bytes(content)
        assert_one_line(call(capsys, "lm", "sample", "--checkpoint", str(bad)), "bad.pt")
        assert_one_line(train(capsys, text, bad, "--resume"), "bad.pt")
        assert bad.read_bytes() == content
    sample = ("lm", "sample", "--checkpoint", str(path))
    assert_one_line(call(capsys, *sample, "--prompt", "\u4e2d"), "does not occur")
    assert_one_line(call(capsys, *sample, "--prompt", "\udcff"), "not valid in the terminal's encoding")
    assert call(capsys, *sample, "--temperature", "1e-50", "--length", "5")[0] == 0


def test_sampling_a_diverged_model(capsys, text, tmp_path):
    path = tmp_path / "lm.pt"
    assert train(capsys, text, path, "--steps", "1")[0] == 0
    spoil(path)
    assert_one_line(call(capsys, "lm", "sample", "--checkpoint", str(path)), "diverged")


def test_training_that_diverges(capsys, text, tmp_path):
    """Is an error, and the last checkpoint of numbers stays."""
    path = tmp_path / "lm.pt"
    assert train(capsys, text, path, "--steps", "2")[0] == 0
    before = path.read_bytes()
    spoil(path)
    more = call(capsys, "lm", "train", "--data", text, "--checkpoint", str(path), "--resume", "--steps", "4")
    assert more[0] == 2
    assert "fastrnn: step 3: the loss is nan: training has diverged, take a smaller --lr\n" in more[2]
    path.write_bytes(before)
    code, _, err = train(capsys, text, path, "--steps", "9", "--lr", "1e30", "--overwrite")
    assert code == 2
    assert "training has diverged" in err
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--cell", "foo"), "invalid choice: 'foo'"),
        (("--threads", "x"), "invalid int value: 'x'"),
        (("--threads", "0"), "--threads must be at least 1, got 0"),
        (("--json", "/dev/null/x.json"), "cannot write /dev/null/x.json"),
    ],
)
def test_bench_says_what_is_wrong_before_it_measures(capsys, options, part):
    pytest.importorskip("pytest_benchmark")
    assert_one_line(call(capsys, "bench", *options), part)


def test_training_never_drops_a_checkpoint_silently(capsys, text, tmp_path):
    path = tmp_path / "lm.pt"
    assert train(capsys, text, path, "--steps", "3")[0] == 0
    assert_one_line(train(capsys, text, path, "--steps", "5"), "--resume", "--overwrite")
    assert_one_line(train(capsys, text, path, "--steps", "3", "--resume"), "at step 3 already")
    assert_one_line(train(capsys, text, path, "--steps", "5", "--resume", "--lr", "0.5"), "--lr 0.5 differs")
    other = tmp_path / "other.txt"
    other.write_text("another text altogether\n" * 30, encoding="utf-8")
    assert_one_line(train(capsys, str(other), path, "--steps", "5", "--resume"), "another text")
    assert train(capsys, text, path, "--steps", "2", "--overwrite")[0] == 0
    assert checkpoint.load(str(path))["step"] == 2


def test_unwritable_output_gives_one_line(capsys, text, tmp_path):
    # Below a file nothing can be made, whoever runs the test.
    below = os.path.join(text, "sub", "lm.pt")
    assert_one_line(train(capsys, text, below), "cannot write")
    assert_one_line(train(capsys, text, tmp_path), "cannot write", "directory")
    assert_one_line(train(capsys, text, tmp_path / "lm.pt", "--plot", below), "cannot write")
    assert_one_line(call(capsys, "lm", "demo", "--data", text, "--out", text), "cannot write")


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "fastrnn", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A test run started in the background ignores SIGINT and would hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_saves_and_resumes_bit_identically(capsys, text, tmp_path):
    path = tmp_path / "lm.pt"
    process = start(
        *("lm", "train", "--data", text, "--checkpoint", str(path), *SMALL),
        *("--steps", "1000000", "--save-every", "5"),
    )
    try:
        deadline = time.monotonic() + 120
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert path.exists(), process.communicate(timeout=5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "interrupted at step" in out
    assert "Traceback" not in err
    assert not [file for file in tmp_path.iterdir() if file.suffix == ".tmp"]

    saved = checkpoint.load(str(path))
    steps = saved["step"] + 10
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as the process above
        assert train(capsys, text, path, "--steps", str(steps), "--resume")[0] == 0
        straight = tmp_path / "straight.pt"
        assert train(capsys, text, straight, "--steps", str(steps))[0] == 0
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(checkpoint.load(str(path))["losses"], checkpoint.load(str(straight))["losses"])


def test_no_traceback_from_the_real_command(tmp_path):
    process = start(
        "lm", "train", "--data", str(tmp_path / "none.txt"), "--checkpoint", str(tmp_path / "lm.pt")
    )
    out, err = process.communicate(timeout=120)
    assert_one_line((process.returncode, out, err), "No such file")


def test_a_closed_pipe_is_no_error(text, capsys, tmp_path):
    path = tmp_path / "lm.pt"
    assert train(capsys, text, path, "--steps", "2")[0] == 0
    process = start("lm", "sample", "--checkpoint", str(path), "--length", "50")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=120) == 0
    process.stderr.close()
