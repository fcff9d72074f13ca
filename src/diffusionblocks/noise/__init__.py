"""What a noise level means: its distribution, its corruption of the target, its preconditioning."""

from .edm import EDM, PARTITION_STRATEGIES, Preconditioning

__all__ = ["EDM", "PARTITION_STRATEGIES", "Preconditioning"]
