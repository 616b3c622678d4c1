"""Rows on disk -> samples -> token ids; decodes images and videos."""
