"""Text to token ids and back, over the `tokenizers` library; folders in Hugging Face layout are read and written.

`encode` never adds tokens of its own accord: where bos belongs is the chat template's business. Special tokens spelled
out in the text are recognised, so a rendered template encodes to the ids its author meant.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, processors

from luciola.text import chat
from luciola.text.untrusted import printable, read_json, read_text, shortened

UNKNOWN = "<unk>"
MAX_TOKEN_ID = 2**31
MAX_BYTES = 128 << 20  # of tokenizer.json; those of 256,000 tokens have 34 MB
REASONING_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")

# What a folder with a tokenizer in some form holds at least one of; only the first can be read here.
FORMS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
FILES = (*FORMS, "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja")
MORE_TEMPLATES = "additional_chat_templates"  # a folder with a file for each further one, as transformers 5 writes it
LONG = 10_000  # characters or ids from which on the work is done without Python's lock, so that other threads go on
TOOL_USE = "tool_use"  # the further template which transformers takes where there are tools


class Tokenizer:
    """A `tokenizers.Tokenizer` together with the names of its bos, eos and padding tokens and its chat template.

    Attributes:
        vocab_size: the highest token id plus one, which is the number of embedding rows a model needs.
        bos_token_id, pad_token_id: None when there is no such token.
        eos_token_ids: every id that ends a completion, the main one first; empty when there is none.
        chat_template: jinja2 source, or None.
        further_templates: others by name; "tool_use" takes the place of the first where there are tools.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        further_eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
        further_templates: Mapping[str, str] | None = None,
    ) -> None:
        # A tokenizer.json may carry truncation and padding from the moment it was saved; both would falsify ids.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._bos_token, self._eos_token, self._pad_token = bos_token, eos_token, pad_token
        self.chat_template, self.further_templates = chat_template, dict(further_templates or {})
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_token_id = self._named("bos_token", bos_token)
        self.pad_token_id = self._named("pad_token", pad_token)
        eos_id = self._named("eos_token", eos_token)
        own = () if eos_id is None else (eos_id,)
        self.eos_token_ids = tuple(dict.fromkeys((*own, *further_eos_ids)))

    def _named(self, role: str, token: str | None) -> int | None:
        if token is None:
            return None
        token_id = self.token_id(token)
        if token_id is None:
            raise ValueError(
                f"The tokenizer's {role} is {shortened(token)}, which its vocabulary of {self.vocab_size} tokens "
                f"lacks; add it to tokenizer.json, or take {role} out of tokenizer_config.json."
            )
        return token_id

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, bos={self._bos_token!r}, eos={self._eos_token!r})"

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """What the `tokenizers` library makes of this tokenizer, to look at; a change to it would change this one."""
        return self._backend

    @property
    def thinks(self) -> bool:
        """Whether replies of a model with this tokenizer begin with reasoning that `</think>` ends: its chat template
        speaks of that, or its vocabulary has a token for it."""
        return chat.END_THINK in (self.chat_template or "") or self.token_id(chat.END_THINK) is not None

    def token_id(self, token: str) -> int | None:
        """The id of one token given by name, such as "</think>"; None when the vocabulary lacks it."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def encode(self, text: str, begin: bool = False) -> list[int]:
        """The token ids of `text`; special tokens written in it are recognised. Nothing is added, but with `begin` the
        bos token, if the tokenizer's own files put it in front of a text that lacks it.

        Raises:
            ValueError: the tokenizer has neither tokens for the text nor one for what it does not know.
        """
        ids: list[int]
        try:
            if len(text) < LONG:
                ids = self._backend.encode(text, add_special_tokens=False).ids
            else:  # of `tokenizers`' functions only those for batches let go of the lock
                ids = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # Exception for an unknown character without token; a panic, which is none, else
            raise ValueError(f"The tokenizer cannot encode {shortened(text)}: {printable(str(error))}.") from error
        if begin and self._begins_with_bos and ids[:1] != [self.bos_token_id]:
            assert self.bos_token_id is not None
            ids.insert(0, self.bos_token_id)
        return ids

    @cached_property
    def longest(self) -> int:
        """The most characters that a token stands for, blank space aside which some tokenizers pass over."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    @cached_property
    def _begins_with_bos(self) -> bool:
        return self.bos_token_id is not None and self._backend.encode("").ids[:1] == [self.bos_token_id]

    def lacks(self, character: str) -> bool:
        """Whether the character is lost: it becomes the token for what is unknown, or none (white space may do that).

        A tokenizer that falls back to bytes lacks nothing.
        """
        ids = self.encode(character)
        unknown = {self.token_id(name) for name in (getattr(self._backend.model, "unk_token", None), UNKNOWN) if name}
        return not unknown.isdisjoint(ids) or not (ids or character.isspace())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Ids beyond the vocabulary (padding rows of an embedding) decode to nothing."""
        text: str
        if len(ids) < LONG:
            text = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        else:
            text = self._backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0]
        return text

    def stream(self, skip_special_tokens: bool = True) -> "DecodeStream":
        """A decoder for tokens which arrive one at a time."""
        return DecodeStream(self, skip_special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of chat `messages` by this tokenizer's chat template; errors as `chat.render`."""
        template = self.further_templates.get(TOOL_USE, self.chat_template) if tools else self.chat_template
        if template is None:
            raise ValueError(
                "This tokenizer has no chat template; give the prompt as text, or put a chat_template.jinja file "
                "into the model's folder."
            )
        return chat.render(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            bos_token=self._bos_token,
            eos_token=self._eos_token,
            variables=variables,
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of chat `messages`: `encode` of `render`."""
        return self.encode(
            self.render(messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables)
        )

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, as transformers reads them.

        Eos ids beyond the main one have no place in these files: the model's generation_config.json lists them.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"))
        tokens = {"bos_token": self._bos_token, "eos_token": self._eos_token, "pad_token": self._pad_token}
        if self.token_id(UNKNOWN) is not None:
            tokens["unk_token"] = UNKNOWN
        tokens = {role: token for role, token in tokens.items() if token is not None}
        config: dict[str, Any] = {
            **tokens,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        if self.further_templates:
            named = {
                **({} if self.chat_template is None else {"default": self.chat_template}),
                **self.further_templates,
            }
            config["chat_template"] = [{"name": name, "template": template} for name, template in named.items()]
        for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", tokens)):
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def present(cls, folder: Path) -> bool:
        """Whether `folder` holds a tokenizer in any form; `load` tells when the form cannot be read."""
        return any((folder / name).is_file() for name in FORMS)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read a folder which this class or transformers 4.x or 5.x wrote.

        Raises:
            ValueError: no tokenizer.json, a file which is not what its name says, or a named token which is missing.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(
                f"{folder} has no tokenizer.json; write one with transformers: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
            )
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path} has more than {MAX_BYTES >> 20} MB, which no tokenizer needs; fetch it again.")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # Exception for a missing comma, and for some contents a panic, which is none
            reason = printable(str(error))
            raise ValueError(f"{path} is not a tokenizer the `tokenizers` library can read: {reason}") from error
        config = _json_or_nothing(folder / "tokenizer_config.json")
        names = {**_json_or_nothing(folder / "special_tokens_map.json"), **config}
        bos, eos = (_token_text(names, role, folder) for role in ("bos_token", "eos_token"))
        if {"add_bos_token", "add_eos_token"} & config.keys():  # transformers takes them over what tokenizer.json says
            wanted = ((bos, config.get("add_bos_token")), (eos, config.get("add_eos_token")))
            known = [
                token if asked is True and backend.token_to_id(token or "") is not None else None
                for token, asked in wanted
            ]
            add_around(backend, *known)
        templates = _chat_templates(folder, config)
        return cls(
            backend,
            bos_token=bos,
            eos_token=eos,
            pad_token=_token_text(names, "pad_token", folder),
            further_eos_ids=_eos_ids(folder, has_name=names.get("eos_token") is not None),
            chat_template=templates.pop("default", None),
            further_templates=templates,
        )

    @classmethod
    def characters(
        cls,
        alphabet: str,
        *,
        chat_template: str | None = None,
        added_tokens: Sequence[str] = REASONING_TOKENS,
    ) -> "Tokenizer":
        """A tokenizer whose tokens are the characters of `alphabet`; any other character becomes `<unk>`.

        `added_tokens` are single tokens which survive decoding. Ids: DeepSeek's bos 0, eos 1 and padding 2, the other
        special tokens, the added tokens, the alphabet. Without `chat_template` it is DeepSeek's.
        """
        special = (chat.BOS, chat.EOS, chat.PAD, UNKNOWN, chat.USER, chat.ASSISTANT)
        vocab = {token: index for index, token in enumerate(dict.fromkeys((*special, *added_tokens, *alphabet)))}
        # Byte-pair encoding without a single merge leaves every character by itself.
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
        backend.decoder = decoders.Fuse()
        return finished(backend, special=special, added_tokens=added_tokens, chat_template=chat_template)


def finished(
    backend: tokenizers.Tokenizer, *, special: Sequence[str], added_tokens: Sequence[str], chat_template: str | None
) -> Tokenizer:
    """A Tokenizer of our own making: register its special and added tokens, name them DeepSeek's way."""
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in added_tokens])
    template = chat.DEFAULT_TEMPLATE if chat_template is None else chat_template
    return Tokenizer(backend, bos_token=chat.BOS, eos_token=chat.EOS, pad_token=chat.PAD, chat_template=template)


def add_around(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Bos in front and eos behind, for those who ask a saved tokenizer.json for it; `Tokenizer.encode` never does."""
    tokens = {role: token for role, token in (("bos", bos), ("eos", eos)) if token is not None}
    front, behind = [role for role in tokens if role == "bos"], [role for role in tokens if role == "eos"]
    backend.post_processor = processors.TemplateProcessing(
        single=[*front, "$A", *behind],
        pair=[*front, "$A", *behind, "$B:1", *(f"{role}:1" for role in behind)],
        special_tokens=[
            {"id": role, "ids": [backend.token_to_id(token)], "tokens": [token]} for role, token in tokens.items()
        ],
    )


class DecodeStream:
    """Decodes tokens one at a time, and holds back what may still be half a character.

    A character of up to four bytes may be spread over several tokens; until the last has come, decoding gives U+FFFD
    in its place. So a trailing U+FFFD waits for more, and everything before it is shown. The pieces and the flush
    together are the text that `decode` gives for all tokens at once.
    """

    # Bytes that form no character at all come out as U+FFFD one by one. No unfinished character makes so long a run.
    _HOPELESS = 16

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []  # the tokens decoded together: shown ones for context, then the open ones
        self._open = 0  # window[open:] came after the last moment at which nothing was held back
        self._shown = 0  # characters of the window's text already given out

    def push(self, token_id: int) -> str:
        """Add one token; the text which is certain now and was not given out before, often "" or one word."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window, self._skip_special_tokens)
        certain = text.rstrip("\N{REPLACEMENT CHARACTER}")
        if len(text) - len(certain) > self._HOPELESS:
            certain = text
        piece = certain[self._shown :]
        self._shown = max(self._shown, len(certain))
        if len(certain) == len(text):
            self._forget()
        return piece

    def flush(self) -> str:
        """What is still held back, as it decodes; call it once, after the last token."""
        text = self._tokenizer.decode(self._window, self._skip_special_tokens)
        piece = text[self._shown :]
        self._window, self._open, self._shown = [], 0, 0
        return piece

    def _forget(self) -> None:
        """Keep as context only the tokens of the last step. Decoders that look left need one with some text."""
        context = self._window[self._open :]
        length = len(self._tokenizer.decode(context, self._skip_special_tokens))
        if length:
            self._window, self._shown = context, length
        self._open = len(self._window)


def _json_or_nothing(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} when there is no such file."""
    return read_json(path) if path.exists() else {}


def _token_text(names: Mapping[str, Any], role: str, folder: Path) -> str | None:
    """transformers writes a token as text, or as a dict that holds its text under "content"."""
    entry = names.get(role)
    text = entry.get("content") if isinstance(entry, dict) else entry
    if isinstance(text, str) or entry is None:
        return text
    raise ValueError(f"{folder / 'tokenizer_config.json'}: {role} must be a token's text, not {shortened(entry)}.")


def _eos_ids(folder: Path, has_name: bool) -> tuple[int, ...]:
    """Eos ids from generation_config.json; from config.json only when nothing else names one (base models)."""
    path = folder / "generation_config.json"
    entry = _json_or_nothing(path).get("eos_token_id")
    if entry is None and not has_name:
        path = folder / "config.json"
        entry = _json_or_nothing(path).get("eos_token_id")
    entries = entry if isinstance(entry, list) else [] if entry is None else [entry]
    for token_id in entries:
        if type(token_id) is not int or not 0 <= token_id < MAX_TOKEN_ID:
            raise ValueError(f"{path}: eos_token_id must be a token id or a list of some, not {shortened(entry)}.")
    return tuple(entries)


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. transformers 5 writes chat_template.jinja, the default, and a folder of further ones; before,
    an entry in tokenizer_config.json was the text of one or a list of several."""
    path, more = folder / "chat_template.jinja", folder / MORE_TEMPLATES
    if path.is_file():
        further = {file.stem: read_text(file) for file in sorted(more.glob("*.jinja"))} if more.is_dir() else {}
        return {"default": read_text(path), **further}
    entry = config.get("chat_template")
    entries = [{"name": "default", "template": entry}] if isinstance(entry, str) else [] if entry is None else entry
    found = {}
    for named in entries if isinstance(entries, list) else [None]:
        name, template = (named.get("name"), named.get("template")) if isinstance(named, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str):
            raise ValueError(
                f"{folder / 'tokenizer_config.json'}: chat_template must be text, or a list of objects with name and "
                "template."
            )
        found[name] = template
    return found
