"""CLIP, used as OpenAI's package is: `model, preprocess = clip.load("ViT-B/16")`."""

from .clip import available_models, load, tokenize

__all__ = ["available_models", "load", "tokenize"]
