"""Declare the data set of an experiment."""

from __future__ import annotations

from dataclasses import dataclass

from cnnlib.errors import require


@dataclass(frozen=True)
class Data:
    """The data set of an experiment, and how the experiment uses the training examples."""

    name: str = "mnist5k"
    data_dir: str | None = None
    """Folder of prepared TFDS data sets. None: `TFDS_DATA_DIR` if it is set, else the default of TFDS."""
    validation: int = 0
    """Number of training examples to hold out for validation, stratified by class. Settings and checkpoints are chosen
    on these examples only."""
    train: int | None = None
    """Number of remaining examples that each lane (model) trains on. The lane's order seed draws them. None: all."""
    shuffle_pixels: int | None = None
    """Seed of a permutation of pixels. All examples and channels get the same permutation. None: no permutation."""
    seed: int | None = None
    """Seed of a generated data set. None: the default seed of that data set."""
    stream: bool | None = None
    """Read the examples chunk by chunk during training, instead of keeping all of them on the device. All lanes see the
    same chunks; each lane orders the examples of a chunk for itself. None: stream if the examples would take too much
    memory."""
    workers: int = 0
    """Number of processes that read ahead for a stream. It does not change results. 0: use threads of this process."""

    def __post_init__(self) -> None:
        require(self.train is None or self.train >= 1, f"data.train must be at least 1, not {self.train}")
        within = self.shuffle_pixels is None or 0 <= self.shuffle_pixels < 2**32
        require(within, f"data.shuffle_pixels must be in 0..2**32-1, not {self.shuffle_pixels}")
        require(self.validation >= 0, f"data.validation must not be negative, not {self.validation}")
        require(0 <= self.workers <= 256, f"data.workers must be in 0..256, not {self.workers}")
        require(self.seed is None or 0 <= self.seed < 2**32, f"data.seed must be in 0..2**32-1, not {self.seed}")
