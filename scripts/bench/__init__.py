"""Measurements: each module is one, run as `python -m scripts.bench.NAME`; README.md lists them."""
