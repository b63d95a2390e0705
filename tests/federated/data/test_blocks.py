from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from configs.errors import UserError
from federated.data.answers import AnsweredText
from federated.data.blocks import Blocks, batches, pack_blocks, take
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.paths import SHARED

BOS, EOS = 256, 257


TOKENIZER = byte_tokenizer(bos_token="<s>", eos_token="</s>")


def reference(texts: list[str], tokenizer: PreTrainedTokenizerFast, start: int, size: int) -> list[list[int]]:
    """One text at a time, one token at a time."""
    stream = []
    for text in texts:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        stream += [start, *tokens] if tokens else []
    return [stream[at : at + size] for at in range(0, len(stream), size) if len(stream) - at > 1]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=20), st.integers(2, 17))
def test_blocks_are_the_concatenated_documents(texts, size):
    expected = reference(texts, TOKENIZER, BOS, size)
    if not expected:
        with pytest.raises(UserError):
            pack_blocks(texts, TOKENIZER, block_size=size)
        return
    blocks = pack_blocks(texts, TOKENIZER, block_size=size)
    assert blocks.input_ids.dtype == blocks.labels.dtype == torch.int64
    assert blocks.input_ids.shape == blocks.labels.shape == (len(expected), size)
    for row, labels, tokens in zip(blocks.input_ids.tolist(), blocks.labels.tolist(), expected, strict=True):
        assert row[: len(tokens)] == tokens
        assert labels == tokens + [-100] * (size - len(tokens))
    assert blocks.num_tokens == sum(map(len, expected))


def test_bos_stands_between_documents_and_padding_is_in_the_vocabulary():
    blocks = pack_blocks(["ab", "", "c"], TOKENIZER, block_size=4)
    a, b, c = TOKENIZER.encode("abc")
    assert blocks.input_ids.tolist() == [[BOS, a, b, BOS]], "nothing predicts the one token left over"
    padded = pack_blocks(["ab", "cc"], TOKENIZER, block_size=4)
    assert padded.labels.tolist() == [[BOS, a, b, BOS], [c, c, -100, -100]]
    assert padded.input_ids.max() < len(TOKENIZER) and padded.input_ids.min() >= 0


def test_more_documents_than_are_tokenized_at_once():
    texts = [f"document {number}" for number in range(700)]
    blocks = pack_blocks(iter(texts), TOKENIZER, block_size=16)
    assert blocks.input_ids[blocks.labels != -100].tolist() == sum(reference(texts, TOKENIZER, BOS, 16), [])


def test_max_blocks_reads_no_more_than_needed():
    consumed = []

    def endless():
        while True:
            consumed.append(0)
            yield "ten bytes."

    blocks = pack_blocks(endless(), TOKENIZER, block_size=8, max_blocks=3)
    assert len(blocks) == 3 and (blocks.labels != -100).all() and len(consumed) <= 512
    assert len(pack_blocks(["a" * 20], TOKENIZER, block_size=8, max_blocks=0)) == 3


def test_eos_stands_in_for_a_missing_bos_and_without_both_it_is_refused():
    blocks = pack_blocks(["ab"], byte_tokenizer(eos_token="</s>"), block_size=4)
    assert blocks.input_ids[0, 0] == 256
    with pytest.raises(UserError, match="neither"):
        pack_blocks(["ab"], byte_tokenizer(), block_size=4)


def test_blocks_of_answers_have_their_loss_alone_and_blocks_without_one_are_left_out():
    documents = [AnsweredText("askyes", (3, 6)), AnsweredText("x" * 9, (0, 1)), AnsweredText("why", ())]
    blocks = pack_blocks(documents, TOKENIZER, block_size=4)
    # <s>ask yes<s> x<s>... of which the block xxxx and all after it have no answer
    y, e, s, x = TOKENIZER.encode("yesx")
    assert blocks.labels.tolist() == [[y, e, s, -100], [x, -100, -100, -100]][:1]
    assert blocks.num_tokens == 3 and TOKENIZER.decode(blocks.input_ids[0]) == "yes<s>"
    both = pack_blocks([documents[0], "no"], TOKENIZER, block_size=5)
    assert TOKENIZER.decode(both.labels[both.labels != -100]) == "yes<s>no"
    assert torch.equal(both.input_ids, pack_blocks(["askyes", "no"], TOKENIZER, block_size=5).input_ids)


def test_max_blocks_counts_blocks_with_an_answer():
    documents = [AnsweredText("x" * 7 + "y" * 8, (7 + 4, 7 + 8))] * 3
    blocks = pack_blocks(documents, TOKENIZER, block_size=8, max_blocks=2)
    assert [TOKENIZER.decode(row[row != -100]) for row in blocks.labels] == ["yyyy", "yyyy"]
    every = pack_blocks(documents, TOKENIZER, block_size=8)
    assert len(every) == 3 and torch.equal(every.labels[:2], blocks.labels)
    with pytest.raises(UserError, match="an answer with a token to predict, got none"):
        pack_blocks([AnsweredText("why", ())], TOKENIZER, block_size=8)


def test_empty_input_is_refused():
    for texts in ([], ["", ""]):
        with pytest.raises(UserError, match="got none"):
            pack_blocks(texts, TOKENIZER, block_size=4)
    largest = int(pack_blocks(["abc"], TOKENIZER, block_size=4).input_ids.max())
    with pytest.raises(UserError, match=f"token ids below {largest}"):
        pack_blocks(["abc"], TOKENIZER, block_size=4, vocab_size=largest)
    assert len(pack_blocks(["abc"], TOKENIZER, block_size=4, vocab_size=largest + 1)) == 1


def numbered(count: int) -> Blocks:
    ids = torch.arange(count).unsqueeze(1).expand(count, 2)
    return Blocks(ids, ids + 100)


def test_take():
    assert take(numbered(5), 2).input_ids[:, 0].tolist() == [0, 1]
    assert len(take(numbered(5), 0)) == len(take(numbered(5), 9)) == 5


def test_batches_visit_every_block_once_an_epoch_in_the_generators_order():
    def epochs(seed: int) -> list[list[int]]:
        stream = batches(numbered(7), 3, generator=torch.Generator().manual_seed(seed))
        drawn = list(islice(stream, 6))
        assert [len(ids) for ids, _ in drawn] == [3, 3, 1] * 2
        assert all(torch.equal(ids + 100, labels) for ids, labels in drawn)
        flat = torch.cat([ids[:, 0] for ids, _ in drawn]).tolist()
        return [flat[:7], flat[7:]]

    first, second = epochs(0)
    assert sorted(first) == sorted(second) == list(range(7)) and first != second
    assert epochs(0) == [first, second] and epochs(1) != [first, second]


def test_batches_of_no_blocks_are_refused():
    with pytest.raises(UserError, match="got none"):
        batches(numbered(0), 3, generator=torch.Generator())


def test_a_real_tokenizer_round_trips():
    folder = SHARED / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no real tokenizer: {folder} is absent")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["Once upon a time, there was a cat.", "It sat on a mat."]
    blocks = pack_blocks(texts, tokenizer, block_size=16)
    tokens = blocks.input_ids[blocks.labels != -100]
    starts = (tokens == tokenizer.bos_token_id).nonzero().flatten().tolist()
    assert len(starts) == 2 and starts[0] == 0
    assert tokenizer.decode(tokens[1 : starts[1]]).strip() == texts[0]
    assert tokenizer.decode(tokens[starts[1] + 1 :]).strip() == texts[1]
