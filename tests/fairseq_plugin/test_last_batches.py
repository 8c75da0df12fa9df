"""With the plugin fairseq's batches hold every sentence, and are otherwise fairseq's own."""

import numpy as np
import pytest
from fairseq.data import data_utils
from fairseq.data.data_utils_fast import batch_by_size_vec
from hypothesis import given
from hypothesis import strategies as st

import normexp.fairseq_plugin  # noqa: F401 (its loading is what is tested)


@given(
    sizes=st.lists(st.integers(1, 30), max_size=60),
    multiple=st.integers(1, 9),
    max_tokens=st.one_of(st.none(), st.integers(30, 200)),
    max_sentences=st.one_of(st.none(), st.integers(1, 20)),
    as_iterator=st.booleans(),
)
def test_no_sentence_is_left_out(sizes, multiple, max_tokens, max_sentences, as_iterator) -> None:
    order = np.argsort(sizes, kind="stable").astype(np.int64)
    lengths = np.array(sizes, dtype=np.int64)
    batches = data_utils.batch_by_size(
        iter(order) if as_iterator else order,
        num_tokens_fn=lambda index: sizes[index],
        num_tokens_vec=lengths[order],
        max_tokens=max_tokens,
        max_sentences=max_sentences,
        required_batch_size_multiple=multiple,
    )
    assert [index for batch in batches for index in batch] == list(order)
    # as fairseq's compiled function makes them, before their last one is dropped
    limits = max_tokens or -1, max_sentences or -1
    expected = batch_by_size_vec(order, lengths[order], *limits, multiple) if sizes else []
    assert [list(batch) for batch in batches] == [list(batch) for batch in expected]


def test_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def batches() -> list:
        return data_utils.batch_by_size(
            range(21), lambda _: 1, max_tokens=100, required_batch_size_multiple=11
        )

    assert [len(batch) for batch in batches()] == [11, 10]
    assert len(batches()) == 2
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "keeping the last 10 of 21 sentences" in said[0]
