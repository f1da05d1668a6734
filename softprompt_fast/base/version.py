"""The package's version; read by the build too, without an import."""

__version__ = "0.1.0"
