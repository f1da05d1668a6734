"""Attention of many segments in one pass."""
