"""Routers: token-, sequence- and task-level gates over a bank of adapters."""
