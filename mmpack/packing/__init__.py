"""Encoded samples -> plans -> packs."""
