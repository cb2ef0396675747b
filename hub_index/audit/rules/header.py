"""The header of the weight file: everything that must hold before a byte of weights is read or allocated."""

from __future__ import annotations

import math
from collections.abc import Iterator

from compose.errors import AdapterFormatError
from compose.files.safetensors_file import (
    DTYPES,
    MAX_DIMS,
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    check_tensor_names,
)
from compose.hub_index.audit.evidence import Evidence
from compose.hub_index.audit.rule import Remark, rule

MAX_METADATA_BYTES = 2**20


@rule("header.truncated", "high", hard=True)
def is_whole(evidence: Evidence) -> Iterator[Remark]:
    """The file ends before its header does."""
    raw = evidence.raw
    if raw is None:
        return
    if raw.length is None:
        yield Remark(f"{raw.size} bytes are too few for a safetensors file; it is empty or truncated")
    elif raw.length <= MAX_HEADER_BYTES and 8 + raw.length > raw.size:
        yield Remark(f"a header of {raw.length:,} bytes is declared in a file of {raw.size:,}; it is truncated")


@rule("header.bomb", "critical", hard=True)
def length_is_bounded(evidence: Evidence) -> Iterator[Remark]:
    """The declared length of the header would allocate more than any real header needs."""
    raw = evidence.raw
    if raw is not None and raw.length is not None and raw.length > MAX_HEADER_BYTES:
        yield Remark(f"a header of {raw.length:,} bytes is declared; the limit is {MAX_HEADER_BYTES:,}")


@rule("header.text", "high", hard=True)
def text_is_json(evidence: Evidence) -> Iterator[Remark]:
    """The header is not one JSON object that begins with a brace, its metadata not texts."""
    raw = evidence.raw
    if raw is None or not raw.whole:
        return
    if raw.problem:
        yield Remark(f"the header is {raw.problem}")
    elif raw.head[8:9] != b"{":
        yield Remark("the header does not begin with '{'")
    if not raw.metadata_text:
        yield Remark("__metadata__ must map texts to texts")


@rule("header.duplicate", "critical", hard=True)
def names_stand_once(evidence: Evidence) -> Iterator[Remark]:
    """A name stands twice: readers differ in which of the two they take."""
    for name in evidence.raw.twice if evidence.raw is not None else ():
        yield Remark(f"{name[:200]!r} stands twice in one object")


@rule("header.entry", "high", hard=True)
def entries_are_complete(evidence: Evidence) -> Iterator[Remark]:
    """An entry lacks its dtype, shape or offsets, or has a dtype that is not supported."""
    raw = evidence.raw
    for entry in raw.malformed if raw is not None else ():
        yield Remark(f"entry {entry}: needs a dtype, a shape and two data offsets, all of 0 or more")
    for tensor in raw.tensors if raw is not None else ():
        if tensor.dtype not in DTYPES:
            yield Remark(f"{tensor.name[:200]!r} has dtype {tensor.dtype!r:.40}; supported are {', '.join(DTYPES)}")


@rule("header.name", "critical", hard=True)
def names_are_plain(evidence: Evidence) -> Iterator[Remark]:
    """A tensor's name holds NUL or other control characters, a path, or is endlessly long."""
    for tensor in evidence.raw.tensors if evidence.raw is not None else ():
        try:
            check_tensor_names([tensor.name])
        except AdapterFormatError as error:
            yield Remark(str(error))


@rule("header.count", "high", hard=True)
def count_is_bounded(evidence: Evidence) -> Iterator[Remark]:
    """No tensor at all, or more than any adapter has."""
    raw = evidence.raw
    if raw is None or not raw.whole or raw.problem:
        return
    count = len(raw.tensors) + len(raw.malformed)
    if not 0 < count <= MAX_TENSORS:
        yield Remark(f"{count:,} tensors; allowed are 1 to {MAX_TENSORS:,}")


@rule("header.shape", "critical", hard=True)
def shapes_are_bounded(evidence: Evidence) -> Iterator[Remark]:
    """A size bomb: a shape of many dimensions, without entries, or of more entries than its bytes hold."""
    for tensor in evidence.raw.tensors if evidence.raw is not None else ():
        width = DTYPES[tensor.dtype].itemsize if tensor.dtype in DTYPES else None
        shown = f"{tensor.name[:200]!r} of shape {list(tensor.shape)!r:.120}"
        if not 1 <= len(tensor.shape) <= MAX_DIMS:
            yield Remark(f"{shown}: allowed are 1 to {MAX_DIMS} dimensions")
        elif 0 in tensor.shape and not _may_be_empty(evidence):
            yield Remark(f"{shown} has no entries: a bomb, or a shard that was not gathered before saving")
        elif width is not None and math.prod(tensor.shape) * width != tensor.end - tensor.begin:
            yield Remark(f"{shown} and dtype {tensor.dtype} does not fit its {tensor.end - tensor.begin:,} bytes")


@rule("header.overlap", "critical", hard=True)
def spans_do_not_overlap(evidence: Evidence) -> Iterator[Remark]:
    """Two tensors share bytes, or a tensor ends before it begins."""
    position, owner = 0, ""
    for tensor in sorted(evidence.raw.tensors if evidence.raw is not None else (), key=lambda one: one[3:]):
        if tensor.end < tensor.begin:
            yield Remark(f"{tensor.name[:200]!r} ends at byte {tensor.end}, before it begins at {tensor.begin}")
        elif tensor.begin < position:
            yield Remark(
                f"{tensor.name[:200]!r} begins at byte {tensor.begin}, inside {owner[:200]!r} that ends at {position}"
            )
        if tensor.end > position:
            position, owner = tensor.end, tensor.name


@rule("header.extent", "high", hard=True)
def spans_fill_the_file(evidence: Evidence) -> Iterator[Remark]:
    """Bytes that belong to no tensor, or tensors that reach beyond the file or beyond what is ever read."""
    raw = evidence.raw
    if raw is None or not raw.tensors or raw.length is None:
        return
    position = 0
    for tensor in sorted(raw.tensors, key=lambda one: one[3:]):
        if tensor.begin > position:
            yield Remark(f"bytes {position:,} to {tensor.begin:,} of the data belong to no tensor")
        position = max(position, tensor.end)
    present = raw.size - 8 - raw.length
    if position > present:
        yield Remark(f"the tensors take {position:,} bytes, the file holds {present:,}; it is truncated")
    elif position < present and not raw.malformed:
        yield Remark(f"{present - position:,} bytes follow the last tensor")
    if position > MAX_FILE_BYTES:
        yield Remark(f"the tensors take {position:,} bytes, more than the limit of {MAX_FILE_BYTES:,}")


@rule("header.metadata", "medium")
def metadata_is_small(evidence: Evidence) -> Iterator[Remark]:
    """Metadata far larger than any tool writes."""
    if evidence.raw is not None and evidence.raw.metadata_bytes > MAX_METADATA_BYTES:
        yield Remark(f"__metadata__ has {evidence.raw.metadata_bytes:,} bytes, more than {MAX_METADATA_BYTES:,}")


def _may_be_empty(evidence: Evidence) -> bool:
    """AdaLoRA prunes ranks to 0, and its files hold tensors without entries."""
    return evidence.config is not None and evidence.config.get("peft_type") == "ADALORA"
