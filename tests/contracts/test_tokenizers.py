"""tokenizers and fastokens: the size of the cache of words, and batches as flat arrays."""

from __future__ import annotations

import fastokens
import numpy as np
import tokenizers

from tests.contracts.contract import Contract
from tests.tiny import tiny_tokenizer

TOKENIZERS = Contract("tokenizers", "raysft/data/tokenization/tokenizer.py")
FASTOKENS = Contract("fastokens", "raysft/data/tokenization/fast_encoder.py")


def test_the_cache_of_words_can_be_larger():
    for model in (tokenizers.models.BPE, tokenizers.models.Unigram):
        TOKENIZERS.name(model, "_resize_cache")
    tokenizers.models.BPE()._resize_cache(100_000)
    TOKENIZERS.name(tokenizers.Tokenizer, "encode_special_tokens")


def test_fastokens_gives_the_ids_of_a_batch_and_where_each_text_ends():
    backend = tiny_tokenizer().backend_tokenizer
    FASTOKENS.name(fastokens.Tokenizer, "encode_batch_flat")
    quick = FASTOKENS.name(fastokens.Tokenizer, "from_json_str")(backend.to_str())
    texts = ["one", "", "two words"]
    ids, ends = quick.encode_batch_flat(texts, False)
    right = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    assert np.frombuffer(ids, np.uint32).tolist() == [token for each in right for token in each]
    assert np.frombuffer(ends, np.uint64).tolist() == np.cumsum([0, *map(len, right)]).tolist()
