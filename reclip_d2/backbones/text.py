"""The text side of a frozen CLIP: the text encoder and the Query text features W_q.

Shape letters: C classes, T tokens of a text, E width of the text transformer, D width of the joint embedding.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import MIB, read_bytes
from reclip_d2.utils.io import atomic_write, cache_dir, remove_leftovers_of
from reclip_d2.utils.locks import lock_path, waiting

logger = logging.getLogger(__name__)

_MAX_CACHE_BYTES = 1024 * MIB


class TextEncoder(nn.Module):
    """The text tower of an open_clip model, with its tokenizer.

    The modules are the model's own: nothing is copied, and a frozen model stays frozen.
    """

    def __init__(self, clip: nn.Module, tokenizer: object) -> None:
        """
        Args:
            clip: an open_clip ``CLIP`` or ``CustomTextCLIP``.
            tokenizer: its tokenizer, from ``open_clip.get_tokenizer``; needs ``encode``, ``sot_token_id`` and
                ``eot_token_id`` for :meth:`name_tokens`.
        """
        super().__init__()
        tower = getattr(clip, "text", clip)
        self.tokenizer = tokenizer
        self.token_embedding = tower.token_embedding
        self.positional_embedding = tower.positional_embedding
        self.transformer = tower.transformer
        self.ln_final = tower.ln_final
        self.text_projection = tower.text_projection
        mask = getattr(tower, "attn_mask", None)
        self.is_causal = mask is not None and torch.equal(mask, causal_mask(len(mask)).to(mask))
        # open_clip's CLIP takes over these two settings of its text tower under other names.
        self._pool_type = getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", None)
        self._end_id = getattr(tower, "text_eos_id", None) or getattr(tower, "eos_id", None)
        # CoCa's class token is appended to the text, padding included, and the embedding is read there.
        self._has_class_token = getattr(tower, "cls_emb", None) is not None
        # The bound method is kept, not the module: registering `clip` here would register its image tower.
        self._encode_text = clip.encode_text

    @property
    def width(self) -> int:
        """Width E of a token embedding."""
        return self.token_embedding.weight.shape[1]

    @property
    def embed_dim(self) -> int:
        """Width D of a text embedding."""
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection.out_features
        return self.width if self.text_projection is None else self.text_projection.shape[1]

    @property
    def context_length(self) -> int:
        """Largest number of tokens of a text, start and end included."""
        return self.positional_embedding.shape[0]

    def name_tokens(self, name: str) -> list[int]:
        """Token ids of a bare class name, without start and end."""
        return list(self.tokenizer.encode(name))

    def project(self, hidden: Tensor) -> Tensor:
        """Final LayerNorm and projection of the end tokens' hidden states: ``(..., E)`` to ``(..., D)``."""
        hidden = self.ln_final(hidden)
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(hidden)
        return hidden if self.text_projection is None else hidden @ self.text_projection

    def encode(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Text embeddings ``(len(texts), D)`` float32, each of length 1.

        In a causal transformer no token sees what comes after it. So the texts are sorted by length, and each batch
        is cut off at its longest text: the same embeddings at a fraction of the work. A tower that reads the padding
        gets every text at full length.
        """
        tokens = self.tokenizer(list(texts)).to(self.positional_embedding.device)
        if (ends := self._read_positions(tokens)) is None:
            rows = [self._encode_text(batch) for batch in tokens.split(batch_size)]
            return F.normalize(torch.cat(rows).float(), dim=-1)
        order = ends.argsort(stable=True)
        embeddings = torch.cat([self._encode_short(tokens[rows], ends[rows]) for rows in order.split(batch_size)])
        return embeddings[order.argsort()]

    def _read_positions(self, tokens: Tensor) -> Tensor | None:
        """Where the embedding of each text ``(N, T)`` is read: ``(N,)``; None if tokens behind it matter, too."""
        if not self.is_causal or self._has_class_token:
            return None
        if self._pool_type == "argmax":
            return tokens.argmax(dim=1)
        if self._pool_type == "eos":
            return (tokens == self._end_id).int().argmax(dim=1)
        return None

    def _encode_short(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """Embeddings ``(N, D)`` of length 1 of texts ``(N, T)``, read at ``ends`` ``(N,)``."""
        length = int(ends.max()) + 1
        embedded = self.token_embedding(tokens[:, :length]) + self.positional_embedding[:length]
        hidden = self.transformer(embedded, attn_mask=causal_mask(length).to(embedded))
        return F.normalize(self.project(hidden[torch.arange(len(tokens), device=ends.device), ends]).float(), dim=-1)


def causal_mask(length: int) -> Tensor:
    """Additive attention mask ``(length, length)`` of a causal transformer: -inf above the diagonal, else 0."""
    return torch.full((length, length), float("-inf")).triu(1)


# Classes whose texts are encoded together: enough to sort by length, few enough that others need not wait for long.
_CLASSES_AT_ONCE = 16


@torch.no_grad()
def query_features(
    text_encoder: TextEncoder,
    class_names: Sequence[Sequence[str]],
    templates: Sequence[str],
    turn: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Tensor:
    """Query text features W_q (section III-A): the frozen segmentation head.

    Each text is normalised, a class's texts (all templates of all its names) are averaged, and the average is
    normalised again.

    Args:
        class_names: for each class its name and any synonyms.
        templates: texts with one ``{}`` for the name.
        turn: makes a context that is entered around the encoding of each class.

    Returns:
        ``(C, D)`` float32 on the CPU.
    """
    texts = [[template.format(name) for name in names for template in templates] for names in class_names]
    for names, own_texts in zip(class_names, texts, strict=True):
        longest = max(len(text_encoder.name_tokens(text)) for text in own_texts)
        if longest > text_encoder.context_length - 2:
            raise ReclipError(f"class name {names[0][:60]!r} is longer than the text encoder takes: shorten it")
    features = []
    for start in range(0, len(texts), _CLASSES_AT_ONCE):
        group = texts[start : start + _CLASSES_AT_ONCE]
        with turn():
            embeddings = text_encoder.encode([text for own_texts in group for text in own_texts])
        of_classes = embeddings.split([len(own_texts) for own_texts in group])
        features.extend(F.normalize(rows.mean(dim=0), dim=0) for rows in of_classes)
    return torch.stack(features).cpu()


def cached_query_features(
    text_encoder: TextEncoder,
    class_names: Sequence[Sequence[str]],
    templates: Sequence[str],
    clip_key: str,
    turn: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Tensor:
    """:func:`query_features`, kept in a file of :func:`reclip_d2.utils.io.cache_dir`.

    The file's name is a hash of all that the features depend on: ``clip_key`` (``DenseCLIP.key``: architecture and
    weights), the templates and the names; a change of any of them computes anew.
    """
    key = json.dumps([clip_key, list(templates), [list(names) for names in class_names]])
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    path = cache_dir() / "query_features" / f"{digest}.safetensors"
    shape = (len(class_names), text_encoder.embed_dim)
    if (kept := _read_query_features(path, shape)) is not None:
        return kept
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(waiting(lock_path(path), "another run, which computes the same text features"))
            if (kept := _read_query_features(path, shape)) is not None:
                return kept
        except OSError as error:
            logger.warning("the cache cannot be written: %s", error)
            return query_features(text_encoder, class_names, templates, turn)
        features = query_features(text_encoder, class_names, templates, turn)
        try:
            remove_leftovers_of(path)
            with atomic_write(path) as temporary:
                temporary.write_bytes(safetensors.torch.save({"query_features": features}))
        except OSError as error:  # the disk is full: they are computed again next time
            logger.warning("text features are not kept: %s", error)
    return features


def _read_query_features(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """Features of a file; None for one that is missing, or damaged: that is no mistake of the user's."""
    try:
        features = safetensors.torch.load(read_bytes(path, limit=_MAX_CACHE_BYTES)).get("query_features")
    except (ReclipError, safetensors.SafetensorError, ValueError):
        return None
    if features is None or features.dtype != torch.float32 or tuple(features.shape) != shape:
        return None
    return features if torch.allclose(features.norm(dim=1), torch.ones(shape[0]), atol=1e-3) else None


def check_class_names(
    class_names: Sequence[Sequence[str]], encode: Callable[[str], Sequence[int]] | None = None
) -> None:
    """Raise :class:`ReclipError` for an empty list, an empty name or a name that two classes share.

    Args:
        encode: token ids of a name: then names that differ in writing alone, and not in their tokens, count as one.
    """
    if not class_names:
        raise ReclipError("the class list is empty: the data set's metadata needs stuff_classes")
    seen: dict[str, int] = {}
    read: dict[tuple[int, ...], tuple[int, str]] = {}
    for index, names in enumerate(class_names):
        if not names:
            raise ReclipError(f"class {index} has no name: give every class a name")
        for name in names:
            if not name.strip():
                raise ReclipError(f"class {index} has an empty name: give every class a name")
            if seen.setdefault(name.strip().lower(), index) != index:
                raise ReclipError(
                    f"classes {seen[name.strip().lower()]} and {index} share the name {name!r}: rename one"
                )
            if encode is not None:
                other_index, other = read.setdefault(tuple(encode(name)), (index, name))
                if other_index != index:
                    raise ReclipError(
                        f"CLIP reads the names {other!r} of class {other_index} and {name!r} of class {index} alike:"
                        " rename one"
                    )
