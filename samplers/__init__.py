"""Samplers: how tokens are drawn from a generator's distributions."""

from .base import SampleOutput, Sampler, Stats, default_sampler

__all__ = ["SampleOutput", "Sampler", "Stats", "default_sampler"]
