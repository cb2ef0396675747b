"""Experts that are no plain stack, under autocast."""

from __future__ import annotations

import torch

from compose.routers import preset


def test_mixing_in_splits_differentiates_under_autocast(routed_over, batch):
    routed, inputs = routed_over("llama", preset("mhr"), ranks=(4, 4, 4, 4), tasks=("a", "b")), batch("llama")
    gradients = []
    for enabled in (False, True):
        routed.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = routed(**inputs, task_ids=torch.tensor([0, 1, 0])).loss
        loss.backward()
        gradients.append(torch.cat([one.grad.flatten() for one in routed.trained_parameters().values()]))
    exact, low = gradients
    assert float((low - exact).norm() / exact.norm()) < 0.05
