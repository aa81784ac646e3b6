"""flowrl: train language models to match a reward distribution (FlowRL, arXiv:2509.15207)."""

__version__ = "0.1.0"
