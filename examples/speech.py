"""Speech without alignment: the vowels in a recording, by a bidirectional LSTM and CTC.

The speech is synthetic: pulses of a voice (its pitch gliding between 90 and 250 Hz) through a filter with the
three formants of each vowel, as Peterson & Barney measured them in 1952, with vocal tracts of different
lengths, glides from vowel to vowel, pauses, and noise. Nothing says where a vowel begins.
"""

from __future__ import annotations

import random
import sys
import wave
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import fastrnn

from . import common

RATE, WINDOW, HOP = 8000, 256, 80  # samples a second; a frame every 10 ms
BANDS, STACKED = 43, 3  # each band of three frequencies of the spectrum, each step of three frames
FORMANTS = {  # Hz, means of 33 men; names of ARPAbet
    "iy": (270, 2290, 3010),
    "ih": (390, 1990, 2550),
    "eh": (530, 1840, 2480),
    "ae": (660, 1720, 2410),
    "ah": (520, 1190, 2390),
    "aa": (730, 1090, 2440),
    "ao": (570, 840, 2410),
    "uh": (440, 1020, 2240),
    "uw": (300, 870, 2240),
    "er": (490, 1350, 1690),
}
BANDWIDTHS = torch.tensor([60.0, 90.0, 150.0])


def smooth(track: Tensor, frames: int = 7) -> Tensor:
    """Moving average of a track [F, n] over time."""
    padded = nn.functional.pad(track.t()[None], (frames // 2, frames // 2), mode="replicate")
    return nn.functional.avg_pool1d(padded, frames, 1)[0].t()


def spoken(vowels: list[str]) -> Tensor:
    """A recording [samples] of these vowels."""
    formants, gains = [], []
    for i, vowel in enumerate(vowels):
        if i and (vowel == vowels[i - 1] or random.random() < 0.3):
            pause = random.randint(5, 15)
            formants += [FORMANTS[vowel]] * pause
            gains += [0.0] * pause
        length = random.randint(8, 25)
        formants += [FORMANTS[vowel]] * length
        gains += [1.0] * length
    tract = random.uniform(0.9, 1.15)  # shorter ones sound higher
    peaks = tract * smooth(torch.tensor(formants, dtype=torch.float32))[None]  # [1, F, 3]
    gain = smooth(torch.tensor(gains)[:, None])  # [F, 1]
    frequency = torch.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None, None]  # [129, 1, 1]
    ratio = (frequency / peaks) ** 2
    filters = ((1 - ratio) ** 2 + (frequency * BANDWIDTHS / peaks**2) ** 2).rsqrt().prod(2)  # [129, F]

    samples = HOP * (len(gain) - 1)
    pitch = torch.linspace(random.uniform(90, 250), random.uniform(90, 250), samples)
    phase = (pitch / RATE).cumsum(0)
    pulses = (phase.floor().diff(prepend=phase.new_zeros(1)) > 0).float()
    window = torch.hann_window(WINDOW)
    source = torch.stft(pulses, WINDOW, HOP, window=window, return_complex=True)  # [129, F]
    voice = torch.istft(source * filters * gain.t(), WINDOW, HOP, window=window, length=samples)
    voice = voice / voice.std()
    return voice + random.uniform(0.03, 0.3) * torch.randn(samples)  # 10 to 30 dB


def features(recording: Tensor) -> Tensor:
    """Logarithms of energy by frequency, of mean 0 and deviation 1, [F / STACKED, STACKED * BANDS]."""
    spectrum = torch.stft(recording, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True)
    bands = nn.functional.avg_pool1d(spectrum.abs().square().t(), 3)  # [F, BANDS]
    bands = (bands + 1e-6).log()
    bands = (bands - bands.mean()) / bands.std()
    return bands[: len(bands) // STACKED * STACKED].reshape(-1, STACKED * BANDS)


def save(path: Path, recording: Tensor) -> None:
    """A WAV file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        scaled = recording / recording.abs().max() * 32767
        file.writeframes(scaled.to(torch.int16).numpy().tobytes())


def distance(a: list[str], b: list[str]) -> int:
    """Levenshtein's: how many insertions, deletions and substitutions make a of b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


class Recogniser(nn.Module):
    def __init__(self, symbols: int, hidden: int) -> None:
        super().__init__()
        self.rnn = fastrnn.LSTM(STACKED * BANDS, hidden, num_layers=2, bidirectional=True)
        self.head = nn.Linear(2 * hidden, symbols)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x [T, B, STACKED * BANDS] -> log-probabilities [T, B, symbols]; symbol 0 is CTC's blank."""
        return self.head(self.rnn(x, lengths=lengths)[0]).log_softmax(-1)


def speech(quick: bool, out: Path) -> common.Figure:
    symbols = common.Symbols([list(FORMANTS)])
    held, count = (50, 400) if quick else (300, 3000)
    said = [random.choices(list(FORMANTS), k=random.randint(3, 8)) for _ in range(count)]
    recordings = [spoken(vowels) for vowels in said]
    save(out / "speech.wav", recordings[0])
    print(f"{sum(map(len, recordings)) / RATE / 60:.0f} minutes of speech")
    inputs = [features(recording) for recording in recordings]
    model = Recogniser(len(symbols), hidden=64 if quick else 96)
    stream = common.batches(count - held, 32)

    def batch(chosen: list[int]) -> tuple[Tensor, Tensor]:
        x = [inputs[i] for i in chosen]
        return pad_sequence(x), torch.tensor([len(frames) for frames in x])

    def loss() -> Tensor:
        chosen = [held + i for i in next(stream).tolist()]
        x, lengths = batch(chosen)
        targets, sizes = symbols.encode(said[i] for i in chosen)
        return nn.functional.ctc_loss(model(x, lengths), targets.t(), lengths, sizes)

    common.fit(model, loss, steps=300 if quick else 800, lr=1e-2 if quick else 5e-3)
    x, lengths = batch(list(range(held)))
    with torch.no_grad():
        best = model(x, lengths).argmax(-1)  # [T, B]
    wrong = 0
    for b in range(held):
        path = best[: lengths[b], b].unique_consecutive()
        found = symbols.decode(path[path > 0])
        wrong += distance(found, said[b])
        if b < 3:
            print(f"said {' '.join(said[b])}, heard {' '.join(found)}")
    right = 1 - wrong / sum(map(len, said[:held]))
    return common.Figure("vowels recognised", right, 0.3 if quick else 0.95)


if __name__ == "__main__":
    sys.exit(common.main("speech", speech, __doc__))
