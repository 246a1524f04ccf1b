"""minialign: multimodal alignment (arXiv 2407.02477), written out by hand in PyTorch."""

__version__ = "0.1.0"
