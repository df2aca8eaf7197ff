"""Tokenizer of CPM-Bee: greedy longest match over `vocab.txt`, in document syntax (see `document_cpm_bee`)."""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, filterfalse
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedTokenizer

from .document_cpm_bee import (
    TABLE_HEAD,
    AnswerSlot,
    EncodedDocument,
    collate_documents,
    flatten_document,
    own_strings,
    segment_relations,
)
from .sequences_cpm_bee import TokenSequences
from .token_ids_cpm_bee import image_token_id, num_extension_slots


VOCAB_FILES_NAMES = {"vocab_file": "vocab.txt"}

# Line feed and space can't stand for themselves in a file of one token a line.
VOCAB_FILE_NAMES_OF_WHITESPACE = {"</n>": "\n", "</_>": " "}
SPECIAL_TOKENS = ("<pad>", "<unk>", "<mask>", "<sep>", "<s>", "</s>", "<root>", "<ans>", "<option>", "<eod>")

# What the ids after the words are called. No text can be tokenised to a slot: its name is neither a special token nor
# without a character that the vocabulary has.
SLOT_NAME = "[extension {}]"
IMAGE_TOKEN = "<image>"

# A cap for one error message's quotation of user text.
QUOTED_CHARACTERS = 40


def load_vocab(vocab_file: str | os.PathLike) -> dict[str, int]:
    """Reads `vocab.txt`: one token a line, id = line number from 0.

    Raises:
        ValueError: if the file is not UTF-8, repeats a token or lacks one of the special tokens.
    """
    try:
        with open(vocab_file, encoding="utf-8", newline="") as file:
            lines = file.read().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{vocab_file} is not a CPM-Bee vocabulary: {error}.") from error
    if lines[-1] == "":
        lines.pop()
    if all(line.endswith("\r") for line in lines[:-1]):  # checked out with CRLF line ends; the last may have none
        lines = [line.removesuffix("\r") for line in lines]
    for name, token in VOCAB_FILE_NAMES_OF_WHITESPACE.items():
        if name in lines:
            lines[lines.index(name)] = token
    vocab = dict(zip(lines, range(len(lines)), strict=True))
    missing = [token for token in (*SPECIAL_TOKENS, *VOCAB_FILE_NAMES_OF_WHITESPACE.values()) if token not in vocab]
    if missing:
        raise ValueError(
            f"{vocab_file} is not a CPM-Bee vocabulary: it has {len(lines):,} lines and lacks "
            f"{', '.join(repr(token) for token in missing)}."
        )
    if len(vocab) != len(lines) or not vocab.keys().isdisjoint(VOCAB_FILE_NAMES_OF_WHITESPACE):
        raise ValueError(f"{vocab_file} repeats a token: {len(lines):,} lines, {len(vocab):,} different tokens.")
    return vocab


class LongestMatch:
    """Greedy longest match from the left, in time linear in the text.

    Every prefix of every word has an entry `(token, length, extendable)`: the longest word that the prefix starts
    with, and whether a longer prefix exists. A match walks from prefix to longer prefix until none is left. The
    entries of words with the same first character are made when the first text has it.
    """

    def __init__(self, words: Iterable[str]):
        self.words: defaultdict[str, list[str]] = defaultdict(list)
        """By their first character."""
        for word in words:
            self.words[word[:1]].append(word)
        self.prefixes: dict[str, tuple[str | None, int, bool]] = {}

    def _first_entry(self, character: str) -> tuple[str | None, int, bool] | None:
        """Makes the entries of all words that begin so; None if there are none."""
        if character not in self.words:
            return None
        words = set(self.words[character])
        extendable: set[str] = set()
        for word in words:
            for end in range(len(word) - 1, 0, -1):
                prefix = word[:end]
                if prefix in extendable:
                    break
                extendable.add(prefix)
        prefixes: dict[str, tuple[str | None, int, bool]] = {}
        for prefix in sorted(words | extendable, key=len):
            if prefix in words:
                prefixes[prefix] = (prefix, len(prefix), prefix in extendable)
            else:
                token, length, _ = prefixes[prefix[:-1]] if len(prefix) > 1 else (None, 0, True)
                prefixes[prefix] = (token, length, True)
        self.prefixes.update(prefixes)  # at once: another thread sees all of them or none
        return prefixes[character]

    def split(self, text: str) -> list[str]:
        """Splits `text` into words, and runs of characters that no word starts with."""
        pieces: list[str] = []
        append, get = pieces.append, self.prefixes.get
        begin, unknown, end_of_text = 0, 0, len(text)
        while begin < end_of_text:
            end = begin + 2  # most words have two characters or more: look there first
            entry = get(text[begin:end]) or get(text[begin])
            if entry is None:
                if self._first_entry(text[begin]) is None:
                    begin += 1
                continue
            while entry[2] and end < end_of_text:
                end += 1
                longer = get(text[begin:end])
                if longer is None:
                    break
                entry = longer
            if not entry[1]:  # words begin so, but none is here
                begin += 1
                continue
            if unknown < begin:
                append(text[unknown:begin])
            append(entry[0])
            begin += entry[1]
            unknown = begin
        if unknown < end_of_text:
            append(text[unknown:])
        return pieces


class Pieces(dict[int, str]):
    """What ids are in a text; `unknown` for all others."""

    unknown = ""

    def __missing__(self, index: int) -> str:
        return self.unknown


class CpmBeeEncoding(BatchEncoding):
    """Inputs that know what their extension tokens stand for, wherever they are copied or sent to."""

    @property
    def extension_strings(self) -> list[dict[int, str]]:
        """For every row, `id -> string` of what is no token of the vocabulary: `decode` takes it as
        `extension_table`."""
        return own_strings(self.data["extension_table"])


class CpmBeeTokenizer(PreTrainedTokenizer):
    """CPM-Bee's tokenizer.

    Called as any tokenizer it takes text in document syntax: `<name>` is a special token and a literal `<` is written
    `<<` (`escape` does it); strings without a token become `<unk>`. Nothing is lost in `encode_text` and
    `encode_document`, which return the extension tokens too.

    Its ids are those of `token_ids_cpm_bee`: the words of `vocab.txt`, slots for extension tokens, the placeholder
    of images, and tokens that were added; `len(tokenizer)` counts all of them.

    Args:
        vocab_file (`str`): path of `vocab.txt`.

    Raises:
        ValueError: for text with an unpaired `<`, such as `"a < b"`.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str,
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        unk_token: str = "<unk>",
        sep_token: str = "<sep>",
        pad_token: str = "<pad>",
        mask_token: str = "<mask>",
        extra_special_tokens: Sequence[str] = ("<root>", "<ans>", "<option>", "<eod>"),
        padding_side: str = "left",
        model_max_length: int = 3000,
        **kwargs,
    ):
        self.vocab = load_vocab(vocab_file)
        slots = [SLOT_NAME.format(slot) for slot in range(num_extension_slots(self.num_words))]
        self._tokens = [*self.vocab, *slots, IMAGE_TOKEN]
        self._matcher: LongestMatch | None = None
        self._special_ids: frozenset[int] | None = None
        self._pieces: dict[bool, Pieces] = {}
        # Written in older folders for other tokenizers; here only document syntax decides.
        for name in ("additional_special_tokens", "add_bos_token", "add_eos_token", "token_type_ids_pattern"):
            kwargs.pop(name, None)
        kwargs["special_tokens_pattern"] = "none"
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            unk_token=unk_token,
            sep_token=sep_token,
            pad_token=pad_token,
            mask_token=mask_token,
            extra_special_tokens=list(extra_special_tokens),
            padding_side=padding_side,
            model_max_length=model_max_length,
            token_type_ids_pattern="all_zeros",
            **kwargs,
        )
        self.vocab_file = vocab_file

    # ------------------------------------------------------------------------------------------------ vocabulary

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    @property
    def num_words(self) -> int:
        """Tokens of `vocab.txt`."""
        return len(self.vocab)

    @property
    def image_token_id(self) -> int:
        """The placeholder of images."""
        return image_token_id(self.num_words)

    def get_vocab(self) -> dict[str, int]:
        return {**self.vocab, **self._other_ids, **self._added_tokens_encoder}

    def _convert_token_to_id(self, token: str) -> int:
        index = self.vocab.get(token)
        if index is None:
            index = self._other_ids.get(token, self.vocab[str(self.unk_token)])
        return index

    @functools.cached_property
    def _other_ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self._tokens[self.num_words :], self.num_words)}

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens[index] if 0 <= index < len(self._tokens) else str(self.unk_token)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        path = os.path.join(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + "vocab.txt")
        names = {token: name for name, token in VOCAB_FILE_NAMES_OF_WHITESPACE.items()}
        with open(path, "w", encoding="utf-8", newline="") as file:
            file.writelines(f"{names.get(token, token)}\n" for token in self.vocab)
        return (path,)

    def _add_tokens(self, new_tokens, special_tokens: bool = False) -> int:
        self._matcher = self._special_ids = None
        self._pieces = {}
        return super()._add_tokens(new_tokens, special_tokens=special_tokens)

    @property
    def matcher(self) -> LongestMatch:
        if self._matcher is None:
            words = chain(self.vocab, self._added_tokens_encoder)
            self._matcher = LongestMatch(filterfalse(frozenset(SPECIAL_TOKENS).__contains__, words))
        return self._matcher

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens."""
        if self._special_ids is None:
            added = {index for index, token in self._added_tokens_decoder.items() if token.special}
            named = {self.vocab[token] for token in SPECIAL_TOKENS}
            self._special_ids = frozenset(added | named | {self.image_token_id})
        return self._special_ids

    # ----------------------------------------------------------------------------------------------- text -> tokens

    @staticmethod
    def escape(text: str) -> str:
        """Plain text -> document syntax: no `<` of it opens a special token."""
        return text.replace("<", "<<")

    @staticmethod
    def unescape(text: str) -> str:
        """Document syntax -> text for people: `<<` is one `<` again; special tokens keep their names."""
        return text.replace("<<", "<")

    @staticmethod
    def split_document_syntax(text: str) -> Iterator[tuple[str, bool]]:
        """Yields `(text, is_special)`: special tokens with their brackets, and plain text between them unescaped.

        Raises:
            ValueError: for a `<` that opens no special token, with its position and what to write instead.
        """

        def fault(position: int, what: str) -> ValueError:
            quote = text[max(0, position - QUOTED_CHARACTERS // 2) : position + QUOTED_CHARACTERS // 2]
            return ValueError(
                f"{what} at character {position} of {len(text)}: {quote!r}. In document syntax '<' opens a special "
                "token; write '<<' (tokenizer.escape) for a literal '<'."
            )

        plain: list[str] = []
        begin = 0
        while (position := text.find("<", begin)) >= 0:
            plain.append(text[begin:position])
            if text.startswith("<<", position):
                plain.append("<")
                begin = position + 2
                continue
            end = text.find(">", position + 2)  # whatever follows the `<` is of the token
            if end < 0:
                raise fault(position, "The text ends inside a special token opened")
            if text.find("<", position + 2, end) >= 0:
                raise fault(position, "There is a '<' inside the special token opened")
            if any(plain):
                yield "".join(plain), False
            plain.clear()
            yield text[position : end + 1], True
            begin = end + 1
        plain.append(text[begin:])
        if any(plain):
            yield "".join(plain), False

    def tokenize(self, text: str, **kwargs) -> list[str]:
        split, tokens = self.matcher.split, []
        if kwargs.get("split_special_tokens", self.split_special_tokens):
            return split(text)
        for part, is_special in self.split_document_syntax(text):
            if is_special:
                tokens.append(part)
            else:
                tokens.extend(split(part))
        return tokens

    def encode_text(
        self, text: str, extension_table: dict[int, str] | None = None
    ) -> tuple[list[int], dict[int, str]]:
        """Encodes document syntax without loss.

        Args:
            text: text in document syntax.
            extension_table: `id -> string` of the strings met before; they keep their ids. Not changed.

        Returns:
            Token ids, those without a token numbered from `num_words` in order of first use, and their table.

        Raises:
            ValueError: for text that is not document syntax, or with more strings without a token than there are
                slots.
        """
        numbers = {string: index for index, string in (extension_table or {}).items()}
        known = self.num_words
        vocab, added = self.vocab, self._added_tokens_encoder
        ids = []
        for token in self.tokenize(text):
            index = vocab.get(token)
            if index is None:
                index = added.get(token)
            if index is None:
                index = numbers.setdefault(token, known + len(numbers))
            ids.append(index)
        if len(numbers) > (slots := num_extension_slots(known)):
            raise ValueError(
                f"The text has {len(numbers):,} different strings without a token, more than the {slots:,} that one "
                "prompt has slots for. Shorten it, or leave such characters out."
            )
        return ids, {index: string for string, index in numbers.items()}

    # -------------------------------------------------------------------------------------------------- documents

    def encode_document(self, document: Mapping[str, Any], *, close_answers: bool = False) -> EncodedDocument:
        """Encodes one document (nested dict of strings in document syntax).

        Args:
            document: see `document_cpm_bee`.
            close_answers: end given answers with `</s>`, as training needs it.

        Raises:
            ValueError: for anything but a nested dict of strings, text that is not document syntax, or a special token
                whose base the vocabulary lacks.
        """
        segments = flatten_document(document)
        begin_id, end_id = self.vocab["<s>"], self.vocab["</s>"]
        table: dict[int, str] = {}
        ids: list[int] = []
        names: list[str] = []
        num_slots, seen = 0, table
        encoded = EncodedDocument([], [], [], [], segment_relations(segments), [], [], {})
        for segment_id, segment in enumerate(segments):
            try:
                tokens, table = self.encode_text(segment.text, table)
            except ValueError as error:
                where = " > ".join(segment.path) or "the top level"
                raise ValueError(f"The document's text at {where[:200]} can't be encoded. {error}") from error
            names += list(table.values())[len(seen) :]
            seen = table
            if segment.is_answer and not segment.text:
                # In a prompt the original's slots hold `<ans_1>`, `<ans_2>`, ..., which count with those of texts.
                num_slots += 1
                names.append(f"<ans_{num_slots}>")
            begin = len(ids)
            closed = close_answers if segment.is_answer else True
            ids += [begin_id, *tokens, *([end_id] if closed else [])]
            length = len(ids) - begin
            encoded.token_type_ids += [int(segment.is_answer)] * length
            encoded.segment_ids += [segment_id] * length
            if segment.is_image:
                encoded.image_bounds.append((begin + 1, len(ids) - 1))
            if segment.is_answer:
                encoded.answer_slots.append(AnswerSlot(segment.path, segment_id, begin, len(ids)))
        encoded.extension_table = table
        numbered = self.number_extensions(table, table.values())
        in_prompt = self.number_extensions(table, names)
        encoded.prompt_strings = {pair: table[index] for index, pair in in_prompt.items()}
        encoded.prompt_numbers = {place: in_prompt[index][1] for place, index in enumerate(ids) if index in in_prompt}
        encoded.extension_strings = {pair: table[index] for index, pair in numbered.items()}
        for index in ids:
            base, sub = numbered.get(index, (index, 0))
            encoded.input_ids.append(base)
            encoded.sub_ids.append(sub)
        return encoded

    def number_extensions(self, table: Mapping[int, str], names: Iterable[str]) -> dict[int, tuple[int, int]]:
        """Extension id -> (base id, number within the base); `names` are the strings in order, and those of slots."""
        counts: dict[int, int] = {}
        numbered, ids = {}, {string: index for index, string in table.items()}
        for string in dict.fromkeys(names):
            base = self.unk_token_id
            if string.startswith("<") and string.endswith(">") and len(string) > 1:
                name = f"<{string[1:-1].split('_', 1)[0]}>"
                if name not in self.vocab:
                    raise ValueError(
                        f"The special token {string!r} has no base: {name!r} is not in the vocabulary. Write '<<' "
                        "(tokenizer.escape) for a literal '<'."
                    )
                base = self.vocab[name]
            if string in ids:
                numbered[ids[string]] = (base, counts.get(base, 0))
            counts[base] = counts.get(base, 0) + 1
        return numbered

    def collate(
        self,
        documents: Sequence[EncodedDocument],
        *,
        with_labels: bool = False,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        min_length: int = 0,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Pads encoded documents to one batch of model inputs (see `document_cpm_bee.collate_documents`).

        The result's `extension_strings` has, for every row, `id -> string` of the strings without a token: hand it to
        `decode` as `extension_table`.
        """
        batch = collate_documents(
            documents,
            num_words=self.num_words,
            pad_token_id=self.pad_token_id,
            padding_side=padding_side or self.padding_side,
            pad_to_multiple_of=pad_to_multiple_of,
            min_length=min_length,
            with_labels=with_labels,
        )
        table = batch["extension_table"]
        if return_tensors == "pt" and not table[0]:  # an empty list has no third axis to see
            batch["extension_table"] = torch.zeros(len(documents), 0, TABLE_HEAD, dtype=torch.long)
        return CpmBeeEncoding(batch, tensor_type=return_tensors)

    def prepare_for_finetune(
        self, data_list: Mapping[str, Any] | Sequence[Mapping[str, Any]], max_length: int = 2048
    ) -> BatchEncoding:
        """A batch of answered documents to learn from, as the Hub's own class has it: `model(**batch).loss`.

        Args:
            data_list: one or several documents in document syntax, their answers under `<ans>`.
            max_length: the most tokens of a document; longer ones are an error, never cut.

        Returns:
            Tensors, padded on the right, with `labels`: the answers' tokens and `</s>`, -100 elsewhere.

        Raises:
            ValueError: for a malformed document, one without an answer, or one that is too long.
        """
        documents = [data_list] if isinstance(data_list, Mapping) else list(data_list)
        if not documents:
            raise ValueError("prepare_for_finetune needs at least one document, got an empty list.")
        encoded = []
        for index, document in enumerate(documents):
            try:
                encoded.append(self.encode_document(document, close_answers=True))
            except ValueError as error:
                raise ValueError(f"Document {index}: {error}") from error
            if not any(slot.end - slot.begin > 2 for slot in encoded[-1].answer_slots):
                raise ValueError(f'Document {index} has no answer to learn: give it one under "<ans>".')
            if len(encoded[-1]) > max_length:
                raise ValueError(
                    f"Document {index} has {len(encoded[-1]):,} tokens, more than max_length ({max_length:,}): "
                    "shorten it, or raise max_length; nothing is cut off silently."
                )
        return self.collate(encoded, with_labels=True, padding_side="right", return_tensors="pt")

    # ----------------------------------------------------------------------------------------------- tokens -> text

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs) -> str | list[str]:
        """As in transformers. What `generate` returned brings its strings along; for ids of other origin they are
        given as `extension_table`, `id -> string`."""
        if isinstance(token_ids, TokenSequences) and "extension_table" not in kwargs:
            if token_ids.ndim == 2:
                return [self.decode(row, skip_special_tokens, **kwargs) for row in token_ids]
            kwargs["extension_table"] = next(iter(token_ids.extension_strings), None)
            token_ids = token_ids.tolist()
        if isinstance(token_ids, list) and set(map(type, token_ids)) == {int}:  # the library looks at each of them
            return self._decode(token_ids, skip_special_tokens, **kwargs)
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, *args, **kwargs) -> list[str]:
        """As [`decode`]."""
        if isinstance(sequences, TokenSequences) and sequences.ndim == 2:
            return self.decode(sequences, skip_special_tokens, **kwargs)
        return super().batch_decode(sequences, skip_special_tokens, *args, **kwargs)

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        return "".join(tokens)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        extension_table: Mapping[int, str] | None = None,
        **kwargs,
    ) -> str:
        """Decodes to document syntax, which encodes to the same ids again.

        With `skip_special_tokens` there is nothing left to tell from a literal `<`, so the result is plain text, `<`
        not doubled. Ids are looked up in `extension_table`, `id -> string`, first; slots without an entry, and what
        is no id, are `<unk>`.
        """
        token_ids = [token_ids] if isinstance(token_ids, int) else token_ids
        pieces = self._pieces_of(skip_special_tokens)
        if not extension_table:
            return "".join(map(pieces.__getitem__, token_ids))
        own = {
            index: self._piece(
                token, len(token) > 1 and token.startswith("<") and token.endswith(">"), skip_special_tokens
            )
            for index, token in extension_table.items()
        }
        return "".join([own[index] if index in own else pieces[index] for index in token_ids])

    def _pieces_of(self, skip_special_tokens: bool) -> Pieces:
        pieces = self._pieces.get(skip_special_tokens)
        if pieces is None:
            words = self._tokens[: self.num_words] if skip_special_tokens else map(self.escape, self._tokens)
            pieces = Pieces(zip(range(self.num_words), words, strict=False))
            pieces.unknown = self._piece(str(self.unk_token), True, skip_special_tokens)
            for index in {*self.special_ids, *range(self.image_token_id, len(self))}:
                token = self.convert_ids_to_tokens(index)
                pieces[index] = self._piece(token, index in self.special_ids, skip_special_tokens)
            self._pieces[skip_special_tokens] = pieces
        return pieces

    def _piece(self, token: str, is_special: bool, skip_special_tokens: bool) -> str:
        """What a token is in a text."""
        if is_special:
            return "" if skip_special_tokens else token
        return token if skip_special_tokens else self.escape(token)


__all__ = ["CpmBeeTokenizer"]
