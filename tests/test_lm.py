"""The language model: corpus, training, checkpoints, sampling."""

from __future__ import annotations

import contextlib
import math
import os
import random
from dataclasses import replace

import pytest
import torch

import fastrnn.lm.checkpoint as checkpoint
from fastrnn.lm import baseline, demo, diagnose, generate, report, train
from fastrnn.lm.corpus import Chunks, Corpus, Vocabulary, read_text
from fastrnn.lm.errors import UserError
from fastrnn.lm.model import Config, build
from fastrnn.lm.progress import Progress
from fastrnn.lm.train import Trainer
from fastrnn.markov import MarkovModel

CPU = torch.device("cpu")
TINY = Config(hidden=12, batch=3, bptt=7, lr=1e-2)
CELLS = ("lstm", "gru", "rnn")
IMPLEMENTATIONS = ("fastrnn", "torch")


def make_text(n=700, seed=0):
    return "".join(random.Random(seed).choices("ab cd\ne\u00e9\u4e2d\U0001f600", k=n))


@pytest.fixture
def corpus():
    return Corpus.from_text(make_text())


def test_default_text_is_deterministic_python():
    text = read_text(None)
    assert text == read_text(None)
    assert "import" in text
    assert len(text) <= 4_000_000


def test_vocabulary_round_trip():
    text = make_text()
    vocabulary = Vocabulary("".join(sorted(set(text))))
    tokens = vocabulary.encode(text)
    assert tokens.dtype == torch.long
    assert vocabulary.decode(tokens) == text
    assert vocabulary.encode("").numel() == 0
    with pytest.raises(UserError, match="'Z'"):
        vocabulary.encode("aZ")


def test_split_covers_the_text(corpus):
    both = torch.cat([corpus.train, corpus.valid])
    assert corpus.vocabulary.decode(both) == make_text()
    assert corpus.valid.numel() == 70


@pytest.mark.parametrize(("n", "batch", "bptt"), [(100, 3, 7), (24, 3, 7), (2, 1, 5), (101, 10, 3)])
def test_chunks_continue_each_other(n, batch, bptt):
    chunks = Chunks(torch.arange(n), batch, bptt)
    inputs, targets = zip(*(chunks.chunk(i) for i in range(len(chunks))), strict=True)
    assert {len(x) for x in inputs[:-1]} <= {bptt}
    inputs, targets = torch.cat(inputs), torch.cat(targets)
    assert len(inputs) == n // batch - 1  # to the last character
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs[1:], inputs[:-1] + 1)  # in every column, across the chunks
    assert torch.equal(inputs[0], torch.arange(batch) * (n // batch))


def test_chunks_too_short():
    with pytest.raises(ValueError, match="at least 6"):
        Chunks(torch.arange(5), 3, 7)


@pytest.mark.parametrize("cell", CELLS)
def test_implementations_have_the_same_curve(cell, corpus):
    curves = []
    for implementation in IMPLEMENTATIONS:
        trainer = Trainer(Config(implementation, cell, hidden=12, batch=3, bptt=7), corpus, CPU)
        curves.append([trainer.train_step() for _ in range(35)])
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=1e-4, atol=0)


def test_training_learns():
    trainer = Trainer(TINY, Corpus.from_text("abcd" * 200), CPU)
    before = trainer.validate()
    for _ in range(100):
        trainer.train_step()
    assert before > 2.5
    assert trainer.validate() < 1.2
    text = generate.generate(trainer.model, trainer.corpus.vocabulary, 8, prompt="ab", temperature=0)
    assert text == "abcdabcdab"


def test_state_is_carried_and_detached(corpus):
    trainer = Trainer(TINY, corpus, CPU)
    trainer.train_step()
    state = trainer.state
    assert not any(part.requires_grad for part in state)
    inputs, targets = trainer.chunks.chunk(1)
    with torch.no_grad():
        logits, _ = trainer.model(inputs, state)
    assert trainer.train_step() == pytest.approx(train.cross_entropy(logits, targets).item(), rel=1e-5)


@pytest.mark.parametrize("bptt", [23, 20])  # 69 steps: three chunks of 23, or three and one of nine
def test_perplexity_is_the_mean_over_the_text(corpus, bptt):
    trainer = Trainer(Config(hidden=12, batch=1, bptt=bptt), corpus, CPU)
    with torch.no_grad():
        logits, _ = trainer.model(corpus.valid[:-1, None])
    want = math.exp(train.cross_entropy(logits, corpus.valid[1:, None]).item())
    assert trainer.validate() == pytest.approx(want, rel=1e-5)


def test_validation_leaves_training_alone(corpus):
    curves = []
    for validate in (False, True):
        trainer = Trainer(Config(hidden=12, batch=3, bptt=7, dropout=0.5), corpus, CPU)
        for _ in range(6):
            trainer.train_step()
            if validate:
                trainer.validate()
        curves.append(trainer.losses)
    assert curves[0] == curves[1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_resume_is_bit_identical(implementation, cell, corpus, tmp_path):
    config = Config(implementation, cell, hidden=12, batch=3, bptt=7, dropout=0.3)
    straight = Trainer(config, corpus, CPU)
    assert 14 < len(straight.chunks) < 40  # the run below passes an epoch's end
    for _ in range(40):
        straight.train_step()

    path = str(tmp_path / "lm.pt")
    first = Trainer(config, corpus, CPU)
    for _ in range(14):
        first.train_step()
    checkpoint.save(path, first.fields())
    torch.rand(5)  # whatever ran in between
    second = Trainer(config, corpus, CPU)
    second.restore(checkpoint.load(path), path)
    for _ in range(26):
        second.train_step()
    assert second.losses == straight.losses
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_checkpoint_is_whole_or_the_previous_one(tmp_path, corpus, monkeypatch):
    path = tmp_path / "lm.pt"
    trainer = Trainer(TINY, corpus, CPU)
    checkpoint.save(str(path), trainer.fields())
    before = path.read_bytes()

    def half_written(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(str(path), trainer.fields())

    def interrupted(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(str(path), trainer.fields())
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["lm.pt"]  # no temporary file is left


def test_two_processes_save_to_one_path(tmp_path, corpus, monkeypatch):
    """The second begins and ends while the first is about to put its file in place: the last one wins."""
    path, fields, replace = str(tmp_path / "lm.pt"), Trainer(TINY, corpus, CPU).fields(), os.replace

    def meanwhile(*args):
        with monkeypatch.context() as m:
            m.setattr(os, "replace", replace)
            m.setattr(os, "getpid", lambda: 1)
            checkpoint.save(path, fields | {"step": 2})
        replace(*args)

    monkeypatch.setattr(os, "replace", meanwhile)
    checkpoint.save(path, fields | {"step": 1})
    assert checkpoint.load(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["lm.pt"]


def test_checkpoint_through_a_link(tmp_path, corpus):
    link = tmp_path / "link.pt"
    link.symlink_to(tmp_path / "real.pt")
    checkpoint.save(str(link), Trainer(TINY, corpus, CPU).fields())
    assert link.is_symlink()
    assert checkpoint.load(str(tmp_path / "real.pt"))["step"] == 0


def damaged(tmp_path, corpus, change):
    path = str(tmp_path / "bad.pt")
    fields = Trainer(TINY, corpus, CPU).fields()
    change(fields)
    checkpoint.save(path, fields)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("optimizer"), "optimizer"),
        (lambda f: f.update(version=99), "version 99"),
        (lambda f: f.update(format="other"), "not a checkpoint"),
        (lambda f: f["config"].update(hidden=-1), "configuration"),
        (lambda f: f["config"].update(hidden="many"), "configuration"),
        (lambda f: f["config"].pop("cell"), "configuration"),
        (lambda f: f.update(characters=""), "vocabulary"),
        (lambda f: f["model"].pop("head.bias"), "fit each other"),
    ],
)
def test_damaged_checkpoint_names_the_fault(tmp_path, corpus, change, message):
    with pytest.raises(UserError, match=message):
        train.load_model(damaged(tmp_path, corpus, change), CPU)


def test_restore_refuses_what_does_not_fit(tmp_path, corpus):
    path = damaged(tmp_path, corpus, lambda fields: fields.update(step=5))
    with pytest.raises(UserError, match="fit each other"):
        Trainer(TINY, corpus, CPU).restore(checkpoint.load(path), path)
    path = damaged(tmp_path, corpus, lambda fields: None)
    other = Corpus.from_text(make_text(seed=1))
    with pytest.raises(UserError, match="another text"):
        Trainer(TINY, other, CPU).restore(checkpoint.load(path), path)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.update(state=None),
        lambda f: f.update(state=f["state"][0]),
        lambda f: f.update(state=torch.stack(f["state"])),
        lambda f: f.update(state=tuple(s[:, 1:] for s in f["state"])),
        lambda f: f.update(state=tuple(s.double() for s in f["state"])),
        lambda f: f["optimizer"]["state"].pop(0),
        lambda f: f["optimizer"]["state"][0].pop("exp_avg"),
        lambda f: f["optimizer"]["state"][0].update(exp_avg_sq=torch.zeros(2, 2)),
    ],
)
def test_restore_refuses_states_of_other_sizes(tmp_path, corpus, change):
    trainer, path = Trainer(TINY, corpus, CPU), str(tmp_path / "bad.pt")
    trainer.train_step()
    fields = trainer.fields()
    checkpoint.save(path, fields)
    Trainer(TINY, corpus, CPU).restore(checkpoint.load(path), path)
    change(fields)
    checkpoint.save(path, fields)
    with pytest.raises(UserError, match="fit each other"):
        Trainer(TINY, corpus, CPU).restore(checkpoint.load(path), path)


def test_a_flipped_bit_is_seen(tmp_path, corpus):
    path, trainer = tmp_path / "lm.pt", Trainer(TINY, corpus, CPU)
    checkpoint.save(str(path), trainer.fields())
    content = bytearray(path.read_bytes())
    weight = trainer.model.head.weight.detach().numpy().tobytes()
    content[bytes(content).index(weight) + 7] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="checksum"):
        checkpoint.load(str(path))


def test_the_longest_name(tmp_path, corpus):
    path = str(tmp_path / ("m" * 252 + ".pt"))
    checkpoint.check_writable(path)
    checkpoint.save(path, Trainer(TINY, corpus, CPU).fields())
    assert checkpoint.load(path)["step"] == 0


def test_a_pipe_is_no_place_for_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="no regular file"):
        checkpoint.check_writable(str(tmp_path / "pipe"))


def test_checkpoints_run_no_code(tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"format": "fastrnn-lm", "config": pytest.fail}, path)
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load(str(path))


def test_generate_repeats_by_seed(corpus):
    model = build(TINY, len(corpus.vocabulary), CPU)
    texts = [generate.generate(model, corpus.vocabulary, 30, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert generate.generate(model, corpus.vocabulary, 0, prompt="ab") == "ab"


def test_markov_baseline(corpus):
    V = len(corpus.vocabulary)
    counted = baseline.count(corpus, (1, 2, 5, 10_000))
    assert [c.order for c in counted] == [1, 2, 5]  # the text is too short for the last
    for c in counted:
        model = MarkovModel(V, c.order, c.smoothing).fit(corpus.train)
        assert c.perplexity == pytest.approx(float(model.perplexity(corpus.valid)), rel=1e-12)
        others = (MarkovModel(V, c.order, s).fit(corpus.train) for s in baseline.SMOOTHINGS)
        assert c.perplexity == min(float(m.perplexity(corpus.valid)) for m in others)
        windows = corpus.train.unfold(0, c.order + 1, 1)
        assert c.stored == torch.unique(windows, dim=0).shape[0]
        assert c.dense == V ** (c.order + 1)


def test_table_of_the_baseline(corpus):
    sizes = [baseline.parameters(Trainer(TINY, text, CPU).model) for text in (corpus, corpus_of(3000))]
    assert sizes[0] == sizes[1]  # as many for a longer text: what is counted grows
    stored = [baseline.count(text, (3,))[0].stored for text in (corpus, corpus_of(3000))]
    assert stored[1] > 2 * stored[0]
    counted = [baseline.Counted(n, 0.1, *c, 500) for n, c in ((1, (5.0, 70, 100)), (2, (4.5, 300, 1000)))]
    lines = baseline.table(baseline.Comparison({"fastrnn.LSTM": 3.25}, 1234, counted, 10)).splitlines()
    assert [line.split()[:4] for line in lines[1:]] == [
        ["fastrnn.LSTM", "3.250", "1,234", "parameters,"],
        ["counted", "on", "500", "characters,"],
        ["Markov", "order", "1", "5.000"],
        ["Markov", "order", "2", "4.500"],
    ]
    assert lines[2].endswith("smoothing picked on the validation text, in counting's favour:")
    assert "70 counts stored; 100 = 10^2 in a dense table" in lines[3]
    assert "300 counts stored; 1,000 = 10^3 in a dense table" in lines[4]
    behind = baseline.table(baseline.Comparison({"fastrnn.LSTM": 4.75}, 1234, counted, 10))
    assert "not yet ahead of counting (order 2)" in behind


def test_the_baseline_counts_no_endless_text(corpus, monkeypatch):
    monkeypatch.setattr(baseline, "COUNTED", 100)
    (c,) = baseline.count(corpus, (1,))
    assert (c.characters, c.stored) == (
        100,
        len(set(zip(corpus.train[:99].tolist(), corpus.train[1:100].tolist(), strict=True))),
    )


def corpus_of(n):
    return Corpus.from_text(make_text(n))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_diagnosis_is_of_the_last_characters_loss(implementation, corpus):
    """The norms' last step is the head's own gradient."""
    model = build(Config(implementation, hidden=12), len(corpus.vocabulary), CPU)
    tokens = diagnose.stretches(corpus.vocabulary, make_text(), 9, 4, "text")
    assert torch.equal(tokens[:, -1], corpus.valid[-10:])
    assert torch.equal(tokens[:, 0], corpus.train[:10])
    found, loss = diagnose.flows(model, tokens)
    output = model.rnn(model.embedding(tokens[:-1]))[0][-1].detach().requires_grad_()
    want = torch.nn.functional.cross_entropy(model.head(output), tokens[-1])
    want.backward()
    assert loss == pytest.approx(want.item(), rel=1e-5)
    assert len(found) == 2
    torch.testing.assert_close(found[1].norms[-1], output.grad.norm())


@pytest.mark.parametrize("cell", CELLS)
def test_the_demo_drops_alike(cell, corpus):
    """Trained in turns, each goes on with its own random numbers."""
    trainers = {
        name: Trainer(Config(name, cell, hidden=12, batch=3, bptt=7, dropout=0.5), corpus, CPU)
        for name in IMPLEMENTATIONS
    }
    outcome = demo.alternate(trainers, 0.0, train.Interrupt())
    assert outcome.difference() < 1e-5


def test_the_demo_drops_nothing_on_a_gpu(tmp_path):
    config = Config(dropout=0.5)
    with pytest.raises(UserError, match=r"--dropout: torch\.nn draws other masks on cuda"):
        demo.demo(config, None, str(tmp_path / "out"), 1.0, 100, torch.device("cuda"))
    assert not (tmp_path / "out").exists()


def test_ctrl_c_before_the_last_step_leaves_a_finished_run(corpus, tmp_path, monkeypatch):
    trainer, interrupt = Trainer(TINY, corpus, CPU), train.Interrupt()
    monkeypatch.setattr(train, "interrupts", lambda: contextlib.nullcontext(interrupt))
    step = trainer.train_step

    def pressed_after(interrupted):
        loss = step(interrupted)
        interrupt.pressed = trainer.step >= 2
        return loss

    monkeypatch.setattr(trainer, "train_step", pressed_after)
    path = str(tmp_path / "lm.pt")
    assert train.run(trainer, 3, path, save_every=9, valid_every=9)
    assert trainer.interrupted
    assert checkpoint.load(path)["step"] == 3
    assert not train.run(trainer, 9, path, save_every=9, valid_every=9)


def test_outcome_of_the_demo():
    losses = {"fastrnn": [2.0, 1.0, 1.1], "torch": [2.0, 1.0, 1.0]}
    outcome = demo.Outcome([1.0, 3.0, 1.5], losses)
    assert outcome.ratio == 1.5
    assert outcome.difference() == pytest.approx(0.1)
    assert outcome.difference(2) == 0.0
    for name in losses:  # a comparison with no number is no agreement
        assert math.isnan(demo.Outcome([1.0], {**losses, name: [2.0, 1.0, math.nan]}).difference())


@pytest.mark.parametrize(
    ("ratios", "note"),
    [([1.0] * 10, ""), ([1.0] * 9, "of so few pairs"), ([1.0] * 9 + [3.5], "other programs run here")],
)
def test_times_that_say_little(ratios, note, capsys):
    outcome = demo.Outcome(ratios, {"fastrnn": [2.0], "torch": [2.0]})
    demo._print_outcome(outcome, [report.Curve(name, [2.0], [0.1], [300]) for name in ("ours", "theirs")])
    printed = capsys.readouterr().out
    assert ("not to be trusted" in printed) == bool(note)
    assert note in printed


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    curve = report.Curve("fastrnn.LSTM", [2.0, 1.0], [0.1, 0.2], [300, 300])
    path = tmp_path / "plot.png"
    for counted in (None, [], [baseline.Counted(1, 0.1, 5.0, 70, 100, 500)]):
        comparison = None if counted is None else baseline.Comparison({"LSTM": 3.0}, 1234, counted, 10)
        report.plot(str(path), [curve, curve], "title", comparison)
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    many = baseline.Counted(4, 0.1, 5.0, 70, 3000**5, 500)  # more than 64 bits
    report.plot(str(path), [curve], "title", baseline.Comparison({"LSTM": 3.0}, 1234, [many], 3000))
    with pytest.raises(UserError, match="cannot write"):
        report.plot(str(tmp_path / "none" / "plot.png"), [curve], "title")


def test_the_picture_says_what_its_numbers_are():
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    counted = [baseline.Counted(n, 0.1, 5.0 / n, 70 * n, 10 ** (n + 1), 500) for n in (1, 2)]
    report._draw_sizes(axes, baseline.Comparison({"LSTM": 3.0}, 1234, counted, 10))
    assert [text.get_text() for text in axes.texts] == ["perplexity\n5.00", "perplexity\n2.50"]
    assert axes.get_ylabel() == "numbers stored"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "Markov, a table of every possible n-gram",
        "Markov, the n-grams of the text",
        "LSTM, any context: perplexity 3.00",
    ]


def test_plain_progress_prints_its_last_line(capsys):
    progress = Progress(2)
    progress.update("loss 1")
    progress.update("loss 0.5")
    progress.close()
    assert capsys.readouterr().err == "step 2/2  loss 0.5\n"


def test_gradients_are_clipped(corpus):
    """To --clip, all of them by one factor: the gradients of a step that clips nothing, times that."""

    def gradients(clip):
        trainer = Trainer(replace(TINY, clip=clip), corpus, CPU)
        trainer.train_step()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    whole = gradients(1e9)
    factor = 1e-3 / (whole.norm() + 1e-6)  # clip_grad_norm_'s own
    # Two roundings and the norm's: assert_close's own bound for float32.
    torch.testing.assert_close(gradients(1e-3), whole * factor, rtol=1.3e-6, atol=0)


def test_dropout_acts(corpus):
    """Between the layers, in training alone."""
    model = build(replace(TINY, layers=2, dropout=0.5), len(corpus.vocabulary), CPU)
    tokens = corpus.train[:20].view(-1, 1)
    first, second = model(tokens)[0], model(tokens)[0]
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


def test_a_new_pass_begins_with_no_state(corpus):
    trainer, given = Trainer(TINY, corpus, CPU), []
    forward = trainer.model.forward

    def noted(tokens, state=None):
        given.append(state is None)
        return forward(tokens, state)

    trainer.model.forward = noted
    passes = len(trainer.chunks)
    for _ in range(passes + 2):
        trainer.train_step()
    assert given == [True] + [False] * (passes - 1) + [True, False]
