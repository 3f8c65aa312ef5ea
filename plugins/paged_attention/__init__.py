"""Attention over a paged KV cache for a packed batch that mixes prefill chunks and decodes."""

from slipstream.plugins.spec import ACTIVATION_DTYPES, AttributeSpec, OperatorSpec, TensorSpec

_ANY_KV = ("float32", "float16", "int8", "bfloat16", "float8e4m3fn", "uint8")

SPEC = OperatorSpec(
    name="PagedAttention",
    doc="Applies the optional per-head RMS norm and the rotary embedding to q and k, writes this "
    "step's k and v, as far as it is given them, into their pages in place, then attends over "
    "pages with a causal mask.",
    inputs=(
        TensorSpec(
            "qkv",
            ACTIVATION_DTYPES,
            ("tokens", "(num_heads+kv_parts*num_kv_heads)*head_dim"),
            "q, k and v heads of each token, as far as kv_parts says",
        ),
        TensorSpec(
            "cos",
            ("float32",),
            ("tokens", "rotary_half"),
            "cosines of the rotary angles, of half the rotated width",
        ),
        TensorSpec("sin", ("float32",), ("tokens", "rotary_half"), "sines of the rotary angles"),
        TensorSpec(
            "kv_cache",
            _ANY_KV,
            ("layers", "num_pages", "planes", "num_kv_heads", "page_size*head_dim"),
            "pages, written in place; v is [page_size, head_dim] in a page and head, k the same or "
            "transposed (k_row_major). Pages of integers hold pairs along the axis that is added "
            "up: k [head_dim/2, page_size, 2], v [page_size/2, head_dim, 2]. uint8 are bytes, of k "
            "in 16 bits for all heads and then of v in 8, so there are 3 planes; else there are 2",
            written=True,
        ),
        TensorSpec(
            "query_start",
            ("int32",),
            ("sequences+1",),
            "first token row of each sequence, then the number of tokens",
        ),
        TensorSpec(
            "context_len",
            ("int32",),
            ("sequences",),
            "tokens of each sequence in the cache after this step",
        ),
        TensorSpec(
            "page_table", ("int32",), ("sequences", "max_pages"), "page numbers of each sequence"
        ),
        TensorSpec(
            "slot_mapping", ("int32",), ("tokens",), "page * page_size + offset of each new token"
        ),
        TensorSpec(
            "kv_scales",
            ("float32",),
            ("layers", "num_pages", "2", "num_kv_heads", "page_size"),
            "scales of pages of integers (int8, uint8), one a token and head",
            optional=True,
            written=True,
        ),
        TensorSpec(
            "q_norm",
            ACTIVATION_DTYPES,
            ("head_dim",),
            "RMS-norm weight of each q head",
            optional=True,
        ),
        TensorSpec(
            "k_norm",
            ACTIVATION_DTYPES,
            ("head_dim",),
            "RMS-norm weight of each k head",
            optional=True,
        ),
        TensorSpec(
            "sinks",
            ("float32",),
            ("num_heads",),
            "a logit that only joins the denominator",
            optional=True,
        ),
    ),
    outputs=(
        TensorSpec(
            "output", ACTIVATION_DTYPES, ("tokens", "num_heads*head_dim"), "attention output"
        ),
    ),
    attributes=(
        AttributeSpec("layer", "int", "index into the first axis of kv_cache", within=(0, 2**16)),
        AttributeSpec("num_heads", "int", "query heads", within=(1, 2**16)),
        AttributeSpec(
            "num_kv_heads", "int", "key/value heads; divides num_heads", within=(1, 2**16)
        ),
        AttributeSpec("head_dim", "int", "width of a head", within=(1, 512)),
        AttributeSpec("page_size", "int", "tokens a page", within=(1, 2**12)),
        AttributeSpec("scale", "float", "factor of the scores, usually head_dim ** -0.5"),
        AttributeSpec(
            "sliding_window",
            "int",
            "keys a query sees, itself included; 0 for all",
            0,
            (0, 2**31 - 1),
        ),
        AttributeSpec("soft_cap", "float", "c in c * tanh(score / c); 0 for none", 0.0),
        AttributeSpec("norm_eps", "float", "epsilon of the norms of heads", 1e-6),
        AttributeSpec(
            "kv_parts",
            "int",
            "what qkv has beside q: 2 k and v, 1 k, whose heads are also v before norm and rotary "
            "embedding, 0 none, as another node of the step has written them",
            2,
            (0, 2),
        ),
        AttributeSpec("v_norm", "int", "1: v heads have an RMS norm without weight", 0, (0, 1)),
        AttributeSpec(
            "k_row_major",
            "int",
            "k in a page and head: 0 [head_dim, page_size], 1 [page_size, head_dim]",
            0,
            (0, 1),
        ),
        AttributeSpec("k_scale", "float", "unit of the k codes of float8e4m3fn pages", 1.0),
        AttributeSpec("v_scale", "float", "unit of the v codes of float8e4m3fn pages", 1.0),
    ),
    reference="slipstream.plugins.paged_attention.reference:paged_attention",
    native="slipstream.plugins._cpu",
    checked=True,
    cuda="slipstream.plugins.paged_attention.cuda.bind:paged_attention",
)
