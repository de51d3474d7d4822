"""What the text towers need of a tokenizer: CLIP's, or one of Hugging Face.

Shape letters: N texts, T tokens of a text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence

from reclip_d2.errors import ReclipError


@dataclasses.dataclass(frozen=True)
class TextTokens:
    """How a text becomes ``[start...] tokens [end] [padding...]``.

    Attributes:
        start: ids before every text: one, or none (T5, Gemma).
        end: id after every text.
        padding: id after the end.
        encode: token ids of a text, without start and end.
        digest: hash of a tokenizer from files; "" for CLIP's.
    """

    start: tuple[int, ...]
    end: int
    padding: int
    encode: Callable[[str], Sequence[int]]
    digest: str = ""


def text_tokens(tokenizer: object, padding: int = 0) -> TextTokens:
    """The tokens of open_clip's ``SimpleTokenizer`` or ``HFTokenizer``.

    Args:
        padding: for ``SimpleTokenizer``, whose padding is known to the text tower only.

    Raises:
        ReclipError: the tokenizer of Hugging Face pads on the left, or ends texts in another way.
    """
    if hasattr(tokenizer, "sot_token_id"):
        return TextTokens((tokenizer.sot_token_id,), tokenizer.eot_token_id, padding, tokenizer.encode)
    inner, clean = tokenizer.tokenizer, tokenizer.clean_fn

    def encode(text: str) -> list[int]:
        return list(inner(clean(text), add_special_tokens=False).input_ids)

    plain, whole = encode("sky"), list(inner(clean("sky")).input_ids)
    if tokenizer.strip_sep_token:
        whole = [0 if token == inner.sep_token_id else token for token in whole]
    first = next((k for k in range(len(whole)) if whole[k : k + len(plain)] == plain), None)
    what = f"the tokenizer of Hugging Face {getattr(inner, 'name_or_path', '')!r}"
    if tokenizer.tokenizer_mode or first is None or len(whole) != first + len(plain) + 1:
        raise ReclipError(f"{what} is not supported: it does not end a text with one token")
    if inner.padding_side != "right" or inner.pad_token_id is None:
        raise ReclipError(f"{what} is not supported: it does not pad texts on the right")
    backend = getattr(inner, "backend_tokenizer", None)
    content = json.dumps(sorted(inner.get_vocab().items())) if backend is None else backend.to_str()
    options = [whole, inner.pad_token_id, tokenizer.context_length, clean.__name__]
    digest = hashlib.sha256(f"{content} {options}".encode()).hexdigest()
    return TextTokens(tuple(whole[:first]), whole[-1], inner.pad_token_id, encode, digest)
