"""The model as a GGUF file that llama.cpp loads, and back from it. Version 3, little-endian."""

import struct

import numpy as np

from .model import Config
from .tokenizer import CHAT_TEMPLATE, END, PAD, SPECIAL, Tokenizer

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # types of values
SCALARS = {U32: "<I", I32: "<i", F32: "<f", BOOL: "<?"}
TENSOR, STORED = 0, np.dtype("<f4")  # type of all tensors, F32
ALL_F32 = 0  # type of the file
NORMAL, CONTROL = 1, 3  # types of tokens


class GgufError(ValueError):
    """The file is not a GGUF that this can read."""


def _metadata(config, tokenizer):
    tokens = tokenizer.tokens
    types = [CONTROL] * len(SPECIAL) + [NORMAL] * (len(tokens) - len(SPECIAL))
    return {
        "general.architecture": (STRING, "llama"),
        "general.type": (STRING, "model"),
        "general.name": (STRING, "router"),
        "general.description": (STRING, "Routes a request in plain English to a kind of agent; answers as JSON"),
        "general.organization": (STRING, "NOA ARK"),
        "general.license": (STRING, "apache-2.0"),
        "general.languages": (ARRAY, (STRING, ["en"])),
        "general.file_type": (U32, ALL_F32),
        "llama.vocab_size": (U32, config.vocabulary),
        "llama.context_length": (U32, config.context),
        "llama.embedding_length": (U32, config.width),
        "llama.block_count": (U32, config.layers),
        "llama.feed_forward_length": (U32, config.hidden),
        "llama.attention.head_count": (U32, config.heads),
        "llama.attention.head_count_kv": (U32, config.kv_heads),
        "llama.attention.layer_norm_rms_epsilon": (F32, config.epsilon),
        "llama.rope.dimension_count": (U32, config.head),
        "llama.rope.freq_base": (F32, config.rope_base),
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "gpt-2"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens)),
        "tokenizer.ggml.token_type": (ARRAY, (I32, types)),
        "tokenizer.ggml.merges": (ARRAY, (STRING, [" ".join(m) for m in tokenizer.merges])),
        "tokenizer.ggml.bos_token_id": (U32, PAD),
        "tokenizer.ggml.eos_token_id": (U32, END),
        "tokenizer.ggml.padding_token_id": (U32, PAD),
        "tokenizer.ggml.add_bos_token": (BOOL, False),
        "tokenizer.ggml.add_eos_token": (BOOL, False),
        "tokenizer.chat_template": (STRING, CHAT_TEMPLATE),
    }


def _string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(kind, value):
    if kind == STRING:
        return _string(value)
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(_value(inner, item) for item in items)
    return struct.pack(SCALARS[kind], value)


def write(config, weights, tokenizer):
    """The bytes of a GGUF file. In half precision it would be half as long, but emulated processors are slow to widen numbers."""
    metadata = _metadata(config, tokenizer)
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(config.shapes()), len(metadata))]
    head += [_string(key) + struct.pack("<I", kind) + _value(kind, value) for key, (kind, value) in metadata.items()]
    body, offset = [], 0
    for name, shape in config.shapes().items():
        data = weights[name].astype(STORED).tobytes()
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head.append(_string(name) + dimensions + struct.pack("<IQ", TENSOR, offset))
        body.append(data + bytes(-len(data) % ALIGNMENT))
        offset += len(body[-1])
    head = b"".join(head)
    return head + bytes(-len(head) % ALIGNMENT) + b"".join(body)


class _Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count):
        if count > len(self.data) - self.at:
            raise GgufError(f"the file ends at byte {len(self.data)}, {count} more were to come at {self.at}")
        self.at += count
        return self.data[self.at - count : self.at]

    def unpack(self, form):
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def string(self):
        return str(self.take(*self.unpack("<Q")), "utf-8")

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, count = self.unpack("<IQ")
            return [self.value(inner) for _ in range(count)]
        if kind not in SCALARS:
            raise GgufError(f"value of type {kind}; this reads what it writes")
        return self.unpack(SCALARS[kind])[0]


def parse(data):
    """Metadata, and tensors by name."""
    reader = _Reader(memoryview(data))
    if bytes(reader.take(4)) != MAGIC:
        raise GgufError("this is not a GGUF file")
    version, tensors, values = reader.unpack("<IQQ")
    if version != VERSION:
        raise GgufError(f"version {version} of GGUF; this reads version {VERSION}")
    metadata = {}
    for _ in range(values):
        key = reader.string()
        metadata[key] = reader.value(*reader.unpack("<I"))
    found = []
    for _ in range(tensors):
        name = reader.string()
        shape = reader.unpack(f"<{reader.unpack('<I')[0]}Q")[::-1]
        found.append((name, shape, *reader.unpack("<IQ")))
    reader.take(-reader.at % ALIGNMENT)
    begin, out = reader.at, {}
    for name, shape, kind, offset in found:
        if kind != TENSOR or offset % ALIGNMENT:
            raise GgufError(f"tensor {name} is of type {kind} at offset {offset}; this reads what it writes")
        reader.at = begin + offset
        data = reader.take(int(np.prod(shape)) * STORED.itemsize)
        out[name] = np.frombuffer(data, STORED).reshape(shape)
    return metadata, out


def read(data):
    """Sizes, weights and tokenizer of a file that `write` made."""
    metadata, tensors = parse(data)
    try:
        config = Config(
            vocabulary=metadata["llama.vocab_size"],
            width=metadata["llama.embedding_length"],
            layers=metadata["llama.block_count"],
            heads=metadata["llama.attention.head_count"],
            kv_heads=metadata["llama.attention.head_count_kv"],
            hidden=metadata["llama.feed_forward_length"],
            context=metadata["llama.context_length"],
            rope_base=metadata["llama.rope.freq_base"],
            epsilon=metadata["llama.attention.layer_norm_rms_epsilon"],
        )
        merges = [m.split(" ") for m in metadata["tokenizer.ggml.merges"]]
        tokenizer = Tokenizer(metadata["tokenizer.ggml.tokens"], merges)
        weights = {name: tensors[name] for name in config.shapes()}
    except KeyError as missing:
        raise GgufError(f"the file lacks {missing}") from None
    for name, shape in config.shapes().items():
        if weights[name].shape != shape:
            raise GgufError(f"tensor {name} has shape {weights[name].shape}, not {shape}")
    return config, weights, tokenizer
