"""The commands from end to end, as a person runs them."""

import ast
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from commandline import Ran, assert_refused, rankrace
from rankrace import __main__ as entry
from rankrace import __version__
from rankrace.config import RunConfig
from rankrace.result import Result
from tinyfolder import PARITIES, SHORT, SUMS, tiny_bert, tiny_llama, write_rows

COMMANDS = ("train", "search", "preview", "plan", "merge")
FILES = ["adapter", "checkpoints", "config.yaml", "report.html", "result.json"]
HALF_A_BIT = 2.0**-8
"""What rounding to bfloat16, which keeps 8 bits, changes at most: a share of each weight."""
TOLERANCE = 8 * HALF_A_BIT
"""Of the largest logit: several layers are passed."""


@dataclass(frozen=True)
class Trained:
    """A finished run and what it was made from."""

    model: Path
    data: Path
    out: Path
    ran: Ran

    @property
    def result(self) -> Result:
        return Result.read(self.out / "result.json")


@pytest.fixture(scope="module")
def causal(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trained with options from a file and on the command line."""
    folder = tmp_path_factory.mktemp("causal")
    model, data = tiny_llama(folder / "model", smollm2), write_rows(folder / "sums.jsonl", SUMS)
    options = {
        "ranks": [2, 4],
        "max_steps": 8,
        "batch-size": 9,
        "seed": 3,
        "epochs": 7,
        "lr": "1e-2",
        "model": "not this",
    }
    (folder / "options.yaml").write_text(yaml.safe_dump(options))
    given = ["--model", model, "--data", data, "--out", folder / "out", "--batch-size", 8, "--seed", 4]
    ran = rankrace("train", "--config", folder / "options.yaml", *given)
    assert ran.code == 0, ran.err
    return Trained(model, data, folder / "out", ran)


@pytest.fixture(scope="module")
def classifying(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("classifying")
    model, data = tiny_bert(folder / "model", minilm), write_rows(folder / "parities.jsonl", PARITIES)
    ran = rankrace("train", "--model", model, "--data", data, "--out", folder / "out", *SHORT)
    assert ran.code == 0, ran.err
    return Trained(model, data, folder / "out", ran)


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Of every file its time and bytes."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def loaded_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return peft.load_peft_weights(str(folder), device="cpu")


# --- help and version


def test_help_of_the_whole() -> None:
    for arguments in ([], ["--help"]):
        ran = rankrace(*arguments)
        assert (ran.code, ran.err) == (0, "")
        assert "LoRA fine-tuning in which nobody has to guess the rank" in ran.out
        for command in COMMANDS:
            assert re.search(rf"^\W*{command} ", ran.out, re.MULTILINE), command


@pytest.mark.parametrize("command", ["train", "search", "preview", "plan"])
def test_help_names_every_option(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    ran = rankrace(command, "--help")
    assert (ran.code, ran.err) == (0, "")
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z-]*)", ran.out))
    flags = {name.replace("_", "-") for name in RunConfig.model_fields} - {"rank-lr"}
    of_a_run = {"out", "resume", "no-resume", "save-every", "track", "average"}
    wanted = flags | {"config", "help", "no-refine", "no-resume", "no-twin"}
    assert named == (wanted if command == "train" else wanted - of_a_run)
    assert "Default: 2,4,8,16,32." in ran.out
    assert "shrink|race|grid" in ran.out


def test_help_of_merge() -> None:
    ran = rankrace("merge", "--help")
    assert (ran.code, ran.err) == (0, "")
    assert {"--out", "--model", "--help"} <= set(re.findall(r"--[a-z]+", ran.out))


def test_version() -> None:
    assert rankrace("--version") == Ran(0, f"rankrace {__version__}\n", "")


# --- train


def test_train_writes_these_files_and_no_others(causal: Trained, classifying: Trained) -> None:
    for trained in (causal, classifying):
        assert sorted(path.name for path in trained.out.iterdir()) == FILES
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
            path.name for path in (trained.out / "adapter").iterdir()
        }
        # The whole output, hidden files included, and what it stands beside: nothing else was written.
        assert not [path for path in trained.out.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]
        steps = [path.name for path in sorted((trained.out / "checkpoints").iterdir())]
        assert steps == ["step-000007", "step-000008"]


def test_train_says_what_it_found(causal: Trained, classifying: Trained) -> None:
    for trained, unit in ((causal, "token"), (classifying, "example")):
        result = trained.result
        said = dict(line.split(maxsplit=1) for line in trained.ran.out.splitlines())
        assert said["rank"] == str(result.rank)
        assert said["reason"] == result.reason
        assert said["loss"] == f"{result.loss.base:.4f} → {result.loss.final:.4f} nats per {unit}"
        assert said["parameters"] == f"{result.trainable_parameters:,}"
        assert Path(said["adapter"]).is_dir()
        assert Path(said["report"]).is_file()
        assert "step 8/8" in trained.ran.err
        assert math.isfinite(result.loss.final)
    assert causal.result.loss.final < causal.result.loss.base
    assert causal.result.decision.gain is not None
    assert 0 < causal.result.decision.gain < 2 * (causal.result.loss.base - causal.result.loss.final)
    assert causal.result.labels == []
    assert classifying.result.labels == ["even", "odd"]


def test_the_command_line_wins(causal: Trained) -> None:
    used = yaml.safe_load((causal.out / "config.yaml").read_text())
    assert (used["seed"], used["batch_size"], used["model"]) == (4, 8, str(causal.model))
    assert (used["ranks"], used["max_steps"], used["epochs"], used["lr"]) == ([2, 4], 8, 7.0, 0.01)
    assert causal.result.seed == 4
    assert set(used) == set(RunConfig.model_fields) - {"resume"}, "every option as it was used"


def test_the_configuration_reruns_to_the_same_result(causal: Trained, classifying: Trained, tmp_path: Path) -> None:
    for trained in (causal, classifying):
        out = tmp_path / trained.result.task
        ran = rankrace("train", "--config", trained.out / "config.yaml", "--out", out)
        assert ran.code == 0, ran.err
        again, before = Result.read(out / "result.json"), trained.result
        for field in (
            "rank",
            "reason",
            "loss",
            "accuracy",
            "curve",
            "decision",
            "candidates",
            "looks",
            "history",
            "data",
        ):
            assert getattr(again, field) == getattr(before, field), field
        files = [folder / "adapter" / "adapter_model.safetensors" for folder in (out, trained.out)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_another_seed_gives_another_result(causal: Trained, tmp_path: Path) -> None:
    """What the test before compares is not the same by construction."""
    ran = rankrace("train", "--config", causal.out / "config.yaml", "--out", tmp_path / "out", "--seed", 5)
    assert ran.code == 0, ran.err
    assert Result.read(tmp_path / "out" / "result.json").loss.final != causal.result.loss.final


def test_the_winner_of_a_grid_is_what_it_would_have_been_alone(causal: Trained, tmp_path: Path) -> None:
    """The same factors in float64: being chosen among others changed nothing in its training."""
    options = ["--model", causal.model, "--data", causal.data, "--strategy", "grid", "--no-refine", "--max-steps", 8]
    options += ["--batch-size", 8, "--lr", "1e-2", "--dropout", "0.1", "--dtype", "float64"]
    ran = rankrace("train", *options, "--ranks", "2,4,8", "--out", tmp_path / "race")
    assert ran.code == 0, ran.err
    result = Result.read(tmp_path / "race" / "result.json")
    assert sorted((c.rank, c.status == "winner") for c in result.candidates) == [
        (rank, rank == result.rank) for rank in (2, 4, 8)
    ]
    checkpoint = json.loads((tmp_path / "race" / "checkpoints" / "step-000008" / "state.json").read_text())
    spent = checkpoint["session"]["search"]
    assert min(spent["look_seconds"], spent["loser_seconds"]) > 0
    assert result.time.search_s == pytest.approx(spent["look_seconds"] + spent["loser_seconds"])
    assert result.time.total_s > result.time.search_s + result.time.evaluation_s
    ran = rankrace("train", *options, "--ranks", result.rank, "--out", tmp_path / "alone")
    assert ran.code == 0, ran.err
    raced, alone = (loaded_tensors(tmp_path / name / "adapter") for name in ("race", "alone"))
    assert raced.keys() == alone.keys()
    for name, tensor in raced.items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(tensor, alone[name], rtol=0, atol=1e-12)


def test_a_terminal_without_the_signs(causal: Trained, tmp_path: Path) -> None:
    """Latin-1 has ±, but neither → nor the brackets of the preview."""
    for command, said in (("train", "loss        "), ("preview", "0 plus 0 is? 0<|im_end|>?")):
        given = ["--model", causal.model, "--data", causal.data, *SHORT, "--out", tmp_path / "out"]
        ran = subprocess.run(
            [sys.executable, "-m", "rankrace.cli", command, *map(str, given)],
            env={**os.environ, "PYTHONIOENCODING": "latin-1"},
            capture_output=True,
        )
        assert ran.returncode == 0, ran.stderr
        assert said in ran.stdout.decode("latin-1")


def test_texts_longer_than_the_model_takes(classifying: Trained, tmp_path: Path) -> None:
    """The default --max-length is above BERT's number of positions."""
    rows = [*PARITIES, *({**row, "text": row["text"] + " and" * 600} for row in PARITIES[:4])]
    data = write_rows(tmp_path / "long.jsonl", rows)
    ran = rankrace("train", "--model", classifying.model, "--data", data, "--out", tmp_path / "out", *SHORT)
    assert ran.code == 0, ran.err
    assert re.search(r"Cut \d of \d\d training examples to 512 tokens, the most that the model takes\.", ran.err)


def test_an_edge_is_said_beside_the_rank(causal: Trained, tmp_path: Path) -> None:
    given = ["--model", causal.model, "--data", causal.data, *SHORT, "--strategy", "grid", "--no-refine"]
    for command, out in (("train", ["--out", tmp_path / "out"]), ("search", [])):
        ran = rankrace(command, *given, "--ranks", 3, *out)
        assert ran.code == 0, ran.err
        assert "but         Edge of the search: 3 is the smallest rank there was to choose." in ran.out
        assert "interval" not in ran.out, "of one rank"
        assert "Not confident" not in ran.out, "the edge is why"


def test_a_model_given_from_here_is_found_from_everywhere(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By PEFT, from another working directory; the configuration keeps what was given, and resuming goes by that."""
    tiny_llama(tmp_path / "model", smollm2)
    write_rows(tmp_path / "sums.jsonl", SUMS)
    monkeypatch.chdir(tmp_path)
    given = ["train", "--model", "./model", "--data", "sums.jsonl", "--out", "out", *SHORT]
    ran = rankrace(*given)
    assert ran.code == 0, ran.err
    assert yaml.safe_load(Path("out/config.yaml").read_text())["model"] == "./model"
    again = rankrace(*given, "--resume")
    assert (again.code, again.out) == (0, ran.out)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model = peft.AutoPeftModelForCausalLM.from_pretrained("../out/adapter")
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "model")
    assert Result.read(Path("../out/result.json")).model == str(tmp_path / "model")
    for page in ("adapter/README.md", "report.html"):
        assert f"{tmp_path}/model" in Path("../out", page).read_text()


def test_resuming_a_finished_run_says_so(causal: Trained) -> None:
    before = contents(causal.out)
    ran = rankrace("train", "--config", causal.out / "config.yaml", "--out", causal.out, "--resume")
    assert ran.code == 0, ran.err
    assert ran.err == f"This run is finished: {causal.out / 'report.html'}\n"
    assert ran.out == causal.ran.out
    assert contents(causal.out) == before


def test_the_adapter_has_the_loss_that_is_reported(causal: Trained) -> None:
    """By plain PEFT, one example at a time, on the rows that took no part in the training."""
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(causal.model), causal.out / "adapter"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(causal.out / "adapter")
    losses: dict[tuple[str, str], list[float]] = {}
    for row in SUMS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none")
        losses[row["prompt"], row["completion"]] = loss.tolist()
    held_out = validation_rows(causal)
    values = [value for key in held_out for value in losses[key]]
    assert sum(values) / len(values) == pytest.approx(causal.result.loss.final, abs=1e-4)


def validation_rows(trained: Trained) -> list[tuple[str, str]]:
    """Prompts and completions of the held-out rows of a run on SUMS."""
    from rankrace.data import read_splits
    from rankrace.data.formats import PromptCompletion

    config = RunConfig.model_validate(yaml.safe_load((trained.out / "config.yaml").read_text()))
    examples = read_splits(config).validation
    return [(e.prompt, e.completion) for e in examples if isinstance(e, PromptCompletion)]


# --- search


def lora_config(out: str) -> tuple[peft.LoraConfig, float]:
    """The code that `search` prints, evaluated as a person would who pastes it, and the learning rate beside it."""
    code = out.splitlines()[-1]
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call)
    config = eval(code, {"peft": peft})
    assert isinstance(config, peft.LoraConfig)
    return config, float(code.rpartition("# learning rate ")[2])


def test_search_finds_what_train_finds_and_writes_nothing(
    causal: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the configuration names a folder for the run."""
    monkeypatch.chdir(tmp_path)
    before = contents(causal.out)
    ran = rankrace("search", "--config", causal.out / "config.yaml")
    assert ran.code == 0, ran.err
    assert list(tmp_path.iterdir()) == []
    assert contents(causal.out) == before
    result = causal.result
    assert ran.out.splitlines()[:2] == causal.ran.out.splitlines()[:2]
    config, lr = lora_config(ran.out)
    saved = peft.LoraConfig.from_pretrained(str(causal.out / "adapter"))
    assert isinstance(saved, peft.LoraConfig)
    assert config.r == result.rank == saved.r
    assert config.lora_alpha == saved.lora_alpha
    assert config.target_modules == saved.target_modules
    assert config.task_type == saved.task_type == "CAUSAL_LM"
    assert lr == pytest.approx(result.learning_rate, rel=1e-2)
    assert "step 8/8" not in ran.err, "trained on after the decision"


@pytest.mark.parametrize("option", [["--out", "out"], ["--resume"], ["--save-every", 1], ["--track", "tensorboard"]])
def test_search_refuses_what_it_would_ignore(option: list[object], causal: Trained, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    ran = rankrace("search", "--model", causal.model, "--data", causal.data, *SHORT, *option)
    assert_refused(ran, f"has no use for {option[0]}", "leave it out", within=tmp_path)


def test_the_code_that_search_prints_gives_the_adapter_that_train_trains(classifying: Trained) -> None:
    ran = rankrace("search", "--config", classifying.out / "config.yaml")
    assert ran.code == 0, ran.err
    config, _ = lora_config(ran.out)
    assert config.task_type == "SEQ_CLS"
    model = peft.get_peft_model(AutoModelForSequenceClassification.from_pretrained(classifying.model), config)
    fresh = peft.get_peft_model_state_dict(model)
    saved = loaded_tensors(classifying.out / "adapter")
    assert {name: tensor.shape for name, tensor in fresh.items()} == {name: t.shape for name, t in saved.items()}


# --- preview


def test_preview_shows_what_is_learned(causal: Trained) -> None:
    ran = rankrace("preview", "--model", causal.model, "--data", causal.data)
    assert (ran.code, ran.err) == (0, "")
    assert f"Read 36 rows of {causal.data} as prompt+completion." in ran.out
    assert "Note: Only 4 validation examples" in ran.out
    examples = ran.out[ran.out.index("example 1:") :]
    assert examples.count("example ") == 3
    assert "0 plus 0 is⟦ 0<|im_end|>⟧" in examples
    assert "example 1: 8 tokens, 3 supervised" in examples
    tokenizer = AutoTokenizer.from_pretrained(causal.model)
    assert len(tokenizer("0 plus 0 is 0<|im_end|>")["input_ids"]) == 8
    assert len(tokenizer(" 0<|im_end|>")["input_ids"]) == 3


def test_preview_of_a_conversation_uses_the_chat_template(causal: Trained, tmp_path: Path) -> None:
    turns = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"Yes, {n}."}] for n in range(20)
    ]
    data = write_rows(tmp_path / "turns.jsonl", [{"messages": messages} for messages in turns])
    chat = rankrace("preview", "--model", causal.model, "--data", data)
    plain = rankrace("preview", "--model", causal.model, "--data", data, "--template", "plain")
    assert (chat.code, plain.code) == (0, 0), chat.err + plain.err
    assert "<|im_start|>user\n3?<|im_end|>\n<|im_start|>assistant\n⟦Yes, 3.<|im_end|>⟧" in chat.out
    assert "User: 3?\n\nAssistant:⟦ Yes, 3.<|im_end|>⟧" in plain.out


def test_preview_of_classes(classifying: Trained) -> None:
    ran = rankrace("preview", "--model", classifying.model, "--data", classifying.data)
    assert (ran.code, ran.err) == (0, "")
    assert "example 1: 5 tokens, class 0\n[CLS] 0 and 0 [SEP]" in ran.out
    assert "example 2: 5 tokens, class 1\n[CLS] 0 and 1 [SEP]" in ran.out


# --- merge


def logits(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**tokenizer(t, return_tensors="pt")).logits.flatten(0, -2) for t in texts])


def assert_merged(trained: Trained, merged: Path, auto: Any, texts: list[str]) -> PreTrainedModel:
    """The merged model on disk computes what base and adapter compute in PEFT, and not what the base computes."""
    tokenizer = AutoTokenizer.from_pretrained(merged)
    base = auto.from_pretrained(trained.model, dtype=torch.float32).eval()
    plain = logits(base, tokenizer, texts)
    expected = logits(peft.PeftModel.from_pretrained(base, trained.out / "adapter").eval(), tokenizer, texts)
    model = auto.from_pretrained(merged)
    assert model.dtype == torch.bfloat16
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    found = logits(model.float().eval(), tokenizer, texts)
    allowed = TOLERANCE * expected.abs().max()
    assert (found - expected).abs().max() <= allowed
    assert (found - plain).abs().max() > allowed, "the adapter does nothing that could be missed"
    return model


def test_merge(causal: Trained, tmp_path: Path) -> None:
    ran = rankrace("merge", causal.out / "adapter", "--out", tmp_path / "merged")
    assert (ran.code, ran.err) == (0, "")
    said, how = ran.out.splitlines()
    found = re.fullmatch(rf"merged into {tmp_path}/merged; largest difference of a logit: ([\d.e-]+), where the "
                         r"largest logit is ([\d.e-]+): the rounding to 16 bits", said)  # fmt: skip
    assert found is not None, said
    assert 0 < float(found[1]) < 0.05 * float(found[2])
    loaded = eval(how.removeprefix("load it without PEFT: "), {"transformers": transformers})
    assert isinstance(loaded, LlamaForCausalLM)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert_merged(
        causal, tmp_path / "merged", AutoModelForCausalLM, [row["prompt"] + row["completion"] for row in SUMS]
    )


def test_merge_of_a_run_instead_of_its_adapter(causal: Trained, tmp_path: Path) -> None:
    ran = rankrace("merge", causal.out, "--out", tmp_path / "merged")
    assert_refused(ran, "is not an adapter", f"did you mean {causal.out / 'adapter'}?", within=tmp_path)


def test_merge_adds_the_update_and_rounds_once(causal: Trained, tmp_path: Path) -> None:
    """Weight by weight, by hand: W + s·B A for the layers of the adapter, W for the others."""
    ran = rankrace("merge", causal.out / "adapter", "--out", tmp_path / "merged")
    assert ran.code == 0, ran.err
    base = AutoModelForCausalLM.from_pretrained(causal.model).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert merged.keys() == base.keys()
    factors = loaded_tensors(causal.out / "adapter")
    updated = 0
    for name, weight in base.items():
        A = factors.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        if A is not None:
            B = factors[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
            weight = weight + causal.result.scaling * B @ A
            updated += 1
        assert merged[name].dtype == torch.bfloat16
        assert torch.all((merged[name].float() - weight).abs() <= HALF_A_BIT * weight.abs() + 1e-7), name
    assert updated == len(factors) / 2 == 14


def test_merge_of_a_classifier_keeps_its_head_and_its_labels(classifying: Trained, tmp_path: Path) -> None:
    ran = rankrace("merge", classifying.out / "adapter", "--out", tmp_path / "merged")
    assert (ran.code, ran.err) == (0, "")
    texts = [row["text"] for row in PARITIES]
    model = assert_merged(classifying, tmp_path / "merged", AutoModelForSequenceClassification, texts)
    assert model.config.id2label == {0: "even", 1: "odd"}


def test_merge_into_a_base_that_has_moved(causal: Trained, tmp_path: Path) -> None:
    """The adapter's own record of it leads nowhere."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for path in (causal.out / "adapter").iterdir():
        (adapter / path.name).write_bytes(path.read_bytes())
    record = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**record, "base_model_name_or_path": "/nowhere"}))
    ran = rankrace("merge", adapter, "--out", tmp_path / "merged")
    assert_refused(ran, "cannot load the model '/nowhere'", within=tmp_path, left=["adapter"])
    ran = rankrace("merge", adapter, "--out", tmp_path / "merged", "--model", causal.model)
    assert (ran.code, ran.err) == (0, "")


def test_merge_refuses_a_folder_that_holds_something(causal: Trained, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    ran = rankrace("merge", causal.out / "adapter", "--out", tmp_path)
    assert_refused(
        ran, f"{tmp_path} is not an empty folder", "choose another --out", within=tmp_path, left=["mine.txt"]
    )


@pytest.mark.parametrize("changed", [{"hidden_size": 64}, {"num_hidden_layers": 1}])
def test_merge_refuses_another_base(changed: dict[str, int], causal: Trained, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(causal.model)
    config.update(changed)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    ran = rankrace("merge", causal.out / "adapter", "--out", tmp_path / "merged", "--model", tmp_path / "other")
    said = [f"does not fit {tmp_path / 'other'}", "trained on a model with other layers"]
    assert_refused(ran, *said, within=tmp_path, left=["other"])


def test_merge_refuses_a_model_of_another_kind(causal: Trained, classifying: Trained, tmp_path: Path) -> None:
    ran = rankrace("merge", classifying.out / "adapter", "--out", tmp_path / "merged", "--model", causal.model)
    assert_refused(ran, f"does not fit {causal.model}", within=tmp_path)


def test_ctrl_c_while_the_command_is_being_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """What it imports takes a third of a second."""

    class Interrupting:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "rankrace.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "rankrace.cli", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupting, *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "Stopped.\n"
