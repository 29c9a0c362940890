"""Supported model families: one table row each."""
