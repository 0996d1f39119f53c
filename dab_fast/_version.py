"""The one place of the version: pyproject.toml, the extension and `dab_fast.__version__` read it."""

__version__ = "0.1.0"
