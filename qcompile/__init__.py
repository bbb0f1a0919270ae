"""qcompile: one low-bit model that serves every device."""

from .calibrate import calibrate as calibrate
from .checkpointing import checkpoint_segments as checkpoint_segments
from .checkpointing import recomputation as recomputation
from .convert import convert as convert
from .data_parallel import sync_batch_norm as sync_batch_norm
from .errors import QCompileError as QCompileError
from .file.load import load as load
from .file.save import save as save
from .float_state import float_state_dict as float_state_dict
from .joint_loss import JointLoss as JointLoss
from .lower import lower as lower
from .own_parameters import param_groups as param_groups
from .policy import Policy as Policy
from .prepare import prepare as prepare
from .registry import schemes as schemes
from .registry import targets as targets
from .search import search as search
from .summary import summary as summary
from .switching import at as at
from .switching import bits as bits
from .switching import modes as modes
from .switching import set_bits as set_bits
from .verify import VerificationReport as VerificationReport
from .verify import verify as verify
from .version import __version__ as __version__
