"""The language model's small print: what its corpus, checkpoints, training, reports and demo count."""

from __future__ import annotations

import math
import signal
from contextlib import suppress

import pytest
import torch
from test_lm import CPU, TINY, damaged, make_text

import fastrnn.lm.checkpoint as checkpoint
from fastrnn.lm import baseline, demo, diagnose, generate, report, train
from fastrnn.lm.corpus import Corpus, Vocabulary
from fastrnn.lm.errors import UserError
from fastrnn.lm.model import Config, build
from fastrnn.lm.progress import Progress
from fastrnn.lm.train import Trainer


@pytest.fixture
def corpus():
    return Corpus.from_text(make_text())


def test_the_least_text():
    Corpus.from_text("ab" * 10).check_size(3, 5, "text")  # 18 = 3 * (5 + 1), and 2
    with pytest.raises(UserError, match="need 21 characters for training, it has 18"):
        Corpus.from_text("ab" * 10).check_size(3, 6, "text")
    with pytest.raises(UserError, match="nothing is left for validation"):
        Corpus.from_text("ab" * 9).check_size(1, 5, "text")  # one, which has no next one


def test_validation_is_of_so_much_as_asked_for():
    corpus = Corpus.from_text(make_text(), valid_max=10)
    assert corpus.vocabulary.decode(corpus.valid) == make_text()[630:640]


def test_an_older_version(tmp_path, corpus):
    path = damaged(tmp_path, corpus, lambda f: f.update(version=1))
    with pytest.raises(UserError, match="version 1, expected 2"):
        checkpoint.load(path)


def test_the_history_goes_on(corpus, tmp_path):
    first, second = Trainer(TINY, corpus, CPU), Trainer(TINY, corpus, CPU)
    for _ in range(3):
        first.train_step()
    first.validate()
    path = str(tmp_path / "lm.pt")
    checkpoint.save(path, first.fields())
    second.restore(checkpoint.load(path), path)
    assert second.validations == first.validations
    second.train_step()
    assert second.seconds[:3] == first.seconds
    assert second.curve("a").tokens_per_second > 0


def test_a_position_that_is_not_the_steps(tmp_path, corpus):
    path = damaged(tmp_path, corpus, lambda f: f.update(position=1))
    with pytest.raises(UserError, match="fit each other"):
        Trainer(TINY, corpus, CPU).restore(checkpoint.load(path), path)


def test_validation_of_fewer_characters_than_the_batch_wants():
    trainer = Trainer(Config(hidden=12, batch=32, bptt=7), Corpus.from_text(make_text(320)), CPU)
    assert 1 < trainer.validate() < 100


def test_the_perplexity_of_what_has_diverged(corpus):
    trainer = Trainer(TINY, corpus, CPU)
    with torch.no_grad():
        trainer.model.head.bias[0] = 1e6
    assert trainer.validate() == math.inf


def test_a_loaded_model_drops_nothing(tmp_path, corpus):
    path = damaged(tmp_path, corpus, lambda f: None)
    assert not train.load_model(path, CPU)[0].training


def test_ctrl_c_is_pythons_again_afterwards():
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with suppress(RuntimeError), train.interrupts():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
            raise RuntimeError
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_of_one_likeliest_the_likeliest_is_drawn(corpus):
    model = build(TINY, len(corpus.vocabulary), CPU)
    likeliest = generate.generate(model, corpus.vocabulary, 30, temperature=0)
    assert generate.generate(model, corpus.vocabulary, 30, top_k=1, seed=1) == likeliest


def test_the_whole_prompt_counts(corpus):
    model, text = build(TINY, len(corpus.vocabulary), CPU), make_text()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
        for k in range(20):
            prompt = text[k : k + 12]
            logits = model(corpus.vocabulary.encode(prompt)[:, None])[0][-1, 0]
            want = corpus.vocabulary.decode(logits.argmax()[None])
            assert (
                generate.generate(model, corpus.vocabulary, 1, prompt=prompt, temperature=0) == prompt + want
            )


def test_the_carried_state_is_the_models(corpus):
    trainer = Trainer(TINY, corpus, CPU)
    with torch.no_grad():
        _, state = trainer.model(trainer.chunks.chunk(0)[0])
    trainer.train_step()
    torch.testing.assert_close(trainer.state, state)


class Paced:
    """A trainer whose steps take the seconds that it is given."""

    device = CPU

    def __init__(self, name, order, seconds):
        self.name, self.order, self.given, self.seconds, self.losses = name, order, iter(seconds), [], []

    def train_step(self):
        self.order.append(self.name[0])
        self.seconds.append(next(self.given))
        self.losses.append(1.0)


def test_the_demos_ratio_is_torchs_time_over_ours():
    order, n = [], demo.BLOCK_STEPS
    seconds = {"fastrnn": [9.0] * n + [1.0] * 2 * n, "torch": [1.0] * n + [3.0] * 2 * n}
    trainers = {name: Paced(name, order, given) for name, given in seconds.items()}
    outcome = demo.alternate(trainers, 0.0, train.Interrupt())
    assert outcome.ratios == [3.0, 3.0]  # the first pair warms up
    assert "".join(order) == "f" * n + "t" * 2 * n + "f" * 2 * n + "t" * n


def test_speed_is_that_of_the_median_step():
    curve = report.Curve("a", [1.0] * 3, [0.1, 0.2, 0.4], [300, 300, 200])
    assert curve.tokens_per_second == pytest.approx(1500)


def test_one_network_ahead_is_enough():
    counted = [baseline.Counted(2, 0.1, 4.5, 300, 1000, 500)]
    networks = {"fastrnn.LSTM": 3.25, "torch.nn.LSTM": 4.75}
    assert "not yet ahead" not in baseline.table(baseline.Comparison(networks, 1234, counted, 10))


def test_a_text_of_one_stretch(corpus):
    tokens = diagnose.stretches(corpus.vocabulary, make_text(10), 9, 4, "text")
    assert torch.equal(tokens, corpus.vocabulary.encode(make_text(10))[:, None])
    with pytest.raises(UserError, match="needs 11 characters, it has 10"):
        diagnose.stretches(corpus.vocabulary, make_text(10), 10, 4, "text")


def test_progress_of_a_resumed_run(capsys):
    progress = Progress(5, start=4)
    progress.update("loss 1")
    assert capsys.readouterr().err == "step 5/5  loss 1\n"


def test_tokens_of_each_step(corpus):
    trainer = Trainer(TINY, corpus, CPU)
    chunks = [trainer.chunks.chunk(k)[1].numel() for k in range(len(trainer.chunks))]
    assert len(set(chunks)) == 2  # the last one is shorter
    assert [trainer.tokens(step) for step in range(2 * len(chunks))] == 2 * chunks


def test_a_character_past_the_last():
    with pytest.raises(UserError, match="'z'"):
        Vocabulary("ab").encode("az")


def test_the_most_parameters():
    Config(hidden=8000, cell="rnn").check(100)
    Config(hidden=7800).check(100)
    with pytest.raises(UserError, match="makes 1,025,600,000 parameters"):
        Config(hidden=8000).check(100)


def test_what_is_kept_of_a_run_that_diverges(corpus, tmp_path, monkeypatch):
    trainer, path = Trainer(TINY, corpus, CPU), str(tmp_path / "lm.pt")
    step = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", lambda asked: (step(asked), math.nan)[trainer.step > 2])
    with pytest.raises(UserError, match=r"step 3: the loss is nan: .*lm\.pt has step 2$"):
        train.run(trainer, 9, path, save_every=2, valid_every=9)
    assert checkpoint.load(path)["step"] == 2
