"""qcompile: one low-bit model that serves every device."""

from .version import __version__ as __version__
