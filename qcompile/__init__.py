"""qcompile: one low-bit model that serves every device."""

from .calibrate import calibrate as calibrate
from .convert import convert as convert
from .errors import QCompileError as QCompileError
from .file.load import load as load
from .file.save import save as save
from .float_state import float_state_dict as float_state_dict
from .joint_loss import JointLoss as JointLoss
from .lower import lower as lower
from .model import at as at
from .model import bits as bits
from .model import modes as modes
from .model import set_bits as set_bits
from .own_parameters import param_groups as param_groups
from .prepare import prepare as prepare
from .registry import schemes as schemes
from .registry import targets as targets
from .verify import VerificationReport as VerificationReport
from .verify import verify as verify
from .version import __version__ as __version__
