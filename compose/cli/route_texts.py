"""What a router does with one text: its gates read once, its continuation, and all of it as a trace.

Shape letters: ``T`` tokens, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from compose.errors import ComposeError, UnknownNameError, unknown_name

if TYPE_CHECKING:
    import torch

    from compose.fewshot.loading import LoadedModel
    from compose.routers.routed import RoutedModel
    from compose.routers.trace import RoutingTrace


class Routed(NamedTuple):
    """A text, routed.

    Attributes:
        trace: Sums, switches of the continuation, and one strip: the text with what was generated.
        continuation: The generated text, ``""`` where none was asked for.
        new_tokens: How many tokens it has.
    """

    trace: RoutingTrace
    continuation: str
    new_tokens: int


def route_text(
    routed: RoutedModel,
    loaded: LoadedModel,
    text: str,
    *,
    new_tokens: int = 0,
    task: str | None = None,
    cluster: int | None = None,
    about: Mapping[str, Any] | None = None,
) -> Routed:
    """Run a text through a routed model and measure the gates.

    Of an encoder-decoder model the text is the encoder's; the strip shows the sites that read it.

    Args:
        routed: The model with its router.
        loaded: Its tokenizer and prompt template.
        text: Passes through the prompt template.
        new_tokens: Continue it by so many tokens at most, greedily, and count how often the dominant expert changes.
        task: Name of its task, for gates that read task ids.
        cluster: Its cluster, for gates that read cluster ids.
        about: Goes into the trace.

    Raises:
        ComposeError: The text has no tokens, or the router needs what was not given.
    """
    import torch

    from compose.fewshot.scoring import stop_ids
    from compose.routers.metrics import RoutingMeter
    from compose.routers.token_strip import strip_of
    from compose.text.encoding import encode
    from compose.text.examples import Example
    from compose.text.pieces import token_texts

    two = bool(routed.config.is_encoder_decoder)
    prompt = encode([Example(text, "")], loaded.tokenizer, loaded.prompt_format, encoder_decoder=two)[0].prompt
    told = _told(routed, task, cluster)
    meter = RoutingMeter(routed.router.experts)
    answer: list[int] = []
    own, others = _sites(routed, two)
    routed.eval()
    if new_tokens:
        with routed.recording() as steps:
            answer = routed.generate([prompt], max_new_tokens=new_tokens, stop_ids=stop_ids(loaded), **told)[0]
        meter.update_generation(steps, rows=1, lengths=[len(answer)], sites=others if two else own)
    ids = [*prompt] if two else [*prompt, *answer]
    inputs = {"input_ids": torch.tensor([ids], device=routed.device), **told}
    if two:
        start = routed.config.decoder_start_token_id
        inputs["decoder_input_ids"] = torch.tensor([[start, *answer[:-1]]], device=routed.device)
    else:
        inputs["prompt_mask"] = torch.arange(len(ids), device=routed.device)[None] < len(prompt)
    with torch.no_grad(), routed.recording() as decisions:
        routed(**inputs)
    meter.update([each._replace(rows_N=None) for each in decisions])  # switches are those of the generation alone
    pieces = token_texts(loaded.tokenizer, ids)
    strip = strip_of(decisions, pieces, name="text", prompt_length=len(prompt), task=task or "", gates=True, sites=own)
    meter.keep(strip)
    continuation = loaded.tokenizer.decode(answer, skip_special_tokens=True)
    return Routed(meter.trace(about), continuation, len(answer))


def mean_gates(trace: RoutingTrace) -> list[tuple[str, list[float]]]:
    """Layer -> mean share of the gates per expert, ``E`` numbers."""
    from compose.report.routing_data import depth_metrics, depths

    found = [(depth.label, depth_metrics(trace, depth)) for depth in depths(trace)]
    return [(label, list(one.load)) for label, one in found if one is not None]


def _told(routed: RoutedModel, task: str | None, cluster: int | None) -> dict[str, torch.Tensor]:
    """What the gates are told of the row."""
    import torch

    reads, tasks = routed.spec.gate_input, routed.router.tasks
    if reads == "text":
        raise ComposeError("this router reads embeddings of texts by an external encoder; route it from Python")
    if task is not None and task not in tasks:
        raise UnknownNameError(unknown_name("task", task, tasks))
    if reads == "task_id" and task is None:
        raise ComposeError(f"this router reads the task; give --task, one of {', '.join(tasks)}")
    if reads == "cluster_id" and cluster is None:
        raise ComposeError("this router reads the text's cluster; give --cluster NUMBER")
    told = {}
    if task is not None:
        told["task_ids"] = torch.tensor([tasks.index(task)], device=routed.device)
    if cluster is not None:
        told["cluster_ids"] = torch.tensor([cluster], device=routed.device)
    return told


def _sites(routed: RoutedModel, two: bool) -> tuple[Sequence[str], Sequence[str]]:
    """Names of the sites that read the text's tokens, and of those that read the decoder's, of an encoder-decoder."""
    from compose.routers.sites import reads_encoder

    layout = routed.router.layout
    if not two:
        return list(layout), []
    decoder = [name for name, site in layout.items() if "decoder" in site.body.split(".")]
    mixed = [name for name in decoder if any(reads_encoder(target) for target in layout[name].targets)]
    return [name for name in layout if name not in decoder], [name for name in decoder if name not in mixed]
