"""What people type and what they are told: parsing, help, refusals, secrets, the command `hf-mixup`."""

import json
import os
import subprocess
import sys
import time

import pytest
from transformers.hf_argparser import string_to_bool

from hf_mixup.arguments import MixupTrainingArguments
from hf_mixup.cli import main as command
from hf_mixup.cli import pretrain, train
from hf_mixup.cli.launch import divided
from hf_mixup.cli.refusals import Debug, run
from hf_mixup.cli.train import parse, parser
from hf_mixup.core.secrets import HIDDEN, redacted, without_secrets
from run_script import ROOT

SECRET = "hf_" + "Ab3" * 12
SMALL = ("--max_train_samples", "40", "--max_eval_samples", "20", "--max_steps", "2", "--per_device_train_batch_size", "20", "--use_cpu")


def script(name):
    return command.script(name)


def told(capsys, main, *words, prog="hf-mixup train"):
    """The exit status, and what stands on the screen."""
    status = run(main, list(map(str, words)), prog)
    return status, capsys.readouterr().err


# -- parsing ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("--mode", "batch"), ("--mode=batch",)])
def test_every_flag_of_the_help_can_be_typed(words):
    assert parse([*words, "--mix", "cutmix", "--use_cpu"])[3].mode == "batch"


def test_every_option_is_only_itself():
    """Every flag of the training, typed alone with a value of its kind, sets its own argument and nothing else."""
    reader = parser()
    values = {int: "1", float: "0.5", str: "x", string_to_bool: "true", None: "x"}  # objects of transformers are no text
    for option, action in reader._option_string_actions.items():
        if action.dest not in ("help", "help_all", "debug") and (action.choices or action.type in values):
            value = next(iter(action.choices)) if action.choices else values[action.type]
            words = [option] if action.nargs == 0 else [option, str(value)]
            assert set(reader.typed(words)) == {action.dest}, option


@pytest.mark.parametrize("word", ["--tok", "--hub_tok", "--output_di", "--learning", "--num-train-epoch"])
def test_abbreviations_are_refused(word):
    with pytest.raises(ValueError, match=rf"every argument must be known, got '{word}'; did you mean"):
        parse([word, "x"])


@pytest.mark.parametrize("words", [("--output-dir", "there"), ("--output_dir=there",), ("--output-dir=there",)])
def test_the_output_folder_that_is_typed_is_used(words):
    assert parse([*words, "--use_cpu"])[3].output_dir == "there"


def test_the_output_folder_of_a_recipe_is_used(tmp_path):
    (tmp_path / "own.yaml").write_text("dataset_name: digits\noutput_dir: there\nlearning_rate: 1e-3\n")
    run_args, args = parse(["--recipe", str(tmp_path / "own.yaml"), "--use_cpu"])[2:]
    assert (args.output_dir, args.learning_rate) == ("there", 0.001)
    assert run_args.recipe_hash != parse(["--use_cpu"])[2].recipe_hash
    assert parse(["--use_cpu"])[3].output_dir is None
    (tmp_path / "own.yaml").write_text("learning_rate: fast\n")
    with pytest.raises(ValueError, match="must set learning_rate to a number, got 'fast'; correct the file"):
        parse(["--recipe", str(tmp_path / "own.yaml")])


@pytest.mark.parametrize(
    ("words", "recipe"),
    [
        ((), "digits"),
        (("--train_dir", "x"), "from_scratch"),
        (("--train_dir", "x", "--model_name_or_path", "y"), "finetune"),
        (("--dataset_name", "digits", "--recipe", "digits100"), "digits100"),
    ],
)
def test_the_recipe_that_holds(words, recipe):
    assert parse([*words, "--use_cpu"])[2].recipe == recipe


@pytest.mark.parametrize(
    ("words", "tasks", "strategy"),
    [
        ((), (True, True, False), "epoch"),
        (("--do_eval",), (False, True, False), "epoch"),
        (("--do_train",), (True, False, False), "no"),
        (("--do_train", "--do_eval"), (True, True, False), "epoch"),
        (("--do_predict",), (False, False, True), "no"),
        (("--do_train", "False", "--do_eval"), (False, True, False), "epoch"),
        (("--do_train", "--eval_strategy", "epoch"), (True, False, False), "epoch"),
    ],
)
def test_tasks_are_those_of_transformers_scripts(words, tasks, strategy):
    args = parse([*words, "--use_cpu"])[3]
    assert (args.do_train, args.do_eval, args.do_predict) == tasks
    assert args.eval_strategy == strategy


def test_debug_is_a_switch_and_transformers_argument():
    assert parse(["--debug", "underflow_overflow", "--use_cpu"])[3].debug[0] == "underflow_overflow"
    Debug.on = False
    parse(["--debug", "--use_cpu"])
    assert Debug.on


def test_launcher_and_script_share_no_word():
    own = parser()._option_string_actions
    words = ["--num_processes", "2", "--mix", "cutmix", "--seed", "3", "--config_file=x.yaml", "--mixed-precision", "no", "--bf16"]
    assert divided(words, own) == (
        ["--mix", "cutmix", "--seed", "3", "--bf16"],
        ["--num_processes", "2", "--config_file=x.yaml", "--mixed-precision", "no"],
    )


# -- help -------------------------------------------------------------------------------------------------------------------


def shown(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        parse([*words])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_is_short_grouped_and_holds(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    short = shown(capsys, "--help")
    assert len(short.splitlines()) < 160
    assert max(map(len, short.splitlines())) <= 80
    titles = [line for line in short.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[0] == "mixing:"
    assert short.index("--mix ") < short.index("--model_name_or_path") < short.index("--num_train_epochs")
    every = shown(capsys, "--help-all")
    assert len(every.splitlines()) > 2 * len(short.splitlines())
    for name in ("--mixer_learning_rate", "--fsdp ", "--model_type", "--config_name", "--image_processor_name"):
        assert name in every
        assert name not in short

    def learning_rate(text):
        return text[text.index("--learning_rate") :].partition("(default: ")[2].partition(")")[0]

    assert learning_rate(short) == "0.003"
    assert learning_rate(shown(capsys, "--train_dir", "x", "--help")) == "0.001"
    assert learning_rate(shown(capsys, "--train_dir", "x", "--model_name_or_path", "y", "-h")) == "0.0001"
    assert learning_rate(shown(capsys, "--learning_rate", "7", "--help")) == "7.0"
    # what the command itself shows, before the script is imported
    for words, recipe, rate in ((["train"], "digits", "0.003"), (["pretrain"], "pretrain_digits", "0.06"), (["pretrain", "--train_dir", "x"], None, "5e-05")):  # fmt: skip
        with pytest.raises(SystemExit):
            command.main([*words, "--help"])
        text = capsys.readouterr().out
        assert learning_rate(text) == rate
        assert (f"those of the recipe {recipe}." in text) == (recipe is not None)
        assert "(default" not in text.partition("\nhelp:")[2]


@pytest.mark.parametrize("name", ["evaluate", "benchmark", "visualize", "convert"])
def test_help_of_the_other_commands(name, capsys):
    with pytest.raises(SystemExit) as ended:
        script(name).main(["--help"], f"hf-mixup {name}")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: hf-mixup {name} ")
    for idle in ("--train_crop", "--random_erasing", "--cache_images"):
        assert idle not in text


def test_the_command_itself_is_fast_and_light():
    code = "import sys; from hf_mixup.cli.main import main; main(['--help']); print([m for m in ('torch', 'transformers', 'accelerate') if m in sys.modules])"
    start = time.process_time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"
    assert time.process_time() - start < 1
    for name in (*command.SCRIPT_OF, *command.OTHERS):
        assert f"\n  {name} " in done.stdout


def test_methods_and_environment(capsys):
    from hf_mixup import METHODS

    assert command.main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(METHODS)
    assert max(map(len, lines)) <= 80
    assert command.main(["env"]) == 0
    text = capsys.readouterr().out
    for name in ("hf_mixup", "Python", "torch ", "transformers", "accelerate", "timm", "devices"):
        assert f"\n{name}" in f"\n{text}"


# -- refusals ---------------------------------------------------------------------------------------------------------------

# what was typed, and what the sentence must say
MISTAKES = [
    (("--mix", "cutmx"), "did you mean 'cutmix'"),
    (("--mix", "CutMix"), "did you mean 'cutmix'"),
    (("--mix", "mixup,cutmix"), "separated by spaces, got 'mixup,cutmix'; write --mix mixup cutmix"),
    (("--mix",), "--mix must be followed by a value"),
    (("--alpha", "auto"), "--alpha must be a number, got 'auto'"),
    (("--alpha", "-1"), "alpha"),
    (("--mix", "mixup", "cutmix", "--alpha", "1", "2", "3"), "alpha"),
    (("--mix_prob", "0.5", "0.6"), "mix_prob must sum to 1"),
    (("--mix_rate", "50"), "mix_rate"),
    (("--mix_args", '{"cutmix": {"alhpa": 1}}'), "did you mean 'alpha'"),
    (("--mix_args", "cutmix"), "mix_args must be JSON"),
    (("--mix", "vanilla", "--mix_args", '{"cutmix": {"alpha": 1}}'), "mix_args"),
    (("--loss", "crossentrpy"), "did you mean 'crossentropy'"),
    (("--mode", "bacth"), "did you mean 'batch'"),
    (("--epochs", "2"), "did you mean '--num_train_epochs'"),
    (("--lr", "1"), "did you mean '--learning_rate'"),
    (("--batch-size", "1"), "did you mean '--per_device_train_batch_size'"),
    (("--mixup_alpha", "1"), "every argument must be known, got '--mixup_alpha'"),
    (("--mixx", "cutmix"), "did you mean '--mix'"),
    (("cutmix",), "every argument must start with --, got 'cutmix'"),
    (("--optim", "adam"), "--optim must be a known choice, got 'adam'"),
    (("--seed", "one"), "--seed must be a whole number, got 'one'"),
    (("--bf16", "maybe"), "--bf16 must be true or false, got 'maybe'"),
    (("--learning_rate",), "--learning_rate must be followed by a value"),
    (("--num_train_epochs", "many"), "--num_train_epochs must be a number, got 'many'"),
    (("--recipe", "digit"), "did you mean 'digits'"),
    (("--recipe", "none.yaml"), "recipe must be a YAML file that exists"),
    (("--dataset_name", "/no/such/folder"), "dataset_name must be"),
    (("--train_dir", "/no/such/folder"), "train_dir"),
    (("--dataset_name", "digits", "--image_column_name", "imag"), "did you mean 'image'"),
    (("--dataset_name", "digits", "--label_column_name", "labl"), "did you mean 'label'"),
    (("--architecture", "resnet81"), "architecture must be a name of timm or of ours"),
    (("--architecture", "resnet18", "--model_name_or_path", "x"), "a run must have one network"),
    (("--model_name_or_path", "/no/such/checkpoint"), "/no/such/checkpoint"),
    (("--model_type", "vti"), "model_type must be"),
    (("--mix", "transmix", "--architecture", "cifar_resnet20"), "attention"),
    (("--per_device_train_batch_size", "1"), "at least 2 images"),
    (("--label_smoothing_factor", "0.1"), "label_smoothing_factor must be 0"),
    (("--warmup_epochs", "1", "--warmup_steps", "5"), "warmup_epochs"),
    (("--resume_from_checkpoint", "True"), "expected to hold a complete checkpoint, got none"),
    (("--load_best_model_at_end", "--save_strategy", "steps"), "load_best_model_at_end"),
    (("--hub_tokn", SECRET), "did you mean '--hub_token'"),
    ((f"--tokn={SECRET}",), "did you mean"),
    (("--seed", SECRET), f"got '{HIDDEN}'"),
    (("\u2014mix", "cutmix"), "did you mean '--mix'"),
    (("--mix", "cutmix", "\u2013alpha", "1"), "every argument must start with --, got '\u2013alpha'; did you mean '--alpha'"),
    (("mix=cutmix",), "every argument must start with --, got 'mix'; did you mean '--mix'"),
    (("--mix=cutmix", "mixup"), "got 'mixup'; write --mix without = and its values with spaces between them"),
    (("--seed", "1", "2"), "got '2'; --seed takes one value"),
    (("--mix", "cutmix mixup"), "write cutmix mixup instead"),
    (("--mix", "[cutmix]"), "write cutmix instead"),
    (("--mix", "cutmix+mixup"), "write cutmix mixup instead"),
    (("--alpha", "20%"), "got '20%'; write --alpha 0.2"),
    (("--alpha", "0.2,0.8"), "write --alpha 0.2 0.8"),
    (("--alpha", "[0.2]"), "write --alpha 0.2"),
    (("--learning_rate", "0,001"), "write --learning_rate 0.001"),
    (("--learning_rate", "nan"), "--learning_rate must be a finite number, got nan"),
    (("--learning_rate", "-1"), "learning_rate must be a number from 0 to"),
    (("--max_train_samples", "1e3"), "write --max_train_samples 1000"),
    (("--mix_rate", "50%"), "got '50%' (Extra data: line 1 column 3 (char 2)); write 0.5 instead"),
    (("--mix_args", '{"cutmix": 1}'), "mix_args of 'cutmix' must map names to values, got 1; write it as"),
    (("--mix_args", '{"cutmix": {"alpha": 1}, "cutmix": {"alpha": 2}}'), "mix_args must name everything once, got 'cutmix' several times"),
    (("--seed", "-1"), "seed must be a whole number of at least 0, got -1"),
    (("--per_device_train_batch_size", "0"), "per_device_train_batch_size must be a whole number of at least 1, got 0"),
    (("--per_device_eval_batch_size", "-1"), "per_device_eval_batch_size must be a whole number of at least 1, got -1"),
    (("--gradient_accumulation_steps", "0"), "gradient_accumulation_steps must be a whole number of at least 1, got 0"),
    (("--num_train_epochs", "-3"), "num_train_epochs must be a number from 0 to"),
    (("--weight_decay", "-0.1"), "weight_decay must be a number from 0 to"),
    (("--logging_steps", "0"), "logging_steps must be a number from"),
    (("--num_proceses", "2"), "every argument must be known, got '--num_proceses'"),
    (("--label_names", "genus"), "every argument must be known, got '--label_names'; did you mean '--label_column_name'"),
    (("--train_dir", ""), "train_dir must not be empty, got ''"),
    (("--lr_scheduler_kwargs", "x"), "lr_scheduler_kwargs must be JSON"),
    (("--accelerator_config", "no.json"), "accelerator_config must be JSON, or a file of it that exists, got 'no.json'"),
    (("--report_to", "swanlab"), "report_to must name packages that are installed, got 'swanlab'"),
    (("--loss", '{"name": "focal", "name": "bce"}'), "loss must name everything once, got 'name' several times"),
    (("--do_train", "False", "--do_eval", "False"), "a run must train, evaluate or predict"),
    (("--do_predict", "--resume_from_checkpoint", "True"), "resume_from_checkpoint is for training"),
    # what transformers notices late, tells in its own way, or not at all
    (("--no_weight_decay", "["), "no_weight_decay must hold regular expressions, got '['"),
    (("--metric_for_best_model", "acuracy"), "metric_for_best_model must be a known name, got 'acuracy'; did you mean 'accuracy'"),
    (("--optim_args", "foo"), "optim_args must be name=value, with commas between several, got 'foo'; write it as momentum=0.9"),
    (("--optim_args", "lr=0.1"), "optim_args must hold options that adamw_torch has and transformers passes on, got 'lr=0.1', which has no"),
    (("--optim", "sgd", "--optim_args", "momentum=0.9,momentun=0.5"), "got 'momentun=0.5', which has no effect"),
    (("--optim", "sgd", "--optim_args", "momentum=abc"), "optim and optim_args must make an optimizer, got 'sgd' and 'momentum=abc' (could"),
    (("--optim", "sgd", "--optim_args", "nesterov=True"), "(Nesterov momentum requires a momentum and zero dampening); correct optim_args"),
    (("--lr_scheduler_type", "warmup_stable_decay"), "must make a schedule, got 'warmup_stable_decay' and"),
    (("--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"powr": 2}'), "unexpected keyword argument 'powr'); correct lr_scheduler"),
    (("--accelerator_config", '{"split_batchs": true}'), "got an error of its checks (AcceleratorConfig.__init__() got an unexpected keyword"),
    (("--accelerator_config", '{"split'), "accelerator_config must be JSON such as"),
    (("--fsdp", "full_shrad"), "Unknown `fsdp` option: full_shrad"),
    (("--debug", "foo"), "foo is not a valid DebugOption, please select one of"),
    (("--include_for_metrics", "inputss"), "include_for_metrics must be a known name, got 'inputss'; did you mean 'inputs'?"),
    (("--save_strategy", "best"), "save_strategy 'best' needs metric_for_best_model, got none"),
    (("--seed", "4294967296"), "seed must be a number from 0 to 4294967295, got 4294967296"),
    (("--data_seed", "9" * 20), "data_seed must be a number from 0 to"),
    (("--torch_empty_cache_steps", "0"), "torch_empty_cache_steps must be a whole number of at least 1, got 0"),
    (("--image_size", "1"), "image_size must be a size that has a neighbourhood, of at least 2 pixels, got 1"),
    # what had no effect
    (("--architecture", "resnet18", "--config_name", "x"), "a run must have one network, got architecture and config_name"),
    (("--model_type", "vit", "--drop_path", "0.1"), "drop_path is for a network from scratch that architecture names, got 0.1 with model_type"),
    (("--model_name_or_path", "x", "--drop_path", "0.1"), "got 0.1 with model_name_or_path; leave it out"),
    (("--crop_scale", "0.5", "1"), "crop_scale is for train_crop 'resized', got [0.5, 1.0] with 'pad'"),
    (("--recipe", "imagenet_deit_s", "--mix", "cutmix", "mixup"), "has arguments for them, mixup+cutmix, got cutmix+mixup; swap them"),
    (("--do_eval",), "a run without training needs a trained network, got --do_eval without one; pass --model_name_or_path"),
    (("--do_train", "False", "--do_predict"), "a run without training needs a trained network, got --do_predict without one"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_a_mistake_is_one_sentence_at_the_end_and_leaves_nothing(words, message, capsys, tmp_path):
    folder = tmp_path / "runs" / "out"
    status, text = told(capsys, script("train").main, "--output_dir", folder, *words)
    last = text.strip().splitlines()[-1]
    assert status == 2, text
    assert last.startswith("hf-mixup: error: "), text
    assert message in last
    assert text.count("error:") == 1
    assert "Traceback" not in text
    assert SECRET not in text
    assert not (tmp_path / "runs").exists()


RECIPES = [
    ("learning_rate: [0.1]", "must set learning_rate to a number, got [0.1]"),
    ("learning_rate: 50%", "must set learning_rate to a number, got '50%'; write learning_rate: 0.5"),
    ("learning_rate: yes", "must set learning_rate to a number, got True"),
    ("learning_rate:", "must set learning_rate to a number, got None"),
    ("seed: 1.5", "must set seed to a whole number, got 1.5"),
    ("dataset_name: [a, b]", "must set dataset_name to a text, got ['a', 'b']"),
    ("bf16: 3", "must set bf16 to true or false, got 3"),
    ("alpha: [a]", "must set alpha to a number, got 'a'"),
    ("lr_scheduler_type: cosin", "must set lr_scheduler_type to a known choice, got 'cosin'; did you mean 'cosine'"),
    ("mix: [3]", "must list names of methods under 'mix', got [3]"),
    ("loss: [a]", "loss must be a name, a dictionary or a Loss, got ['a']"),
    ("mix: mixup, cutmix", "got 'mixup, cutmix'; write mixup cutmix instead"),
    ("seed: 1\nseed: 2", "must be plain YAML, got 'seed' several times in"),
    ("\0", "must be plain YAML"),
]


@pytest.mark.parametrize(("text", "message"), RECIPES)
def test_a_mistake_in_a_recipe_is_one_sentence(text, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(f"architecture: cifar_resnet20\n{text}\n")
    status, shown = told(capsys, script("train").main, "--recipe", "own.yaml")
    assert status == 2, shown
    assert message in shown.strip().splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["own.yaml"]


def test_what_a_recipe_may_leave_to_be_understood(tmp_path):
    """One value for a list, a number for a text, `no` without quotes, schedules and dictionaries as YAML."""
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "dataset_name: digits\nmix: cutmix\nalpha: 0.2\noutput_dir: 7\nsave_strategy: no\nlearning_rate: 1e-3\n"
        "mix_rate: [[0, 1], [5, 0]]\nmix_args: {cutmix: {mode: pair}}\noptim: lamb\nmin_lr: null\n"
    )
    args = parse(["--recipe", str(recipe), "--use_cpu"])[3]
    assert (args.mix, args.alpha, args.output_dir, args.save_strategy, args.learning_rate) == (["cutmix"], [0.2], "7", "no", 0.001)
    assert (args.mix_rate, args.mix_args, args.optim) == ([[0, 1], [5, 0]], {"cutmix": {"mode": "pair"}}, "lamb")
    assert parse(["--optim", "lamb", "--use_cpu"])[3].optim == "lamb"


def test_an_argument_that_is_given_twice_is_told(caplog, monkeypatch):
    """So that a command can be called with changes, and nobody waits for methods that were replaced."""
    monkeypatch.setattr("hf_mixup.cli.parser._told", set())
    args = parse(["--mix", "cutmix", "--seed=1", "--mix", "mixup", "--seed", "1", "--use_cpu"])[3]
    assert args.mix == ["mixup"]
    assert "--mix is given several times; the last one counts" in caplog.text


def test_the_words_after_the_dashes_replace_those_of_a_cell(capsys, tmp_path, monkeypatch):
    """They are typed once, so that nothing is told; `--warmup-steps` is `--warmup_steps`."""
    from hf_mixup.report.sweep import with_changes

    cell = ["--recipe", "a", "--mix", "b", "c", "--num_train_epochs", "5", "--seed=1", "--warmup_steps", "3"]
    more = ["--num_train_epochs=2", "--warmup-steps", "1"]
    assert with_changes(cell, more) == ["--recipe", "a", "--mix", "b", "c", "--seed=1", *more]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_mixup.cli.parser._told", set())
    words = ("--mix", "cutmix", "--seeds", "1", "--dry_run", "run.sh", "--", "--num_train_epochs", "2")
    status, text = told(capsys, script("benchmark").main, *words)
    assert (status, text) == (0, "")
    assert (
        (tmp_path / "run.sh").read_text().count("--num_train_epochs 2") == (tmp_path / "run.sh").read_text().count("--num_train_epochs") > 0
    )


@pytest.mark.parametrize(("name", "recipe"), [("train", "cifar100_basic"), ("pretrain", "pretrain_digits")])
def test_options_of_a_recipe_stay_with_its_optimizer(name, recipe):
    """A typed optimizer does not get those of the recipe's; options that are typed too are taken."""
    parse = {"train": train, "pretrain": pretrain}[name].parse
    assert parse(["--recipe", recipe, "--use_cpu"])[3].optim_args == "momentum=0.9"
    assert parse(["--recipe", recipe, "--use_cpu", "--optim", "adamw_torch"])[3].optim_args is None
    assert parse(["--recipe", recipe, "--use_cpu", "--optim", "rmsprop", "--optim_args", "alpha=0.9"])[3].optim_args == "alpha=0.9"


def test_typed_values_replace_those_of_the_methods_in_a_recipe():
    args = train.parse(["--recipe", "imagenet_deit_s", "--mix", "mixup", "tokenmix", "--use_cpu", "--alpha", "0.3"])[3]
    assert args.method_choice().methods[0].sample.alpha == 0.3
    args = train.parse(["--recipe", "imagenet_deit_s", "--mix", "mixup", "tokenmix", "--use_cpu"])[3]
    assert args.method_choice().methods[0].sample.alpha == 0.8


def test_a_typed_network_has_no_arguments_of_the_recipes_network(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("architecture: DeiT-S\ndrop_path: 0.1\nfor_backbone: {DeiT-S: {learning_rate: 0.5}}\n")
    for words in (["--model_type", "vit"], ["--config_name", "x"], ["--model_name_or_path", "x"]):
        for script_of in (train, pretrain):
            model, _, _, args = script_of.parse(["--recipe", str(own), "--use_cpu", *words])
            assert (model.architecture, model.drop_path, args.learning_rate) == (None, 0.0, 5e-5), words
    model, _, _, args = train.parse(["--recipe", str(own), "--use_cpu"])
    assert (model.drop_path, args.learning_rate) == (0.1, 0.5)


def test_a_recipe_of_a_pre_training_names_its_methods(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("mix: [unmix]\nfor_method: {unmix: {learning_rate: 0.5}, imix: {learning_rate: 0.25}}\n")
    assert pretrain.parse(["--recipe", str(own), "--use_cpu"])[3].learning_rate == 0.5
    assert pretrain.parse(["--recipe", str(own), "--use_cpu", "--mix", "imix"])[3].learning_rate == 0.25
    own.write_text("for_method: {imix: {learning_rate: 0.25}}\n")
    assert pretrain.parse(["--recipe", str(own), "--use_cpu"])[3].learning_rate == 0.25


def test_not_to_resume_is_no_leave_to_write_into_a_folder_in_use(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for name, word in (("train", "False"), ("pretrain", "none")):
        status, text = told(capsys, script(name).main, "--output_dir", tmp_path, "--resume_from_checkpoint", word)
        assert (status, "output_dir must be new or empty" in text) == (2, True), text


def test_the_command_of_a_run_has_its_processes(monkeypatch):
    for name in ("train", "pretrain"):
        seen = []
        module = script(name)
        monkeypatch.setattr(module, "work", lambda *given, seen=seen: seen.append(given[-1]))
        monkeypatch.setattr(MixupTrainingArguments, "world_size", 2)
        module.main(["--use_cpu", "--output_dir", "runs/two", "--hub_token", "hf_xyz"])
        assert seen == [f"hf-mixup {name} --num_processes 2 --use_cpu --output_dir runs/two"]


def test_debug_shows_where(capsys):
    with pytest.raises(ValueError, match="cutmx"):
        run(script("train").main, ["--debug", "--mix", "cutmx"], "hf-mixup")


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("evaluate", (), "checkpoint must be given"),
        ("evaluate", ("x", "--protocols", "fgms"), "did you mean 'fgsm'"),
        ("evaluate", ("/no/such",), "/no/such"),
        ("evaluate", ("x", "--epps", "3"), "did you mean '--eps'"),
        ("benchmark", ("--seeds", "0"), "seeds must be a whole number of at least 1, got 0"),
        ("benchmark", ("--", "--learning_rat", "9"), "did you mean '--learning_rate'"),
        ("benchmark", ("--summarize", "/no/such"), "train_log.jsonl"),
        ("visualize", ("--activations",), "got no checkpoint; pass --checkpoint"),
        ("visualize", ("--images", "/no/a.png", "/no/b.png"), "images must be files that can be read"),
        ("evaluate", ("",), "checkpoint must not be empty, got ''"),
        ("evaluate", ("x", "--eps", "8%"), "got '8%'; write --eps 0.08"),
        ("evaluate", ("x", "--protocols", "fgsm,pgd"), "write fgsm pgd instead"),
        ("evaluate", ("x", "--seed", "-1"), "seed must be a whole number of at least 0, got -1"),
        ("benchmark", ("--seeds", "1", "2", "3"), "got '2'; --seeds takes one value"),
        ("benchmark", ("--mix", "cutmx"), "did you mean 'cutmix'"),
        ("benchmark", ("--alphas", "-1"), "alphas must be a positive, finite number, got -1"),
        ("benchmark", ("--epochs", "0"), "epochs must be a whole number of at least 1, got 0"),
        ("benchmark", ("--measure", "best"), "--measure is for --summarize, got 'best' without it"),
        ("benchmark", ("--", "--seed", "3"), "the sweep sets --seed itself, got 3 after --; give --seeds before it"),
        ("benchmark", ("--", "--num_train_epochs", "-1"), "num_train_epochs must be a number from 0"),
        (
            "benchmark",
            ("--", "--architecture", "resnet18"),
            "the sweep sets --architecture itself, got 'resnet18' after --; give --backbones",
        ),
        ("benchmark", ("--", "--do_eval"), "every run of a sweep trains, got '--do_eval' after --"),
        ("benchmark", ("--", "--optim_args", "foo"), "optim_args must be name=value"),
        ("visualize", ("--mix", "wordmixup"), "a picture needs a method that mixes images, videos or sounds, got 'wordmixup'"),
        ("visualize", ("--mix", "cutmix", "tmix"), "got 'tmix', which mixes words or hidden states of the network; choose another"),
        ("visualize", ("--inputs", "videos", "--mix", "moex"), "got 'moex', which mixes words or hidden states"),
        ("visualize", ("--count", "101"), "count must be a number from 1 to 100, got 101"),
        ("visualize", ("--output", "a.pgn"), "the ending of output must be a known name, got '.pgn'; did you mean '.png'"),
        ("benchmark", ("--into", "none.md"), "into must be a file with one <!-- digits100 -->"),
        ("visualize", ("--count", "0"), "count must be a whole number of at least 1, got 0"),
        ("visualize", ("--all", "--alpha", "1"), "--alpha has no effect with --all, got both"),
        (
            "convert",
            ("a.pth", "out", "--architecture", "resnet18", "--image_size", "-1"),
            "image_size must be a whole number of at least 1",
        ),
        ("pretrain", ("--base", "moco", "--do_eval"), "every argument must be known, got '--do_eval'"),
        ("pretrain", ("--learning_rate", "-1"), "learning_rate must be a number from 0"),
        ("convert", ("a.pth", "out"), "--architecture must be given"),
        ("convert", ("/no/a.pth", "out", "--architecture", "resnet18"), "/no/a.pth"),
    ],
)
def test_mistakes_in_the_other_commands(name, words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, text = told(capsys, script(name).main, *words, prog=f"hf-mixup {name}")
    assert status == 2, text
    assert message in text.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_unknown_commands(capsys):
    assert command.main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err
    assert command.main(["env", "please"]) == 2


@pytest.mark.slow
def test_refusals_of_several_processes(tmp_path):
    """By every process at once, and told once."""
    words = [sys.executable, "-m", "hf_mixup", "train", "--num_processes", "2", "--mix", "cutmx", "--output_dir", tmp_path / "out"]
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("hf-mixup: error: method must be a known name, got 'cutmx'")
    assert done.stderr.count("error:") == 1
    assert "not passed to" not in done.stderr
    assert not (tmp_path / "out").exists()


# -- secrets ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("--hub_token", "my-secret"),
        ("--hub-token", "my-secret"),
        ("--token=my-secret",),
        ("--hub_token", "my-secret", "--license", "by my-secret"),
        ("--mix_args", json.dumps({"cutmix": {"teacher": SECRET}})),
    ],
)
def test_no_form_of_a_token_is_published(words):
    parser().typed(list(words))
    text = " ".join(without_secrets(["--mix", "cutmix", *words, "--bf16"]))
    assert "my-secret" not in text
    assert SECRET not in text
    assert text.startswith("--mix cutmix")
    assert text.endswith("--bf16")


def test_what_is_no_token_stays(monkeypatch):
    assert redacted("hf_mixup/report and hf_hub_download") == "hf_mixup/report and hf_hub_download"
    monkeypatch.setenv("HF_TOKEN", "of-the-environment")
    assert redacted("x of-the-environment y") == f"x {HIDDEN} y"


def test_a_run_leaves_no_token(tmp_path, capsys):
    """Typed as a token, and by mistake in the licence."""
    words = ("--output_dir", tmp_path / "out", *SMALL, "--hub_token", "my-secret-2", "--license", f"my-secret-2 {SECRET}")
    status, text = told(capsys, script("train").main, *words)
    assert status == 0, text
    assert (tmp_path / "out/README.md").is_file()
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"my-secret-2" not in data, path
            assert SECRET.encode() not in data, path
    assert "my-secret-2" not in text


def test_help_imports_no_networks():
    """The help of training is shown before what takes seconds to import: models, the Trainer, datasets, plots, peft."""
    code = "import sys\nfrom hf_mixup.cli.main import main\ntry: main()\nfinally: print(sorted(name for name, module in sys.modules.items() if module))"
    shown = subprocess.run([sys.executable, "-c", code, "train", "--help"], capture_output=True, text=True, check=True).stdout
    help_text, _, modules = shown.rpartition("\n[")
    assert "--mix" in help_text
    heavy = (
        "transformers.trainer'",
        "transformers.modeling_utils'",
        "torch._dynamo'",
        "'datasets'",
        "'timm'",
        "'matplotlib'",
        "'sklearn'",
        "'evaluate'",
        "'peft'",
    )
    assert [name for name in heavy if name in modules] == []


@pytest.mark.parametrize("name", command.LAUNCHED)
def test_the_command_itself_reaches_the_script(name, capsys):
    """`hf-mixup NAME ...`, before its processes start: the help, and a refusal."""
    for words, status, message in ((["--help"], 0, "usage: hf-mixup"), (["--sed", "1"], 2, "got '--sed'; did you mean '--seed'")):
        with pytest.raises(SystemExit) as end:
            sys.exit(command.main([name, *words]))
        shown = capsys.readouterr()
        assert (end.value.code or 0) == status
        assert message in shown.out + shown.err
