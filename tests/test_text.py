"""Texts are mixed inside the network: words before positions and norm, hidden states with the mask of each text. Each fault of public code has a test:
mixing after positions and norm, so that both are applied twice; the mask of one text for both; mixed logits; mixing in evaluation."""

import json

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.masking_utils import create_bidirectional_mask

from hf_mixup import MixupCollator, MixupModel, get_method
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey, keyed
from refusals import refuses
from run_script import ROOT
from small import difference, losses, trainer, weights
from test_readme import run_blocks
from test_task_scripts import run
from test_trainer import _StopAt

KEY = MixKey(3, 0, 5, 0, 0, 100)
WORDS = 50
_BERT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 40}
_MODERN = {**_BERT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 6}
NETWORKS = {
    "bert": ("Bert", {**_BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "distilbert": ("DistilBert", {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}),
    "modernbert": ("ModernBert", _MODERN),
    "modernbert, mean": ("ModernBert", {**_MODERN, "classifier_pooling": "mean"}),
}  # fmt: skip
every_network = pytest.mark.parametrize("kind", NETWORKS)


def network(kind="bert", **config):
    name, fields = NETWORKS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=WORDS, num_labels=4, **fields, **config)
    made = getattr(transformers, f"{name}ForSequenceClassification")(config)
    for parameter in made.parameters():  # or all texts would be nearly alike
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return made


def texts(count=6, longest=9, seed=0):
    """Numbers of words, 0 where there is none, of texts of several lengths; their masks, and classes."""
    tokens = torch.randint(3, WORDS, (count, longest), generator=keyed(seed))
    mask = torch.arange(longest) < torch.arange(longest, longest - count, -1)[:, None].clamp(min=2)
    return tokens * mask, mask.long(), torch.arange(count) % 4


def planned(method, count):
    return method.sample.plan(torch.Size((count, 1, 1, 9)), KEY.own_rng(), Signals())


def step(model, tokens, mask, labels, **more):
    torch.manual_seed(0)
    return model.train()(input_ids=tokens, attention_mask=mask, labels=labels, mix_key=KEY, **more)


def words_mixed(net, plan, tokens):
    words = net.get_input_embeddings()(tokens)
    return torch.lerp(words[plan.partners[:, 0]], words, plan.lam[:, None, None])


@every_network
def test_words_are_mixed_before_positions_and_norm_under_the_union_of_masks(kind):
    """By hand, through `inputs_embeds`, which networks give positions and norm, once."""
    net, (tokens, mask, labels) = network(kind), texts()
    method = get_method("wordmixup")
    out = step(MixupModel(net, method), tokens, mask, labels)
    plan = planned(method, 6)
    union = mask | mask[plan.partners[:, 0]]
    expected = net(inputs_embeds=words_mixed(net, plan, tokens), attention_mask=union).logits
    assert_close(out.logits, expected, atol=1e-5, rtol=1e-5)
    assert_close(
        out.targets, plan.lam[:, None] * torch.eye(4)[labels] + (1 - plan.lam[:, None]) * torch.eye(4)[labels[plan.partners[:, 0]]]
    )
    # and the faults give something else
    plain = net(input_ids=tokens, attention_mask=mask).logits
    wrong = {
        "one text's mask": net(inputs_embeds=words_mixed(net, plan, tokens), attention_mask=mask).logits,
        "mixed logits": torch.lerp(plain[plan.partners[:, 0]], plain, plan.lam[:, None]),
        "not mixed": plain,
    }
    if kind == "bert":
        embedded = net.bert.embeddings(input_ids=tokens)
        twice = torch.lerp(embedded[plan.partners[:, 0]], embedded, plan.lam[:, None, None])
        wrong["positions and norm twice"] = net(inputs_embeds=twice, attention_mask=union).logits
    for name, logits in wrong.items():
        assert not torch.allclose(out.logits, logits, atol=1e-3), name


@every_network
@pytest.mark.parametrize("name", ["wordmixup", "tmix", "manifoldmix"])
def test_evaluation_is_plain_and_training_is_not(kind, name):
    net, (tokens, mask, labels) = network(kind), texts()
    model = MixupModel(net, name)
    assert not torch.allclose(step(model, tokens, mask, labels).logits, net(input_ids=tokens, attention_mask=mask).logits, atol=1e-3)
    model.eval()
    for more in ({}, {"labels": labels}, {"labels": labels, "mix_key": KEY}):
        assert torch.equal(
            model(input_ids=tokens, attention_mask=mask, **more).logits, net.eval()(input_ids=tokens, attention_mask=mask).logits
        )


@every_network
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_text_mixed_with_itself_is_as_it_was(kind, layer):
    """All rows of a batch are one text, so whoever is drawn, nothing may change: not the positions, not the norm, not the mask."""
    net, (tokens, mask, labels) = network(kind), texts()
    model = MixupModel(net, get_method("manifoldmix", layers=[layer])).train()
    rows = [part[3:4].expand(6, -1) for part in (tokens, mask)]
    assert_close(step(model, *rows, labels).logits, net(input_ids=rows[0], attention_mask=rows[1]).logits, atol=1e-5, rtol=1e-5)


@every_network
@pytest.mark.parametrize("layer", [0, 2])
def test_more_padding_changes_nothing(kind, layer):
    net, (tokens, mask, labels) = network(kind), texts()
    model = MixupModel(net, get_method("manifoldmix", layers=[layer]))
    longer = [nn.functional.pad(part, (0, 5)) for part in (tokens, mask)]
    assert_close(step(model, *longer, labels).logits, step(model, tokens, mask, labels).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mix_layer", [0, 1, 2])
def test_tmix_is_the_loop_of_the_authors(mix_layer):
    """`BertEncoder4Mix` of code/mixtext.py at github.com/SALT-NLP/MixText, for texts without padding, as its masks of ones stand for:
    `for i, layer_module in enumerate(self.layer): if i <= mix_layer: hidden_states, hidden_states2 = layer_module(...), layer_module(...);
    if i == mix_layer: hidden_states = l * hidden_states + (1-l) * hidden_states2; if i > mix_layer: hidden_states = layer_module(...)`."""
    net, (tokens, _, labels) = network(), texts()
    tokens = torch.where(tokens > 0, tokens, 7)
    method = get_method("tmix", layers=[mix_layer + 1])
    out = step(MixupModel(net, method), tokens, torch.ones_like(tokens), labels)
    plan = planned(method, 6)
    lam = plan.lam[:, None, None]
    hidden = net.bert.embeddings(input_ids=tokens)
    hidden2 = hidden[plan.partners[:, 0]]
    for i, layer_module in enumerate(net.bert.encoder.layer):
        hidden = layer_module(hidden)
        if i <= mix_layer:
            hidden2 = layer_module(hidden2)
        if i == mix_layer:
            hidden = lam * hidden + (1 - lam) * hidden2
    assert_close(out.logits, net.classifier(net.bert.pooler(hidden)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hidden_states_are_taken_under_the_own_mask_and_go_on_under_the_union(attention):
    net, (tokens, mask, labels) = network(attn_implementation=attention), texts()
    method = get_method("tmix", layers=[2])
    model = MixupModel(net, method)
    out = step(model, tokens, mask, labels)
    plan = planned(method, 6)
    own = net(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states[2]
    hidden = torch.lerp(own[plan.partners[:, 0]], own, plan.lam[:, None, None])
    union = create_bidirectional_mask(config=net.config, inputs_embeds=hidden, attention_mask=mask | mask[plan.partners[:, 0]])
    expected = net.classifier(net.bert.pooler(net.bert.encoder.layer[2](hidden, union)))
    assert_close(out.logits, expected, atol=1e-5, rtol=1e-5)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.bert.encoder.layer[0].parameters() if p.ndim > 1)


def test_activation_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointed in (False, True):
        model = MixupModel(network(), "tmix").train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        step(model, *texts()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert difference(*found) < 1e-6


def test_which_words_are_of_which_sentence_stays_the_own_texts():
    net, (tokens, mask, labels) = network(), texts()
    kinds = (torch.arange(9) > 3).long().expand(6, -1)
    out = step(MixupModel(net, "wordmixup"), tokens, mask, labels, token_type_ids=kinds)
    plan = planned(get_method("wordmixup"), 6)
    union = mask | mask[plan.partners[:, 0]]
    expected = net(inputs_embeds=words_mixed(net, plan, tokens), attention_mask=union, token_type_ids=kinds).logits
    assert_close(out.logits, expected, atol=1e-5, rtol=1e-5)


# -- the Trainer --------------------------------------------------------------------------------------------------------------


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, WORDS)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32)


def sentences(count=40, seed=0):
    """Words of which those of one quarter of the vocabulary, the class, come twice as often."""
    rng, read, rows = keyed(seed), tokenizer(), []
    for row in range(count):
        label = row % 4
        length = int(torch.randint(3, 12, (), generator=rng))
        own = torch.randint(2, 14, (length,), generator=rng) + 12 * label
        words = torch.where(torch.rand(length, generator=rng) < 0.7, own, torch.randint(2, WORDS, (length,), generator=rng))
        rows.append({**read(" ".join(f"w{int(word)}" for word in words)), "label": label})
    return rows


@every_network
@pytest.mark.parametrize("mix", [["wordmixup"], ["tmix", "vanilla"]], ids=" ".join)
def test_trains_mixed_evaluates_plain_and_resumes(tmp_path, kind, mix):
    def made(folder, **changes):
        return trainer(folder, network(kind), sentences(), sentences(16, 1), mix=mix, max_steps=6, processing_class=tokenizer(), **changes)

    whole = made(tmp_path / "whole")
    before = weights(whole.model)
    whole.train()
    assert difference(before, weights(whole.model)) > 0
    made(tmp_path / "cut", callbacks=[_StopAt(3)]).train()
    resumed = made(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert difference(weights(whole.model), weights(resumed.model)) == 0
    assert losses(whole)[-1] == losses(resumed)[-1]
    predicted = torch.from_numpy(whole.predict(sentences(16, 1)).predictions)
    whole.save_model(tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    read, rows = tokenizer(), sentences(16, 1)
    batch = read.pad([{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows], return_tensors="pt")
    with torch.no_grad():
        logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert_close(logits, predicted, atol=1e-5, rtol=1e-5)
    assert set(plain.state_dict()) == set(network(kind).state_dict())
    again = MixupModel.from_pretrained(tmp_path / "out")
    assert type(again.backbone) is type(plain)
    assert again.to_dict() == whole.mixup_model.to_dict()


@pytest.mark.parametrize("changes", [{"ema_decay": 0.9}, {"gradient_accumulation_steps": 2, "bf16": True}, {"mix_repeat": 2}], ids=str)
def test_other_arguments_go_with_texts(tmp_path, changes):
    done = trainer(
        tmp_path, network(), sentences(), sentences(8, 1), mix=["wordmixup", "tmix"], max_steps=3, logging_steps=1,
        processing_class=tokenizer(), eval_strategy="steps", eval_steps=3, **changes,
    )  # fmt: skip
    done.train()
    assert all(0 < loss < 20 for loss in losses(done))


def test_refusals(tmp_path):
    for name in ("mixup", "cutmix", "puzzlemix", "automix", "moex", "regmixup"):
        with refuses(f"texts are mixed inside the network, got '{name}', which mixes its input; use 'wordmixup'"):
            MixupModel(network(), name)
    tokens, mask, labels = texts()
    model = MixupModel(network(), "wordmixup").train()
    with refuses("input_ids must be whole numbers"):
        step(model, tokens.float(), mask, labels)
    with refuses("layers must be from 0 to 3, the stages of BertForSequenceClassification, got 4"):
        MixupModel(network(), get_method("tmix", layers=[4]))
    with refuses("layers must be a number from 0 to 1"):
        get_method("tmix", layers=[1.5])
    with refuses("token ids cannot be mixed, only their embeddings, got input_ids", TypeError):
        MixupCollator("mixup", num_labels=4, input_name="input_ids")([{"input_ids": tokens[row], "labels": 0} for row in range(6)])
    decoder = transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=1, n_head=2, num_labels=4, pad_token_id=0)
    )
    with refuses("mixing texts needs an encoder, whose classifier sees the whole text, got GPT2ForSequenceClassification"):
        MixupModel(decoder, "wordmixup")
    network().save_pretrained(tmp_path)
    with refuses("a teacher must see the network's mixtures, got 'wordmixup', which mixes inside the network"):
        MixupModel(network(), "wordmixup", teacher=tmp_path)


def test_word_mixup_of_images_is_mixup():
    from small import Images, vit

    images, labels = Images(8).pixels, Images(8).labels
    one, other = (MixupModel(vit(), name).train()(images, labels, KEY) for name in ("wordmixup", "mixup"))
    assert_close(one.logits, other.logits)
    assert torch.equal(one.targets, other.targets)


# -- the script ---------------------------------------------------------------------------------------------------------------


def test_docstrings_are_those_of_the_standard_library():
    import asyncio

    from hf_mixup.data.docstrings import PACKAGES, docstrings

    train, evaluation = docstrings()
    rows = dict(train + evaluation)
    assert len(rows) == len(train) + len(evaluation) > 1000
    assert rows[" ".join(asyncio.gather.__doc__.split())] == PACKAGES.index("asyncio")


SHORT = ("--max_steps", 4, "--max_train_samples", 32, "--max_eval_samples", 16, "--per_device_train_batch_size", 8, "--use_cpu")


def test_the_script_trains_resumes_and_goes_on_from_its_checkpoint_on_a_data_set(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    assert len((ROOT / "training_scripts/run_mixup_text.py").read_text().splitlines()) < 150
    out = tmp_path / "out"
    run("text", "--output_dir", out, *SHORT, "--save_strategy", "steps", "--save_steps", 2)
    plain = AutoModelForSequenceClassification.from_pretrained(out)
    assert 0 <= json.loads((out / "all_results.json").read_text())["eval_top1"] <= 1
    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained" in card.content
    run("text", "--output_dir", out, *SHORT, "--resume_from_checkpoint", out / "checkpoint-2")
    assert difference(weights(plain), weights(AutoModelForSequenceClassification.from_pretrained(out))) == 0
    features = Features({"number": Value("int64"), "sentence": Value("string"), "kind": ClassLabel(names=["good", "bad"])})
    rows = {"number": range(20), "sentence": ["all is well", "return nothing at all"] * 10, "kind": [0, 1] * 10}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    run(
        "text", "--output_dir", tmp_path / "more", "--dataset_name", tmp_path / "data", "--model_name_or_path", out, "--mix", "tmix", *SHORT
    )
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "more")
    assert again.config.id2label == {0: "good", 1: "bad"}
    with refuses("texts are mixed inside the network, got 'cutmix'"):
        run("text", "--output_dir", tmp_path / "none", "--mix", "cutmix", *SHORT)
    assert not (tmp_path / "none").exists()


def test_blocks_of_the_guide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_blocks("docs/guides/text.md", model=network(), train=sentences(), test=sentences(8, 1), tokenizer=tokenizer())
    assert names["trainer"].state.global_step == 2
    assert AutoModelForSequenceClassification.from_pretrained("runs/text").config.num_labels == 4


# -- further networks -------------------------------------------------------------------------------------------------------


def of_family(name, **fields):
    torch.manual_seed(0)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = getattr(transformers, f"{name}Config")(vocab_size=WORDS, num_labels=4, pad_token_id=0, **{**_BERT, **still, **fields})
    made = getattr(transformers, f"{name}ForSequenceClassification")(config)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("name", ["Roberta", "MPNet", "XLMRoberta"])
def test_positions_that_are_counted_from_words_are_those_of_the_mixture(name):
    """The tail of the longer text has positions too, though the own text has no words there; the network alone gives those of padding."""
    net, (tokens, mask, labels) = of_family(name), texts()
    method = get_method("wordmixup")
    out = step(MixupModel(net, method), tokens, mask, labels)
    plan = planned(method, len(tokens))
    united = mask | mask[plan.partners[:, 0]]
    assert bool((united != mask).any())
    table = next(module for part, module in net.named_modules() if part.endswith("position_embeddings"))
    places = united.cumsum(1) * united + table.padding_idx
    with torch.no_grad():
        logits = net(inputs_embeds=words_mixed(net, plan, tokens), attention_mask=united, position_ids=places).logits
    assert_close(out.logits, logits)


@pytest.mark.parametrize("name", ["DebertaV2", "Albert", "Electra", "ConvBert", "RoFormer"])
def test_words_of_other_families_are_mixed_as_by_hand(name):
    special = {"DebertaV2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "pooler_dropout": 0.0}}
    fields = {"embedding_size": 16, **({"classifier_dropout_prob": 0.0} if name == "Albert" else {}), **special.get(name, {})}
    net, (tokens, mask, labels) = of_family(name, **fields), texts()
    net = net.requires_grad_()
    out = step(MixupModel(net, "wordmixup"), tokens, mask, labels)
    plan = planned(get_method("wordmixup"), len(tokens))
    with torch.no_grad():
        logits = net(inputs_embeds=words_mixed(net, plan, tokens), attention_mask=mask | mask[plan.partners[:, 0]]).logits
    assert_close(out.logits, logits)


def test_networks_that_classify_by_the_last_word_are_refused():
    """Those of the next word alone, whatever they call their classifier; with XLNet, whose layers have words first and texts second."""
    small = {"vocab_size": WORDS, "num_labels": 4, "pad_token_id": 0}
    for name, fields in (
        ("GPT2", {"n_embd": 16, "n_layer": 1, "n_head": 2}), ("CTRL", {"n_embd": 16, "n_layer": 1, "n_head": 2, "dff": 16}),
        ("XLNet", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}), ("ModernBertDecoder", _MODERN),
        ("T5", {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}),
        ("Llama", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}),
    ):  # fmt: skip
        net = getattr(transformers, f"{name}ForSequenceClassification")(getattr(transformers, f"{name}Config")(**{**fields, **small}))
        for method in ("wordmixup", "tmix"):
            with refuses(f"mixing texts needs an encoder, whose classifier sees the whole text, got {name}ForSequenceClassification"):
                MixupModel(net, method)


def test_layers_without_a_row_for_each_text_are_refused():
    """Labels would be mixed, and nothing else."""
    from hf_mixup.steps.manifoldmix import mixed_layer

    partner, lam = torch.tensor([1, 0, 2]), torch.full((3,), 0.5)
    for output in (torch.randn(7, 3, 4), (torch.randn(7, 3, 4), None), torch.arange(3)):
        with refuses("a layer that is mixed must give a row for each of the 3 inputs, got shapes"):
            mixed_layer(output, partner, lam)
    assert mixed_layer((torch.ones(3, 2), None), partner, lam)[1] is None
    chars = transformers.CanineForSequenceClassification(
        transformers.CanineConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=4, num_hash_buckets=32, num_hash_functions=2
        )
    )  # fmt: skip
    with refuses("needs a network with one table of word embeddings, got CanineForSequenceClassification; use 'tmix'"):
        MixupModel(chars, "wordmixup")
