"""Architectures."""

ARCHITECTURES = {}
