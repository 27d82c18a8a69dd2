"""The version of this package, also for the files that record what made them."""

__version__ = "0.1.0"
