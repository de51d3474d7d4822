"""The learnable Query, an ablation of the rectification stage (ReCLIP++, Table IV).

Shape letters: C classes, D width of the joint embedding, L prompt vectors, E width of the text transformer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reclip_d2.backbones.interface import VisionLanguageBackbone
from reclip_d2.backbones.reference import ReferencePrompt, normalize_reference

START_TEXT = "a photo of a"


class LearnableQuery(nn.Module):
    """Query text features W_q of a prompt that trains: ``Q_i = [SOS][u_1]...[u_L][name_i][EOS]``.

    The paper asks whether the prompt of the Query should be learnable as the Reference's is, and does not say how it
    was made so. Here it has the Reference's form, Eq. (1), with separate vectors ``u`` that the classes share, and
    W_q has rows of length 1, as the fixed one. It takes the place of the fixed W_q in the Query logits M_q and in
    Eq. (7); the hypotheses remain those of the fixed one, since they are made before the training. A class with
    synonyms goes by the first, as in the Reference.

    The vectors start as the embedded words "a photo of a" (so does CoOp, whose prompts the Reference follows; L = 4):
    training starts from a Query that segments, that of the one template ``a photo of a {}``. From random vectors, as
    the Reference has them, M_q would start as noise, which is not what the ablation asks about. It also sets this L
    apart from ``MODEL.BIAS_HEAD.PROMPT_LENGTH``.
    """

    def __init__(self, backbone: VisionLanguageBackbone, class_names: Sequence[str]) -> None:
        """
        Args:
            backbone: read for sizes, tokens and the words' embeddings; it is passed to :meth:`forward` and not
                kept.
            class_names: one name a class (the first of its synonyms).
        """
        super().__init__()
        tokens = torch.tensor(backbone.name_tokens(START_TEXT))
        self.prompt = ReferencePrompt(backbone, class_names, prompt_length=len(tokens))
        vectors = self.prompt.vectors  # fewer than words if a class name fills the context: the last words then
        with torch.no_grad():
            vectors.copy_(backbone.token_embeddings(tokens)[len(tokens) - len(vectors) :])

    def forward(self, backbone: VisionLanguageBackbone) -> Tensor:
        """W_q ``(C, D)``, rows of length 1; differentiable in the prompt's vectors."""
        return normalize_reference(self.prompt(backbone), "row")
