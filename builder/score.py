"""What an engine needs to score documents: the tokens of its answers, and the template of a pair.

Both as the model card of Qwen3-Reranker has them: the score is the probability of "yes" beside that
of "no" after a prompt of instruction, query and document.
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory

from slipstream.builder.checkpoints.base import Checkpoint
from slipstream.builder.pooling import StatedPooling
from slipstream.errors import BuildError
from slipstream.weights.tokenizer import read_tokenizer

TEMPLATE = "chat_template.jinja"
_ANSWERS = ("yes", "no")
# A template of pairs asks for messages of this role.
_ROLE = re.compile(r"""['"]document['"]""")
_PAIR = """\
<|im_start|>system
Judge whether the Document meets the requirements based on the Query and the Instruct provided. \
Note that the answer can only be "yes" or "no".<|im_end|>
<|im_start|>user
<Instruct>: {{ messages | selectattr("role", "eq", "system") | map(attribute="content") | first \
| default("Given a web search query, retrieve relevant passages that answer the query") }}
<Query>: {{ messages | selectattr("role", "eq", "query") | map(attribute="content") | first }}
<Document>: {{ messages | selectattr("role", "eq", "document") | map(attribute="content") | first \
}}<|im_end|>
<|im_start|>assistant
<think>{{ '\\n\\n' }}</think>{{ '\\n\\n' }}"""


def answers_of(checkpoint: Checkpoint, stated: StatedPooling) -> tuple[int, ...]:
    """The tokens whose logits make a score: those that the checkpoint names, or yes and no.

    Raises BuildError for tokens that the model does not have.
    """
    answers, size = stated.answers or _yes_and_no(checkpoint), checkpoint.config.vocab_size
    if max(answers) >= size:
        raise BuildError(
            f"the answers of {checkpoint.path} are the tokens {', '.join(map(str, answers))}, and "
            f"its vocabulary has {size}; its files are of different models: download them again"
        )
    return answers


def _yes_and_no(checkpoint: Checkpoint) -> tuple[int, ...]:
    with TemporaryDirectory() as directory:
        checkpoint.write_tokenizer(Path(directory))
        tokenizer = read_tokenizer(Path(directory) / "tokenizer.json")
    found = [tokenizer.token_to_id(answer) for answer in _ANSWERS]
    tokens = tuple(token for token in found if token is not None)
    if len(tokens) < len(_ANSWERS):
        raise BuildError(
            f"{checkpoint.path} does not have both {' and '.join(_ANSWERS)} as tokens, whose "
            "logits make a score; use a model that answers so, or another --task"
        )
    return tokens


def write_score_template(directory: Path) -> None:
    """Put the template of Qwen3-Reranker in the place of one that knows no documents."""
    file = directory / TEMPLATE
    if not file.is_file() or not _ROLE.search(file.read_text(encoding="utf-8")):
        file.write_text(_PAIR, encoding="utf-8")
