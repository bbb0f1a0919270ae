"""Check that what runs is what was trained: `verify` and what it returns."""

from .report import Difference as Difference
from .report import EndToEnd as EndToEnd
from .report import Flip as Flip
from .report import LayerCheck as LayerCheck
from .report import VerificationReport as VerificationReport
from .verification import verify as verify
