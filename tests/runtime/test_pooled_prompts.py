from __future__ import annotations

from dataclasses import replace

import pytest
from tokenizers.processors import TemplateProcessing

from slipstream.builder.contract import Pooling
from slipstream.errors import ContextLengthError, InvalidRequestError
from slipstream.runtime.pooled_prompts import PooledPrompts, Prompt
from slipstream.runtime.pooling import PoolingParams
from slipstream.runtime.testing import counting_engine

EMBED = Pooling("embed", "last", True, 4, 100, "cosine", {"query": "q: ", "web": "w: "}, None)
SCORE = replace(EMBED, task="score", dimensions=1, prompts={}, default_prompt=None)


def prompts(pooling: Pooling = EMBED, *, around: bool = True) -> PooledPrompts:
    """Of a tokenizer by characters that puts a token before and two after each text."""
    engine = counting_engine(max_seq_len=64)
    if around:
        backend = engine.tokenizer._backend
        single = "x $A y z"
        special = [(name, backend.token_to_id(name)) for name in "xyz"]
        backend.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return PooledPrompts(engine, pooling)


def text(made: PooledPrompts, tokens: Prompt) -> str:
    assert not isinstance(tokens, str)
    return made._tokenizer.decode(tokens, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("cut", "want"), [(None, "xabcdefyz"), (9, "xabcdefyz"), (8, "xabcdeyz"), (3, "xyz")]
)
def test_what_stands_around_a_text_stays(cut: int | None, want: str) -> None:
    made = prompts()
    tokens = made.tokens("abcdef", PoolingParams(truncate_prompt_tokens=cut))
    assert text(made, tokens) == want


def test_a_text_without_what_stands_around_it() -> None:
    made = prompts()
    params = PoolingParams(truncate_prompt_tokens=4, add_special_tokens=False)
    assert text(made, made.tokens("abcdef", params)) == "abcd"


def test_token_ids_are_cut_and_nothing_else() -> None:
    made = prompts()
    assert made.tokens([5, 6, 7], PoolingParams(truncate_prompt_tokens=2)) == [5, 6]
    assert made.tokens([5, 6, 7], PoolingParams(prompt_name="query")) == [5, 6, 7]
    assert len(made.tokens([5] * 99, PoolingParams(truncate_prompt_tokens=-1))) == 64


def test_cuts_that_cannot_be() -> None:
    with pytest.raises(InvalidRequestError, match="puts 3 tokens around a text; raise it"):
        prompts().tokens("abc", PoolingParams(truncate_prompt_tokens=2))
    with pytest.raises(InvalidRequestError, match="is 65, and this engine takes 64"):
        prompts().tokens("abc", PoolingParams(truncate_prompt_tokens=65))


def test_a_text_that_is_too_long_is_told_before_it_is_encoded() -> None:
    with pytest.raises(ContextLengthError, match=r"takes 1 to 64 \(max_seq_len 64\)"):
        prompts().tokens("a" * 10_000, PoolingParams())


def test_prompts_by_name() -> None:
    made = prompts(around=False)
    assert text(made, made.tokens("abc", PoolingParams(prompt_name="query"))) == "q: abc"
    assert text(made, made.tokens("abc", PoolingParams())) == "abc"
    default = prompts(replace(EMBED, default_prompt="web"), around=False)
    assert text(default, default.tokens("abc", PoolingParams())) == "w: abc"
    with pytest.raises(InvalidRequestError, match="no prompt 'x': its prompts are query, web"):
        made.tokens("abc", PoolingParams(prompt_name="x"))
    with pytest.raises(InvalidRequestError, match="no prompt 'x': it has none"):
        prompts(SCORE).tokens("abc", PoolingParams(prompt_name="x"))


def test_both_sides_of_a_search_have_prompts_of_their_own() -> None:
    pairs = prompts().pairs(["a"], ["b", "c"])
    assert pairs.prompts == ["a", "b", "c"]
    assert [params.prompt_name for params in pairs.params] == ["query", None, None]
    assert pairs.pairs == [(0, 1), (0, 2)]
    assert prompts().pairs(["a", "b"], ["c", "d"]).pairs == [(0, 2), (1, 3)]


def test_numbers_of_texts_that_make_no_pairs() -> None:
    for queries, documents in (
        ([], ["a"]),
        (["a"], []),
        (["a", "b"], ["c"]),
        (["a"] * 2, ["b"] * 3),
    ):
        with pytest.raises(InvalidRequestError, match="make no pairs; give one query"):
            prompts().pairs(queries, documents)


def test_documents_are_cut_and_the_rest_of_a_pair_is_not() -> None:
    made = prompts(SCORE, around=False)
    whole, short = made.pairs(["q"], ["d" * 9, "e"]).prompts
    pair = made.pairs(["q"], ["d" * 9, "e"], PoolingParams(truncate_prompt_tokens=len(whole) - 4))
    assert text(made, pair.prompts[0]) == text(made, whole).replace("d" * 9, "d" * 5)
    assert pair.prompts[1] == short
    cut = made.pairs(["q"], ["d" * 9, "e"], max_tokens_per_doc=2)
    assert text(made, cut.prompts[0]) == text(made, whole).replace("d" * 9, "dd")
    with pytest.raises(InvalidRequestError, match="query and the template alone have"):
        made.pairs(["q" * 30], ["d"], PoolingParams(truncate_prompt_tokens=10))
