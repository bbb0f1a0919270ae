"""qcompile: one low-bit model that serves every device."""

from .errors import QCompileError as QCompileError
from .float_state import float_state_dict as float_state_dict
from .joint_loss import JointLoss as JointLoss
from .model import at as at
from .model import bits as bits
from .model import modes as modes
from .model import set_bits as set_bits
from .own_parameters import param_groups as param_groups
from .prepare import prepare as prepare
from .registry import schemes as schemes
from .registry import targets as targets
from .version import __version__ as __version__
