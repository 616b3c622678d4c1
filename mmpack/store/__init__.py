"""Encoded samples on disk."""
