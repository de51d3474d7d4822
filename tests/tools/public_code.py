"""The models of the public ReCLIP and ReCLIP++ code, transcribed for tests: what they do to CLIP, and their names.

Shape letters: B images, C classes, D joint embedding, E width of the image transformer, (h, w) patch grid.
"""

import importlib.util
import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from torch import nn

from reclip_d2.backbones.build import build_clip
from reclip_d2.config import load_config
from reclip_d2.modeling.checkpoint import ReclipCheckpointer
from tests.helpers import EMBED_DIM, TINY_NAME, TINY_TEXT, TINY_VISION, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
QUICK_NAME = f"{TINY_NAME}-quickgelu"
CLIP_OPTIONS = ("--clip", QUICK_NAME, "--pretrained", "random")
MEAN, STD = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])


@pytest.fixture(scope="module")
def tool():
    """The program as a module."""
    path = ROOT / "tools" / "convert_public_checkpoint.py"
    spec = importlib.util.spec_from_file_location("convert_public_checkpoint", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def quick_model(tmp_path_factory) -> None:
    """The tiny CLIP with QuickGELU, known to open_clip."""
    if QUICK_NAME not in open_clip.list_models():
        path = tmp_path_factory.mktemp("model") / f"{QUICK_NAME}.json"
        config = {"embed_dim": EMBED_DIM, "vision_cfg": TINY_VISION, "text_cfg": TINY_TEXT, "quick_gelu": True}
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)


class PublicModel(nn.Module):
    """What the two models share, in eval mode: the changed image tower and the Reference prompt."""

    def __init__(self, clip: nn.Module, class_token: torch.Tensor, activation: str) -> None:
        super().__init__()
        self.clip = clip
        self.token = class_token
        self.gelu = activation == "gelu"
        self.text_encoder = nn.Module()
        self.text_encoder.prompt_token = nn.Parameter(0.3 * torch.randn(1, 73, TINY_TEXT["width"]))

    def mlp(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        hidden = block.mlp.c_fc(x)
        return block.mlp.c_proj(F.gelu(hidden) if self.gelu else hidden * torch.sigmoid(1.702 * hidden))

    def features(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense features (B, D, h, w) and the resized positional embedding (1, E, h, w)."""
        visual, patch, width = self.clip.visual, 8, TINY_VISION["width"]
        h, w = -(-image.shape[2] // patch), -(-image.shape[3] // patch)
        image = F.pad(image, [0, w * patch - image.shape[3], 0, h * patch - image.shape[2]])
        x = visual.conv1(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.view(1, 1, -1).expand(len(x), 1, -1), x], dim=1)
        pe = visual.positional_embedding
        grid = pe[1:].reshape(1, 4, 4, width).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
        x = visual.ln_pre(x + torch.cat([pe[None, :1], grid.flatten(2).transpose(1, 2)], dim=1))
        for index, block in enumerate(visual.transformer.resblocks):
            y = F.layer_norm(x, (width,), block.ln_1.weight, block.ln_1.bias, 1e-6)
            if index < len(visual.transformer.resblocks) - 1:
                y = block.attn(y, y, y, need_weights=False)[0]
            else:
                y = F.linear(y, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)[2]
                y = F.linear(y, block.attn.out_proj.weight, block.attn.out_proj.bias)
            x = x + y
            x = x + self.mlp(block, F.layer_norm(x, (width,), block.ln_2.weight, block.ln_2.bias, 1e-6))
        x = (visual.ln_post(x)[:, 1:] @ visual.proj).transpose(1, 2).unflatten(2, (h, w))
        return x / x.norm(dim=1, keepdim=True), grid

    def reference(self, names: list[str]) -> torch.Tensor:
        """Reference features (C, D) before their norm."""
        clip = self.clip
        tokens = torch.stack([tiny_tokenizer()(name)[0][1:4] for name in names])
        start = clip.token_embedding(torch.tensor([[49406]])).expand(len(names), -1, -1)
        prompt = self.text_encoder.prompt_token.expand(len(names), -1, -1)
        x = torch.cat([start, prompt, clip.token_embedding(tokens)], dim=1) + clip.positional_embedding
        x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask))
        return x[torch.arange(len(names)), 74 + tokens.argmax(-1)] @ clip.text_projection


class PublicReCLIPPP(PublicModel):
    """ReCLIP++: positional features times Reference features, and the decoder."""

    def __init__(self, clip: nn.Module, class_token: torch.Tensor, num_classes: int, activation: str) -> None:
        super().__init__(clip, class_token, activation)
        self.pe_proj = nn.Conv2d(TINY_VISION["width"], EMBED_DIM, 1)
        self.decoder_conv2 = nn.Conv2d(EMBED_DIM + num_classes, num_classes, 5, padding=2)
        self.decoder_norm2 = nn.BatchNorm2d(num_classes)
        nn.init.normal_(self.decoder_norm2.running_mean)
        nn.init.uniform_(self.decoder_norm2.running_var, 0.5, 1.5)

    def forward(self, image: torch.Tensor, query: torch.Tensor, names: list[str]) -> torch.Tensor:
        features, grid = self.features(image)
        prompt = self.reference(names)
        prompt = prompt / prompt.norm()
        bias = torch.einsum("xdhw,cd->xchw", self.pe_proj(grid), prompt)
        logits = torch.einsum("bdhw,cd->bchw", features, query) - bias
        return self.decoder_norm2(self.decoder_conv2(torch.cat([features, logits], dim=1)))


class PublicReCLIP(PublicModel):
    """ReCLIP: similarities with the Reference features, three convolutions of PE, and no decoder."""

    def __init__(
        self, clip: nn.Module, class_token: torch.Tensor, num_classes: int, activation: str, widths=(20, 12)
    ) -> None:
        super().__init__(clip, class_token, activation)
        sizes, layers = [TINY_VISION["width"], *widths, num_classes], []
        for inside, outside in zip(sizes[:-1], sizes[1:], strict=True):
            norm = nn.BatchNorm2d(outside)
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            layers += [nn.Conv2d(inside, outside, 3, padding=1), norm, nn.ReLU()]
        self.proj_net = nn.Sequential(*layers)
        self.conv1, self.norm1 = layers[0], layers[1]  # that code has its layers under two names each

    def forward(self, image: torch.Tensor, query: torch.Tensor, names: list[str]) -> torch.Tensor:
        features, grid = self.features(image)
        prompt = self.reference(names)
        prompt = prompt / prompt.norm()
        bias = torch.einsum("bdhw,cd->bchw", features, prompt) + self.proj_net(grid)
        return torch.einsum("bdhw,cd->bchw", features, query) - bias


def public_model(activation: str = "own", num_classes: int = 4, kind: type = PublicReCLIPPP) -> PublicModel:
    """A model of random weights in eval mode."""
    clip, _ = build_clip(QUICK_NAME, "random")
    return kind(clip, torch.randn(TINY_VISION["width"]), num_classes, activation).eval().requires_grad_(False)


def save_public(folder: Path, model: PublicModel, prefix: str = "module.", **extra: torch.Tensor) -> tuple[Path, Path]:
    """The checkpoint and the class token as that code has them; CLIP's tensors are dragged along."""
    state = {f"{prefix}{name}": value for name, value in {**model.state_dict(), **extra}.items()}
    torch.save(state, folder / "best_weight.pth")
    torch.save(model.token.view(1, 1, -1), folder / "cls_token.pt")
    return folder / "best_weight.pth", folder / "cls_token.pt"


def name_file(folder: Path, names: list[str], file: str = "names.txt") -> str:
    """A class list, one name per line."""
    (folder / file).write_text("\n".join(names) + "\n")
    return str(folder / file)


def built(config: Path, names: list[str], datasets) -> nn.Module:
    """The model of a written config with its weights, as train_net.py makes it."""
    datasets("reclip_test_public", [], names)
    cfg = load_config(str(config), ["MODEL.DEVICE", "cpu", "DATASETS.TEST", "('reclip_test_public',)"])
    model = build_model(cfg).eval()
    ReclipCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def error_of(tool, capsys, source: Path, output: Path, *options: str) -> str:
    """The error line of the program, which must leave no files."""
    with pytest.raises(SystemExit) as caught:
        tool.main([str(source), str(output), *options, *CLIP_OPTIONS])
    message = capsys.readouterr().err
    assert caught.value.code == 1 and message.startswith("error: ") and message.count("\n") == 1
    assert not list(output.parent.glob("ours.*"))
    return message
