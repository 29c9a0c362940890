"""Latency on this device: measured, kept in a table, and promised by a constraint."""
