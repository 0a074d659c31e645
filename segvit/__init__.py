"""Semantic segmentation with plain vision transformers."""

__version__ = "0.1.0"
