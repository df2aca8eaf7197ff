"""The ids of CPM-Bee's tokens, all below `config.vocab_size`.

| ids | what |
| --- | --- |
| `0 .. num_words - 1` | the words of `vocab.txt` |
| the `num_extension_slots(num_words)` next | slots: in each row of a batch they stand for its own extension tokens |
| one more | the placeholder of images |
| from there on | tokens that were added to the tokenizer |

The original numbers extension tokens beyond its vocabulary, so that the width of its logits changes with the prompt.
Tools take logits and ids of one width for granted. So the vocabulary is padded, by a rule that needs nothing but the
number of words: original files, and folders written before, are padded when they are read.
"""

VOCAB_MULTIPLE = 64
LEAST_EXTENSION_SLOTS = 400


def padded_vocab_size(num_words: int) -> int:
    """Ids in all, as long as no tokens are added: 87,040 for the released vocabulary of 86,583 words."""
    return -(-(num_words + 1 + LEAST_EXTENSION_SLOTS) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def num_extension_slots(num_words: int) -> int:
    """Different extension tokens that one row can have: 456 for the released vocabulary."""
    return padded_vocab_size(num_words) - num_words - 1


def image_token_id(num_words: int) -> int:
    """The placeholder of images."""
    return padded_vocab_size(num_words) - 1
