"""How a byte-level vocabulary splits text into words, by the names of ``tokenizer.ggml.pre``.

llama-vocab.cpp of llama.cpp defines what the names mean. The expressions are those of the models'
own tokenizer.json files where those are known, and llama.cpp's for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Words:
    """Patterns that split a text one after the other, each what those before it have left whole.

    ``whole_words`` looks a word up before merging, as tiktoken does. ``add_bos``: a text begins
    with the begin token unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_UP_TO_3 = r"\p{N}{1,3}"
# Groups of three digits, counted from the last.
_THREES = r"\d{1,3}(?=(?:\d{3})*(?!\d))"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"


def _tiktoken(digits: str, *, contractions: str = f"{_CONTRACTIONS}|", end: str = _LINES) -> str:
    return f"{contractions}{_WORD}|{digits}|{_SIGNS}|{end}"


def _cased(digits: str, contractions: str = "", marks: str = r"\p{M}") -> str:
    """Words that begin where small letters end, as in CamelCase."""
    upper, lower = (rf"[{kind}\p{{Lm}}\p{{Lo}}{marks}]" for kind in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{start}{upper}*{lower}+{contractions}|{start}{upper}+{lower}*{contractions}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"
    )


_LLAMA3 = _tiktoken(_UP_TO_3)
_QWEN2 = _tiktoken(_DIGIT)
_O200K = _cased(_UP_TO_3, f"{_CONTRACTIONS}?")
_BLOOM = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{964}\x{6D4}\x{60C})]+"
_KANJI = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+"
_HAN = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+"
_NO_LINES = r"[^\n]+|[\n]+"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
)
# Letters that have an upper and a lower case, in the Unicode of the model's day.
_CASED_LETTERS = (
    r"A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}"
    r"\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}"
    r"\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}"
    r"\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}"
    r"\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}"
    r"\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}"
    r"\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}"
    r"\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}"
    r"\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}"
    r"\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}"
    r"\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}"
    r"\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}"
    r"\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}"
    r"\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}"
    r"\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}"
)
_JAIS2_SPACES = "".join(rf"|\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))

# The families, and the names of each.
_FAMILIES: tuple[tuple[Words, str], ...] = (
    (
        # What llama.cpp takes for a file that names none, too.
        Words((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
        "default",
    ),
    (
        Words((_LLAMA3,), whole_words=True, add_bos=True),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    ),
    (Words((_LLAMA3,)), "smaug-bpe dbrx glm4 chatglm-bpe"),
    (Words((_QWEN2,), nfc=True), "qwen2 deepseek-r1-qwen"),
    (Words((_QWEN2,)), "stablelm2 megrez kormo f2llmv2 hunyuan solar-open grok-2"),
    (
        Words((_QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(
            r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"),), nfc=True),
        "qwen35",
    ),
    (Words((_tiktoken(_DIGIT, contractions=""),)), "ufakzeka"),
    (Words((_NO_LINES, _QWEN2)), "laguna"),
    (Words((_UP_TO_3, _tiktoken(r"\p{N}+")), whole_words=True), "minicpm5"),
    (
        Words((_tiktoken(_UP_TO_3, end=rf"\s*[\r\n]+{_JAIS2_SPACES}|\s{{1,2}}(?!\S)|\s{{1}}"),)),
        "jais-2",
    ),
    (
        Words((_GPT2,)),
        "gpt-2 phi-2 gigachat a.x-4.0 mellum mpt olmo jais trillion granite-docling exaone4 "
        "modern-bert jina-es jina-de jina-v2-es jina-v2-de",
    ),
    (
        Words((_DIGIT, _GPT2)),
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    ),
    (Words((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")), "falcon"),
    (Words((_cased(_DIGIT),), whole_words=True, add_bos=True), "tekken"),
    (Words((_O200K,)), "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (Words((_O200K,), whole_words=True), "granite-embed-multi-97m"),
    (Words((r"\d{1,3}(?=(?:\d{3})*\b)", _O200K)), "tiny_aya cohere2moe"),
    (Words((r"\p{N}+", _THREES)), "superbpe"),
    (
        Words((
            "[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+",
            r"\s+$",
            _HAN,
            r"\p{N}+",
        )),
        "deepseek-llm",
    ),
    (Words(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, _DIGIT)), "deepseek-coder"),
    (
        Words((_UP_TO_3, _KANJI, rf"{_DEEPSEEK3}[\r\n]*|{_LINES}")),
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
    ),
    (
        Words((_UP_TO_3, _KANJI, rf"{_DEEPSEEK3}|[\r\n]|\s+(?!\S)|\s+", _DIGIT)),
        "spark2_5",
    ),
    (
        Words((
            _THREES,
            r"[\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{F900}-\x{FAFF}\x{3040}-\x{309F}"
            r"\x{30A0}-\x{30FF}\x{FF65}-\x{FF9F}\x{2F00}-\x{2FDF}\x{E40}-\x{E7F}\x{E80}-\x{EFF}"
            r"\x{1780}-\x{17FF}\x{1000}-\x{109F}\x{AA60}-\x{AA7F}\x{A9E0}-\x{A9FF}"
            r"\x{AC00}-\x{D7AF}\x{1100}-\x{11FF}]+",
            rf"{_DEEPSEEK3}[\r\n]*|{_LINES}",
        )),
        "afmoe",
    ),
    (
        Words((
            r"[\x{AC00}-\x{D7A3}\x{3131}-\x{318E}]+|[\x{FF01}\x{2026}\x{201C}\x{201D}\x{2018}"
            r"\x{2019}\x{2014}\x{FF1A}\x{FF1B}\x{FF0C}\x{3001}-\x{303F}\x{FE30}-\x{FE4F}]+"
            rf"|[\x{{3105}}-\x{{312F}}]+|{_KANJI}",
            _cased(_DIGIT, f"{_CONTRACTIONS}?"),
        ), whole_words=True),
        "youtu",
    ),
    (Words((_BLOOM,)), "bloom gpt3-finnish poro-chat"),
    (Words((_BLOOM, _DIGIT)), "viking"),
    (
        Words((
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            _DIGIT,
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ), add_bos=True),
        "chameleon",
    ),
    (
        Words((
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
        )),
        "bailingmoe bailingmoe2 llada-moe",
    ),
    (
        Words((rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}",)),
        "seed-coder",
    ),
    (
        Words((
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )),
        "exaone-moe",
    ),
)  # fmt: skip
WORDS: Mapping[str, Words] = MappingProxyType(
    {name: words for words, names in _FAMILIES for name in names.split()}
)
