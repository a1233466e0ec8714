"""Existing models on the fused functions: what their forward methods compute is found and fused."""

from .convert import Conversion, convert, unconvert

__all__ = ["Conversion", "convert", "unconvert"]
