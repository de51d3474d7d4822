"""The learnable Query, an ablation of the rectification stage (ReCLIP++, Table IV).

Shape letters: C classes, D width of the joint embedding, L prompt vectors, F width of the text transformer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reclip_d2.backbones.interface import VisionLanguageBackbone
from reclip_d2.backbones.reference import ReferencePrompt, normalize_reference

START_TEXT = "a photo of a"


class LearnableQuery(nn.Module):
    """Query text features W_q from a learnable prompt: ``Q_i = [SOS][u_1]...[u_L][name_i][EOS]``.

    The paper tests whether the Query's prompt should be learnable like the Reference's, without details. Here it has
    the Reference's form, Eq. (1), with separate vectors ``u`` that the classes share, and W_q has rows of length 1. It
    replaces the fixed W_q in the Query logits M_q and in Eq. (7); the hypotheses still use the fixed W_q, since they
    are computed before training. For a class with synonyms the first name is used, as in the Reference.

    The vectors are initialised with the embeddings of "a photo of a" (as in CoOp, whose prompts the Reference follows;
    L = 4, independent of ``MODEL.BIAS_HEAD.PROMPT_LENGTH``), so that training starts from the segmentation of the
    template ``a photo of a {}``. With random vectors, as in the Reference, M_q would start as noise, which is not what
    the ablation tests.
    """

    def __init__(self, backbone: VisionLanguageBackbone, class_names: Sequence[str]) -> None:
        """
        Args:
            backbone: gives sizes, tokens and word embeddings; it is not stored, but passed to :meth:`forward`.
            class_names: one name per class (the first of its synonyms).
        """
        super().__init__()
        tokens = torch.tensor(backbone.name_tokens(START_TEXT))
        self.prompt = ReferencePrompt(backbone, class_names, prompt_length=len(tokens))
        vectors = self.prompt.vectors  # if a class name fills the context, fewer than words: use the last words
        with torch.no_grad():
            vectors.copy_(backbone.token_embeddings(tokens)[len(tokens) - len(vectors) :])

    def forward(self, backbone: VisionLanguageBackbone) -> Tensor:
        """W_q ``(C, D)``, rows of length 1; differentiable in the prompt's vectors."""
        return normalize_reference(self.prompt(backbone), "row")
