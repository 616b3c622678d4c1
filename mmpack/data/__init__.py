"""Rows on disk -> samples -> token ids; images and videos."""
