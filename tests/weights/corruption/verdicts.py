"""What all damages share: what they may lead to, and a byte that is another afterwards.

NOTICED     a ValueError.
SAME        a ValueError, or a model with the logits of the undamaged one.
CONFIG      the same; or the file now states another legal configuration (config.json and GGUF's metadata have no
            checksums), which the loaded model has, with the same weights where they lie as they do in memory.
UNKNOWABLE  the same, or any model that can be run: what was changed is the data of a GGUF file, or a type of number to
            another with as many bytes, and GGUF has no checksums.
"""

import random

NOTICED, SAME, CONFIG, UNKNOWABLE = "noticed", "same", "config", "unknowable"
Files = dict[str, bytes]  # of a model, by name


def replace_byte(content: bytes, at: int, rng: random.Random) -> bytes:
    other = rng.choice([0, 1, 0x22, 0x2C, 0x30, 0x7F, 0xFF, content[at] ^ (1 << rng.randrange(8)), rng.randrange(256)])
    return content[:at] + bytes([other if other != content[at] else content[at] ^ 1]) + content[at + 1 :]
