"""The version of `kl_plugins`, read here by the build and by every process of a run."""

__version__ = "0.1.0"
