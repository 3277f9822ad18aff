"""What our own convolutional networks share: a stem, stages, the mean over places, a linear classifier."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class StagedClassifier(PreTrainedModel):
    """Abstract: a network builds `stem`, `stages` and `classifier`, and initialises them."""

    main_input_name = "pixel_values"
    accepts_loss_kwargs = False
    _no_split_modules = ("_Block",)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, output_hidden_states: bool = False, **kwargs
    ) -> ImageClassifierOutputWithNoAttention:
        """`hidden_states` are the stem's map and those after every stage, (B, C, h, w)."""
        hidden = self.stem(pixel_values)
        states = [hidden]
        for stage in self.stages:
            hidden = stage(hidden)
            states.append(hidden)
        logits = self.classifier(hidden.mean((2, 3)))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=tuple(states) if output_hidden_states else None)
