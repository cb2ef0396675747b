"""Adapter formats, one file per format; compose.formats.peft reads and writes PEFT LoRA folders."""
