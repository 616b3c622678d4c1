"""Packs assembled on the device: off the main path, which assembles in DataLoader workers."""
