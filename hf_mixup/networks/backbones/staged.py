"""The base of our own convolutional networks: a stem, stages, the mean over places, a linear classifier."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention, ImageClassifierOutputWithNoAttention


class StagedClassifier(PreTrainedModel):
    """Abstract: a subclass builds and initialises `stem`, `stages` and `classifier`."""

    main_input_name = "pixel_values"
    accepts_loss_kwargs = False
    _no_split_modules = ("_Block",)

    def maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """The maps (B, C, h, w) after the stem and after every stage."""
        states = [self.stem(pixel_values)]
        for stage in self.stages:
            states.append(stage(states[-1]))
        return tuple(states)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, output_hidden_states: bool = False, **kwargs
    ) -> ImageClassifierOutputWithNoAttention:
        """`hidden_states` are the maps (B, C, h, w) after the stem and after every stage."""
        states = self.maps(pixel_values)
        logits = self.classifier(states[-1].mean((2, 3)))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=states if output_hidden_states else None)


def classifier_for(channels: int, num_labels: int) -> nn.Module:
    """A linear layer, or the identity for 0 classes, as in transformers' networks."""
    return nn.Linear(channels, num_labels) if num_labels else nn.Identity()


class Headless:
    """Mixin of a StagedClassifier: the same network without its classifier, for AutoModel."""

    _keys_to_ignore_on_load_unexpected = (r"^classifier\.",)

    def __init__(self, config):
        super().__init__(config)
        del self.classifier

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False, **kwargs) -> BaseModelOutputWithPoolingAndNoAttention:
        """`last_hidden_state` (B, C, h, w), and `pooler_output` (B, C), its mean over places."""
        states = self.maps(pixel_values)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=states[-1], pooler_output=states[-1].mean((2, 3)), hidden_states=states if output_hidden_states else None
        )
