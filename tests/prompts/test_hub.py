"""Prompts that go to the Hub and come back: the same vectors, only the needed files, and errors of one line."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hub_stand_in import HubStandIn, use_hub
from support.tiny_models import batch, build
from support.tiny_tuning import tune_tiny

import softprompt_fast as spf
from softprompt_fast.base.hub import HubName, parse
from softprompt_fast.base.locations import located
from softprompt_fast.distillation import join_prompts
from softprompt_fast.distillation.joining import Composition
from softprompt_fast.inference import PromptBank
from softprompt_fast.prompts import push_to_hub, read_prompt
from softprompt_fast.prompts.card import is_ours
from softprompt_fast.tasks import Task


def two_prompts(model: Any = None) -> spf.SoftPromptModel:
    tuned = spf.SoftPromptModel(build("llama") if model is None else model)
    for name, length in (("movies", 3), ("tweets", 5)):
        tuned.add_prompt(name, init=torch.randn(length, 32))
    return tuned


def test_one_prompt_comes_back(hub: HubStandIn, tmp_path: Path) -> None:
    tuned = two_prompts()
    commit = tuned.push_to_hub("me/reviews", ["movies"], commit_message="first", private=True)
    assert commit.oid in str(commit) and hub.repositories["me/reviews"].private
    assert hub.repositories["me/reviews"].messages == ["initial commit", "first"]
    assert sorted(hub.files("me/reviews")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]

    loaded = spf.SoftPromptModel.from_pretrained(build("llama"), "me/reviews", cache_dir=tmp_path / "other")
    assert list(loaded.prompts.names) == ["reviews"]
    assert torch.equal(loaded.prompts["reviews"], tuned.prompts["movies"])
    assert (tmp_path / "other").is_dir() and not (tmp_path / "cache").exists()


def test_several_prompts_come_back_by_their_names(hub: HubStandIn) -> None:
    tuned = two_prompts()
    tuned.push_to_hub("me/several")
    assert "movies/README.md" in hub.files("me/several") and "README.md" in hub.files("me/several")

    loaded = spf.SoftPromptModel.from_pretrained(build("llama"), "me/several")
    ids, mask = batch()
    names = ["movies", "tweets", "tweets", None]
    assert torch.equal(loaded(ids, mask, prompt_ids=names).logits, tuned(ids, mask, prompt_ids=names).logits)
    one = spf.SoftPromptModel.from_pretrained(build("llama"), "me/several", ["tweets"])
    assert list(one.prompts.names) == ["tweets"]
    assert torch.equal(read_prompt("me/several#tweets")[0], tuned.prompts["tweets"])
    bank = PromptBank(build("llama"))
    assert bank.add_directory("me/several") == ["movies", "tweets"]
    bank.add("again", "me/several#movies")
    assert torch.equal(bank["again"], tuned.prompts["movies"])


def test_a_deep_prompt_comes_back(hub: HubStandIn) -> None:
    tuned = spf.DeepPromptModel(build("llama"))
    tuned.add_prompt("deep", 4)
    tuned.push_to_hub("me/deep")
    loaded = spf.DeepPromptModel.from_pretrained(build("llama"), "me/deep")
    assert torch.equal(loaded.prompts["deep"], tuned.prompts["deep"])


def test_prompts_of_documents_keep_what_they_were_trained_with(
    hub: HubStandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = two_prompts()
    tuned.save_pretrained(tmp_path / "guides")
    for name in ("movies", "tweets"):
        Composition("a run", (name,), beside=1, opening=2).save(tmp_path / "guides" / name)
    push_to_hub(tmp_path / "guides", "me/guides")
    with caplog.at_level(logging.WARNING):
        pair = join_prompts(["me/guides#movies", "me/guides#tweets"], tmp_path / "pair")
    assert "trained" not in caplog.text
    assert torch.equal(read_prompt(pair)[0], torch.cat([tuned.prompts["movies"], tuned.prompts["tweets"][2:]]))


def test_only_the_files_of_prompts_are_downloaded(hub: HubStandIn) -> None:
    two_prompts().push_to_hub("me/mixed", ["movies"])
    other = {"model.safetensors": b"1", "adapter_model.bin": b"2", "checkpoints/a/adapter_config.json": b"{}"}
    hub.repositories["me/mixed"].add("main", other, "more")
    hub.requests.clear()
    folder = located("me/mixed")
    assert sorted(file.name for file in folder.rglob("*")) == ["adapter_config.json", "adapter_model.safetensors"]
    fetched = {request.rpartition("/")[2] for request in hub.requests if request.startswith("GET /me/mixed/resolve")}
    assert fetched == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_repository_with_a_pickle_only_is_refused(hub: HubStandIn) -> None:
    two_prompts().push_to_hub("me/pickle", ["movies"])
    repository = hub.repositories["me/pickle"]
    repository.commits[repository.branches["main"]] = {"adapter_config.json": b"{}", "adapter_model.bin": b"x"}
    with pytest.raises(FileNotFoundError, match=r"must hold adapter_config.json and adapter_model.safetensors"):
        located("me/pickle")


def test_revisions(hub: HubStandIn) -> None:
    tuned = two_prompts()
    first = tuned.push_to_hub("me/moving", ["movies"])
    before = tuned.prompts["movies"].detach().clone()
    with torch.no_grad():
        tuned.prompts["movies"].add_(1)
    tuned.push_to_hub("me/moving", ["movies"], revision="v2")
    assert torch.equal(read_prompt("me/moving")[0], before)
    assert torch.equal(read_prompt("me/moving@v2")[0], tuned.prompts["movies"])
    loaded = spf.SoftPromptModel(build("llama"))
    assert torch.equal(loaded.load_prompt("me/moving", "a", revision="v2"), tuned.prompts["movies"])
    tuned.push_to_hub("me/moving", ["movies"])
    assert torch.equal(loaded.load_prompt("me/moving", "b"), tuned.prompts["movies"])
    assert torch.equal(loaded.load_prompt("me/moving", "c", revision=first.oid), before)
    with pytest.raises(ValueError, match=r"`revision` must be 'v2' as in 'me/moving@v2', got 'v3'"):
        loaded.load_prompt("me/moving@v2", "d", revision="v3")
    with pytest.raises(ValueError, match=r"`revision` must be None unless a repository on the Hub is named"):
        loaded.load_prompt(Path.cwd(), "d", revision="v3")


def test_a_commit_can_be_proposed(hub: HubStandIn) -> None:
    tuned = two_prompts()
    commit = tuned.push_to_hub("me/asked", ["movies"], create_pr=True)
    assert commit.pr_url.endswith("/me/asked/discussions/1") and hub.files("me/asked") == {}
    assert torch.equal(read_prompt("me/asked@refs/pr/1")[0], tuned.prompts["movies"])


def test_the_cache_answers_without_the_network(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_prompts().push_to_hub("me/kept")
    folder = located("me/kept")
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    assert located("me/kept") == folder
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert located("me/kept") == folder and hub.requests == []
    with pytest.raises(
        ConnectionError, match=r"me/other .* cannot be downloaded, because HF_HUB_OFFLINE is set"
    ) as told:
        located("me/other")
    assert "\n" not in str(told.value)
    with pytest.raises(ConnectionError, match=r"HF_HUB_OFFLINE"):
        two_prompts().push_to_hub("me/kept")


def test_errors_are_one_line(hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_prompts().push_to_hub("me/secret", private=True)
    cases: list[tuple[str, type[Exception], str]] = [
        (
            "me/missing",
            FileNotFoundError,
            "me/missing is no folder here and no repository on the Hub that you can read",
        ),
        ("me/secret@v9", FileNotFoundError, "me/secret on the Hub has no revision 'v9'"),
        ("me/secret#books", FileNotFoundError, "me/secret on the Hub has no prompt 'books'; it has movies, tweets"),
    ]
    for source, kind, message in cases:
        with pytest.raises(kind, match=message) as told:
            located(source)
        assert "\n" not in str(told.value)
    use_hub(monkeypatch, hub.url, tmp_path / "stranger", token=None)
    with pytest.raises(FileNotFoundError, match=r"if it is private, log in or set HF_TOKEN"):
        located("me/secret")
    with pytest.raises(OSError, match=r"me/new on the Hub: .*401") as told:
        two_prompts().push_to_hub("me/new")
    assert "\n" not in str(told.value)
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "alone")
    with pytest.raises(ConnectionError, match=r"me/secret .* because the Hub does not answer") as told:
        located("me/secret")
    assert "\n" not in str(told.value)
    with pytest.raises(ConnectionError, match=r"me/new .* because the Hub does not answer") as told:
        two_prompts().push_to_hub("me/new")
    assert "\n" not in str(told.value)


def test_what_is_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse("user/repo") == HubName("user/repo", None, None)
    assert parse(Path("user/repo.x@refs/pr/1#movies")) == HubName("user/repo.x", "refs/pr/1", "movies")
    for text in ("sentiment@production", "repo", "a/b/c", "/a/b", "../a", "user/repo#", "random"):
        assert parse(text) is None, text
    (tmp_path / "user").mkdir()
    assert parse("user/repo") is None  # a misspelt folder is not looked up on the Hub


def test_a_run_is_pushed_with_its_task_and_scores(hub: HubStandIn, tmp_path: Path) -> None:
    values = tune_tiny(tmp_path / "run")
    push_to_hub(tmp_path / "run", "me/run", base_model="org/base")
    files = hub.files("me/run")
    assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "task.json"]
    card = files["README.md"].decode()
    assert 'SoftPromptModel.from_pretrained(model, "me/run")' in card and "base_model: org/base" in card
    assert "## Scores" in card
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert Task.load("me/run").model == "org/base"
    assert torch.equal(read_prompt("me/run")[0], values)


def test_paths_of_this_machine_are_not_uploaded(
    hub: HubStandIn, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import transformers

    tuned = two_prompts(transformers.AutoModelForCausalLM.from_pretrained(model_folder))
    with caplog.at_level(logging.WARNING, "softprompt_fast"):
        tuned.push_to_hub("me/local", ["movies"])
    assert "others cannot find the base model" in caplog.text and "base_model" in caplog.text
    text = b"".join(content for name, content in hub.files("me/local").items())
    assert str(model_folder.parent).encode() not in text
    assert json.loads(hub.files("me/local")["adapter_config.json"])["base_model_name_or_path"] == model_folder.name


def saved_by_peft(folder: Path, base: Path) -> Path:
    """A prompt that PEFT made of words of a tokenizer, with its path, and PEFT's card."""
    peft = pytest.importorskip("peft")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=2,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="film",
        tokenizer_name_or_path=str(base),
        tokenizer_kwargs={"cache_dir": str(base.parent / "cache")},
    )
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("given", "name"), [("org/base", "org/base"), (None, "model")])
def test_paths_of_a_prompt_from_peft_are_not_uploaded(
    hub: HubStandIn, model_folder: Path, tmp_path: Path, given: str | None, name: str
) -> None:
    base = tmp_path / "model"
    shutil.copytree(model_folder, base)
    folder = saved_by_peft(tmp_path / "theirs", base)
    assert str(base) in (folder / "README.md").read_text()
    push_to_hub(folder, "me/theirs", base_model=given)
    files = hub.files("me/theirs")
    assert [file for file, content in files.items() if str(tmp_path).encode() in content] == []
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == config["tokenizer_name_or_path"] == name
    assert config["tokenizer_kwargs"] == {"cache_dir": "cache"}
    assert is_ours(files["README.md"].decode())

    card = (folder / "README.md").read_text().replace("# Model Card for Model ID", "# Mine")
    (folder / "README.md").write_text(card)
    push_to_hub(folder, "me/mine", base_model=given)
    assert hub.files("me/mine")["README.md"].decode() == card.replace(str(base), name)


def test_a_tokenizer_of_another_name_is_kept(hub: HubStandIn, tmp_path: Path) -> None:
    two_prompts().save_pretrained(tmp_path, ["movies"])
    file = tmp_path / "movies" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_name_or_path": "org/words"}))
    push_to_hub(tmp_path / "movies", "me/movies", base_model="org/base")
    assert json.loads(hub.files("me/movies")["adapter_config.json"])["tokenizer_name_or_path"] == "org/words"


def test_a_card_changed_by_hand_stays(hub: HubStandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tuned = two_prompts()
    tuned.push_to_hub("me/card", ["movies"])
    hub.repositories["me/card"].add("main", {"README.md": b"mine"}, "edit")
    with torch.no_grad():
        tuned.prompts["movies"].add_(1)
    tuned.push_to_hub("me/card", ["movies"])
    assert hub.files("me/card")["README.md"] == b"mine" and "keeps its own README.md" in caplog.text
    assert torch.equal(read_prompt("me/card")[0], tuned.prompts["movies"])
    tuned.save_pretrained(tmp_path / "own", ["movies"])
    (tmp_path / "own" / "movies" / "README.md").write_text("theirs")
    push_to_hub(tmp_path / "own", "me/card")
    assert hub.files("me/card")["README.md"] == b"theirs"


def test_prompts_of_several_bases_are_refused(hub: HubStandIn, tmp_path: Path) -> None:
    two_prompts().save_pretrained(tmp_path / "mixed", ["movies"])
    two_prompts(build("qwen2")).save_pretrained(tmp_path / "mixed", ["tweets"])
    with pytest.raises(ValueError, match=r"must have one base model"):
        push_to_hub(tmp_path / "mixed", "me/mixed")
    assert "me/mixed" not in hub.repositories


def test_a_task_of_a_multitask_prompt(hub: HubStandIn, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from support.peft_models import peft_model

    peft_model("llama", kind="MultitaskPromptTuning", num_tasks=2, num_ranks=2).save_pretrained(tmp_path / "many")
    push_to_hub(tmp_path / "many", "me/many")
    assert torch.equal(read_prompt("me/many#1")[0], read_prompt(tmp_path / "many#1")[0])
    loaded = spf.SoftPromptModel.from_pretrained(build("llama"), "me/many")
    assert list(loaded.prompts.names) == ["many-0", "many-1"]


def test_one_prompt_never_hides_several(hub: HubStandIn) -> None:
    tuned = two_prompts()
    tuned.push_to_hub("me/one", ["movies"])
    tuned.push_to_hub("me/several")
    with pytest.raises(ValueError, match="me/one on the Hub holds one prompt in the repository itself, got several"):
        tuned.push_to_hub("me/one")
    with pytest.raises(ValueError, match="me/several on the Hub holds prompts in folders, got one prompt to push"):
        tuned.push_to_hub("me/several", ["movies"])
    tuned.push_to_hub("me/several")
    assert len(hub.repositories["me/one"].messages) == 2


def test_peft_loads_what_was_pushed(hub: HubStandIn) -> None:
    peft = pytest.importorskip("peft")
    tuned = two_prompts()
    tuned.push_to_hub("me/one", ["movies"])
    tuned.push_to_hub("me/several")
    ids = batch()[0]
    mask = torch.ones_like(ids)
    for repository, options in (("me/one", {}), ("me/several", {"subfolder": "movies"})):
        theirs = peft.PeftModel.from_pretrained(build("llama"), repository, **options)
        logits = theirs(input_ids=ids, attention_mask=mask).logits[:, 3:]
        torch.testing.assert_close(logits, tuned(ids, mask, prompt_ids="movies").logits, atol=1e-4, rtol=1e-4)
