"""CLIP: an image encoder and a text encoder that meet in one embedding space.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.
Classes, attributes and state-dict keys carry the names of OpenAI's package, so weights made for it
fit here. Shapes: B batch, n sequence length, D joint embedding, H x W pixels, h x w grid. Sequences
are batch-first, B x n x width.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


def normal(std, *shape):
    """A parameter of normal numbers, on the meta device of none: it would import the compiler."""
    x = torch.empty(shape)
    return nn.Parameter(x if x.is_meta else x.normal_(std=std))


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32 whatever the input's type, which the output keeps."""

    def forward(self, x):
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU with which OpenAI trained CLIP."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class Attention(nn.MultiheadAttention):
    """Multi-head self-attention with the parameters of PyTorch's, but open to be taken apart.

    The rows of `in_proj_weight` (3 width x width) are the query, key and value projections.
    """

    def __init__(self, width, heads, causal=False):
        super().__init__(width, checked_heads(heads, width), batch_first=True)
        self.causal = causal

    def project(self, x):
        """B x n x width -> queries, keys, values, each B x heads x n x (width / heads)."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        return tuple(split_heads(part, self.num_heads) for part in qkv.chunk(3, dim=-1))

    def forward(self, x):
        """B x n x width -> B x n x width. Causal: position i sees positions 0 ... i."""
        mixed = F.scaled_dot_product_attention(*self.project(x), is_causal=self.causal)
        return self.out_proj(merge_heads(mixed))


def checked_heads(heads, width):
    """The number of heads, by default one per 64 channels; ValueError where it is impossible."""
    heads = heads or max(1, width // 64)
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} attention heads do not divide a width of {width}")
    return heads


def split_heads(x, heads):
    """B x n x width -> B x heads x n x (width / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x):
    """B x heads x n x (width / heads) -> B x n x width."""
    return x.transpose(1, 2).flatten(2)


class MLP(nn.Sequential):
    """Linear layer, activation, linear layer: c_fc, gelu, c_proj, with the weights of each."""

    def forward(self, x):
        """B x n x width -> B x n x width, or n x width."""
        if not isinstance(self.gelu, QuickGELU):
            return super().forward(x)
        # x sigmoid(1.702 x) = silu(1.702 x) / 1.702: both factors are free within the products,
        # which leaves one pass over the widest tensor of a block instead of three.
        first, last = self.c_fc, self.c_proj
        hidden = torch.addmm(first.bias, x.flatten(0, -2), first.weight.t(),
                             beta=1.702, alpha=1.702)
        hidden = F.silu(hidden, inplace=True)
        return torch.addmm(last.bias, hidden, last.weight.t(), alpha=1 / 1.702).view(x.shape)


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block: x + attention(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, width, heads, causal=False, activation="quick_gelu"):
        super().__init__()
        self.attn = Attention(width, heads, causal)
        self.ln_1 = LayerNorm(width)
        self.mlp = MLP(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=ACTIVATIONS[activation](),
            c_proj=nn.Linear(4 * width, width)))
        self.ln_2 = LayerNorm(width)

    def forward(self, x):
        """B x n x width -> B x n x width."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of residual attention blocks on B x n x width."""

    def __init__(self, width, layers, heads, causal=False, activation="quick_gelu"):
        super().__init__()
        self.resblocks = nn.Sequential(*(
            ResidualAttentionBlock(width, heads, causal, activation) for _ in range(layers)))
        # The normal initialisation of GPT-2: what is added to the residual shrinks with depth.
        inner, residual = width ** -0.5, width ** -0.5 * (2 * layers) ** -0.5
        for block in self.resblocks:
            block.attn.in_proj_weight = normal(inner, 3 * width, width)
            block.attn.out_proj.weight = normal(residual, width, width)
            block.mlp.c_fc.weight = normal((2 * width) ** -0.5, 4 * width, width)
            block.mlp.c_proj.weight = normal(residual, width, 4 * width)

    def forward(self, x):
        return self.resblocks(x)


class VisionTransformer(nn.Module):
    """ViT: a class token and patches through a transformer; the token gives the image feature."""

    def __init__(self, input_resolution, patch_size, width, layers, heads, output_dim, activation):
        super().__init__()
        self.input_resolution = input_resolution
        tokens, scale = (input_resolution // patch_size) ** 2 + 1, width ** -0.5
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = normal(scale, width)
        self.positional_embedding = normal(scale, tokens, width)
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, activation=activation)
        self.ln_post = LayerNorm(width)
        self.proj = normal(scale, width, output_dim)

    def forward(self, image):
        """B x 3 x R x R, R being `input_resolution` -> B x D."""
        x = self.conv1(image).flatten(2).transpose(1, 2)             # B x hw x width
        token = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([token, x], dim=1) + self.positional_embedding.to(x.dtype)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


def add_convolution(module, i, inplanes, planes, size, stride=1):
    """Give a module the convolution conv{i}, with bn{i} and relu{i} that follow it."""
    convolution = nn.Conv2d(inplanes, planes, size, stride, padding=size // 2, bias=False)
    module.add_module(f"conv{i}", convolution)
    module.add_module(f"bn{i}", nn.BatchNorm2d(planes))
    module.add_module(f"relu{i}", nn.ReLU(inplace=True))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; a stride is an average pooling, here and there."""

    def __init__(self, inplanes, planes, stride=1):
        super().__init__()
        outplanes = 4 * planes
        add_convolution(self, 1, inplanes, planes, 1)
        add_convolution(self, 2, planes, planes, 3)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        add_convolution(self, 3, planes, outplanes, 1)
        self.downsample = None
        if stride > 1 or inplanes != outplanes:
            self.downsample = nn.Sequential(OrderedDict({
                "-1": nn.AvgPool2d(stride), "0": nn.Conv2d(inplanes, outplanes, 1, bias=False),
                "1": nn.BatchNorm2d(outplanes)}))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(self.avgpool(x)))
        return self.relu3(x + shortcut)


class AttentionPool2d(nn.Module):
    """Pooling by attention: the query is the mean of all positions, keys are mean and positions."""

    def __init__(self, grid, width, heads, output_dim):
        super().__init__()
        self.num_heads = checked_heads(heads, width)
        self.positional_embedding = normal(width ** -0.5, grid ** 2 + 1, width)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, output_dim)

    def forward(self, x):
        """B x width x h x w -> B x D."""
        x = x.flatten(2).transpose(1, 2)                             # B x hw x width
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
        x = x + self.positional_embedding.to(x.dtype)
        qkv = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        qkv = (split_heads(part, self.num_heads) for part in qkv)
        return self.c_proj(merge_heads(F.scaled_dot_product_attention(*qkv))).squeeze(1)


class ModifiedResNet(nn.Module):
    """ResNet with a stem of three convolutions, antialiased strides and attention pooling."""

    def __init__(self, layers, output_dim, heads, input_resolution=224, width=64):
        super().__init__()
        self.input_resolution = input_resolution
        add_convolution(self, 1, 3, width // 2, 3, stride=2)
        add_convolution(self, 2, width // 2, width // 2, 3)
        add_convolution(self, 3, width // 2, width, 3)
        self.avgpool = nn.AvgPool2d(2)
        self.layer1 = make_stage(width, width, layers[0])
        self.layer2 = make_stage(4 * width, 2 * width, layers[1], stride=2)
        self.layer3 = make_stage(8 * width, 4 * width, layers[2], stride=2)
        self.layer4 = make_stage(16 * width, 8 * width, layers[3], stride=2)
        self.attnpool = AttentionPool2d(input_resolution // 32, 32 * width, heads, output_dim)

    def forward(self, image):
        """B x 3 x R x R, R being `input_resolution` -> B x D."""
        x = self.relu1(self.bn1(self.conv1(image)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.avgpool(self.relu3(self.bn3(self.conv3(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.attnpool(x)


def make_stage(inplanes, planes, blocks, stride=1):
    """A ResNet stage; only its first block strides and changes the number of channels."""
    rest = (Bottleneck(4 * planes, planes) for _ in range(blocks - 1))
    return nn.Sequential(Bottleneck(inplanes, planes, stride), *rest)


class CLIP(nn.Module):
    """Both encoders.

    vision_layers: a number of blocks makes a VisionTransformer, four numbers a ModifiedResNet
    (then `vision_patch_size` is None). Heads: None for one per 64 channels. activation:
    "quick_gelu" or "gelu". ValueError: another one, or heads that do not divide a width.
    """

    def __init__(self, embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size,
                 context_length, vocab_size, transformer_width, transformer_heads,
                 transformer_layers, vision_heads=None, activation="quick_gelu"):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r}: expected one of {list(ACTIVATIONS)}")
        self.activation = activation
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.visual = VisionTransformer(
            image_resolution, vision_patch_size, vision_width, vision_layers, vision_heads,
            embed_dim, activation
        ) if isinstance(vision_layers, int) else ModifiedResNet(
            vision_layers, embed_dim, vision_heads, image_resolution, vision_width)
        self.transformer = Transformer(transformer_width, transformer_layers, transformer_heads,
                                       causal=True, activation=activation)
        self.token_embedding = nn.Embedding.from_pretrained(
            normal(0.02, vocab_size, transformer_width), freeze=False)
        self.positional_embedding = normal(0.01, context_length, transformer_width)
        self.ln_final = LayerNorm(transformer_width)
        self.text_projection = normal(transformer_width ** -0.5, transformer_width, embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def dtype(self):
        """The type that the encoders compute in."""
        return self.visual.conv1.weight.dtype

    def encode_image(self, image):
        """Preprocessed images, B x 3 x R x R -> features, B x D, not normalised."""
        return self.visual(image.to(self.dtype))

    def encode_text(self, text):
        """Token ids, B x n -> features, B x D, not normalised, taken at each row's end token.

        Attention is causal, so what follows the end token changes nothing: n may be anything up to
        `context_length` that holds it.
        """
        x = self.token_embedding(text).to(self.dtype)                # B x n x width
        x = x + self.positional_embedding[:text.shape[1]].to(self.dtype)
        x = self.ln_final(self.transformer(x))
        end = text.argmax(dim=-1)            # the end token has the largest id of the vocabulary
        return x[torch.arange(len(x), device=x.device), end] @ self.text_projection

    def forward(self, image, text):
        """B x 3 x R x R, T x n -> cosines times exp(logit_scale), B x T, and their transpose."""
        image_features = F.normalize(self.encode_image(image), dim=-1)
        text_features = F.normalize(self.encode_text(text), dim=-1)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.t()
        return logits_per_image, logits_per_image.t()


def convert_weights(model):
    """Turns, in place, what multiplies activations (convolutions, projections) into float16.

    Norms, embeddings and the logit scale stay in float32, as in OpenAI's package.
    """
    kept = ("ln_", "bn", "downsample.1", "embedding", "logit_scale")
    for name, parameter in model.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.half()


# Channels per head of open_clip's image encoders, by width and number of blocks. In OpenAI's own,
# 768 or 1024 wide, in the ResNets, and in the text encoders of all of them, a head has 64.
HEAD_CHANNELS = {(384, 12): 64, (512, 12): 64, (896, 12): 64, (1280, 32): 80, (1408, 40): 88,
                 (1664, 48): 104, (1792, 56): 112}
NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids"}


def build_model(state_dict, vision_heads=None, text_heads=None, activation="quick_gelu",
                guess_heads=True):
    """A CLIP in float32 and eval mode, its sizes read off the shapes in `state_dict`.

    state_dict: names -> tensors as in OpenAI's package; copied, not kept.
    vision_heads, text_heads: attention heads, which no shape tells. Default: the 0-dim tensors
    `vision_heads` and `text_heads` of the state dict where it has them, else those of the known
    model of these sizes, else one per 64 channels; the last, for the image encoder, only with
    guess_heads. activation: "quick_gelu" (OpenAI's weights) or "gelu".
    ValueError: names are missing, left over or of the wrong shape, numbers are not finite, heads do
    not divide a width, or nothing tells them.
    """
    state = {name: value.detach().clone() for name, value in state_dict.items()
             if name.rpartition(".")[2] not in NOT_WEIGHTS}
    stored = [int(state.pop(name, 0)) for name in ("vision_heads", "text_heads")]
    sizes = infer_sizes(state)
    width, layers = sizes["vision_width"], sizes["vision_layers"]
    vision_heads = vision_heads or stored[0]
    if not vision_heads and isinstance(layers, int) and width not in (768, 1024):
        if (width, layers) in HEAD_CHANNELS:
            vision_heads = width // HEAD_CHANNELS[width, layers]
        elif not guess_heads:
            raise ValueError(f"nothing tells the attention heads of its image encoder, {width} "
                             f"channels and {layers} blocks: give their number (--heads N)")
    with torch.device("meta"):               # no memory and no random numbers for nothing
        model = CLIP(**sizes, vision_heads=vision_heads, activation=activation,
                     transformer_heads=text_heads or stored[1])
    for name, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{' '.join(str(error).split()):.300}") from None
    return model.float().eval()


def infer_sizes(state):
    """The arguments of CLIP, but heads and activation, from the shapes in a state dict."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    try:
        if "visual.proj" in shapes:
            width, _, _, patch = shapes["visual.conv1.weight"]
            positions = shapes["visual.positional_embedding"][0]
            layers = count_blocks(shapes, "visual.transformer.resblocks.")
        else:
            positions = shapes["visual.attnpool.positional_embedding"][0]
            width, patch = shapes["visual.conv3.weight"][0], None
            layers = [count_blocks(shapes, f"visual.layer{i}.") for i in (1, 2, 3, 4)]
        context_length, transformer_width = shapes["positional_embedding"]
        return dict(
            embed_dim=shapes["text_projection"][1],
            image_resolution=math.isqrt(positions - 1) * (patch or 32),
            vision_layers=layers, vision_width=width, vision_patch_size=patch,
            context_length=context_length, vocab_size=shapes["token_embedding.weight"][0],
            transformer_width=transformer_width,
            transformer_layers=count_blocks(shapes, "transformer.resblocks."))
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"not a CLIP of OpenAI's names: cannot read {error}; it has "
                         + (", ".join([*shapes][:3]) or "nothing")) from None


def count_blocks(names, prefix):
    """How many different words follow the prefix in the names; KeyError where none does."""
    blocks = {name[len(prefix):].partition(".")[0] for name in names if name.startswith(prefix)}
    if not blocks:
        raise KeyError(prefix)
    return len(blocks)
