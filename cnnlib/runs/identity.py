"""What the results of a run depend on, and how two sessions, jobs or hosts differ in it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from cnnlib.config.fields import flat, from_dict, to_dict
from cnnlib.config.schema import Experiment
from cnnlib.data.sets import DataSet, StreamedSet, fingerprint_of_stream
from cnnlib.errors import UserError
from cnnlib.ops import kernels
from cnnlib.runs.record import Identity
from cnnlib.runs.results import Machine
from cnnlib.system import provenance
from cnnlib.train import feeds
from cnnlib.train.multihost import Hosts

SETTINGS = ("jax_enable_x64", "jax_threefry_partitionable", "jax_numpy_dtype_promotion")
"""JAX settings that change results."""
NEVER_IN_THE_NUMBERS = (
    "checkpoint",
    "wandb",
    "compile_cache",
    "data.data_dir",
    "data.workers",
    "data.stream",
    "comparisons",
)
"""Fields that may differ on resume. For `data.stream`, the identity compares the streamed data sets."""
ON_EACH_HOST = ("wandb", "compile_cache", "data.data_dir", "data.workers")
"""Fields that may differ between hosts."""

ONLY_ROUNDING = ("lanes.at_a_time", "devices", "mesh", "accumulate", "remat")
"""Fields that change results only by rounding."""


def identity(
    name: str,
    experiment: Experiment,
    device: jax.Device,
    devices: int,
    cpu_kernels: str,
    data_sets: Iterable[DataSet | StreamedSet],
) -> Identity:
    """Return the identity of a session: what its results depend on. Equal identities give equal results."""
    sets = list(data_sets)
    settings = {"XLA_FLAGS": os.environ.get("XLA_FLAGS"), **{name: getattr(jax.config, name) for name in SETTINGS}}
    return Identity(
        experiment=name,
        config=flat(to_dict(experiment)),
        code_sha256=provenance.code_sha256(),
        data_sha256=fingerprint(sets),
        streamed=names_of_streams(sets),
        versions={**provenance.versions(), "numpy": np.__version__},
        device={"platform": device.platform, "kind": device.device_kind, "kernels": cpu_kernels},
        settings=settings,
        machine=Machine(kernels.processor()[:200], os.cpu_count()),
        devices=devices,
    )


def of_part(whole: Identity, data_set: DataSet | StreamedSet, cpu_kernels: str) -> Identity:
    """Return the identity that a run of only one arm would have. `data_set` and `cpu_kernels` are those of the arm."""
    device = {**whole.device, "kernels": cpu_kernels}
    return replace(whole, data_sha256=fingerprint([data_set]), streamed=names_of_streams([data_set]), device=device)


def names_of_streams(data_sets: Iterable[DataSet | StreamedSet]) -> tuple[str, ...]:
    """Return the names of the data sets that are streamed."""
    return tuple(one.description.name for one in data_sets if feeds.is_streamed(one))


def fingerprint(data_sets: Iterable[DataSet | StreamedSet]) -> str:
    """Return one SHA-256 of all examples and classes. A streamed data set counts by its `fingerprint_of_stream`."""
    digest = hashlib.sha256()
    known = list(data_sets)
    for one in known:
        if isinstance(one, StreamedSet):
            digest.update(fingerprint_of_stream(one).encode())
    resident = [one for one in known if isinstance(one, DataSet)]
    arrays = (array for one in resident for split in (one.train, one.validation, one.test) for array in split)
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data if array.size else b"")
    return digest.hexdigest()


class IdentityChanges(NamedTuple):
    """What has changed since the run began, in words."""

    refused: list[str]
    """Changes that make the results incomparable."""
    told: list[str]
    """Changes after which results agree up to rounding, but perhaps not to the last bit."""


def identity_changes(before: Identity, after: Identity) -> IdentityChanges:
    """Return the differences between two identities, in words."""
    refused: list[str] = []
    told: list[str] = []
    for field, text in changed_fields(before.config, after.config, but=NEVER_IN_THE_NUMBERS):
        (told if field in ONLY_ROUNDING else refused).append(text)
    parts = {"the experiment": "experiment", "cnnlib's code": "code_sha256", "the data": "data_sha256"}
    if before.streamed != after.streamed:
        # The SHA-256 of a stream differs from the SHA-256 of the same examples in memory.
        del parts["the data"]
    for what, part in parts.items():
        old, new = getattr(before, part), getattr(after, part)
        if old != new:
            refused.append(f"{what} was {_short(old, 12)}, is {_short(new, 12)}")
    for part, where in (("versions", refused), ("device", refused), ("settings", refused)):
        for name, text in _changes(getattr(before, part), getattr(after, part)):
            (told if name == "python" else where).append(text)
    if before.streamed != after.streamed:
        refused.append(f"streamed was {_short(before.streamed)}, is {_short(after.streamed)}")
    told += [text for _, text in _changes(*({**vars(one.machine), "devices": one.devices} for one in (before, after)))]
    return IdentityChanges(refused, told)


def _changes(old: Mapping[str, object], new: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for name in dict.fromkeys((*old, *new)):
        if old.get(name) != new.get(name):
            yield name, f"{name} was {_short(old.get(name))}, is {_short(new.get(name))}"


def changed_fields(
    before: Mapping[str, object], after: Mapping[str, object], but: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """For each field that differs between two flat configurations, yield its name and the change in words.

    The name is without the prefix `arms.NAME.`. Skip fields whose name begins with an entry of `but`.
    """
    for name, text in _changes(_fields(before), _fields(after)):
        field = re.sub(r"^arms\.[^.]+\.", "", name)
        if not field.startswith(but):
            yield field, text


def _fields(config: Mapping[str, object]) -> dict[str, object]:
    """Return a flat configuration with one entry per override of an arm."""
    found: dict[str, object] = {}
    for name, value in config.items():
        if name.startswith("arms.") and name.endswith(".own") and isinstance(value, list):
            own = (str(text).partition("=") for text in value)
            found |= {f"{name.removesuffix('own')}{field}": text for field, _, text in own}
        else:
            found[name] = value
    return found


def _short(value: object, length: int = 60) -> str:
    text = (",".join(map(str, value)) or "nothing") if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= length else text[:length] + "..."


def refusal(folder: Path, found: IdentityChanges) -> UserError:
    """Return the error that says in one line why a run is not resumed."""
    return UserError(
        f"the run in {folder} cannot be resumed to the same numbers: {'; '.join(found.refused)}; --force goes on with "
        f"it all the same, and the results say so; without --resume it is moved aside and a new one begins"
    )


def check_alike(hosts: Hosts, this: Identity) -> None:
    """Raise UserError on all hosts if any host's results would differ from the results of process 0."""
    own = json.dumps(to_dict(this)).encode()
    first, this = (from_dict(json.loads(text), Identity, "identity") for text in (hosts.from_first(own), own))
    found = [text for _, text in changed_fields(first.config, this.config, but=ON_EACH_HOST)]
    found += [text for text in identity_changes(first, this).refused if text not in found]
    hosts.same("differences from process 0:", "; ".join(found) or "none")
