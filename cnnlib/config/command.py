"""Find the command line that repeats a run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from cnnlib.config.fields import from_dict
from cnnlib.config.overrides import assignments, override
from cnnlib.config.schema import EXPERIMENTS, Experiment, Growth, kept_like
from cnnlib.errors import UserError


def command_for(name: str, experiment: Experiment | Growth) -> str | None:
    """Return the command that repeats a run; None if no overrides of a registered experiment give this run."""
    if name not in EXPERIMENTS:
        return None
    registered = EXPERIMENTS.get(name)
    if type(registered) is not type(experiment):
        return None
    known, wanted = assignments(registered), assignments(experiment)
    for overrides in ([text for text in wanted if text not in known], wanted):
        try:
            if override(registered, overrides) == experiment:
                return shlex.join(["cnnlib", "run", name, *overrides])
        except UserError:  # for example, the registered experiment lacks an arm
            continue
    return None


def command_to_repeat(name: str, config: Mapping[str, object]) -> str | None:
    """Return the command that repeats a run of the experiment `name`. `config` is the `config` of its `results.json`.

    Settings that do not affect results, such as checkpoints and W&B, come from the registered experiment. Return None
    if no overrides of that experiment give this run. Raise UserError if this version of cnnlib cannot read `config`.
    """
    experiment = from_dict(config, Experiment)
    registered = EXPERIMENTS.get(name) if name in EXPERIMENTS else None
    return command_for(name, kept_like(experiment, registered) if isinstance(registered, Experiment) else experiment)
