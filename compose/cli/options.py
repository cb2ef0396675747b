"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

INPUTS = "Inputs"
SEARCH = "Search"
OUTPUT = "Output"

Base = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="MODEL", help="Base model: a local folder or a Hugging Face id.", rich_help_panel=INPUTS
    ),
]
Banks = Annotated[
    list[Path] | None,
    typer.Option(
        "--bank", metavar="DIR", help="Folder of adapters, or one adapter; may be repeated.", rich_help_panel=INPUTS
    ),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 ...", rich_help_panel=INPUTS)]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--dtype", metavar="NAME", help="auto, float32, bfloat16 or float16.", rich_help_panel=INPUTS),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.", rich_help_panel=OUTPUT)]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --out.", rich_help_panel=OUTPUT)]
