"""Builds, caches and loads the native extension; decides which implementation runs."""
