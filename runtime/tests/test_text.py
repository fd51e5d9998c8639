"""Text from tokens as they come is the decoding of all of them; blocks of the cache are shared and given back."""

import itertools
import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from castlm_runtime.cache import Blocks
from castlm_runtime.detokenizer import Detokenizer, clean_up
from castlm_runtime.model import BLOCK

WORDS = ["▁Hello", "▁world", "▁", "▁▁", "o", ".", "▁.", "n't", "▁n't", "'s", "▁'", "▁'s", "!", "▁!", "\n", "é"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def like_llama_2() -> Tokenizer:
    """Metaspaces, single bytes, and the first space dropped."""
    vocabulary = {text: number for number, text in enumerate(["<unk>", *WORDS, *BYTES])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<think>", special=True)])
    return tokenizer


def like_gpt_2() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: number for number, char in enumerate(alphabet)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<think>", special=True)])
    return tokenizer


def streamed(tokenizer: Tokenizer, ids: list[int], cleans_up: bool) -> list[str]:
    stream = Detokenizer(lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=True), cleans_up)
    return [stream.put(token, number == len(ids)) for number, token in enumerate(ids, 1)]


def whole(tokenizer: Tokenizer, ids: list[int], cleans_up: bool) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return clean_up(text) if cleans_up else text


@pytest.mark.parametrize("make", [like_llama_2, like_gpt_2])
@pytest.mark.parametrize("cleans_up", [False, True])
def test_text_in_pieces_is_the_decoding_of_all_tokens(make, cleans_up):
    """Of words, spaces and special tokens, of characters in several bytes, and of bytes that are no character."""
    tokenizer, draw = make(), random.Random(0)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    pool = [[number] for number in range(1 if make is like_llama_2 else 0, 17 if make is like_llama_2 else size)]
    pool += [[size - 1]] * 3
    if make is like_llama_2:
        pool += [[tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()] for text in ("🙂", "é€", "\n")]
    for _ in range(1500):
        ids = list(itertools.chain(*(draw.choice(pool) for _ in range(draw.randrange(1, 30)))))
        assert "".join(streamed(tokenizer, ids, cleans_up)) == whole(tokenizer, ids, cleans_up), ids


def test_a_space_after_a_special_token_stays():
    tokenizer = like_llama_2()
    ids = [tokenizer.token_to_id(text) for text in ("▁Hello", "<think>", "▁world")]
    assert streamed(tokenizer, ids, False) == ["Hello", "", " world"]


def test_bytes_that_are_no_character_do_not_wait_for_ever():
    """Each step decodes a few tokens, whatever came before."""
    tokenizer, lengths = like_llama_2(), []

    def decode(tokens):
        lengths.append(len(tokens))
        return tokenizer.decode(list(tokens), skip_special_tokens=True)

    stream = Detokenizer(decode)
    ids = [tokenizer.token_to_id("<0x80>")] * 500
    text = "".join(stream.put(token, number == 500) for number, token in enumerate(ids, 1))
    assert text == tokenizer.decode(ids)
    assert max(lengths) < 40


def test_sequences_that_begin_alike_share_whole_blocks():
    pool = Blocks(8)
    prompt = list(range(2 * BLOCK + 5))
    first = pool.open(prompt, 3 * BLOCK)
    assert first.num_read == 0
    first.make_room(len(prompt))
    first.have_read(len(prompt))
    second = pool.open([*prompt[: BLOCK + 3], 7], 2 * BLOCK)
    assert (second.num_read, second.blocks) == (BLOCK, first.blocks[:1])
    same = pool.open(prompt[: 2 * BLOCK], 2 * BLOCK)
    assert same.num_read == BLOCK  # the last token is read for its logits
    other = pool.open([1, *prompt[1:]], BLOCK)
    assert other.num_read == 0
    for sequence in (first, second, same, other):
        sequence.close()
    assert pool.num_used == 0
    again = pool.open(prompt, 3 * BLOCK)  # after all have gone
    assert again.num_read == 2 * BLOCK
    assert Blocks(8, shares_prefixes=False).open(prompt, 3 * BLOCK).num_read == 0


def test_the_block_that_was_used_least_recently_goes_first():
    pool = Blocks(4)
    prompts = [[number] * (BLOCK + 1) for number in range(3)]
    for prompt in (*prompts, prompts[0]):
        sequence = pool.open(prompt, BLOCK + 1)
        sequence.make_room(len(prompt))
        sequence.have_read(len(prompt))
        sequence.close()
    hits = [pool.open(prompt, BLOCK + 1) for prompt in (prompts[0], prompts[2])]
    assert [sequence.num_read for sequence in hits] == [BLOCK, BLOCK]
    hits[0].make_room(BLOCK + 1)  # the last unused block
    hits[1].make_room(BLOCK + 1)  # the place of prompts[1]
    for sequence in hits:
        sequence.close()
    assert pool.open(prompts[1], BLOCK + 1).num_read == 0


def test_blocks_never_belong_to_two_and_are_never_lost():
    """Random sequences that come, grow and go."""
    draw, pool, living = random.Random(1), Blocks(12), []
    for step in itertools.count():
        if step == 3000:
            break
        if living and draw.random() < 0.4:
            living.pop(draw.randrange(len(living))).close()
        else:
            tokens = [draw.randrange(2) for _ in range(BLOCK * draw.randrange(3))] + [step]
            tokens = sorted(tokens)  # many begin alike
            most = len(tokens) + draw.randrange(2 * BLOCK)
            if pool.fits(most):
                living.append(pool.open(tokens, most))
        for sequence in living:
            while len(sequence.tokens) + 1 < draw.randrange(len(sequence.tokens), len(sequence.tokens) + 3):
                sequence.tokens.append(draw.randrange(2))
            end = min(len(sequence.tokens), sequence._num_reserved * BLOCK)
            sequence.make_room(end)
            sequence.have_read(end)
        used = {block for sequence in living for block in sequence.blocks}
        assert pool.num_used == len(used)
        assert len(used) + len(pool._unused) + len(pool._left) == pool.num_blocks
    for sequence in living:
        sequence.close()
    assert pool._reserved == 0
