"""The Hub, with the real client against a Hub on the loopback: pushing, loading by repository id, and what goes wrong."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

import hf_mixup.networks.backbones  # noqa: F401
from hub_server import READ, USER, WRITE, LoopbackHub
from run_script import ROOT, forked

SCRIPT = ROOT / "training_scripts/run_mixup.py"
RUN = ("--max_train_samples", "128", "--max_eval_samples", "60", "--num_train_epochs", "2", "--mix", "automix", "--push_to_hub")


@pytest.fixture
def hub():
    with LoopbackHub() as server:
        yield server


def process(hub, home, *words, token=WRITE, check=True, **environment) -> subprocess.CompletedProcess:
    """A process of its own: the client reads its settings when it is imported."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    settings |= {"HF_TOKEN": token} if token else {}
    settings |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    words, environment = list(map(str, words)), {**clean, **settings, **environment}
    if words[0] == sys.executable:
        done = forked(words, 280, environment, home, of_torch_alone=True)
    else:
        done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False, cwd=home, env=environment)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def python(hub, home, code, **environment):
    """The JSON that a program prints last."""
    return json.loads(process(hub, home, sys.executable, "-c", code, **environment).stdout.strip().splitlines()[-1])


LOAD = """
import json, sys, torch
import hf_mixup.networks.backbones
from hf_mixup import Method, MixupModel
from hf_mixup.mixers import MixBlock
from transformers import AutoModelForImageClassification, pipeline
from huggingface_hub import ModelCard
repo = "tester/automix-run"
x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
logits = lambda model: model.eval()(pixel_values=x).logits.tolist()
run = MixupModel.from_pretrained(repo)
own, alone = run.states["automix"].mixer.state_dict(), MixBlock.from_pretrained(repo).state_dict()
from hf_mixup.data.sources import digits
def checked(card):
    card.validate()  # by the Hub
    return card.data.to_dict()
print(json.dumps({
    "auto": logits(AutoModelForImageClassification.from_pretrained(repo)),
    "run": logits(run),
    "label": pipeline("image-classification", repo)(digits()["test"][0]["image"])[0]["label"],
    "method": Method.from_pretrained(repo).name,
    "mixer": own.keys() == alone.keys() and all(torch.equal(own[name], alone[name]) for name in own),
    "card": checked(ModelCard.load(repo)),
}))
"""

GO_ON = """
import json
from small import Images, arguments
from hf_mixup import MixupModel, MixupTrainer, get_method
repo = "tester/automix-run"
model = MixupModel.from_pretrained(repo)
before = model.backbone.classifier.weight.clone()
MixupTrainer(model, arguments("go-on", max_steps=2), train_dataset=Images(16, 32, 10)).train()
moved = (model.backbone.classifier.weight - before).abs().max().item()
from small import resnet
from hf_mixup.networks.backbones import from_scratch
other = MixupModel(from_scratch("cifar_resnet20", 4, 32), "automix", mix_args={"automix": {"mixer": repo}})
reused = other.states["automix"].mixer
print(json.dumps({"moved": moved, "frozen": not other.states["automix"].mixer_learns,
    "same": (reused.value.weight - model.states["automix"].mixer.value.weight).abs().max().item()}))
"""


def test_train_push_wipe_load(hub, tmp_path):
    """Digits to the Hub and back, in a new process: the same logits; trained on; the mixer reused; from the cache when offline."""
    out = tmp_path / "automix-run"
    words = (*RUN, "--hub_strategy", "checkpoint", "--hub_private_repo", "True", "--hub_token", WRITE)
    process(hub, tmp_path, sys.executable, SCRIPT, "--output_dir", out, *words)
    measured = json.loads((out / "all_results.json").read_text())
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = AutoModelForImageClassification.from_pretrained(out).eval()(pixel_values=x).logits
    shutil.rmtree(out)

    files = hub.files(f"{USER}/automix-run")
    assert {
        "README.md", "all_results.json", "config.json", "gallery.png", "mixup_config.json", "model.safetensors", "train_log.jsonl",
        "training_curve.png", "mixup/state.safetensors", "mixup/mixblock/model.safetensors", "preprocessor_config.json",
        "last-checkpoint/optimizer.pt", "last-checkpoint/mixup/state.safetensors",
    } <= set(files)  # fmt: skip
    assert not [name for name in files if name.startswith(("_", "checkpoint-")) or name.endswith(".tmp")]
    # neither the card nor a pickle of arguments gives the token away
    assert not [name for name, data in files.items() if WRITE.encode() in data]
    assert hub.repositories[f"{USER}/automix-run"].private

    loaded = python(hub, tmp_path, LOAD)
    assert loaded["auto"] == loaded["run"] == expected.tolist()
    assert (loaded["method"], loaded["mixer"], len(loaded["label"])) == ("automix", True, 1)
    metrics = {metric["type"]: metric["value"] for metric in loaded["card"]["model-index"][0]["results"][0]["metrics"]}
    assert metrics["accuracy"] == measured["eval_top1"]
    assert metrics["top_5_accuracy"] == measured["eval_top5"]
    assert "base_model" not in loaded["card"]

    went_on = python(hub, tmp_path, GO_ON)
    assert went_on["moved"] > 0
    assert went_on["frozen"]
    hub.stop()
    offline = LOAD.replace('"card": checked(ModelCard.load(repo)),', "")
    assert python(hub, tmp_path, offline, HF_HUB_OFFLINE="1")["auto"] == expected.tolist()


STRATEGIES = """
import json
from small import resnet, trainer
for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
    run = trainer(strategy, resnet(), push_to_hub=True, hub_strategy=strategy, hub_revision="dev", save_strategy="steps", save_steps=4,
                  mix=["automix"])
    run.train()
    run.push_to_hub()
print("{}")
"""


def test_every_strategy_pushes_to_its_revision(hub, tmp_path):
    python(hub, tmp_path, STRATEGIES)
    names = {strategy: set(hub.files(f"{USER}/{strategy}", "dev")) for strategy in ("end", "every_save", "checkpoint", "all_checkpoints")}
    for name, files in names.items():
        assert {"README.md", "model.safetensors", "mixup_config.json", "mixup_run.json", "train_log.jsonl"} <= files, name
        assert not hub.files(f"{USER}/{name}"), "nothing may go to main"
    messages = {name: [message for _, message in hub.repositories[f"{USER}/{name}"].log[1:]] for name in names}
    assert messages["end"] == ["End of training"]
    assert messages["every_save"][0] == "Training in progress, step 4"
    for repository in (hub.repositories[f"{USER}/{name}"] for name in ("every_save", "checkpoint", "all_checkpoints")):
        first = list(repository.commits.values())[1]  # a run that is killed leaves a whole model there
        assert {"model.safetensors", "mixup/state.safetensors", "mixup_config.json", "train_log.jsonl"} <= set(first)
    assert "last-checkpoint/trainer_state.json" in names["checkpoint"]
    assert {"checkpoint-4/trainer_state.json", "checkpoint-8/trainer_state.json"} <= names["all_checkpoints"]


TOKENS = """
import json, os
from small import trainer, resnet
said = {}
for name, changes in TRIALS.items():
    try:
        trainer("out-" + name, resnet(), push_to_hub=True, **changes)
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""


def test_row_39_the_token_is_tried_before_training(hub, tmp_path):
    trials = {
        "none": {},
        "wrong": {"hub_token": "hf_wrong"},
        "reader": {"hub_token": READ},
        "foreign": {"hub_token": WRITE, "hub_model_id": "a b/c"},
    }
    said = python(hub, tmp_path, f"TRIALS = {trials!r}" + TOKENS, token=None)
    assert said["none"].startswith("ValueError: push_to_hub needs a token of the Hub, got none; log in")
    assert said["wrong"].startswith("ValueError: push_to_hub needs a token that the Hub accepts, got 'Invalid user token'")
    assert said["reader"].startswith("ValueError: push_to_hub needs a token with write access, got one of tester with read access")
    assert "\n" not in "".join(said.values())
    hub.stop()
    said = python(hub, tmp_path, f"TRIALS = {trials!r}" + TOKENS, token=WRITE)
    assert said["none"].startswith("ValueError: push_to_hub must be able to reach the Hub, got")


def test_row_40_nothing_is_lost_when_the_push_fails(hub, tmp_path):
    """The server dies in the middle of the push; the printed command brings everything when it is back."""
    out = tmp_path / "run"
    hub.die_at = "POST /api/models/tester/run/commit"
    quick = f"import hf_mixup.training.hub as h, sys, runpy; h.WAITS = (0, 0); sys.argv = ['run_mixup.py', *sys.argv[1:]]; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    words = [sys.executable, "-c", quick, "--output_dir", out, *RUN, "--hub_strategy", "end"]
    done = process(hub, tmp_path, *words, check=False)
    assert done.returncode not in (0, None)
    assert not hub.running
    assert hub.objects, "it was to die after the weights had come"
    assert (out / "all_results.json").is_file()
    assert (out / "README.md").is_file()
    assert "trying again" in done.stderr
    message, command = done.stderr.strip().splitlines()[-2:]
    assert f"the push to {USER}/run must reach the Hub" in message
    hub.start()
    process(hub, tmp_path, *shlex.split(command))
    files = hub.files(f"{USER}/run")
    assert files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert files["mixup/state.safetensors"] == (out / "mixup/state.safetensors").read_bytes()
    assert not [name for name in files if name.startswith("checkpoint-")]


RETRY = """
import json, hf_mixup.training.hub as h
from pathlib import Path
h.WAITS = (0, 0)
Path("folder").mkdir(); Path("folder/README.md").write_text("---\\nlicense: mit\\n---\\n")
from huggingface_hub import create_repo
create_repo("retry")
h.push_folder("tester/retry", "folder", "twice")
print("{}")
"""


def test_a_push_is_tried_again(hub, tmp_path):
    hub.refuse = {"/commit/": [500, 1]}
    python(hub, tmp_path, RETRY)
    assert "README.md" in hub.files(f"{USER}/retry")


ERRORS = """
import json
from hf_mixup import Method, MixupModel
from hf_mixup.networks.backbones import load_classifier
from hf_mixup.data.processor import ImageFormat
said = {}
def tell(name, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
for loader in (MixupModel.from_pretrained, load_classifier):
    name = loader.__qualname__.split(".")[0]
    tell(name + " missing", loader, "tester/missing")
    tell(name + " revision", loader, "tester/good", revision="v9")
    tell(name + " pickle", loader, "tester/pickle")
    tell(name + " torn", loader, "tester/torn")
    tell(name + " token", loader, "tester/good", token="hf_wrong")
    tell(name + " name", loader, "no such/thing/at all")
for name, repo, hub in (("missing", "missing", {}), ("revision", "good", {"revision": "v9"}), ("token", "good", {"token": "hf_wrong"})):
    tell("ImageFormat " + name, ImageFormat.of_checkpoint, "tester/" + repo, **hub)
tell("ImageFormat none", ImageFormat.of_checkpoint, "tester/good")
tell("Method missing", Method.from_pretrained, "tester/missing")
tell("Method foreign", Method.from_pretrained, "tester/foreign")
print(json.dumps(said))
"""


def test_one_sentence_for_what_cannot_be_loaded(hub, tmp_path):
    from hf_mixup import MixupModel
    from small import resnet

    MixupModel(resnet(), "cutmix").save_pretrained(tmp_path / "good")
    good = {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()}
    weights = good["model.safetensors"]
    hub.add("tester/good", good)
    hub.add("tester/torn", {**good, "model.safetensors": weights[: len(weights) // 2]})
    torch.save({}, tmp_path / "pickle.bin")
    pickled = {name: data for name, data in good.items() if name != "model.safetensors"}
    hub.add("tester/pickle", {**pickled, "pytorch_model.bin": (tmp_path / "pickle.bin").read_bytes()})
    hub.add("tester/foreign", {"config.json": good["config.json"]})
    said = python(hub, tmp_path, ERRORS)
    expected = {
        "missing": "a checkpoint must be a folder, or a repository of the Hub that you may read, got 'tester/missing'",
        "revision": "revision must be a branch, tag or commit of tester/good, got 'v9'",
        "pickle": "tester/pickle must hold its weights as safetensors, got none; pickled weights can run code",
        "torn": "the weights of tester/torn must be whole safetensors files, got an incomplete or corrupted one",
        "token": "the Hub must know your token, got one that it refuses for tester/good",
        "name": "a checkpoint must be a folder, or a repository of the Hub that you may read, got 'no such/thing/at all'",
    }
    for loader in ("MixupModel", "load_classifier"):
        for name, sentence in expected.items():
            assert said[f"{loader} {name}"].startswith(f"ValueError: {sentence}"), (loader, name, said)
    for name in ("missing", "revision", "token"):
        assert said[f"ImageFormat {name}"].startswith(f"ValueError: {expected[name]}"), (name, said)
    assert said["ImageFormat none"].startswith("ValueError: tester/good must hold an image processor, got no readable")
    assert said["Method missing"].startswith(f"ValueError: {expected['missing']}")
    assert said["Method foreign"].startswith("ValueError: tester/foreign must be a checkpoint, got a repository without one of its files")
    assert not [message for message in said.values() if "\n" in message]


TIMM = """
import json, timm, torch
from hf_mixup import MixupModel
from hf_mixup.networks.backbones import from_scratch, load_classifier, load_strictly
from hf_mixup.report.card import write_model_card
from huggingface_hub import HfApi
from transformers import AutoModelForImageClassification
x = torch.randn(2, 3, 32, 32)
different = {}
SIZE = {"resnet10t": 176, "test_vit": 32}
api = HfApi()
for name in ("resnet10t", "test_vit"):
    ours = MixupModel(from_scratch(name, 4, 32), "cutmix").eval()
    for buffer in ours.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    expected = ours(pixel_values=x).logits
    ours.save_pretrained(name)
    write_model_card(name, repo=f"tester/{name}")
    api.create_repo(name)
    api.upload_folder(repo_id=f"tester/{name}", folder_path=name)
    difference = lambda logits: (logits - expected).abs().max().item()
    different[name + " timm"] = difference(timm.create_model(f"hf-hub:tester/{name}", pretrained=True).eval()(x))
    different[name + " auto"] = difference(AutoModelForImageClassification.from_pretrained(f"tester/{name}").eval()(pixel_values=x).logits)
    different[name + " ours"] = difference(MixupModel.from_pretrained(f"tester/{name}").eval()(pixel_values=x).logits)
    load_strictly(from_scratch(name, 4, 32), name)
    different[name + " size"] = abs(timm.data.resolve_model_data_config(timm.create_model(f"hf-hub:tester/{name}"))["input_size"][-1] - SIZE[name])
theirs = timm.create_model("resnet10t", num_classes=4).eval()
timm.models.push_to_hf_hub(theirs, "tester/theirs")
different["theirs"] = (load_classifier("tester/theirs").eval()(pixel_values=x).logits - theirs(x)).abs().max().item()
print(json.dumps(different))
"""


def test_timm_reads_ours_and_we_read_timm_s(hub, tmp_path):
    different = python(hub, tmp_path, TIMM)
    assert len(different) == 9
    assert max(different.values()) < 1e-5, different
    assert 'timm.create_model("hf-hub:tester/resnet10t", pretrained=True)' in hub.files("tester/resnet10t")["README.md"].decode()
