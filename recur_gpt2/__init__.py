"""recur_gpt2: read documents of any length with a pretrained GPT-2, window by window, at constant memory.

The public names are imported when they are first used (PEP 562): PyTorch and transformers take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .errors import InputError
from .models.auto_classes import register_when_needed

if TYPE_CHECKING:
    from .embedding.embedder import DocumentEmbedder
    from .models.classification import RecurGPT2ForSequenceClassification, RecurGPT2ForTokenClassification
    from .models.configuration import RecurGPT2Config
    from .models.conversion import convert_to_t2r
    from .models.modeling import RecurGPT2LMHeadModel, RecurGPT2Model
    from .models.state import RecurState

__all__ = [
    "DocumentEmbedder",
    "InputError",
    "RecurGPT2Config",
    "RecurGPT2ForSequenceClassification",
    "RecurGPT2ForTokenClassification",
    "RecurGPT2LMHeadModel",
    "RecurGPT2Model",
    "RecurState",
    "convert_to_t2r",
]
__version__ = "0.1.0"

_MODULES = {
    "DocumentEmbedder": "embedding.embedder",
    "RecurGPT2Config": "models.configuration",
    "RecurGPT2ForSequenceClassification": "models.classification",
    "RecurGPT2ForTokenClassification": "models.classification",
    "RecurGPT2LMHeadModel": "models.modeling",
    "RecurGPT2Model": "models.modeling",
    "RecurState": "models.state",
    "convert_to_t2r": "models.conversion",
}


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(".models.classification", __name__)  # first of all: it registers our classes
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__():
    return sorted({*globals(), *_MODULES})


register_when_needed()
