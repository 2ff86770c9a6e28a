"""GPT-2's heads for classes, over documents of any length. B rows, N positions, C classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers.loss.loss_utils import ForSequenceClassificationLoss, ForTokenClassification

from .configuration import RecurGPT2Config
from .inputs import check_labels
from .modeling import RecurGPT2Model
from .outputs import RecurGPT2ClassifierOutput
from .pretrained import RecurGPT2PreTrainedModel
from .state import RecurState


class _Classifier(RecurGPT2PreTrainedModel):
    """The transformer, and a linear head over its hidden states."""

    accepts_loss_kwargs = False  # transformers' Trainer: the loss is a mean

    def __init__(self, config: RecurGPT2Config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = RecurGPT2Model(config)
        self._make_head(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        state: RecurState | None = None,
        output_hidden_states: bool | None = None,
        parallel_windows: int = 1,
        *,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        **flattened: Tensor | int,
    ) -> RecurGPT2ClassifierOutput | tuple:
        """Read any number of tokens and classify them.

        Args:
            labels: see the class.
            The other arguments are those of RecurGPT2Model.

        Raises:
            InputError: as RecurGPT2Model.
        """
        read = self.transformer(
            input_ids,
            attention_mask,
            state,
            output_hidden_states,
            parallel_windows,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            output_attentions=output_attentions,
            return_dict=True,
            use_cache=use_cache,
            **flattened,
        )
        logits = self._logits(read.last_hidden_state, input_ids, attention_mask)
        loss = None if labels is None else self.loss_function(logits, labels)
        out = RecurGPT2ClassifierOutput(loss, logits, read.state, read.hidden_states, read.attentions)
        return self._returned(out, return_dict)


class RecurGPT2ForSequenceClassification(_Classifier):
    """Classes of whole documents, from the hidden state of each one's last token.

    Which that is, `attention_mask` says; without it, the last one that is not the configuration's `pad_token_id`.
    labels: (B,) int64 classes; numbers for a regression (`num_labels=1`); (B, C) of 0.0 and 1.0 where several may hold.
    """

    def _make_head(self, config):
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)

    def _logits(self, hidden, input_ids, attention_mask):
        if attention_mask is not None:
            tokens = attention_mask != 0
        elif input_ids is not None and self.config.pad_token_id is not None:
            tokens = input_ids != self.config.pad_token_id
        else:
            return self.score(hidden[:, -1])
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        last = (positions * tokens).amax(dim=1).to(hidden.device)
        return self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])

    def loss_function(self, logits: Tensor, labels: Tensor) -> Tensor:
        """transformers' own, by the configuration's `problem_type`, which it sets if that is None."""
        return ForSequenceClassificationLoss(labels, logits, self.config)


class RecurGPT2ForTokenClassification(_Classifier):
    """A class of each token. labels: (B, N) int64, -100 where there is none."""

    def _make_head(self, config):
        given = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((each for each in given if each is not None), 0.1))  # as GPT-2's
        self.classifier = nn.Linear(config.n_embd, config.num_labels)

    def _logits(self, hidden, input_ids, attention_mask):
        return self.classifier(self.dropout(hidden))

    def loss_function(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the tokens that have a class."""
        check_labels(labels, logits.shape[:2], "the input")
        return ForTokenClassification(logits, labels, self.config)


AutoModelForSequenceClassification.register(RecurGPT2Config, RecurGPT2ForSequenceClassification)
AutoModelForTokenClassification.register(RecurGPT2Config, RecurGPT2ForTokenClassification)
