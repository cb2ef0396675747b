"""S3: drawn configurations and recipes are refused by a `ComposeError`, or give finite updates of the right shapes."""

from tests.hostile.configs import run_configs, run_recipes

VOLUME = 5_000


def test_5_000_configurations(tmpfs):
    figures = run_configs(VOLUME, 0, tmpfs, strict=True)
    assert figures.cases >= VOLUME
    assert figures.accepted > VOLUME // 20
    assert figures.refused > VOLUME // 20


def test_5_000_recipes(tmpfs):
    figures = run_recipes(VOLUME, 0, tmpfs, strict=True)
    assert figures.cases >= VOLUME
    assert figures.accepted > VOLUME // 20
    assert figures.refused > VOLUME // 20
