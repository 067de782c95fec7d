"""The results of a run's jobs. `launch/merge.py` reads and merges them."""

from __future__ import annotations

from typing import NamedTuple

from cnnlib.config.schema import Experiment
from cnnlib.runs.predictions import Predictions
from cnnlib.runs.record import Identity, Job
from cnnlib.runs.resume import FinishedArm


class Merged(NamedTuple):
    """The merged results of a run's jobs."""

    name: str
    """Name of the experiment."""
    experiment: Experiment
    finished: dict[str, FinishedArm]
    answers: dict[str, Predictions]
    identities: dict[str, Identity]
    """For each job name: what the job's results depend on."""
    jobs: dict[str, Job]
    """For each job name: when and where it was trained."""

    @property
    def streamed(self) -> list[str]:
        """Return the names of the data sets that the jobs have streamed."""
        found = (identity.streamed for identity in self.identities.values())
        return list(dict.fromkeys(name for names in found for name in names))
