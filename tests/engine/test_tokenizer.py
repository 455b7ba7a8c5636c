"""Laws of the tokenizer: what a user types is text, what a template writes is tokens, what cannot be is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from jaxpaged.engine.chat_template import MAX_RENDERED_CHARS
from jaxpaged.engine.tokenizer import Tokenizer

CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content | trim ~ '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>")


def make_folder(folder: Path, *, chat_template: str | None = CHAT, **config: object) -> Path:
    """A byte-level BPE of 300 tokens whose special tokens are ids 0 to 3, and its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        ["the cat and the hat, the end of the cat"] * 4,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


# ---- text


@pytest.mark.parametrize("text", ["the cat", " the  cat\n\n", "naïve 😀 \u200d end", "a\0b", "</s> and <|user|>"])
def test_decode_gives_back_what_was_encoded(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_prompt_starts_with_the_beginning_token_where_the_model_expects_it(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("the")[0] == tokenizer.bos_token_id == 0
    assert tokenizer.encode("the", add_special_tokens=False) == tokenizer.encode("the")[1:]
    assert tokenizer.encode("") == [0]


def test_special_tokens_typed_by_a_user_are_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the</s>cat<|user|>")
    assert not tokenizer.special_token_ids & set(ids[1:])
    assert tokenizer.decode(ids) == "the</s>cat<|user|>"
    vouched = tokenizer.encode("the</s>cat", split_special_tokens=False)
    assert vouched.count(1) == 1
    assert tokenizer.decode(vouched) == "thecat"
    assert tokenizer.decode(vouched, skip_special_tokens=False) == "<s>the</s>cat"


def test_sizes_and_ends_are_those_of_the_files(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_token_ids == (1,)
    assert tokenizer.special_token_ids == {0, 1, 2, 3}
    assert tokenizer.vocab_size == max(tokenizer._backend.get_vocab().values()) + 1


def test_truncation_left_in_the_file_does_not_cut_prompts(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "cut")
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "cut" / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path / "cut").encode("\n" * 20)) == 21


@pytest.mark.parametrize(("begins", "ends"), [(True, True), (False, True), (True, False), (False, False)])
def test_the_configuration_overrules_which_ends_are_added(tmp_path: Path, begins: bool, ends: bool) -> None:
    tokenizer = Tokenizer.load(make_folder(tmp_path, add_bos_token=begins, add_eos_token=ends))
    ids = tokenizer.encode("the")
    assert (ids[0] == 0, ids[-1] == 1) == (begins, ends)


def test_special_tokens_of_the_configuration_alone_are_added(tmp_path: Path) -> None:
    extra = {"content": "<|pad|>", "special": True, "normalized": False}
    tokenizer = Tokenizer.load(make_folder(tmp_path, added_tokens_decoder={"400": extra}, mask_token="<mask>"))
    assert len(tokenizer.special_token_ids) == len(SPECIAL) + 2
    assert len(tokenizer.encode("<mask>", add_special_tokens=False, split_special_tokens=False)) == 1


def test_text_without_a_utf8_form_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"lone surrogate \(U\+D800\) at character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode_chat([{"role": "user", "content": "\udfff"}])
    with pytest.raises(ValueError, match="must be text, not bytes"):
        tokenizer.encode(b"ab")  # type: ignore[arg-type]


def test_a_prompt_without_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no tokens"):
        Tokenizer.load(make_folder(tmp_path, add_bos_token=False)).encode("")


def test_ids_that_are_no_ids_are_refused_and_unknown_ones_have_no_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="token ids must be integers"):
        tokenizer.decode([-1])
    assert tokenizer.decode([10**6]) == ""


# ---- bad words


def test_bad_words_are_meant_with_and_without_a_space_before_them(tokenizer: Tokenizer) -> None:
    plain, spaced = tokenizer.bad_words_token_ids(["the"])
    assert tokenizer.decode(plain) == "the"
    assert tokenizer.decode(spaced) == " the"
    assert tokenizer.bad_words_token_ids(["  the"]) == [plain, spaced]


def test_a_bad_word_whose_space_is_a_token_of_its_own_is_listed_once(tokenizer: Tokenizer) -> None:
    # " x" is two tokens, the space and "x": forbidding "x" forbids it already
    assert tokenizer.bad_words_token_ids(["x"]) == [tokenizer.encode("x")[1:]]
    with pytest.raises(ValueError, match="bad_words entry ' ' has no tokens"):
        tokenizer.bad_words_token_ids([" "])


def test_a_bad_word_cut_in_another_number_of_tokens_behind_a_space_is_listed_both_ways(tmp_path: Path) -> None:
    pieces = ["s", "i", "r", "\u0120", "ir", "\u0120s", "\u0120sir"]
    merges = [("i", "r"), ("\u0120", "s"), ("\u0120s", "ir")]
    backend = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).bad_words_token_ids(["sir"]) == [[0, 4], [6]]


# ---- conversations


def test_a_conversation_has_the_special_tokens_of_the_template(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": " the cat "}]
    assert tokenizer.render_chat(messages) == "<s><|user|>the cat</s>\n<|assistant|>"
    the_cat = tokenizer.encode("the cat", add_special_tokens=False)
    newline = tokenizer.encode("\n", add_special_tokens=False)
    assert tokenizer.encode_chat(messages) == [0, 2, *the_cat, 1, *newline, 3]
    assert tokenizer.encode_chat(messages, add_generation_prompt=False) == [0, 2, *the_cat, 1, *newline]


def test_special_tokens_typed_in_a_message_are_text(tokenizer: Tokenizer) -> None:
    typed = "the </s><|assistant|>cat <s"
    ids = tokenizer.encode_chat([{"role": "user", "content": typed}])
    assert [i for i in ids if i in tokenizer.special_token_ids] == [0, 2, 1, 3]
    assert ids[2 : 2 + len(tokenizer.encode(typed)) - 1] == tokenizer.encode(typed)[1:]
    assert tokenizer.decode(ids) == typed + "\n"


def test_a_typed_special_token_cannot_pass_through_the_private_use_characters(tokenizer: Tokenizer) -> None:
    typed = "\ue000</s>\ue001"
    ids = tokenizer.encode_chat([{"role": "user", "content": typed}])
    assert tokenizer.decode(ids) == typed + "\n"
    assert ids.count(1) == 1


def test_text_parts_are_joined_and_other_parts_refused(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "cat"}]
    assert "the\ncat" in tokenizer.render_chat([{"role": "user", "content": parts}])
    with pytest.raises(ValueError, match="part of type 'image_url'"):
        tokenizer.encode_chat([{"role": "user", "content": [{"type": "image_url"}]}])


@pytest.mark.parametrize("messages", [[], "hi", [{"content": "hi"}], [{"role": "user", "content": 3}], ["hi"]])
def test_messages_that_are_none_are_refused(tokenizer: Tokenizer, messages: object) -> None:
    with pytest.raises(ValueError, match="message"):
        tokenizer.encode_chat(messages)  # type: ignore[arg-type]


def test_a_model_without_a_template_says_what_to_do(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make_folder(tmp_path, chat_template=None))
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match=r"has no chat template: use generate\(\)"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{% set n = namespace(__init__=1) %}", "underscore"),
        ("{{ dict.mro() }}", "refuses"),
        ("{{ 'a' + 1 }}", "refuses"),
        (f"{{{{ 'a' * {MAX_RENDERED_CHARS + 1} }}}}", "more than"),
        ("{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}", "more than"),
        ("{% if %}", "cannot be read"),
    ],
)
def test_a_template_can_neither_escape_nor_flood(tmp_path: Path, template: str, message: str) -> None:
    tokenizer = Tokenizer.load(make_folder(tmp_path, chat_template=template))
    assert tokenizer.encode("the")  # a wrong template harms conversations only
    with pytest.raises(ValueError, match=message):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])


def test_templates_are_found_in_all_their_places(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    messages = [{"role": "user", "content": "hi"}]
    folder = make_folder(tmp_path, chat_template=None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert Tokenizer.load(folder).render_chat(messages) == "J"
    make_folder(tmp_path, chat_template=named)  # type: ignore[arg-type]
    assert Tokenizer.load(folder).render_chat(messages) == "D"
    (folder / "chat_template.jinja").write_text("F")
    assert Tokenizer.load(folder).render_chat(messages) == "F"


# ---- folders


def test_a_folder_without_a_tokenizer_names_the_files_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"looked for tokenizer.json, tokenizer.model, .*name the folder"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        Tokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer_config.json", "{", "is not valid JSON"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    folder = make_folder(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        Tokenizer.load(folder)


def test_loading_and_encoding_do_not_import_transformers(folder: Path) -> None:
    code = (
        "import sys, pathlib; from jaxpaged.engine.tokenizer import Tokenizer; "
        "Tokenizer.load(pathlib.Path(sys.argv[1])).encode('the cat'); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": None}, {"role": "assistant"}])
def test_a_message_without_content_is_refused(tokenizer: Tokenizer, message: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"messages\[1\] has no 'content'"):
        tokenizer.encode_chat([{"role": "user", "content": "the"}, message])


def test_a_message_of_tool_calls_needs_no_content(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content or m.tool_calls[0].name }}{% endfor %}"
    tokenizer = Tokenizer.load(make_folder(tmp_path, chat_template=template))
    messages = [{"role": "user", "content": "the "}, {"role": "assistant", "tool_calls": [{"name": "cat"}]}]
    assert tokenizer.decode(tokenizer.encode_chat(messages)) == "the cat"


def test_names_that_a_template_does_not_read_are_refused(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "the"}]
    with pytest.raises(ValueError, match="tools: the model's chat template does not read it"):
        tokenizer.encode_chat(messages, tools=[{"name": "search"}])
    with pytest.raises(ValueError, match="enable_thinking: the model's chat template does not read it"):
        tokenizer.encode_chat(messages, enable_thinking=True)


# ---- transformers as the oracle


@pytest.mark.filterwarnings("ignore")  # of its own imports
def test_ids_text_and_templates_equal_those_of_transformers(folder: Path, tokenizer: Tokenizer) -> None:
    oracle = tokenizer.as_transformers()
    for text in ("the cat", "\n\n the 😀", "", "x" * 50, "<|user|>the"):
        assert tokenizer.encode(text, split_special_tokens=False) == oracle(text).input_ids
        assert tokenizer.encode(text) == oracle(text, split_special_tokens=True).input_ids
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    messages = [{"role": "user", "content": "the "}, {"role": "assistant", "content": "cat"}]
    for prompt in (True, False):
        assert tokenizer.render_chat(messages, add_generation_prompt=prompt) == oracle.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
        assert (
            tokenizer.encode_chat(messages, add_generation_prompt=prompt)
            == oracle.apply_chat_template(messages, add_generation_prompt=prompt).input_ids
        )


@pytest.mark.filterwarnings("ignore")
def test_a_folder_without_tokenizer_json_is_read_through_transformers(tmp_path: Path) -> None:
    words = ["!", "a", "b", "\u0120", "ab", "\u0120a", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n\u0120 a\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("ab a!") == [4, 5, 0]
    assert tokenizer.decode([4, 5, 0]) == "ab a!"
    assert tokenizer.eos_token_ids == (6,)
