"""Tokenizer, incremental detokenizer and stop strings, against the `tokenizers` library itself."""

import contextlib
import json
from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.trainers import BpeTrainer

from jpd.errors import ConfigError, RequestError
from jpd.text import IncrementalDetokenizer, Tokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Stop! Said the fox; STOP, and stopped. \n\n### End",
    "Émigré naïve café 😀😃👩‍👩‍👧 and 🇫🇷🇯🇵.",
    "日本語の文章と中文句子，还有 한국어 문장.",
    "  indented   code = [1, 2, 3]\n\treturn code",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def train(backend, vocab_size, **options):
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *options.pop("bytes", [])],
        **options,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


@cache
def backend(kind):
    """A small tokenizer of each sort that checkpoints come with."""
    if kind == "byte_level":
        result = Backend(models.BPE())
        result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        result.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        train(result, 400, initial_alphabet=alphabet)
        result.add_tokens([AddedToken("日本語"), AddedToken("ée"), AddedToken("a b")])
        result.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    elif kind.startswith("metaspace"):
        scheme = "never" if kind == "metaspace_never" else "always"
        result = Backend(models.BPE(unk_token="<unk>"))
        result.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        result.decoder = decoders.Metaspace(prepend_scheme=scheme)
        train(result, 300)
    else:
        # Characters of three sentences only, so that the others need their bytes.
        trained = Backend(models.BPE(unk_token="<unk>"))
        trained.pre_tokenizer = pre_tokenizers.Metaspace()
        spec = json.loads(train(trained, 600, bytes=BYTE_TOKENS, limit_alphabet=60).to_str())
        for token in spec["added_tokens"][3:]:
            assert token["content"] in BYTE_TOKENS
        spec["added_tokens"] = spec["added_tokens"][:3]
        spec["model"]["byte_fallback"] = True
        result = Backend.from_str(json.dumps(spec))
        result.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        result.pre_tokenizer = None
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if kind == "byte_fallback":
            steps.append(decoders.Strip(" ", 1, 0))
        result.decoder = decoders.Sequence(steps)
    return result


KINDS = ["byte_level", "byte_fallback", "byte_fallback_keep", "metaspace", "metaspace_never"]


@cache
def tokenizer(kind="byte_level"):
    from transformers import PreTrainedTokenizerFast

    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend(kind), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return Tokenizer(hf, kind)


def save_folder(folder, chat_template=None, **files):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=backend("byte_level"),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
    ).save_pretrained(folder)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def chunked(ids, cuts):
    """Splits `ids` after lengths taken from `cuts` in turns."""
    start = 0
    for i in range(len(ids) + 1):
        size = cuts[i % len(cuts)]
        if ids[start : start + size]:
            yield ids[start : start + size]
        start += size


def stream(kind, ids, cuts=(1,), **options):
    """Feeds `ids` in chunks; returns the deltas, flush last, and the detokenizer."""
    detokenizer = IncrementalDetokenizer(tokenizer(kind), **options)
    deltas = [detokenizer.append(chunk) for chunk in chunked(ids, cuts)]
    deltas.append(detokenizer.flush())
    return deltas, detokenizer


def first_stop(text, stops):
    """(start, end, stop) of the match that ends first, the longest of those; None without one."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            stop = max(matches, key=len)
            return end - len(stop), end, stop
    return None


def ids_of(kind):
    """Random token ids, some of them past the vocabulary as a padded model may produce."""
    size = backend(kind).get_vocab_size()
    return st.lists(st.one_of(st.integers(0, size + 5), st.integers(0, 300)), max_size=30)


def valid_bytes_only(kind, ids):
    """Whether the runs of byte tokens in `ids` are UTF-8, the only case where streams can agree."""
    if not kind.startswith("byte_fallback"):
        return True
    pieces = tokenizer(kind)._pieces[True]
    runs, run = [], b""
    for token_id in ids:
        if backend(kind).id_to_token(token_id) in BYTE_TOKENS:
            run += pieces[token_id]
        elif pieces[token_id]:
            runs.append(run)
            run = b""
    try:
        return all(run.decode() is not None for run in [*runs, run])
    except UnicodeDecodeError:
        return False


cuts_strategy = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), skip=st.booleans(), cuts=cuts_strategy)
def test_stream_is_decode_of_random_ids(kind, data, skip, cuts):
    ids = data.draw(ids_of(kind))
    deltas, detokenizer = stream(kind, ids, cuts, skip_special_tokens=skip)
    assert "".join(deltas) == detokenizer.text == tokenizer(kind).decode(ids, skip)
    if valid_bytes_only(kind, ids):
        assert detokenizer.text == backend(kind).decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [*SENTENCES, " leading", "x\u0000y", "\ufffd kept \ufffd", ""])
def test_stream_is_decode_of_encoded_text(kind, text):
    ids = backend(kind).encode(text).ids
    deltas, detokenizer = stream(kind, ids)
    assert "".join(deltas) == detokenizer.text == backend(kind).decode(ids)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@given(text=st.text(alphabet="aé日😀 \n", max_size=20))
def test_no_delta_holds_part_of_a_character(kind, text):
    deltas, _ = stream(kind, backend(kind).encode(text).ids)
    assert "\ufffd" not in "".join(deltas)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_prompt_and_continuation_are_the_whole(kind, data):
    """With any cut between prompt and output, the streamed text is the end of the whole text."""
    ids = backend(kind).encode(data.draw(st.sampled_from(SENTENCES))).ids
    cut = data.draw(st.integers(0, len(ids)))
    _, detokenizer = stream(kind, ids[cut:], prompt_token_ids=ids[:cut])
    whole = backend(kind).decode(ids)
    before = tokenizer(kind).decode(ids[:cut]).rstrip("\ufffd")
    assert whole == before + detokenizer.text


def test_leading_space_depends_on_the_prompt():
    ids = backend("byte_fallback").encode("fox").ids
    special = [1, 2]
    assert stream("byte_fallback", ids)[1].text == "fox"
    assert stream("byte_fallback", ids, prompt_token_ids=special)[1].text == "fox"
    assert stream("byte_fallback", ids, prompt_token_ids=[*special, *ids])[1].text == " fox"


def test_incomplete_character_is_replaced_only_at_the_end():
    ids = [i for i in backend("byte_level").encode("a🦊").ids if i != 1]
    detokenizer = IncrementalDetokenizer(tokenizer())
    assert detokenizer.append(ids[:-1]) == "a"
    assert detokenizer.text == "a"
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.text == "a\ufffd"


def test_valid_characters_outlive_invalid_byte_tokens():
    """What was sent stays: here the `tokenizers` library would turn all four bytes to U+FFFD."""
    ids = [backend("byte_fallback").token_to_id(f"<0x{byte:02X}>") for byte in b"\xe4\xbd\xa0\xff"]
    deltas, detokenizer = stream("byte_fallback", ids)
    assert deltas == ["", "", "你", "\ufffd", ""]
    assert detokenizer.text == tokenizer("byte_fallback").decode(ids)


stops_strategy = st.lists(
    st.one_of(
        st.text(alphabet="stop .#\nox", min_size=1, max_size=4),
        st.sampled_from(["###", "\n\n", "STOP", "😃", "日本", "fox jumps over the"]),
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace"])
@given(
    text=st.one_of(st.sampled_from(SENTENCES), st.text(alphabet="stop .#\nox", max_size=25)),
    stops=stops_strategy,
    cuts=cuts_strategy,
    include=st.booleans(),
)
@example(text="aab", stops=["ab", "b"], cuts=[1], include=False)
@example(text="### #", stops=["####", "# #"], cuts=[1], include=False)
def test_stop_strings_cut_the_text(kind, text, stops, cuts, include):
    ids = backend(kind).encode(text).ids
    full = backend(kind).decode(ids)
    deltas, detokenizer = stream(kind, ids, cuts, stop=stops, include_stop_str_in_output=include)
    assert "".join(deltas) == detokenizer.text
    found = first_stop(full, stops)
    if found is None:
        assert detokenizer.stopped is None
        assert detokenizer.text == full
    else:
        start, end, stop = found
        assert detokenizer.stopped == stop
        assert detokenizer.text == full[: end if include else start]
        assert detokenizer.append(ids) == detokenizer.flush() == ""


@given(
    text=st.text(alphabet="stop#", max_size=25),
    stops=stops_strategy,
    cuts=cuts_strategy,
    min_tokens=st.integers(0, 12),
)
def test_min_tokens_lets_early_stop_strings_pass(text, stops, cuts, min_tokens):
    """A match counts if it ends after what the tokens before number `min_tokens` say."""
    ids = [i for i in backend("byte_level").encode(text).ids if i != 1]
    early = backend("byte_level").decode(ids[: max(min_tokens - 1, 0)])
    ends = [
        (end, end - len(stop))
        for end in range(len(early) + 1, len(text) + 1)
        for stop in stops
        if text[:end].endswith(stop)
    ]
    deltas, detokenizer = stream("byte_level", ids, cuts, stop=stops, min_tokens=min_tokens)
    assert "".join(deltas) == detokenizer.text == (text[: min(ends)[1]] if ends else text)
    assert (detokenizer.stopped is not None) == bool(ends)


@pytest.mark.parametrize(
    ("chars", "stop", "min_tokens", "deltas", "rest"),
    [
        ("a#b##x", ["###", "xyz"], 0, ["a", "", "#b", "", "", "##"], "x"),
        # A second candidate within the text that a first one did not fit.
        ("aaabc", ["aabc"], 0, ["", "", "a", "", ""], ""),
        # "ab" came too early to count and is held only for the sake of "abc".
        ("abxab", ["ab", "abc"], 3, ["", "", "abx", "", ""], ""),
    ],
)
def test_possible_stop_is_held_back_and_nothing_else(chars, stop, min_tokens, deltas, rest):
    detokenizer = IncrementalDetokenizer(tokenizer(), stop=stop, min_tokens=min_tokens)
    ids = [backend("byte_level").token_to_id(char) for char in chars]
    assert [detokenizer.append([token_id]) for token_id in ids] == deltas
    assert detokenizer.text == "".join(deltas) + rest
    assert detokenizer.flush() == rest


def test_load_reads_the_tokenizer_s_own_ids(tmp_path):
    """What the model's files name is the model's, see `jpd.checkpoint.read_config`."""
    save_folder(tmp_path, generation_config={"eos_token_id": [5, 6]}, config={"eos_token_id": 8})
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_token_ids == {2}
    assert loaded.bos_token_id == 1
    assert loaded.vocab_size == backend("byte_level").get_vocab_size()


def test_a_tokenizer_without_special_tokens_ends_nothing():
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend("metaspace")), "bare")
    assert bare.eos_token_ids == frozenset()
    assert bare.bos_token_id is None


def test_load_round_trip(tmp_path):
    loaded = Tokenizer.load(save_folder(tmp_path))
    for text in SENTENCES:
        ids = loaded.encode(text)
        assert ids[0] == loaded.bos_token_id
        assert loaded.decode(ids) == text
        assert loaded.decode(ids, skip_special_tokens=False) == "<s>" + text


def test_chat_template(tmp_path):
    loaded = Tokenizer.load(save_folder(tmp_path, CHAT_TEMPLATE))
    messages = [{"role": "user", "content": "Hi"}]
    ids = loaded.apply_chat_template(messages)
    assert loaded.decode(ids, skip_special_tokens=False) == "<|user|>Hi</s><|assistant|>"
    ids = loaded.apply_chat_template(messages, add_generation_prompt=False)
    assert loaded.decode(ids, skip_special_tokens=False) == "<|user|>Hi</s>"
    with pytest.raises(RequestError, match="no tools"):
        loaded.apply_chat_template([{"role": "tool", "content": "x"}])


def test_chat_without_template():
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer().apply_chat_template([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "Hi",
        {"role": "user", "content": "Hi"},
        ["Hi"],
        [{"role": "user"}],
        [{"role": "", "content": "Hi"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": "Hi", "name": "me"}],
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    ],
)
def test_malformed_messages(messages):
    with pytest.raises(RequestError, match="messages"):
        tokenizer().apply_chat_template(messages)


def test_load_errors_name_the_fault(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no tokenizer: need one of tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ConfigError, match="missing is not a folder"):
        Tokenizer.load(tmp_path / "missing")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot load the tokenizer"):
        Tokenizer.load(tmp_path)


def test_load_never_runs_code_of_a_checkpoint(tmp_path):
    folder = save_folder(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "Own"
    config["auto_map"] = {"AutoTokenizer": ["own.Own", "own.Own"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Own: pass\n")
    with contextlib.suppress(ConfigError):
        Tokenizer.load(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.CTC()])
def test_unknown_joining_rule_is_refused(decoder):
    from transformers import PreTrainedTokenizerFast

    other = Backend.from_str(backend("byte_level").to_str())
    other.decoder = decoder
    with pytest.raises(ConfigError, match="jpd knows ByteLevel"):
        Tokenizer(PreTrainedTokenizerFast(tokenizer_object=other), "other")
