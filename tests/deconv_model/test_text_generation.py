from collections.abc import Sequence
from itertools import product

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from deconv_model.config import ModelConfig
from deconv_model.generation import generate
from deconv_model.sampling import SamplingOptions
from deconv_model.text_generation import TextStream, generate_texts, stream_text
from tests.deconv_model.small_models import CONFIGS, randomised_model

torch.set_num_threads(1)

TEXT = "naïve 試験 \U0001f642\U0001f469\u200d\U0001f680, e\u0301 \ufffd\ufffd and the the end\n"


def _byte_level(vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def _characters(alphabet: str) -> Tokenizer:
    """Return a tokenizer whose ids are one or two characters each."""
    words = [*alphabet, *map("".join, product(alphabet, repeat=2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _byte_fallback() -> Tokenizer:
    """Return a tokenizer that marks spaces, strips the first one, and has bytes for what it has no token for."""
    words = {f"<0x{i:02X}>": i for i in range(256)} | {"▁the": 256, "▁": 257, "▁e": 258, "nd": 259}
    tokenizer = Tokenizer(models.BPE(words, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTES, PAIRS = _byte_level(257), _byte_level(275)


def _pieces(tokenizer: Tokenizer, ids: Sequence[int], stop_strings: Sequence[str] = ()) -> list[str]:
    stream = TextStream(tokenizer, stop_strings)
    pieces = [stream.push(token) for token in ids]
    return [*pieces, stream.finish()]


@pytest.mark.parametrize("tokenizer", [BYTES, PAIRS], ids=["bytes", "pairs of bytes"])
def test_characters_come_whole_and_as_soon_as_their_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT).ids
    assert len(ids) > len(TEXT) / 2
    stream = TextStream(tokenizer)
    text = ""
    for i, token in enumerate(ids):
        text += stream.push(token)
        assert text == tokenizer.decode(ids[: i + 1]).rstrip("\ufffd")
    assert text + stream.finish() == TEXT


@pytest.mark.parametrize("tokenizer", [BYTES, PAIRS], ids=["bytes", "pairs of bytes"])
def test_the_pieces_of_any_ids_are_the_decoded_text(tokenizer: Tokenizer) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        # Mostly bytes that are no UTF-8, and some ids that the tokenizer does not have.
        ids = torch.randint(0, tokenizer.get_vocab_size() + 5, (12,), generator=generator).tolist()
        assert "".join(_pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=False)


def test_a_tokenizer_that_strips_the_first_space_keeps_the_others() -> None:
    assert "".join(_pieces(_byte_fallback(), [256, 256, 257, 257, 256, 0xC3, 0xA9, 258, 259])) == "the the   theé end"


def _before_the_first_complete(text: str, stop_strings: Sequence[str]) -> str:
    for end in range(len(text) + 1):
        complete = [stop for stop in stop_strings if text[:end].endswith(stop)]
        if complete:
            return text[: end - len(max(complete, key=len))]
    return text


@pytest.mark.parametrize(
    "stop_strings",
    [("ab",), ("aab", "ba"), ("bab", "a"), ("abba", "bb"), ("aaaa",), ("b", "aab"), ("abab", "abb")],
    ids=str,
)
def test_stop_strings_end_the_text_wherever_tokens_begin_and_nothing_is_taken_back(stop_strings: Sequence[str]) -> None:
    tokenizer = _characters("ab")
    vocabulary = tokenizer.get_vocab()
    for letters in product("ab", repeat=7):
        text = "".join(letters)
        expected = _before_the_first_complete(text, stop_strings)
        for pairs in ((), (0,), (1, 4), (0, 2, 4)):  # where tokens of two characters begin
            places = [i for i in range(len(text)) if i - 1 not in pairs]
            ids = [vocabulary[text[i : i + 2] if i in pairs else text[i]] for i in places]
            pieces = _pieces(tokenizer, ids, stop_strings)
            # All texts are tried, so a piece that came too early would be wrong for one of them.
            assert "".join(pieces) == expected


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    tokenizer = _characters("abc")
    vocabulary = tokenizer.get_vocab()
    stream = TextStream(tokenizer, "aab")
    given = [(stream.push(vocabulary[letters]), stream.stopped) for letters in [*"cacaaac", "aa", "bc", "c"]]
    assert [piece for piece, _ in given] == ["c", "", "ac", "", "", "a", "aac", "", "", ""]
    assert [stopped for _, stopped in given] == [False] * 8 + [True] * 2
    assert stream.finish() == ""


def test_a_stop_string_may_end_in_the_middle_of_a_token_and_hold_characters_of_several() -> None:
    ids = BYTES.encode("on 試験 \U0001f642 off").ids
    assert "".join(_pieces(BYTES, ids, ["験 \U0001f642"])) == "on 試"
    assert "".join(_pieces(BYTES, ids, ["\n\n"])) == "on 試験 \U0001f642 off"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop_strings must not hold an empty string"):
        TextStream(BYTES, ["a", ""])


END = int(BYTES.get_vocab()["<|endoftext|>"])
MODEL = randomised_model(
    ModelConfig(
        vocab_size=BYTES.get_vocab_size(),
        context_length=36,
        levels=CONFIGS["two levels, coarse attention"].levels,
    )
)
PROMPTS = ["the end", "", "試験 <|endoftext|>", "a" * 80]


def _expected(row: int, new_tokens: int, options: SamplingOptions) -> str:
    prompt = [END, *BYTES.encode(PROMPTS[row], add_special_tokens=False).ids]
    new = generate(MODEL, prompt, max_new_tokens=new_tokens, top_k=options.top_k, seed=options.seed + row, stop_id=END)
    return str(BYTES.decode([token for token in new if token != END], skip_special_tokens=False))


def test_texts_are_continued_alone_and_together() -> None:
    options = SamplingOptions(top_k=60, seed=2)
    texts = generate_texts(MODEL, BYTES, PROMPTS, end_id=END, max_new_tokens=50, options=options)
    assert texts == [_expected(row, 50, options) for row in range(len(PROMPTS))]
    pieces = list(stream_text(MODEL, BYTES, PROMPTS[0], end_id=END, max_new_tokens=50, options=options))
    assert "".join(pieces) == texts[0]
    assert len(pieces) > 5
    assert all(pieces)


def test_stop_strings_end_the_continuations_of_a_batch_each_at_its_own() -> None:
    options = SamplingOptions(top_k=60, seed=2)
    free = [_expected(row, 50, options) for row in range(len(PROMPTS))]
    stops = [free[0][4:6], free[3][20:22]]
    texts = generate_texts(MODEL, BYTES, PROMPTS, end_id=END, max_new_tokens=50, options=options, stop_strings=stops)
    assert texts == [_before_the_first_complete(text, stops) for text in free]
    assert len(texts[0]) <= 4
    pieces = stream_text(
        MODEL, BYTES, PROMPTS[0], end_id=END, max_new_tokens=10**9, options=options, stop_strings=stops[0]
    )
    assert "".join(pieces) == _before_the_first_complete(free[0], stops[:1])


def test_errors_come_at_the_call() -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be a whole number of at least 0, got -1"):
        stream_text(MODEL, BYTES, "a", end_id=END, max_new_tokens=-1)
    with pytest.raises(ValueError, match="empty string"):
        stream_text(MODEL, BYTES, "a", end_id=END, max_new_tokens=1, stop_strings="")
