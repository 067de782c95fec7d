"""Allow training only on a backend that has passed a check. A device, its software and its flags form a backend."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version

import jax

from cnnlib.check.case import Precision
from cnnlib.check.compare import Found, quick_check
from cnnlib.errors import UserError
from cnnlib.ops import kernels
from cnnlib.system import jaxlib_defects, provenance
from cnnlib.system.cache import cache_folder, is_writable, keep_file
from cnnlib.train.programs import compile_cache

FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Environment variables that change what a compiler does."""


def require_right(device: jax.Device, precision: Precision, keep: bool, says: Callable[[str], None]) -> None:
    """Run the quick check on a device, unless it has passed before with the same software and flags.

    A file in the user's cache folder records that the check has passed.

    Args:
        device: One of this process's devices. All devices of the same kind are assumed to give the same results.
        precision: Precision of matrix products, as in training.
        keep: Whether the compiled program of the check may be kept in the user's cache folder.
        says: Called with a message if the check runs.

    Raises:
        UserError: An operation is wrong. The message names the operation and the flag that avoids a known defect.
    """
    known = backend_of(device, precision)
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder("checks") / f"{key}.json"
    if key in PASSED or path.exists():
        PASSED.add(key)
        return
    says(f"checking {device.device_kind} with jaxlib {version('jaxlib')}, once: --no-check skips it")
    with jax.default_device(device), compile_cache(keep, says):
        found = quick_check(precision)
    if wrong := [one for one in found if one.is_wrong]:
        raise UserError(refusal(device, wrong))
    PASSED.add(key)
    if is_writable(path.parent):
        keep_file(path, (json.dumps({**known, "passed": provenance.now()}, indent=2) + "\n").encode())


PASSED: set[str] = set()
"""Keys of backends that have passed in this process or in an earlier process."""


def backend_of(device: jax.Device, precision: Precision) -> dict[str, str]:
    """Return the properties of a backend. If any property changes, the check runs again."""
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "runtime": device.client.platform_version,
        "processor": kernels.processor(),
        "precision": precision,
        "kernels": kernels.chosen() if device.platform == "cpu" else "xla",
        "code": provenance.code_sha256(),
        **{name: os.environ.get(name, "") for name in FLAG_VARIABLES},
    }


def refusal(device: jax.Device, wrong: Sequence[Found]) -> str:
    """Return a one-line message that says what is wrong with a backend and how to avoid it, if a way is known."""
    worst = max(wrong, key=lambda one: one.error)
    jaxlib, flags = version("jaxlib"), os.environ.get("XLA_FLAGS", "")
    here = [defect for defect in jaxlib_defects.known(jaxlib) if defect.platform == device.platform]
    needed = " ".join(dict.fromkeys(defect.flag for defect in here))
    advice = f"jaxlib {jaxlib} has a known defect: XLA_FLAGS='{needed}' avoids it" if here else "try another jaxlib"
    names = ", ".join(dict.fromkeys(one.operation for one in wrong))
    return (
        f"{device.device_kind} computes wrong numbers: {names} ({worst.form}, {worst.dtype}, {worst.size}: "
        f"{worst.error:.3g} times the tolerance) with jaxlib {jaxlib}, XLA_FLAGS='{flags}'; {advice}; "
        "`cnnlib check` shows all operations, --no-check trains all the same"
    )
