"""Where the shipped files are."""

from pathlib import Path

_FOLDER = Path(__file__).parent


def demo_base() -> Path:
    """Folder of the base model and its tokenizer, in the Hugging Face layout."""
    return _FOLDER / "base"


def demo_bank() -> Path:
    """Folder of the bank: one PEFT folder per adapter."""
    return _FOLDER / "bank"
