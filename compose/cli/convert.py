"""``compose convert``: an adapter of another kind (DoRA, IA3, LoHa ...) as a LoRA folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compose.cli import COMMANDS, Command
from compose.cli.console import note, print_facts, print_json, say
from compose.cli.options import OUTPUT, Base, Device, Force, Json
from compose.errors import ComposeError, DuplicateNameError

if TYPE_CHECKING:
    from torch import nn

    from compose.engine.convert import Converted

CONVERT = "Convert"
SHOWN = 5
SILENCE = 10.0

Source = Annotated[Path, typer.Argument(metavar="PATH", help="An adapter folder.", show_default=False)]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder of the result.", rich_help_panel=OUTPUT)
]
Rank = Annotated[
    int | None,
    typer.Option("--rank", metavar="R", help="Keep at most this rank per target.", rich_help_panel=CONVERT),
]
Energy = Annotated[
    float | None,
    typer.Option(
        "--energy", metavar="SHARE", help="Keep this share of the squared norm per target.", rich_help_panel=CONVERT
    ),
]


def convert(
    path: Source,
    out: Out = None,
    base: Base = None,
    rank: Rank = None,
    energy: Energy = None,
    device: Device = "cpu",
    force: Force = False,
    json: Json = False,
) -> None:
    """Write an adapter of another kind as a PEFT LoRA folder, exactly where that is possible.

    AdaLoRA, VeRA, and small LoHa and LoKr are exact and open in every command as they are. DoRA, IA3, and large LoHa
    and LoKr need --rank or --energy, and the error of every target is told; DoRA, IA3, and VeRA without its
    projections need --base. A LoRA adapter is cut to a lower rank.
    """
    if out is None:
        raise ComposeError("give --out DIR for the result")
    if rank is not None and energy is not None:
        raise ComposeError("--rank and --energy exclude each other; give one of them")
    if not path.is_dir():
        raise ComposeError(f"{path}: no such folder; give the folder of one adapter")
    check_out(path, out, force)
    from compose.cli.loading import checked_device
    from compose.engine.convert import convert as run
    from compose.formats.peft import write_adapter

    where = checked_device(device)
    model = None if base is None else load_weights(base)
    converted = run(path, base_model=model, rank=rank, energy=energy, device=where, on_target=Progress())
    write_adapter(converted.adapter, out, overwrite=force)
    show_result(converted, out, json)


def check_out(path: Path, out: Path, force: bool) -> None:
    """Refuse, before any work, a result that would replace the original or anything that is no adapter.

    Raises:
        DuplicateNameError: It would.
    """
    from compose.formats.peft import CONFIG_NAME

    place, origin = out.resolve(), path.resolve()
    if place == origin or place in origin.parents:
        raise DuplicateNameError(f"--out {out} is or holds the originals; give another folder")
    if out.exists() and not (force and out.is_dir() and out.name):
        raise DuplicateNameError(f"{out} exists; give another --out, or --force to replace a folder")
    if out.exists() and not (out / CONFIG_NAME).exists() and any(out.iterdir()):
        raise DuplicateNameError(f"{out} is no adapter folder; it is not replaced")


class Progress:
    """Tells on stderr which target a long conversion is at, every ten seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, done: int, total: int, path: str) -> None:
        """Take the beginning of one target."""
        if time.monotonic() - self._last >= SILENCE:
            self._last = time.monotonic()
            note(f"{done} of {total} targets done, now {path}")


def load_weights(base: str) -> nn.Module:
    """Load a model of any architecture in the dtype it is stored in; conversion needs its weights alone.

    Raises:
        ComposeError: There is no such model, or its configuration names no architecture of Transformers.
    """
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
        architecture = (config.architectures or ["(none)"])[0]
        loader: Any = getattr(transformers, architecture, None)
        if not (isinstance(loader, type) and issubclass(loader, transformers.PreTrainedModel)):
            raise ComposeError(f"{base}: its config.json names the architecture {architecture!r}, which is not known")
        return loader.from_pretrained(base, config=config, dtype="auto", trust_remote_code=False).eval()
    except (OSError, ValueError) as error:
        if isinstance(error, ComposeError):
            raise
        raise ComposeError(f"cannot load the base model {base!r}: {str(error).splitlines()[0]}") from error


def show_result(converted: Converted, out: Path, json: bool) -> None:
    """Print what was written, and where most was lost."""
    adapter, errors = converted.adapter, converted.errors
    worst = sorted(errors, key=lambda path: -errors[path])[:SHOWN]
    ranks = sorted(set(adapter.ranks.values()))
    facts: dict[str, Any] = {
        "written": str(out),
        "from": converted.kind,
        "base": adapter.base or None,
        "targets": len(adapter.targets),
        "rank": ranks[-1] if json or len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        "parameters": adapter.num_parameters,
        "worst error": errors[worst[0]],
    }
    if json:
        print_json({**facts, "errors": errors, "left_out": list(converted.left_out)})
        return
    exact = not any(errors.values())
    facts["worst error"] = "none: exact" if exact else f"{100 * errors[worst[0]]:.2f} % of the update's norm"
    print_facts(facts)
    if not exact:
        for target in worst:
            say(f"  {100 * errors[target]:6.2f} %  {target}")
    if converted.left_out:
        note(f"{len(converted.left_out)} targets change nothing and are left out, e.g. {converted.left_out[0]}")


COMMANDS.register("convert")(
    Command(
        convert,
        examples=(
            "compose convert dora-adapter --base MODEL --rank 32 --out lora-adapter",
            "compose convert loha-adapter --energy 0.99 --out lora-adapter",
            "compose convert adalora-adapter --out lora-adapter",
        ),
    )
)
