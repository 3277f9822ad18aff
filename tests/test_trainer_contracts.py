"""What a Trainer promises, checked for MixupTrainer with every kind of mixing, and for a stock Trainer with the callback."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_mixup import METHODS, MixupCallback, MixupCollator, MixupLoss, MixupModel, MixupTrainer, MixupTrainingArguments
from hf_mixup.core.rng import MixKey
from hf_mixup.data.augment import Augmentation, Transform
from hf_mixup.data.collator import MixedBatch
from hf_mixup.data.dataset import ImageDataset
from hf_mixup.data.sources import digits
from hf_mixup.training.checkpoints import RUN_NAME
from refusals import refuses
from small import Images, arguments, difference, losses, network_for, resnet, trainer, vit, weights
from test_collator import plain_arguments

STOCK = ("output_dir", "per_device_train_batch_size", "max_steps", "learning_rate", "logging_steps", "save_strategy", "report_to", "use_cpu",
         "disable_tqdm", "dataloader_pin_memory", "seed")  # fmt: skip


def stock(folder, model=None, data=None, evaluation=None, **changes) -> Trainer:
    keep = {name: changes.pop(name) for name in ("compute_loss_func", "callbacks", "data_collator") if name in changes}
    settings = {name: getattr(arguments(folder), name) for name in STOCK}
    return Trainer(
        vit() if model is None else model,
        TrainingArguments(**{**settings, "remove_unused_columns": False, **changes}),
        train_dataset=Images() if data is None else data,
        eval_dataset=evaluation,
        **keep,
    )


KINDS = {
    "stock": stock,
    "vanilla": lambda folder, *args, **changes: trainer(folder, *args, mix=["vanilla"], **changes),
    "mixup": lambda folder, *args, **changes: trainer(folder, *args, mix=["mixup", "cutmix"], **changes),
    "automix": lambda folder, *args, **changes: trainer(folder, *args, mix=["automix"], **changes),
    "callback": lambda folder, *args, callbacks=(), **changes: stock(
        folder, *args, callbacks=[MixupCallback(MixupCollator(["mixup", "cutmix"], num_labels=4)), *callbacks], compute_loss_func=MixupLoss(), **changes
    ),
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)


class Events(TrainerCallback):
    def __init__(self):
        self.seen = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            return lambda args, state, control, **kwargs: self.seen.append((name, state.global_step))
        return super().__getattribute__(name)


class InOrder:
    """Mixed in: the rows come in their order."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


# -- the loss of an accumulated batch ---------------------------------------------------------------------------------------


def gradient_of(folder, sizes, method="vanilla", network=vit, loss=None, cls=MixupTrainer, func=None, **changes):
    """The gradient, and the loss logged, of one step over micro-batches of these sizes. Every image is its own method's single draw."""
    pixels, labels = Images(sum(sizes)).pixels, Images(sum(sizes)).labels
    batches, start = [], 0
    for size in sizes:
        batches.append({"pixel_values": pixels[start : start + size], "labels": labels[start : start + size]})
        start += size

    class Given(cls):
        def get_train_dataloader(self):
            return batches

    found = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    settings = {"max_steps": 1, "logging_steps": 1, "gradient_accumulation_steps": len(sizes), "max_grad_norm": 0, **changes}
    run = Given(
        network(),
        arguments(folder, mix=[method], loss=loss, **settings),
        train_dataset=Images(8),
        callbacks=[Keep()],
        compute_loss_func=func,
    )
    run.train()
    return found, losses(run)[0], run


@pytest.mark.parametrize("loss", [None, "bce", {"name": "focal", "weight": [1, 2, 1, 1]}], ids=str)
def test_uneven_micro_batches_are_one_batch(tmp_path, loss):
    (whole, logged, _), (parts, also_logged, _) = (gradient_of(tmp_path, sizes, loss=loss) for sizes in ((10,), (4, 4, 2)))
    for name, gradient in whole.items():
        assert_close(parts[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    assert also_logged == pytest.approx(logged, rel=1e-5)


@pytest.mark.parametrize("method", ["mixup", "puzzlemix", "manifoldmix", "automix", "sumix", "smmix", "recursivemix", "decouplemix"])
def test_every_method_weighs_its_micro_batches_by_images(tmp_path, method):
    """The loss that is logged is the sum over micro-batches of the model's loss, times its share of the images."""
    model, seen = network_for(method), []

    class Watched(MixupTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, True, **kwargs)
            seen.append((outputs.loss.item(), len(inputs["labels"])))
            return loss

    _, logged, _ = gradient_of(tmp_path, (6, 4, 2), method, lambda: model, cls=Watched)
    assert logged == pytest.approx(sum(loss * rows for loss, rows in seen) / 12, rel=1e-5)


def test_a_function_of_ones_own_sees_items_that_are_images(tmp_path):
    def summed(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    for method, repeat in itertools.product(("vanilla", "cutmix"), (1, 2)):
        (own, logged, _), (plain, also_logged, _) = (
            gradient_of(tmp_path, (6, 4, 2), method, func=func, mix_repeat=repeat) for func in (summed, None)
        )
        assert logged == pytest.approx(also_logged, rel=1e-5)
        for name, gradient in plain.items():
            assert_close(own[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


# -- losses given by hand ---------------------------------------------------------------------------------------------------


def test_compute_loss_func_takes_part_in_training_and_evaluation(tmp_path):
    seen = []

    def weighted(outputs, labels, num_items_in_batch=None):
        seen.append((torch.is_grad_enabled(), labels.ndim))
        return F.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 1, 1, 9]), reduction="sum") / num_items_in_batch

    def run(mix, func):
        done = MixupTrainer(vit(), arguments(tmp_path, mix=mix, max_steps=2), train_dataset=Images(16), eval_dataset=Images(8, seed=1), compute_loss_func=func)  # fmt: skip
        done.train()
        return losses(done), done.evaluate()["eval_loss"]

    assert run(["cutmix"], weighted)[0] != run(["cutmix"], None)[0]
    assert set(seen) == {(True, 2), (False, 1)}
    seen.clear()
    own = run(["vanilla"], weighted)
    assert set(seen) == {(True, 1), (False, 1)}
    plain = stock(tmp_path, data=Images(16), evaluation=Images(8, seed=1), max_steps=2, compute_loss_func=weighted)
    plain.train()
    assert own == (pytest.approx(losses(plain), rel=1e-5), pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5))


@pytest.mark.parametrize("method", ["automix", "manifoldmix", "decouplemix", "smmix", "snapmix"])
def test_compute_loss_func_is_refused_by_name_where_a_step_has_losses_of_its_own(tmp_path, method):
    with_loss = lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum()  # noqa: E731
    if METHODS[method].step == METHODS["vanilla"].step and METHODS[method].loss == METHODS["vanilla"].loss:
        MixupTrainer(network_for(method), arguments(tmp_path, mix=[method]), compute_loss_func=with_loss)
        return
    with refuses(f"compute_loss_func replaces the loss, got '{method}'"):
        MixupTrainer(network_for(method), arguments(tmp_path, mix=[method]), compute_loss_func=with_loss)


def test_mixup_loss_carried_over_from_a_stock_trainer_is_the_loss(tmp_path):
    carried = MixupTrainer(vit(), arguments(tmp_path, max_steps=2), train_dataset=Images(), compute_loss_func=MixupLoss(0.3))
    named = trainer(tmp_path, loss={"name": "crossentropy", "smoothing": 0.3}, max_steps=2)
    for run in (carried, named):
        run.train()
    assert losses(carried) == losses(named)
    assert carried.mixup_model.choice == named.mixup_model.choice
    with refuses("the loss must be given once"):
        MixupTrainer(vit(), arguments(tmp_path, loss="bce"), compute_loss_func=MixupLoss())
    smoothed = {"mix": ["vanilla"], "label_smoothing_factor": 0.1}
    for settings, collator in (({"mix": ["decouplemix"]}, None), (smoothed, None), ({}, MixupCollator("decouplemix", num_labels=4))):
        with refuses("MixupLoss must have the loss of the method, got CrossEntropy"):
            MixupTrainer(vit(), arguments(tmp_path, **settings), collator, compute_loss_func=MixupLoss())


def test_label_smoothing_of_an_unmixed_run_is_the_trainers(tmp_path):
    evaluation = Images(8, seed=1)
    own = trainer(tmp_path, evaluation=evaluation, mix=["vanilla"], label_smoothing_factor=0.5, max_steps=4)
    plain = stock(tmp_path, evaluation=evaluation, label_smoothing_factor=0.5, max_steps=4)
    for run in (own, plain):
        run.train()
    assert losses(own) == pytest.approx(losses(plain), rel=1e-5)
    assert own.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    assert own.mixup_model.choice.methods[0].loss.smoothing == 0.5, "what is recorded is what was done"
    with refuses("label smoothing must be given once"):
        arguments(tmp_path, mix=["vanilla"], loss="bce", label_smoothing_factor=0.1)


@pytest.mark.parametrize("mix", ["cutmix", "vanilla"])
def test_an_overridden_compute_loss_cannot_train_unmixed(tmp_path, mix):
    class Around(MixupTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return F.cross_entropy(model(pixel_values=inputs["pixel_values"]).logits, inputs["labels"])

    class Inside(Around):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return F.cross_entropy(self.mixup_model.backbone(pixel_values=inputs["pixel_values"]).logits, inputs["labels"])

    for cls, message in ((Around, "training needs labels and mix_key"), (Inside, "got a Inside that does not call it")):
        model = vit()
        before = weights(model)
        run = cls(model, arguments(tmp_path, mix=[mix]), train_dataset=Images())
        with pytest.raises((ValueError, RuntimeError), match=message):
            run.train()
        assert difference(before, weights(model)) == 0


@pytest.mark.parametrize("method", ["automix", "samix", "adautomix", "sumix", "smmix"])
def test_an_optimizer_that_misses_parameters_is_refused(tmp_path, method):
    model = network_for(method)
    missing = MixupTrainer(model, arguments(tmp_path, mix=[method]), train_dataset=Images(), optimizers=(torch.optim.AdamW(model.parameters()), None))  # fmt: skip
    with refuses(rf"the optimizer must hold every parameter that is trained, got one that lacks .*states\.{method}"):
        missing.train()
    model = MixupModel(network_for(method), method)
    before = weights(model.states)
    whole = MixupTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=Images(), optimizers=(torch.optim.AdamW(model.parameters()), None))  # fmt: skip
    whole.train()
    assert difference(before, weights(model.states)) > 0


def test_settings_that_would_have_no_effect_are_refused(tmp_path):
    optimizer = torch.optim.SGD(vit().parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for changes, keep, message in [
        ({"mixer_learning_rate": 0.1}, {}, "mixer_learning_rate is for methods with a learned mixer, got mixup"),
        ({"no_weight_decay": ["bias"]}, {"optimizers": (optimizer, None)}, "no_weight_decay is for the Trainer's own optimizer"),
        ({"min_lr": 0.1, "lr_scheduler_type": "cosine"}, {"optimizers": (optimizer, schedule)}, "are for the Trainer's own schedule"),
        ({"ema_warmup_epochs": 1.0}, {}, "ema_warmup_epochs is for ema_decay"),
        ({}, {"callbacks": [MixupCallback(MixupCollator("mixup"))]}, "got a MixupCallback too"),
    ]:
        with refuses(message):
            MixupTrainer(vit(), arguments(tmp_path, **changes), train_dataset=Images(), **keep)
    for changes, message in [
        ({"warmup_start": 0.1}, "warmup_start is for warmup_epochs"),
        ({"learning_rate": 0.0, "min_lr": 0.0, "lr_scheduler_type": "cosine"}, "needs a learning rate above 0"),
        ({"optim": "lamb", "optim_args": "a=1"}, "optim_args has no effect on lamb"),
    ]:
        with refuses(message):
            arguments(tmp_path, **changes)

    class Stream(IterableDataset):
        def __iter__(self):
            yield from (Images(16)[i] for i in range(16))

    for changes in ({"warmup_epochs": 1.0, "lr_scheduler_type": "cosine"}, {"ema_decay": 0.9, "ema_warmup_epochs": 1.0}):
        with refuses("needs a data set with a length, got Stream"):
            trainer(tmp_path, data=Stream(), **changes)


# -- model, arguments and collator say one thing ------------------------------------------------------------------------------


def test_a_model_and_arguments_that_disagree_are_refused(tmp_path):
    for model, changes, message in [
        (MixupModel(vit(), "resizemix"), {"mix": ["cutmix"]}, r"got methods\.name='resizemix' in the MixupModel and 'cutmix'"),
        (MixupModel(vit(), "cutmix"), {"mix": ["cutmix"], "alpha": [0.2]}, r"methods\.sample\.alpha=1\.0 in the MixupModel and 0\.2"),
        (MixupModel(vit(), "cutmix", mix_repeat=2), {"mix": ["cutmix"], "mix_repeat": 3}, "mix_repeat=2 in the MixupModel and 3"),
        (MixupModel(vit(), "cutmix"), {"mix": ["cutmix"], "ema_decay": 0.9}, "ema_decay=None in the MixupModel and 0.9"),
        (MixupModel(vit(), "cutmix"), {"mix": ["cutmix"], "mix_rate": 0.5}, "mix_rate=1.0 in the MixupModel and 0.5"),
    ]:
        with refuses(message):
            MixupTrainer(model, arguments(tmp_path, **changes), train_dataset=Images())
    MixupTrainer(MixupModel(vit(), "cutmix"), arguments(tmp_path, mix=["cutmix"]))
    default = MixupTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    assert MixupTrainer(MixupModel(vit(), "resizemix", mix_repeat=2), default).mixup_model.mix_repeat == 2


def test_an_average_goes_on_from_its_folder(tmp_path):
    first = trainer(tmp_path / "a", ema_decay=0.5, max_steps=2)
    first.train()
    first.save_model(tmp_path / "out")
    model = MixupModel.from_pretrained(tmp_path / "out")
    before = weights(model.ema)
    again = MixupTrainer(model, MixupTrainingArguments(str(tmp_path / "b"), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True), train_dataset=Images())  # fmt: skip
    again.train()
    assert difference(before, weights(model.ema)) > 0


def quiet(folder, **changes) -> MixupTrainingArguments:
    """With the default mixing, which a collator overrules."""
    settings = {name: getattr(arguments(folder), name) for name in STOCK}
    return MixupTrainingArguments(**{**settings, **changes})


def test_a_collator_is_recorded_as_what_mixed(tmp_path):
    run = MixupTrainer(vit(), quiet(tmp_path, max_steps=4, logging_steps=4), MixupCollator("fmix", num_labels=4, mix_repeat=2), train_dataset=Images())  # fmt: skip
    run.train()
    row = next(entry for entry in run.state.log_history if "loss" in entry)
    assert row["mix/fmix"] == 1
    assert 0.2 < row["lam"] < 0.8
    run.create_model_card()
    assert "**fmix**" in (tmp_path / "README.md").read_text()
    run.save_model()
    assert [method.name for method in MixupModel.from_pretrained(tmp_path).choice.methods] == ["fmix"]
    assert MixupModel.from_pretrained(tmp_path).mix_repeat == 2


@pytest.mark.parametrize(
    "changes", [{"mix": ["puzzlemix"]}, {"mix_rate": 0.5}, {"mix_repeat": 3}, {"mix_seed": 1}, {"alpha": [0.3]}, {"mode": "pair"}], ids=str
)
def test_arguments_that_a_collator_would_overrule_are_refused(tmp_path, changes):
    with refuses(f"mixing must be set once, got a MixupCollator and {next(iter(changes))}="):
        MixupTrainer(vit(), quiet(tmp_path, **changes), MixupCollator("fmix", num_labels=4), train_dataset=Images())


def test_methods_of_a_collator_have_one_loss(tmp_path):
    """Otherwise the loss of the first would train the batches of all."""
    both = MixupCollator(["mixup", "decouplemix"], num_labels=4)
    with refuses(
        r"methods of a MixupCollator must have one loss, got CrossEntropy\(.*\) and, of 'decouplemix', Decoupled\(.*\); set loss for all"
    ):
        trainer(tmp_path, data_collator=both)
    for loss in ("crossentropy", {"name": "decoupled", "eta": 0.2}):
        run = trainer(tmp_path, data_collator=both, loss=loss)
        assert len({method.loss for method in run.mixup_model.choice.methods}) == 1


def test_a_run_does_not_go_on_with_another_collator(tmp_path):
    run = MixupTrainer(vit(), quiet(tmp_path, max_steps=2, save_strategy="steps", save_steps=1), MixupCollator("mixup", num_labels=4), train_dataset=Images())  # fmt: skip
    run.train()
    assert (tmp_path / "checkpoint-1" / RUN_NAME).is_file()
    for other in ({"data_collator": MixupCollator("fmix", num_labels=4)}, {}):
        again = MixupTrainer(vit(), quiet(tmp_path, max_steps=2), train_dataset=Images(), **other)
        with refuses("a resumed run must mix as before"):
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["collator", "callback"])
def test_a_collator_stops_at_mix_off_epoch(tmp_path, kind, workers):
    seen = []

    class Watched(MixupTrainer if kind == "collator" else Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append((int(self.state.epoch or 0), len(inputs["labels"]), bool((inputs["labels"].max(1).values < 1).any())))
            return super().training_step(model, inputs, *args, **kwargs)

    collator = MixupCollator("mixup", num_labels=4, mix_repeat=2)
    changes = {"num_train_epochs": 3, "max_steps": -1, "dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
    if kind == "collator":
        run = Watched(vit(), quiet(tmp_path, mix_off_epoch=1, **changes), collator, train_dataset=Images(16))
    else:
        settings = plain_arguments(tmp_path, **changes)
        run = Watched(
            vit(), settings, train_dataset=Images(16), compute_loss_func=MixupLoss(), callbacks=[MixupCallback(collator, mix_off_epoch=1)]
        )
    run.train()
    assert seen == [(0, 16, True)] * 2 + [(1, 8, False)] * 2 + [(2, 8, False)] * 2
    if kind == "collator":
        with refuses("mix_off_epoch must be a whole number with a MixupCollator"):
            MixupTrainer(vit(), quiet(tmp_path, mix_off_epoch=1.5), collator, train_dataset=Images())


def test_mixing_ends_with_the_epoch_of_a_stream(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from (Images(16)[i] for i in range(16))

    keys = []

    class Watched(MixupTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            keys.append(self._last_methods)
            return loss

    Watched(vit(), arguments(tmp_path, mix=["mixup"], mix_off_epoch=1, max_steps=5), train_dataset=Stream()).train()
    assert keys == [("mixup",)] * 2 + [("vanilla",)] * 3


def test_repeats_are_all_counted(tmp_path):
    run = trainer(tmp_path, mix_repeat=4, max_steps=3, logging_steps=3)
    names = []
    inner = run.mixup_model.method_for
    run.mixup_model.method_for = lambda key: names.append(inner(key).name) or inner(key)
    run.train()
    assert len(names) == 12
    assert run.state.log_history[0]["mix/mixup"] == pytest.approx(names.count("mixup") / 12)


# -- keys follow from the loop ------------------------------------------------------------------------------------------------


class Keys(MixupTrainer):
    fail_at = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.__dict__.setdefault("keys", []).append((self._last_key.step, self._last_key.micro_step))
        if self.fail_at == len(self.keys):
            raise RuntimeError("CUDA out of memory.")
        return loss


def test_a_second_train_and_a_smaller_batch_draw_the_keys_of_a_fresh_run(tmp_path):
    run = Keys(vit(), arguments(tmp_path, max_steps=1), train_dataset=Images())
    run.train()
    run.train()
    assert run.keys == [(0, 0), (0, 0)]
    for fail_at in (1, 2, 3):
        run = Keys(
            vit(), arguments(tmp_path, max_steps=2, gradient_accumulation_steps=2, auto_find_batch_size=True), train_dataset=Images()
        )
        run.fail_at = fail_at
        run.train()
        assert run.keys[fail_at:] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert run.state.log_history[0]["train_accuracy"] <= 1


def test_resume_in_the_same_object_is_exact(tmp_path):
    run = trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2)
    run.train()
    whole = weights(run.mixup_model)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert difference(whole, weights(run.mixup_model)) == 0


def test_a_batch_size_found_below_two_is_refused(tmp_path):
    run = Keys(vit(), arguments(tmp_path, max_steps=2, per_device_train_batch_size=2, auto_find_batch_size=True), train_dataset=Images())
    run.fail_at = 1
    with refuses("at least 2 images in a batch, got 1 from auto_find_batch_size"):
        run.train()


# -- evaluation ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vanilla", "mixup", "automix"])
def test_evaluation_and_prediction_see_every_image(tmp_path, kind):
    evaluation = Images(13, seed=1)
    run = KINDS[kind](tmp_path, None, None, evaluation, dataloader_drop_last=True, per_device_eval_batch_size=8)
    assert len(run.predict(evaluation).predictions) == 13
    expected = KINDS[kind](tmp_path, None, None, evaluation, per_device_eval_batch_size=8).evaluate()
    assert run.evaluate()["eval_loss"] == expected["eval_loss"]
    assert run.args.dataloader_drop_last
    assert len(run.get_train_dataloader()) == 8


def test_another_evaluation_set_is_the_one_that_is_evaluated(tmp_path):
    """With persistent workers the Trainer keeps the loader of the first set for all."""
    changes = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    run = trainer(tmp_path, evaluation=Images(8, seed=1), **changes)
    first = run.evaluate()["eval_loss"]
    assert run.evaluate(Images(8, seed=2))["eval_loss"] != first
    assert run.evaluate()["eval_loss"] == first


def test_predictions_of_images_with_numbers_and_no_labels(tmp_path):
    test = [{"pixel_values": image, "image_id": row, "name": "a"} for row, image in enumerate(Images(5).pixels)]
    assert trainer(tmp_path).predict(test).predictions.shape == (5, 4)


def test_evaluation_labels_are_checked_before_training(tmp_path):
    from datasets import Dataset

    rows = Dataset.from_dict({"pixel_values": Images(6).pixels.tolist(), "labels": [0, 1, 2, 3, 4, 0]}).with_format("torch")
    model = vit()
    before = weights(model)
    for data in (rows, {"one": rows}, Subset(rows, [4, 5])):
        with refuses(r"in \w+, labels must be from 0 to 3, got 4"):
            trainer(tmp_path, model, evaluation=data).train()
    trainer(tmp_path, model, evaluation=Subset(rows, [0, 5]), max_steps=1)
    assert difference(before, weights(model)) == 0
    with refuses("labels must be from 0 to 3, got 7"):
        trainer(tmp_path, evaluation=[{"pixel_values": torch.randn(3, 16, 16), "labels": 7}]).evaluate()


# -- data ---------------------------------------------------------------------------------------------------------------------


def keyed_images(count=16, on_device=False) -> ImageDataset:
    transform = Transform(lambda image: image, Augmentation((0.5,) * 3, (0.5,) * 3, padding=4, flip=True))
    return ImageDataset(digits()["train"].select(range(count)), "image", "label", transform, on_device=on_device)


class Wrapped(torch.utils.data.Dataset):
    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, row):
        return self.inner[row]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda data: Subset(data, np.arange(16)),
        lambda data: ConcatDataset([Subset(data, range(8)), Subset(data, range(8, 16))]),
        lambda data: torch.utils.data.random_split(data, [8, 8])[0],
        Wrapped,
    ],
    ids=["subset", "concat", "split", "own"],
)
def test_epochs_reach_a_data_set_through_its_wrappers(tmp_path, wrap, on_device):
    seen = []

    class Watched(InOrder, MixupTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            handle = self.mixup_model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["pixel_values"].clone()), with_kwargs=True)  # fmt: skip
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            handle.remove()
            return loss

    data = wrap(keyed_images(on_device=on_device))
    run = Watched(resnet(10), arguments(tmp_path, mix=["vanilla"], num_train_epochs=2, max_steps=-1, per_device_train_batch_size=8), train_dataset=data, eval_dataset=data)  # fmt: skip
    run.train()
    first, second = torch.cat(seen[: len(seen) // 2]), torch.cat(seen[len(seen) // 2 :])
    assert first.dtype == torch.float32
    assert first.shape == second.shape
    assert not torch.equal(first, second)
    assert torch.isfinite(torch.tensor(run.evaluate()["eval_loss"]))


@pytest.mark.parametrize("index", [int, np.int64, np.uint8, torch.tensor], ids=["int", "int64", "uint8", "tensor"])
def test_numbers_of_rows_of_every_type(index):
    data = keyed_images(4)
    assert torch.equal(data[index(3)]["pixel_values"], data[3]["pixel_values"])


def rows_of(form):
    pixels = Images(24).pixels
    make = {
        "lists": lambda i: {"pixel_values": pixels[i].tolist(), "labels": i % 4},
        "arrays": lambda i: {"pixel_values": pixels[i].numpy(), "label": np.int32(i % 4)},
        "objects": lambda i: {"image": object(), "pixel_values": pixels[i], "labels": i % 4, "name": "a"},
        "ragged": lambda i: {"pixel_values": pixels[i], "boxes": torch.zeros(i), "labels": i % 4},
        "pairs": lambda i: (pixels[i], i % 4),
        "label_ids": lambda i: {"pixel_values": pixels[i], "label_ids": i % 4},
    }[form]
    return [make(i) for i in range(24)]


@pytest.mark.parametrize("form", ["lists", "arrays", "objects", "ragged", "pairs", "label_ids"])
def test_data_of_every_form(tmp_path, form):
    """MixupTrainer takes them all; the callback those that a stock Trainer takes, and the collator itself."""
    expected = trainer(tmp_path, data=rows_of("pairs"), evaluation=rows_of("pairs"), max_steps=2)
    expected.train()
    run = trainer(tmp_path, data=rows_of(form), evaluation=rows_of(form), max_steps=2)
    run.train()
    assert losses(run) == losses(expected)
    assert run.evaluate()["eval_loss"] == expected.evaluate()["eval_loss"]
    assert MixupCollator("mixup", num_labels=4)(rows_of(form))["labels"].shape == (24, 4)
    if form in ("lists", "arrays", "label_ids"):
        KINDS["callback"](tmp_path, None, rows_of(form), max_steps=1).train()


def test_inputs_beside_the_image(tmp_path):
    class Tabular(type(vit())):
        def forward(self, pixel_values, tabular=None, labels=None, **kwargs):
            assert tabular is not None
            return super().forward(pixel_values + tabular.mean(), labels=labels, **kwargs)

    data = [{"pixel_values": image, "tabular": [1.0, 2.0], "labels": row % 4} for row, image in enumerate(Images(16).pixels)]
    with refuses("gives a network only pixel_values, got 'tabular'"):
        trainer(tmp_path, Tabular(vit().config), data=data).train()

    class Own(MixupTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader([{**row, "tabular": torch.tensor(row["tabular"])} for row in data], 8)

    for kind, collator in ((Own, None), (MixupTrainer, MixupCollator("mixup", num_labels=4))):
        run = kind(Tabular(vit().config), arguments(tmp_path, **({} if collator else {"mix": ["mixup"]})), collator, data)
        with refuses("gives a network only pixel_values, got 'tabular'"):
            run.train()
    KINDS["callback"](tmp_path, Tabular(vit().config), data, data[:8], max_steps=1).train()


@pytest.mark.parametrize("kind", ["vanilla", "mixup", "automix"])
def test_loaders_that_are_none_of_torch(tmp_path, kind):
    batches = [{"pixel_values": Images(8).pixels, "labels": Images(8).labels} for _ in range(4)]

    class Own(MixupTrainer):
        def get_train_dataloader(self):
            return batches

        get_eval_dataloader = lambda self, data=None: batches  # noqa: E731

    run = Own(vit(), arguments(tmp_path, mix=KINDS[kind](tmp_path).args.mix, max_steps=2), train_dataset=Images(), eval_dataset=Images())
    run.train()
    run.evaluate()
    with refuses("MixupCallback needs a DataLoader, whose collate_fn it replaces, got list", TypeError):

        class Plain(Trainer):
            def get_train_dataloader(self):
                return batches

        Plain(vit(), plain_arguments(tmp_path), train_dataset=Images(), compute_loss_func=MixupLoss(), callbacks=[MixupCallback(MixupCollator("mixup", num_labels=4))]).train()  # fmt: skip


def test_the_callback_and_the_model_agree_on_the_classes(tmp_path):
    with refuses("the collator and the model must agree on num_labels, got 10 and 4"):
        stock(tmp_path, compute_loss_func=MixupLoss(), callbacks=[MixupCallback(MixupCollator("mixup", num_labels=10))]).train()
    stock(tmp_path, compute_loss_func=MixupLoss(), callbacks=[MixupCallback(MixupCollator("mixup"))], max_steps=1).train()


def test_the_callback_and_evaluation_on_start(tmp_path):
    """The guard is for the first batch of training, whatever comes before."""
    with pytest.raises(RuntimeError, match=r"compute_loss_func=MixupLoss\(\)"):
        stock(
            tmp_path, evaluation=Images(8), eval_on_start=True, eval_strategy="steps", callbacks=[MixupCallback(MixupCollator("mixup", num_labels=4))]
        ).train()  # fmt: skip


def test_the_callback_mixes_once(tmp_path):
    loader = DataLoader(Images(16), 8, collate_fn=None)
    collate = loader.collate_fn

    class Own(Trainer):
        fails = True

        def get_train_dataloader(self):
            return loader

        def training_step(self, *args, **kwargs):
            if self.fails:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    run = Own(vit(), plain_arguments(tmp_path, max_steps=1), train_dataset=Images(), compute_loss_func=MixupLoss(), callbacks=[MixupCallback(MixupCollator("mixup", num_labels=4))])  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.fails = False
    run.train()
    assert loader.collate_fn is collate
    with refuses("every batch must be mixed once"):
        stock(tmp_path, data_collator=MixupCollator("mixup", num_labels=4), compute_loss_func=MixupLoss(), callbacks=[MixupCallback(MixupCollator("mixup", num_labels=4))]).train()  # fmt: skip


@pytest.mark.parametrize("outputs", [lambda z: z, lambda z: {"logits": z}, lambda z: (z, None)], ids=["tensor", "mapping", "tuple"])
def test_the_loss_reads_what_networks_return(outputs):
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert_close(MixupLoss()(outputs(logits), labels), F.cross_entropy(logits, labels))


# -- the same run in every kind ---------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"logging_steps": 3, "logging_first_step": True, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1},
        {"gradient_accumulation_steps": 2, "num_train_epochs": 2, "max_steps": -1, "eval_strategy": "epoch", "save_strategy": "epoch"},
        {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "eval_delay": 1},
    ],
    ids=["plain", "saving", "epochs", "evaluating"],
)
def test_events_logs_and_checkpoints_are_those_of_a_stock_trainer(tmp_path, kind, changes):
    found = []
    for name in ("stock", kind):
        events, folder = Events(), tmp_path / name
        run = KINDS[name](folder, None, Images(40), Images(8, seed=1), callbacks=[events], **{"max_steps": 4, **changes})
        run.train()
        run.evaluate()
        run.predict(Images(8))
        logs = [{k: v for k, v in row.items() if k in ("step", "epoch", "learning_rate")} | {"keys": {k for k in row if "/" not in k}} for row in run.state.log_history]  # fmt: skip
        found.append((events.seen, logs, sorted(path.name for path in folder.glob("checkpoint-*"))))
    (events, logs, checkpoints), (own_events, own_logs, own_checkpoints) = found
    assert own_events == events
    assert own_checkpoints == checkpoints
    for row, own in zip(logs, own_logs, strict=True):
        assert own.pop("keys") >= row.pop("keys")
        assert own == pytest.approx(row)


def test_vanilla_is_the_stock_trainer(tmp_path):
    def run(make):
        done = make(tmp_path, None, Images(42), max_steps=8, gradient_accumulation_steps=3, per_device_train_batch_size=4)
        done.train()
        return weights(getattr(done.model, "backbone", done.model))

    def by_images(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    assert difference(run(KINDS["vanilla"]), run(lambda *args, **changes: stock(*args, compute_loss_func=by_images, **changes))) < 1e-6


def test_a_card_before_anything_is_saved(tmp_path):
    run = trainer(tmp_path, mix=["cutmix"], max_steps=1)
    run.train()
    run.create_model_card()
    assert "cutmix" in (tmp_path / "README.md").read_text()


def test_arguments_with_built_methods_are_data(tmp_path):
    args = arguments(tmp_path, mix=[METHODS["cutmix"].replaced(alpha=0.3)])
    assert '"alpha": 0.3' in args.to_json_string()
    assert args.mix[0] == METHODS["cutmix"].replaced(alpha=0.3)


def test_a_mixed_batch_keeps_its_type_where_it_matters(tmp_path):
    batch = MixupCollator("mixup", num_labels=4)([Images(8)[i] for i in range(8)])
    again = copy.deepcopy(batch)
    assert isinstance(again, MixedBatch)
    assert MixupModel(vit(), "cutmix").train()(**batch, mix_key=MixKey(0, 0, 0), mixed=True).methods == ("vanilla",)
