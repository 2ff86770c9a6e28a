"""recur_gpt2: read documents of any length with a pretrained GPT-2, window by window, at constant memory."""

from .configuration import RecurGPT2Config
from .conversion import convert_to_t2r
from .embedding import DocumentEmbedder
from .errors import InputError
from .modeling import RecurGPT2LMHeadModel, RecurGPT2Model
from .state import RecurState

__all__ = [
    "DocumentEmbedder",
    "InputError",
    "RecurGPT2Config",
    "RecurGPT2LMHeadModel",
    "RecurGPT2Model",
    "RecurState",
    "convert_to_t2r",
]
__version__ = "0.1.0"
