"""``compose doctor``."""

import json

import torch
from typer.testing import CliRunner

import compose
from compose.cli.main import build_app


def test_the_facts_are_those_of_this_process() -> None:
    result = CliRunner().invoke(build_app(), ["doctor", "--json"], env={"HF_HUB_OFFLINE": "1"})
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert list(facts) == ["versions", "torch", "environment", "demo"]
    assert facts["versions"]["compose"] == compose.__version__
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]  # a build tag may be missing
    assert facts["torch"]["threads"] == torch.get_num_threads()
    assert len(facts["torch"]["gpus"]) == torch.cuda.device_count()
    assert facts["environment"]["HF_HUB_OFFLINE"] == "1"
    assert isinstance(facts["demo"]["files"], bool)


def test_the_text_names_every_fact() -> None:
    result = CliRunner().invoke(build_app(), ["doctor"])
    assert result.exit_code == 0, result.output
    for word in ("versions", "transformers", "threads", "triton", "HF_HUB_OFFLINE", "demo"):
        assert word in result.stdout
