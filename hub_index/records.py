"""What the index knows about an adapter: frozen records, checked when they are made (spec/ecosystem.md 1.2).

A record is data from strangers: cards, configurations, file headers. Whatever passes these checks can be stored,
exported and shown; nothing in it is ever run or opened by itself. No torch and no numpy is imported here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from compose.errors import HubIndexError

if TYPE_CHECKING:
    import numpy as np

Status = Literal["active", "quarantined", "removed"]
Severity = Literal["info", "low", "medium", "high", "critical"]
Source = Literal["dir", "hub", "description"]
STATUSES: tuple[str, ...] = get_args(Status)
SEVERITIES: tuple[str, ...] = get_args(Severity)
SOURCES: tuple[str, ...] = get_args(Source)

MAX_TEXT = 2**20
MAX_LINE = 4096
MAX_ITEMS = 100_000
MAX_VECTOR = 65_536
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KIND = re.compile(r"[a-z0-9][a-z0-9_:.-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class ModuleRecord:
    """One target of an adapter.

    Attributes:
        name: Module path inside the base model.
        kind: ``"linear"``, ``"embedding"``, ``"vector"`` (IA3), ``"full"`` (modules_to_save), ``"expert"``.
        in_features: ``I``, 0 where it has none.
        out_features: ``O``, 0 where it has none.
        rank: ``R``, 0 where it has none.
        scaling: The multiplier really applied (alpha/R, or alpha/sqrt(R) for rsLoRA).
        has_dora: Whether it has a magnitude vector.
    """

    name: str
    kind: str = "linear"
    in_features: int = 0
    out_features: int = 0
    rank: int = 0
    scaling: float = 1.0
    has_dora: bool = False

    def __post_init__(self) -> None:
        _check_fields(self)
        _need(bool(self.name), "module name", self.name, "a module path")


@dataclass(frozen=True, kw_only=True)
class StatRecord:
    """Statistics of one target's delta (arXiv:2602.15195), for audits and the similarity map.

    A number is None where it is not defined: of an all-zero delta, or of one with values that are not finite.

    Attributes:
        module: Module path.
        sigma1: Largest singular value of the delta.
        fro: Its Frobenius norm.
        energy1: ``sigma1^2 / fro^2``.
        spec_entropy: Entropy (nats) of the normalised squared singular values.
        kurtosis: Of the entries, 3 for a normal distribution.
        num_nonfinite: Values that are NaN or infinite.
        b_zero: Whether B is all zeros.
    """

    module: str
    sigma1: float | None
    fro: float | None
    energy1: float | None
    spec_entropy: float | None
    kurtosis: float | None
    num_nonfinite: int = 0
    b_zero: bool = False

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True, kw_only=True)
class AuditFinding:
    """One remark of an audit.

    Attributes:
        rule: Identifier of the rule.
        severity: ``info``, ``low``, ``medium``, ``high`` or ``critical``.
        module: The target it is about, ``""`` for the whole adapter.
        detail: For a person: what was found, what was expected.
        tool_version: Version of the auditor.
        at: When, ISO 8601 in UTC; the index fills it in where it is empty.
    """

    rule: str
    severity: Severity
    detail: str
    module: str = ""
    tool_version: str = ""
    at: str = ""

    def __post_init__(self) -> None:
        _check_fields(self)
        _need(bool(self.rule), "rule of a finding", self.rule, "an identifier")
        _need(self.severity in SEVERITIES, "severity", self.severity, f"one of {', '.join(SEVERITIES)}")


@dataclass(frozen=True, kw_only=True)
class ScoreRecord:
    """One evaluation result; (task, split, metric, harness, harness_version, seed) is unique in an adapter.

    Attributes:
        task: Name of the task or data set.
        metric: Name of the metric.
        value: Its value, in the metric's own unit.
        split: Of the data, ``""`` when unknown.
        n: Number of examples, None when unknown.
        harness: What measured it, ``"model-index"`` for a card's claim.
        harness_version: Its version.
        seed: Of the evaluation, None when unknown.
        at: When, ISO 8601.
    """

    task: str
    metric: str
    value: float
    split: str = ""
    n: int | None = None
    harness: str = ""
    harness_version: str = ""
    seed: int | None = None
    at: str = ""

    def __post_init__(self) -> None:
        _check_fields(self)
        _need(bool(self.task and self.metric), "score", self.task or self.metric, "a task and a metric")


@dataclass(frozen=True, kw_only=True)
class ExampleRecord:
    """A few prompts stand for an adapter's task: what a retriever embeds (arXiv:2402.09997)."""

    input: str
    target: str = ""

    def __post_init__(self) -> None:
        _check_fields(self, line=MAX_TEXT)


@dataclass(frozen=True, kw_only=True)
class LineageRecord:
    """One parent of a composed adapter, by content.

    Attributes:
        parent_sha256: `AdapterRecord.sha256` of the parent, or the hash of its weight file where that is all we know.
        weight: Its coefficient, None where there is none.
        method: What composed it.
        config_sha256: Hash of the method's configuration, ``""`` when unknown.
    """

    parent_sha256: str
    weight: float | None = None
    method: str = ""
    config_sha256: str = ""

    def __post_init__(self) -> None:
        _check_fields(self)
        check_sha256(self.parent_sha256, "parent_sha256")
        check_sha256(self.config_sha256, "config_sha256", empty=True)


@dataclass(frozen=True, kw_only=True)
class EmbeddingRecord:
    """One vector of an adapter under one encoder.

    Attributes:
        encoder_id: Name of the encoder.
        encoder_sha256: Hash of its weights and settings.
        prompt: The instruction that was put before the text; part of the encoder's identity.
        kind: What was embedded: ``"card"``, ``"examples"``, ``"weights"``, or another lower-case word.
        vector: ``D`` little-endian float32 values.
    """

    encoder_id: str
    encoder_sha256: str
    kind: str
    vector: bytes = field(repr=False)
    prompt: str = ""

    def __post_init__(self) -> None:
        _check_fields(self, line=MAX_TEXT)
        _need(bool(self.encoder_id), "encoder_id", self.encoder_id, "the encoder's name")
        check_sha256(self.encoder_sha256, "encoder_sha256")
        _need(bool(_KIND.fullmatch(self.kind)), "kind of an embedding", self.kind, "a lower-case word")
        size = len(self.vector)
        fine = size % 4 == 0 and 0 < size <= 4 * MAX_VECTOR
        _need(fine, "bytes of a vector", size, f"4 per entry, 1 to {MAX_VECTOR} entries")
        values = struct.unpack(f"<{size // 4}f", self.vector)
        fine = math.isfinite(sum(values)) and any(values)
        _need(fine, "vector", "NaN, an infinity or all zeros", "finite numbers, not all zero, to have a cosine")

    @classmethod
    def from_array(
        cls, values: Any, *, encoder_id: str, encoder_sha256: str, kind: str, prompt: str = ""
    ) -> EmbeddingRecord:
        """Return the record of ``D`` numbers.

        Raises:
            HubIndexError: Not one vector, not finite, or all zeros.
        """
        import numpy as np

        array = np.asarray(values, dtype="<f4")
        _need(array.ndim == 1, "shape of a vector", array.shape, "(D,)")
        return cls(
            encoder_id=encoder_id, encoder_sha256=encoder_sha256, kind=kind, prompt=prompt, vector=array.tobytes()
        )

    @property
    def dim(self) -> int:
        """Number of entries ``D``."""
        return len(self.vector) // 4

    def array(self) -> np.ndarray:
        """Return the vector ``(D,)`` in float32."""
        import numpy as np

        return np.frombuffer(self.vector, dtype="<f4").astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """Everything the index holds about one adapter.

    Attributes:
        name: Unique in an index; 1 to 96 of ``A-Z a-z 0-9 . _ -``.
        sha256_weights: Of the weight file's bytes; ``""`` only where the source is a description.
        sha256_config: Of the configuration file's bytes; ``""`` where there is none.
        source: ``"dir"``, ``"hub"``, or ``"description"`` (known by hearsay: nothing to load).
        repo_id: On the Hugging Face Hub, ``""`` otherwise.
        revision: The commit's hash, never a branch.
        path: The adapter's folder: absolute, or relative to the folder of the index (`Index.folder_of`).
        format: ``"peft-safetensors"``, ``"peft-bin"``, ``"peft-legacy-merged"``, ``"mttl"``, ...
        num_bytes: Size of the weight file.
        num_tensors: Tensors in it.
        num_params: Entries of all tensors.
        dtype: Of the factors, such as ``"BF16"``; several are joined by commas.
        base_id: The base model as the configuration names it, ``""`` when unknown.
        base_revision: Its commit, where the configuration says.
        base_fingerprint: SHA-256 over the sorted (module, shape) pairs the adapter touches and the model type.
        base_relation: ``"adapter"``, or what the card says.
        peft_type: ``"LORA"``, ``"IA3"``, ...
        task_type: ``"CAUSAL_LM"``, ...
        rank_min: Smallest rank of its targets, 0 where they have none.
        rank_max: Largest.
        scaling: Pattern -> multiplier, as the configuration says it; per module it stands in ``modules``.
        flags: ``"dora"``, ``"rslora"``, ``"fan_in_fan_out"``, ``"lora_bias"``, ...
        modules_to_save: Modules replaced whole.
        title: Of the card.
        summary: What the adapter does, in words.
        license: As the card says it.
        language: Codes.
        tags: Of the card.
        datasets: Trained on.
        train_seed: None when unknown.
        hyper: Hyperparameters of the training, JSON values.
        created_at: When it was trained or published, ISO 8601.
        added_at: When it came into the index; the index fills it in.
        status: ``"active"``, ``"quarantined"`` (not used unless asked for) or ``"removed"``.
        reasons: Why it is quarantined or removed.
        modules, examples, scores, parents, stats, findings, embeddings: What belongs to it.
    """

    name: str
    sha256_weights: str = ""
    sha256_config: str = ""
    source: Source = "dir"
    repo_id: str = ""
    revision: str = ""
    path: str = ""
    format: str = ""
    num_bytes: int = 0
    num_tensors: int = 0
    num_params: int = 0
    dtype: str = ""
    base_id: str = ""
    base_revision: str = ""
    base_fingerprint: str = ""
    base_relation: str = "adapter"
    peft_type: str = ""
    task_type: str = ""
    rank_min: int = 0
    rank_max: int = 0
    scaling: Mapping[str, float] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    title: str = ""
    summary: str = ""
    license: str = ""
    language: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    train_seed: int | None = None
    hyper: Mapping[str, Any] = field(default_factory=dict)
    created_at: str = ""
    added_at: str = ""
    status: Status = "active"
    reasons: tuple[str, ...] = ()
    modules: tuple[ModuleRecord, ...] = ()
    examples: tuple[ExampleRecord, ...] = ()
    scores: tuple[ScoreRecord, ...] = ()
    parents: tuple[LineageRecord, ...] = ()
    stats: tuple[StatRecord, ...] = ()
    findings: tuple[AuditFinding, ...] = ()
    embeddings: tuple[EmbeddingRecord, ...] = ()

    def __post_init__(self) -> None:
        check_adapter_name(self.name)
        try:
            _check_fields(self, line=MAX_TEXT)
            _check_adapter(self)
        except HubIndexError as error:
            raise HubIndexError(f"adapter {self.name!r}: {error}") from None

    @property
    def sha256(self) -> str:
        """The adapter's identity: SHA-256 over the hashes of its weights and its configuration.

        Of a description, which has neither, over its name.
        """
        return content_sha256(self.sha256_weights, self.sha256_config, self.name)


@dataclass(frozen=True, kw_only=True)
class AdapterSummary:
    """The fields of an `AdapterRecord` that lists and results of queries show; reading one touches one row."""

    name: str
    sha256: str
    sha256_weights: str
    sha256_config: str
    source: str
    repo_id: str
    revision: str
    path: str
    format: str
    num_bytes: int
    base_id: str
    base_fingerprint: str
    peft_type: str
    task_type: str
    rank_min: int
    rank_max: int
    title: str
    summary: str
    license: str
    tags: tuple[str, ...]
    status: Status
    reasons: tuple[str, ...]


def content_sha256(sha256_weights: str, sha256_config: str, name: str) -> str:
    """Return the identity of an adapter; see `AdapterRecord.sha256`."""
    known = f"adapter\n{sha256_weights}\n{sha256_config}" if sha256_weights else f"description\n{name}"
    return hashlib.sha256(known.encode()).hexdigest()


def check_adapter_name(name: str) -> str:
    """Return ``name`` when it may name an adapter, by the rule of `compose.formats.header.check_name`.

    Raises:
        HubIndexError: Anything but 1-96 of ``A-Z a-z 0-9 . _ -`` starting with a letter or digit, or ``..`` in it.
    """
    fine = isinstance(name, str) and _NAME.fullmatch(name) is not None and ".." not in name
    allowed = "1 to 96 letters, digits, '.', '_' or '-', starting with a letter or digit and without '..'"
    _need(fine, "adapter name", name, allowed)
    return name


def check_sha256(value: str, what: str, *, empty: bool = False) -> str:
    """Return ``value`` where it is 64 hexadecimal digits in lower case, or empty where that is allowed.

    Raises:
        HubIndexError: It is not.
    """
    fine = isinstance(value, str) and (bool(_SHA256.fullmatch(value)) or (empty and value == ""))
    _need(fine, what, value, "64 hexadecimal digits in lower case")
    return value


def _check_adapter(record: AdapterRecord) -> None:
    _need(record.source in SOURCES, "source", record.source, f"one of {', '.join(SOURCES)}")
    _need(record.status in STATUSES, "status", record.status, f"one of {', '.join(STATUSES)}")
    check_sha256(record.sha256_weights, "sha256_weights", empty=record.source == "description")
    check_sha256(record.sha256_config, "sha256_config", empty=True)
    check_sha256(record.base_fingerprint, "base_fingerprint", empty=True)
    _need(record.rank_min <= record.rank_max, "rank_min", record.rank_min, f"at most rank_max {record.rank_max}")
    _distinct("module", [module.name for module in record.modules])
    _distinct("statistic of module", [stat.module for stat in record.stats])
    _distinct("embedding", [(one.encoder_id, one.kind) for one in record.embeddings])
    _distinct("parent", [one.parent_sha256 for one in record.parents])
    keys = [(one.task, one.split, one.metric, one.harness, one.harness_version, one.seed) for one in record.scores]
    _distinct("score", keys)


def _check_fields(record: Any, line: int = MAX_LINE) -> None:
    """Check every field of a record by its annotation, which is a string here."""
    for one in fields(record):
        value = getattr(record, one.name)
        problem = _problem(value, str(one.type), line)
        _need(not problem, one.name, value, problem)


def _problem(value: Any, kind: str, line: int) -> str:
    """Return what a value of this annotation has to be where it is not, else ``""``."""
    if kind.startswith("Mapping"):
        return _mapping_problem(value, numbers=kind.endswith("float]"))
    if kind.startswith("tuple[str"):
        fine = isinstance(value, tuple) and len(value) <= MAX_ITEMS and all(is_text(item, MAX_LINE) for item in value)
        return "" if fine else f"a tuple of at most {MAX_ITEMS} texts of at most {MAX_LINE} characters"
    if kind.startswith("tuple["):
        name = kind[len("tuple[") :].partition(",")[0]
        fine = isinstance(value, tuple) and len(value) <= MAX_ITEMS
        return "" if fine and all(type(item).__name__ == name for item in value) else f"a tuple of {name}"
    if value is None:
        return "" if kind.endswith("| None") else "a value"
    if kind.startswith("float"):
        return "" if _is_number(value) else "a finite number"
    if kind.startswith("int"):
        return "" if type(value) is int and abs(value) < 2**63 else "a whole number below 2^63"
    if kind in ("bool", "bytes"):
        return "" if type(value).__name__ == kind else kind
    return "" if is_text(value, line) else f"text of at most {line} characters in valid Unicode"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # false for NaN


def is_text(value: Any, most: int) -> bool:
    """Return whether ``value`` is a string of at most ``most`` characters that can be written as UTF-8."""
    if not isinstance(value, str) or len(value) > most:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _mapping_problem(value: Any, *, numbers: bool) -> str:
    if not isinstance(value, Mapping):
        return "a mapping"
    try:
        size = len(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return "a mapping of JSON values without NaN and infinities"
    fine = all(is_text(key, MAX_LINE) for key in value) and size <= MAX_TEXT
    if numbers:
        return "" if fine and all(map(_is_number, value.values())) else "a mapping of texts to finite numbers"
    return "" if fine else f"a mapping of texts to JSON values, {MAX_TEXT} bytes at most"


def _distinct(what: str, keys: list[Any]) -> None:
    seen: set[Any] = set()
    for key in keys:
        if key in seen:
            raise HubIndexError(f"{what} {key!r:.120} is given twice; give each once")
        seen.add(key)


def _need(fine: bool, what: str, given: Any, allowed: str) -> None:
    if not fine:
        raise HubIndexError(f"{what} must be {allowed}, got {given!r:.120}")
