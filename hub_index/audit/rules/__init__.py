"""Rules about one adapter's files: one module per stage, each rule a small function entered in ``RULES``."""
