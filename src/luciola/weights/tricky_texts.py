"""Texts on which tokenizers part ways: two of them that agree on all of these may stand for each other.

Most pieces sit on a boundary which one pre-tokenizer or another draws differently. The last texts are made of the
tokenizer's own tokens, because a boundary shows in the ids only where some token would cross it.
"""

import random

from luciola.text.tokenizer import Tokenizer

_PROSE = (
    "The 1st of 22 cats, isn't it?  Yes!\n\n\nNo...   3.14159 × 10⁻⁷ ≈ ½·10⁶ (see p. 1,234,567).",
    "I'VE said: WE'LL go, they'd SAY 'TWAS fine; it’s “quoted” — isn’T it? rock'n'roll 'em 's",
    "def add(a, b):\n    if a is None:\n\t\treturn b\r\n    return a+b  # 12345 times\n\n\nx_1 = {'k': [0x1F, 1e-9]}\n",
    '  <div class="a">\r\n\r\n    <p>&nbsp;</p>\n  </div>\t\n // camelCase XMLHttpRequest snake_case __init__ a->b\n',
    "你好，世界。今天是2024年12月31日！“引号”（括号）《书名》……——　全角　空格。３４５ＡＢＣａｂｃ，龘㐀𠀀",
    "こんにちは、世界。カタカナとひらがな、漢字ー々〆。 안녕하세요, 세계! 123개의 고양이。",
    "مرحبا بالعالم، ١٢٣٤٥ قطة؟ שלום עולם! हिन्दी में नमस्ते दुनिया १२३४५। বাংলা ภาษาไทย ๑๒๓ สวัสดี தமிழ்",
    "e\u0301a\u0300o\u0302 naïve façade Ångström Straße ÉCOLE école ΑΒΓ αβγ Привет МИР ИванПетров Հայերեն ქართული",
    "👨‍👩‍👧‍👦👍🏽 🇺🇸🇩🇪 ❤️🤖🤖 ☃ ✓ → ∑∫√ €100 $5 £7 №9 © ™ 𝒳𝓎 𝟙𝟚𝟛 Ⅷ ② ٪ \u200b\ufeff\u00ad\u2028\u0085 \x00\x07\x1b\x7f",
    "a b  c   d    e     f      g" + " " * 17 + "j" + " " * 64 + "k\n" + "\n" * 9 + "l\t\t\t\tm \n \n  \n   n",
    "\u00a0a\u00a0\u00a0b\u3000c\u3000\u3000d \u00a0 e\u2003f\u202fg\u1680h \u3000i",
    "www.example.com/path?q=1&r=%20#frag user.name+tag@mail.org C:\\Users\\x ~/.bashrc ---- ==== ******** !!!??? ((",
    *(" leading", "trailing ", "trailing\n", "\n", " ", "   ", "\t", "\r\n", "a", "0", "你", "▁", " ▁▁a", "<0x0A>"),
)  # fmt: skip

_BLANKS = (" ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "\r", "\u3000", "\u00a0", "\u2028", "\x07", "\x00", "\u200b")
_SHORT = (
    "'s 'S don't you'LL 're 'VE ’s abc ABC aBc Abc .append (x) _ ... == // # $ € ^ ` | ~ + < > ° № \ufeff ▁ \ufffd "
    "你好 世界， 。 、 「 こんにちは カタカナ ー 한국어 العربية हिन्दी ไทย தமிழ் 𝒳 龘 㐀 𠀀 ａＢ ！ ？ "
    "é e\u0301 \u0301 É ß Ω Яж ǅ ʰ 1 22 123 4567 ٣ १२ ½ Ⅷ ² ５ 𝟙 😀 👨‍👩‍👧 🇺🇸 👍🏽 ❤️"
)
_PIECES = (*_BLANKS, *_SHORT.split())

_MIXTURES, _RUN = 300, 24


def tricky_texts(tokenizer: Tokenizer) -> list[str]:
    """The texts to compare `tokenizer` and a stand-in for it on; the same ones in every call."""
    rng = random.Random(0)
    added = sorted(token.content for token in tokenizer.backend.get_added_tokens_decoder().values())
    around = [f"a{token}b {token} c\n{token}{token}  {token}\n 1{token}。" for token in added]
    pieces = [*_PIECES, *added[:40]]
    mixtures = ["".join(rng.choices(pieces, k=rng.randrange(2, 24))) for _ in range(_MIXTURES)]
    ids = sorted(tokenizer.backend.get_vocab(with_added_tokens=True).values())
    rng.shuffle(ids)
    runs = [[token_id] for token_id in ids[:_MIXTURES]]
    for _ in range(-(-_MIXTURES * _RUN // max(len(ids), 1))):  # each token comes at least once
        rng.shuffle(ids)
        runs += [ids[i : i + _RUN] for i in range(0, len(ids), _RUN)]
    own = [tokenizer.decode(run, skip_special_tokens=False) for run in runs]
    torn = ["".join(rng.choice((part, rng.choice(pieces))) for part in text.split(" ")) for text in own[-_MIXTURES:]]
    return ["", *_PROSE, *around, *mixtures, *own, *torn]
