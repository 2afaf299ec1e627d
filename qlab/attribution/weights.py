"""The factors between two checkpoints: packing, the settings of their quantisation, or the weights as a whole.

* Equal weights in two layouts have no factor: packing is then 0 by what both decode to.
* Equal settings and linears that a fault of storage explains: one factor, *packing*, with the fault's name and place.
* Two known settings and the original weights: one factor for each setting that differs. A coalition is the checkpoint that its
  mixture of settings makes of the original; the ends stay as they are stored. Where quantising with an end's own settings gives
  other bits than it holds, that step is a factor of its own, next to that end, so that it hides in no other. GPTQ does so on
  another machine: it hands every rounding error on to later rows, and one code that falls otherwise changes many.
* Anything else: one factor, *weights*, with its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qlab import checkpoint, data
from qlab.attribution.requantize import Calibration, Done, place, requantize
from qlab.attribution.result import PACKING, Factor
from qlab.attribution.settings import Between, Settings, known, text
from qlab.attribution.storage import storage_fault
from qlab.attribution.weight_difference import WeightsDifference, difference
from qlab.checkpoint import Checkpoint
from qlab.errors import CheckpointError, QlabError
from qlab.lab.transformer import check_one_model

STORED, AGAIN = "as stored", "quantised again here"


@dataclass(frozen=True)
class WeightFactors:
    """The factors; bit i of a mask takes ``factors[i]`` from B."""

    factors: tuple[Factor, ...]
    """Of the categories ``packing``, ``group layout`` and ``weights``."""
    size: WeightsDifference
    """How far the two ends are apart."""
    notes: tuple[str, ...]
    """What a reader should know: why there is one factor only, what was not reproduced."""
    _ends: tuple[Path, Path] = field(repr=False)
    _hybrids: _Hybrids | None = field(default=None, repr=False)

    @property
    def full(self) -> int:
        """The mask that takes everything from B."""
        return (1 << len(self.factors)) - 1

    def admissible(self, mask: int) -> bool:
        """Whether there is such a checkpoint. Raises QlabError for a mask beyond the factors."""
        self._check(mask)
        return mask in (0, self.full) or (self._hybrids is not None and self._hybrids.admissible(mask))

    def directory(self, mask: int) -> Path:
        """The checkpoint of a coalition: A's for 0, B's for the full mask, else one made on first use, in a minute or so.

        Raises QlabError for an inadmissible mask.
        """
        if not self.admissible(mask):
            raise QlabError(f"no quantizer makes the weights of coalition {mask:b}; only admissible ones have a checkpoint")
        if mask in (0, self.full):
            return self._ends[bool(mask)]
        assert self._hybrids is not None
        return self._hybrids.directory(mask)

    def settings(self, mask: int) -> Settings | None:
        """How the checkpoint of an admissible mask is quantised; None where that is not known."""
        if not self.admissible(mask) or self._hybrids is None:
            return None
        return self._hybrids.settings(mask)

    def to_make(self) -> int:
        """How many checkpoints of admissible masks have yet to be made."""
        if self._hybrids is None:
            return 0
        inner = [m for m in range(1, self.full) if self.admissible(m)]
        return len({p for m in inner if not ((p := self._hybrids.place(m)) / "config.json").is_file()})

    def _check(self, mask: int) -> None:
        if not 0 <= mask <= self.full:
            raise QlabError(f"mask {mask} does not fit {len(self.factors)} factors; it must be 0 to {self.full}")


@dataclass(frozen=True)
class _Hybrids:
    """Settings between two ends, and the step from either end's own bits to its settings where they differ."""

    between: Between
    first: bool
    """Whether factor 0 takes A's checkpoint to what its settings give here; it goes before all others."""
    last: bool
    """The same for B's, with the last factor, which goes after all others."""
    original: Path
    calibration: Calibration
    done: Done

    def admissible(self, mask: int) -> bool:
        inner, first, last = self._split(mask)
        if (self.first and not first and (inner or last)) or (last and inner != self._whole):
            return False
        return self.between.admissible(inner)

    def settings(self, mask: int) -> Settings:
        return self.between.settings(self._split(mask)[0])

    def place(self, mask: int) -> Path:
        return place(self.original, self.settings(mask), self.calibration)

    def directory(self, mask: int) -> Path:
        return requantize(self.original, self.settings(mask), self.calibration, self.done)

    @property
    def _whole(self) -> int:
        return (1 << len(self.between.parts)) - 1

    def _split(self, mask: int) -> tuple[int, bool, bool]:
        inner = mask >> self.first
        return inner & self._whole, bool(self.first and mask & 1), bool(inner >> len(self.between.parts))


def weight_factors(
    directory_a: Path,
    directory_b: Path,
    *,
    original: Path | None = None,
    requantize: bool = True,
    settings: tuple[Settings | None, Settings | None] = (None, None),
    calibration: Calibration | None = None,
    done: Done = lambda unit: None,
) -> WeightFactors:
    """The factors between the INT4 checkpoints of two directories.

    ``original`` is the full-precision model both were made from, by default the shipped one for shipped checkpoints.
    ``requantize`` False leaves the weights one factor. ``settings`` are those of A and of B where the caller knows them (see
    :func:`qlab.attribution.settings.declared`), ``calibration`` is their text; the shipped ones are known. Both ends are
    quantised again to see whether that gives their bits, unless they have been before; ``done`` hears of every unit.
    Raises CheckpointError for directories that are no two checkpoints of one model.
    """
    ends = (directory_a, directory_b)
    a, b = (checkpoint.read(d) for d in ends)
    size = difference(a, b)
    check_one_model(*ends)
    if size.served_alike:
        return WeightFactors((), size, _beside(size), ends)
    if faults := _storage(a, b, size):
        return WeightFactors((Factor(PACKING, PACKING, "", "as in A", _listed(faults)),), size, (), ends)
    how = tuple(s or known(d) for s, d in zip(settings, ends, strict=True))
    if original is None and all(known(d) for d in ends):
        original = data.model_directory("fp16")
    why = _single(how, ends, original, requantize)
    if not why:
        try:
            return _by_settings(ends, Between(how[0], how[1]), original, calibration or Calibration.shipped(), size, done)  # type: ignore[arg-type]
        except CheckpointError:
            raise
        except QlabError as e:
            why = str(e)
    one, other = (_named(d, c) for d, c in zip(ends, (a, b), strict=True))
    return WeightFactors((Factor("weights", "weights", "", one, other),), size, (_together(size, why),), ends)


def _by_settings(
    ends: tuple[Path, Path],
    between: Between,
    original: Path,
    calibration: Calibration,
    size: WeightsDifference,
    done: Done,
) -> WeightFactors:
    notes, moved = [], []
    for side, end, own in zip("AB", ends, (between.a, between.b), strict=True):
        again = requantize(original, own, calibration, done)
        found = difference(checkpoint.read(end), checkpoint.read(again))
        moved.append(not found.served_alike)
        if not found.served_alike:
            notes.append(f"{side}'s checkpoint is not what its settings give on this machine ({found}): that step is a factor")
        notes.extend(f"{side} quantised again: {note}" for note in _beside(found))
    factors = [Factor(p.name, p.category, "", text(p, between.a), text(p, between.b)) for p in between.parts]
    if moved[0]:
        factors.insert(0, Factor("quantising A again", "weights", "", STORED, AGAIN))
    if moved[1]:
        factors.append(Factor("quantising B again", "weights", "", AGAIN, STORED))
    hybrids = _Hybrids(between, moved[0], moved[1], original, calibration, done)
    return WeightFactors(tuple(factors), size, tuple(notes), ends, hybrids)


def _single(how: tuple[Settings | None, ...], ends: tuple[Path, Path], original: Path | None, wanted: bool) -> str:
    """Why the weights must stay one factor; empty when they need not."""
    if not wanted:
        return "quantising again was not asked for"
    if original is None:
        return "the original they were quantised from is not at hand"
    for settings, end in zip(how, ends, strict=True):
        if settings is None:
            return f"{end} does not say how its codes were chosen (algorithm, clipping, calibration)"
    return "both were made with the same settings" if how[0] == how[1] else ""


def _storage(a: Checkpoint, b: Checkpoint, size: WeightsDifference) -> Mapping[str, str]:
    """Fault by module where storage explains every difference between two checkpoints of equal settings; else empty."""
    declared = [(c.method, c.config.group_size, c.config.sym, c.config.desc_act, c.config.checkpoint_format) for c in (a, b)]
    if declared[0] != declared[1] or size.dense or size.input_scales:
        return {}
    faults = {}
    for linear in size.linears:
        fault = storage_fault(a.weight(linear.name), b.weight(linear.name))
        if not fault:
            return {}
        faults[linear.name] = fault
    return faults


def _listed(faults: Mapping[str, str]) -> str:
    """``module: fault``, modules with one fault together."""
    modules: dict[str, list[str]] = {}
    for module, fault in faults.items():
        modules.setdefault(fault, []).append(module)
    return "; ".join(f"{_modules(names)}: {fault}" for fault, names in modules.items())


def _modules(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _together(size: WeightsDifference, why: str) -> str:
    """A note on the one factor: its size, and why it is one."""
    said = f"the weights ({size}) are one factor: {why}"
    if size.relative_l2 is not None:
        return said
    return f"{said}; AWQ's input scales are not kept beside them, so that the layers' outputs lie in two coordinates"


def _named(directory: Path, found: Checkpoint) -> str:
    name = directory.resolve().name
    return name if found.method in name else f"{name} ({found.method})"


def _beside(size: WeightsDifference) -> tuple[str, ...]:
    """A note where only AWQ's input scales differ."""
    if not size.input_scales:
        return ()
    return (f"AWQ input scales differ in {len(size.input_scales)} linears; no kernel reads them",)
