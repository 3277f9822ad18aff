"""A `MixupTrainer`'s model: the given network, wrapped for mixing, and compiled."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_mixup.arguments import MixupTrainingArguments
from hf_mixup.model import MixupModel
from hf_mixup.networks.teachers import Normalisation
from hf_mixup.training.agreement import agreed, check_callback, distillation_of, loss_of
from hf_mixup.training.optimization import check_optimization


class Wrapping:
    """The part of MixupTrainer that makes its MixupModel."""

    def _ready(self, model: nn.Module, args: MixupTrainingArguments) -> MixupModel:
        """The MixupModel of a network. `self.model` may be wrapped, and unwrapping it can take as long as a forward pass."""
        self.mixup_model = model = agreed(
            model, args, self._train_collator, self._given_loss, self._data, distillation_of(args, self._teacher)
        )
        self._loss = loss_of(model)
        if model.teachers and self._processor is not None:
            model.normalisation = Normalisation.of_processor(self._processor)
        check_optimization(args, model, self._data, self._optimizers)
        unmixed = len(model.choice.methods) > 1 or model.choice.rates[0] < 1 or args.mix_off_epoch is not None
        if unmixed and any(p.requires_grad for p in model.states.parameters()):
            # a method's mixer gets no gradient from a batch of another method, or a batch that is not mixed
            args.ddp_find_unused_parameters = True
        if args.torch_compile:
            # only the backbone is compiled, in place: mixing stays outside the graph, and parameters keep their names
            model.compile_backbone(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        return model

    def call_model_init(self, trial: Any = None) -> MixupModel:
        if trial is not None:
            self._hp_search_setup(trial)  # the Trainer does it later; then mixing would have the settings of the previous trial
        return self._ready(super().call_model_init(trial), self.args)

    def add_callback(self, callback: Any) -> None:
        check_callback(callback)
        super().add_callback(callback)

    def _build_accelerator_args(self, **kwargs) -> dict[str, Any]:
        from accelerate.utils import TorchDynamoPlugin

        built = super()._build_accelerator_args(**kwargs)
        return {**built, "dynamo_plugin": TorchDynamoPlugin(backend="no")} if self.args.torch_compile else built
