"""Trains a classifier of texts with mixing. Without arguments it trains a tiny BERT to find the package of a docstring of the standard library.

`--dataset_name` takes data sets with a column of texts and one of classes, `--model_name_or_path` any encoder for text classification, such
as BERT, DistilBERT or ModernBERT.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from hf_mixup import MixupTrainer, MixupTrainingArguments
from hf_mixup.cli.tasks import TaskArguments, column_of, data_sets, load_splits, named, numbered, script, train, with_classes
from hf_mixup.data.docstrings import PACKAGES, docstrings
from hf_mixup.networks.backbones import load_classifier

LENGTH = 48  # tokens of a text, from scratch
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def main(argv: list[str], prog: str = "run_mixup_text.py") -> dict[str, float]:
    return train(argv, prog, "Trains a classifier of texts with mixing.", ["wordmixup"], build)


def build(task: TaskArguments, args: MixupTrainingArguments) -> tuple[MixupTrainer, str]:
    data, evaluation, names, read = made(args.seed) if task.dataset_name is None else loaded(task, args.seed)
    names, number = numbered(task, names)
    labels = named(names)
    if task.model_name_or_path is None:
        tokenizer = own_tokenizer([read(row)[0] for row in data])
        network = from_scratch(len(tokenizer), **labels)
    else:
        network = load_classifier(task.model_name_or_path, num_labels=len(names), ignore_mismatched_sizes=True, **labels)
        tokenizer = AutoTokenizer.from_pretrained(task.model_name_or_path)

    def example(row: Any) -> dict[str, Any]:
        text, label = read(row)
        return {**tokenizer(text, truncation=True), "labels": number.get(label, label)}

    sets = data_sets(task, data, evaluation, example, args.seed)
    trainer = MixupTrainer(network, args, **sets, processing_class=tokenizer)
    return trainer, task.dataset_name or "docstrings of the standard library"


def made(seed: int) -> tuple[list, list, list[str], Any]:
    """Docstrings: training rows, evaluation rows, names of the packages, and the function that reads a row."""
    return *docstrings(seed), list(PACKAGES), lambda row: row


def loaded(task: TaskArguments, seed: int) -> tuple[Any, Any, list[str], Any]:
    from datasets import ClassLabel, Value

    train, evaluation = load_splits(task, seed)
    label = column_of(train, task.label_column_name, ClassLabel, "labels")
    words = train.select_columns([name for name, kind in train.features.items() if kind == Value("string") and name != label])
    text = column_of(words, task.input_column_name, Value, "texts")
    return *with_classes(train, evaluation, label), lambda row: (row[text], row[label])


def own_tokenizer(texts: list[str], words: int = 4000) -> PreTrainedTokenizerFast:
    """A tokenizer of the most common words of the texts, in lower case."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    learner = trainers.WordLevelTrainer(vocab_size=words, special_tokens=list(SPECIAL.values()), show_progress=False)
    tokenizer.train_from_iterator(texts, learner)
    ends = [(SPECIAL[name], tokenizer.token_to_id(SPECIAL[name])) for name in ("sep_token", "cls_token")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LENGTH, **SPECIAL)


def from_scratch(words: int, **labels: Any) -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=words, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
            max_position_embeddings=LENGTH, **labels,
        )
    )  # fmt: skip


if __name__ == "__main__":
    script(main, __file__)
