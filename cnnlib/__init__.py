"""cnnlib: compare fully connected, locally connected and convolutional networks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from cnnlib.system import jaxlib_defects

if TYPE_CHECKING:
    from cnnlib.config.schema import EXPERIMENTS as EXPERIMENTS
    from cnnlib.config.schema import Arm as Arm
    from cnnlib.config.schema import Augment as Augment
    from cnnlib.config.schema import Checkpoint as Checkpoint
    from cnnlib.config.schema import Experiment as Experiment
    from cnnlib.config.schema import Lanes as Lanes
    from cnnlib.config.schema import Optim as Optim
    from cnnlib.data.declaration import Data as Data
    from cnnlib.spec.notation import parse_model as parse_model

__version__ = "0.1.0"

_HOME = dict.fromkeys(("EXPERIMENTS", "Arm", "Augment", "Checkpoint", "Experiment"), "cnnlib.config.schema")
_HOME |= {"Lanes": "cnnlib.config.schema", "Optim": "cnnlib.config.schema"}
_HOME |= {"Data": "cnnlib.data.declaration", "parse_model": "cnnlib.spec.notation"}

jaxlib_defects.avoid()  # must run before JAX starts


def __getattr__(name: str) -> object:
    """Import a public name on first use, because `cnnlib list` needs none of these names."""
    if name not in _HOME:
        raise AttributeError(f"module 'cnnlib' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
