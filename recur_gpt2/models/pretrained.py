"""What both models share: made from a GPT-2 checkpoint, saved, loaded, fused."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import file_exists, upload_file
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2PreTrainedModel
from transformers.utils import ModelOutput

from ..errors import InputError
from ..ops.feature_maps import FeatureMap
from ..ops.hybrid import MixingGate
from .block import HEADS, STATE_DECAY, RecurGPT2Block, is_new
from .configuration import OWN_FIELDS, RecurGPT2Config, with_window
from .feature_map_fitting import fit_feature_maps
from .hub import load_gpt2, save_tokenizer
from .memory import LayerMemory, PooledMemory
from .model_card import model_card
from .pointer import PointerMemory
from .slot_initialization import fit_slots

NEW_MODULES = LayerMemory | PooledMemory | PointerMemory | FeatureMap | MixingGate  # what GPT-2 has not


class RecurGPT2PreTrainedModel(GPT2PreTrainedModel):
    config: RecurGPT2Config
    config_class = RecurGPT2Config
    base_model_prefix = "transformer"
    _no_split_modules = ("RecurGPT2Block",)
    # Saved by earlier versions where a memory has no such slots.
    _keys_to_ignore_on_load_unexpected = (r"recurrence\.\d+\.(sink|shift|pool_query|gate_weight|gate_bias)$",)
    _can_record_outputs = None
    _supports_flash_attn = False

    def _configured(self, name: str, given: bool | None) -> bool:
        """An argument of `forward`, or what the configuration says where it is None."""
        return getattr(self.config, name) if given is None else given

    def _returned(self, output: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
        """The output in the form that was asked for."""
        return output if self._configured("return_dict", return_dict) else output.to_tuple()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, NEW_MODULES):
            module.reset_parameters()

    @classmethod
    def from_gpt2(cls, name_or_path: str, *, window: int = 256, recurrence: str = "default", **options):
        """Give any GPT-2 checkpoint windows and a recurrence. The result computes exactly GPT-2 in a first window.

        Args:
            name_or_path: a hub id or a folder that `transformers` can load a GPT-2 from.
            window: T, tokens a window.
            recurrence: "default", "yoshida2020" or "none".
            options: other fields of RecurGPT2Config.

        Raises:
            InputError: the checkpoint is missing, damaged or of another architecture, or a field is out of range.
        """
        known = {*cls.config_class.__dataclass_fields__, "num_labels"}
        unknown = [name for name in options if name not in known]
        if unknown:
            raise InputError(
                f"{unknown[0]!r} is no field of RecurGPT2Config; it has {', '.join(OWN_FIELDS)} and GPT-2's"
            )
        base = load_gpt2(name_or_path)
        options |= {"recurrence": recurrence, "architectures": [cls.__name__]}
        with torch.device("meta"):  # the weights are taken over, not copied
            model = cls(with_window(base.config, window, **options))
        source = base if hasattr(model, "transformer") else base.transformer
        missing, unexpected = model.load_state_dict(source.state_dict(), strict=False, assign=True)
        if not hasattr(model, "lm_head"):
            unexpected = [name for name in unexpected if not name.startswith("lm_head.")]
        alien = [name for name in missing if not is_new(name)] + unexpected
        if alien:
            raise InputError(f"{name_or_path} does not hold a whole GPT-2; these weights do not fit: {alien[:5]}")
        _make_new_parameters(model, base.dtype)
        core = getattr(model.eval(), "transformer", model)
        fit_slots(core)
        fit_feature_maps(core)
        return model

    def fuse_feature_maps(self):
        """Fold the feature maps of linear layers into their projections of queries and keys, for faster inference.

        Exact up to rounding. The folded weights are a copy, which is not saved: call this again after the weights have
        changed. `train()` undoes it. Maps that are not affine before their nonlinearity (elu, rfa), and layers with
        `near_tokens`, which need queries and keys themselves, stay as they are.

        Returns:
            The model itself.
        """
        for block in getattr(self, "transformer", self).h:
            block.fuse_feature_map()
        return self

    def train(self, mode: bool = True):
        """As in PyTorch; training goes on with the feature maps themselves."""
        if mode:
            for block in getattr(self, "transformer", self).h:
                block.unfuse_feature_map()
        return super().train(mode)

    def push_to_hub(self, repo_id: str, *args, results: str | Path | None = None, **kwargs):
        """As in transformers; a repository without a model card is given one.

        Args:
            results: results.json of a comparison, to be shown on the card.
        """
        card = model_card(self.config, type(self).__name__, repo_id, results)
        options = {name: kwargs[name] for name in ("token", "revision") if name in kwargs}
        request = {"create_pr": kwargs["create_pr"]} if "create_pr" in kwargs else {}
        has_card = file_exists(repo_id, "README.md", **options)
        pushed = super().push_to_hub(repo_id, *args, **kwargs)
        if not has_card:
            content = str(card).encode()
            upload_file(path_or_fileobj=content, path_in_repo="README.md", repo_id=repo_id, **options, **request)
        return pushed

    def save_pretrained(self, save_directory, *args, tokenizer=None, **kwargs):
        """As in transformers; with `tokenizer`, its files are saved beside the model, for texts of any length."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if tokenizer is not None:
            save_tokenizer(tokenizer, save_directory)


def _make_new_parameters(model, dtype):
    """Tie the weights again, and make the parameters that are none of GPT-2's: the same ones each time."""
    model.tie_weights()
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_meta:
                made = torch.empty_like(tensor, dtype=dtype, device="cpu")
                setattr(module, name, nn.Parameter(made) if isinstance(tensor, nn.Parameter) else made)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # a GPU's numbers are left alone
        for head in HEADS & dict(model.named_children()).keys():
            model._init_weights(getattr(model, head))
        for module in model.modules():
            if isinstance(module, NEW_MODULES):
                module.reset_parameters()
            elif isinstance(module, RecurGPT2Block) and module.state_decay is not None:
                module.state_decay.fill_(STATE_DECAY)
