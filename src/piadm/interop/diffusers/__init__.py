"""diffusers pipelines and networks in this library."""

from piadm.interop.diffusers.pipeline import ParallelPipeline, parallelize
from piadm.interop.diffusers.probe import UnsupportedError

__all__ = ["ParallelPipeline", "UnsupportedError", "parallelize"]
