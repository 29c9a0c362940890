"""Milliseconds on this device: measured, tabulated, promised."""
