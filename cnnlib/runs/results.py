"""The results of a run: the content of `results.json`, as dataclasses.

Shares such as accuracies are numbers from 0 to 1. A number is None if it does not exist: for example, the accuracy of a
diverged lane, or the validation accuracy of a run without validation examples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cnnlib.config.fields import from_dict
from cnnlib.config.schema import SETTING_FIELDS, LaneNumbers, check_arm_name
from cnnlib.errors import UserError, require
from cnnlib.spec.layers import Connectivity
from cnnlib.system.files import read_json

FORMAT = 2
"""Format of results, records and checkpoints. cnnlib 0.1 wrote format 1."""
Status = Literal["ok", "diverged"]


@dataclass(frozen=True)
class Accuracy:
    """A mean accuracy over the lanes that have not diverged."""

    mean: float | None
    """None without lanes."""
    ci95: tuple[float | None, float | None]
    """The ends of the 95 % interval (Student's t). Both are None if there are fewer than two lanes."""
    n: int
    """Number of lanes."""

    def __post_init__(self) -> None:
        require((self.ci95[0] is None) == (self.ci95[1] is None), "an interval has two ends or none")

    def percent(self) -> tuple[float, float, float]:
        """Return the mean and the ends of the interval in percent. Without an interval, both ends are the mean."""
        assert self.mean is not None, "there is a lane"
        low, high = (100 * (self.mean if end is None else end) for end in self.ci95)
        return 100 * self.mean, low, high


NO_ACCURACY = Accuracy(None, (None, None), 0)
"""The accuracy of no lanes."""


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """The hyperparameters that may differ between the lanes of an arm."""

    learning_rate: float
    momentum: float
    weight_decay: float
    label_smoothing: float
    l1: float
    l1_threshold: float

    @property
    def setting(self) -> tuple[float, ...]:
        """Return the hyperparameters, in the order of `SETTING_FIELDS`."""
        return tuple(getattr(self, name) for name in SETTING_FIELDS)


@dataclass(frozen=True, kw_only=True)
class OfLane(Hyperparameters):
    """The seeds and hyperparameters of one lane (model)."""

    seed: int
    order_seed: int

    @property
    def numbers(self) -> LaneNumbers:
        """Return the seeds and hyperparameters as training takes them."""
        return LaneNumbers(self.seed, self.order_seed, *self.setting)


@dataclass(frozen=True, kw_only=True)
class Setting(Hyperparameters):
    """The lanes of an arm that differ only in their seeds. Accuracies are means over lanes that have not diverged."""

    test_accuracy: Accuracy
    train_accuracy: float | None = None
    validation_accuracy: float | None = None
    diverged: int
    """Number of diverged lanes."""


@dataclass(frozen=True, kw_only=True)
class LaneResult(OfLane):
    """The results of one lane (model)."""

    status: Status
    epochs: int
    """Number of epochs that the lane has trained."""
    parameters_sha256: str
    test_loss: float | None = None
    test_accuracy: float | None = None
    train_loss: float | None = None
    """Loss of the final model on the training examples."""
    train_accuracy: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    distance_from_conv: float | None = None
    """None unless the arm has local layers and starts at a convolution."""
    sparsity: float | None = None
    """None if no lane of the arm has an L1 penalty."""

    def __post_init__(self) -> None:
        require(self.status == "diverged" or self.test_accuracy is not None, "a lane that is ok has no test_accuracy")


@dataclass(frozen=True)
class DataResult:
    """The data set of an arm, with its numbers of examples."""

    name: str
    train: int
    validation: int
    test: int
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class MatchResult:
    """How the widths of an arm were scaled to match a budget (`spec.budget.Match`)."""

    by: str
    target: int
    value: int
    width: float


@dataclass(frozen=True, kw_only=True)
class DescribedArm:
    """What is known about an arm before it trains."""

    name: str
    connectivity: Connectivity
    model: str
    parameters: int
    connections: int
    macs: int
    match: MatchResult | None = None
    start: str | None = None
    data: DataResult
    batch_size: int
    steps: int

    def __post_init__(self) -> None:
        check_arm_name(self.name)


@dataclass(frozen=True, kw_only=True)
class ArmResult(DescribedArm):
    """The results of an arm."""

    compile_seconds: float
    lanes_at_a_time: int
    devices: int = 1
    mesh: tuple[int, ...] = (1, 1)
    memory_bytes: int
    epochs: int
    train_seconds_per_lane: float
    waited_seconds: float | None = None
    """Upper bound of the seconds in which training waited for examples. None unless examples were streamed."""
    chosen_setting: int | None
    """The index of the setting that validation chose, or of the only setting. None if nothing was chosen."""
    test_accuracy: Accuracy
    """The test accuracy of the chosen setting."""
    settings: tuple[Setting, ...]
    lanes: tuple[LaneResult, ...]

    def lanes_of(self, setting: Setting) -> list[LaneResult]:
        """Return all lanes with the hyperparameters of `setting`, diverged lanes included."""
        return [lane for lane in self.lanes if lane.setting == setting.setting]

    def accuracies_of(self, setting: Setting) -> list[float]:
        """Return the test accuracies of the lanes of `setting` that have not diverged."""
        values = (lane.test_accuracy for lane in self.lanes_of(setting) if lane.status == "ok")
        return [value for value in values if value is not None]


@dataclass(frozen=True, kw_only=True)
class DeviceResult:
    """The devices that trained the run."""

    platform: str
    kind: str
    count: int
    hosts: int = 1
    kernels: str
    precision: str = "default"
    flags: str = ""
    """The environment variable XLA_FLAGS."""
    checked: bool = True
    """Whether `check` found the backend right before every session."""


@dataclass(frozen=True)
class Machine:
    """The host of the run."""

    processor: str = "unknown"
    cores: int | None = None


@dataclass(frozen=True)
class Resumption:
    """One resume of a run."""

    time: str
    finished: tuple[str, ...]
    """Names of the arms that were finished before."""
    in_flight: dict[str, int]
    """For each arm that was begun: the number of its finished epochs."""
    changes: tuple[str, ...]
    """Changes since the run began, in words."""
    forced: bool


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """The results of a run that trained."""

    format: int
    experiment: str
    config: dict[str, object]
    """The experiment, as `config.fields.to_dict` returns it. Another version of cnnlib may have other fields."""
    data: DataResult
    device: DeviceResult
    machine: Machine = Machine()
    finished: str = "unknown"
    """The time in ISO 8601, UTC."""
    versions: dict[str, str]
    commit: str | None
    wall_seconds: float
    resumed: tuple[Resumption, ...] = ()
    arms: tuple[ArmResult, ...] = field(default=())


def require_format(what: Path | str, found: object) -> None:
    """Raise UserError if `found` is not a run's record or has another format. The message names the right version."""
    if not isinstance(found, dict):
        raise UserError(f"{what} is no folder of a run that can be read")
    version = found.get("format", 1)
    if version != FORMAT:
        who = "a newer cnnlib" if isinstance(version, int) and version > FORMAT else "cnnlib 0.1"
        raise UserError(f"{what} has format {version}, and this version reads format {FORMAT}: {who} reads it")


def parse_results(values: object, where: Path | str) -> RunResults:
    """Check and convert the content of a `results.json`. Files of cnnlib 0.1 have no format number and are read too.

    Raise UserError if the content is of a newer version or is damaged. The message names the file `where`.
    """
    if not isinstance(values, dict) or not isinstance(values.get("arms"), list) or not values["arms"]:
        raise UserError(f"{where} has no results of trained models")
    if "format" in values:
        require_format(where, values)
    try:
        results: RunResults = from_dict({"format": FORMAT, **values}, RunResults, "results")
    except UserError as error:
        raise UserError(f"{where} is damaged: {error}") from error
    for arm in results.arms:
        if arm.chosen_setting is not None and not 0 <= arm.chosen_setting < len(arm.settings):
            raise UserError(f"{where}: arm {arm.name} has no setting {arm.chosen_setting}")
    return results


def results_in(folder: Path) -> RunResults | None:
    """Read the `results.json` of a run; None if there is none, or if the run only counted and trained nothing.

    Raise UserError if the file is damaged or of a newer version.
    """
    path = folder / "results.json"
    values = read_json(path)
    if values is None or (isinstance(values, dict) and "arms" not in values):
        return None
    return parse_results(values, path)


def read_results(folder: Path) -> RunResults:
    """Read the `results.json` of a run. Raise UserError if it is missing, damaged or of a newer version."""
    results = results_in(folder)
    if results is None:
        raise UserError(f"there are no results in {folder}")
    return results
