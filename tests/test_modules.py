"""The UNet against the description of Ho et al.'s, and the moving average."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from modules import (
    EMA,
    Attention,
    Autoencoder,
    Classifier,
    ConditionalUNet,
    GroupNorm,
    ResidualBlock,
    TextUNet,
    UNet,
    timestep_embedding,
)
from support.text import PAD


def randomized(net, seed=0):
    """All weights random, so that zero-initialised layers hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data.normal_(0, 0.1, generator=generator)
    return net


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 24), (4, 28, 12), (1, 4, 4)])
def test_out_is_shaped_as_in(shape):
    net = UNet(shape[0], width=8, multipliers=(1, 2, 3), blocks=1, attention=(1, 2))
    x, t = torch.randn(2, *shape), torch.tensor([1, 1000])
    assert net(x, t).shape == x.shape
    assert torch.equal(net(x, t), net(x, t, None))


@pytest.mark.parametrize("patch", [2, 4])
def test_a_patch_of_pixels_is_the_channels_of_one_position(patch):
    small = dict(width=8, multipliers=(1, 2), blocks=1, attention=(1,))
    patched, plain = UNet(2, patch=patch, **small), UNet(2 * patch**2, **small)
    plain.load_state_dict(randomized(patched).state_dict())
    x, t = torch.randn(3, 2, 16, 24), torch.tensor([1, 10, 1000])
    corners = [x[:, :, i::patch, j::patch] for i in range(patch) for j in range(patch)]
    out = plain(torch.stack(corners, 2).flatten(1, 2), t).unflatten(1, (2, patch**2))
    expected = torch.empty_like(x)
    for k, (i, j) in enumerate((i, j) for i in range(patch) for j in range(patch)):
        expected[:, :, i::patch, j::patch] = out[:, :, k]
    assert torch.allclose(patched(x, t), expected, atol=1e-6)
    assert patched.divisor == 2 * patch
    with pytest.raises(ValueError, match=f"divisible by {2 * patch}"):
        patched(torch.zeros(1, 2, 2 * patch, 3 * patch), torch.tensor([1]))


def test_size_that_does_not_fit_is_told():
    net = UNet(1, width=8, multipliers=(1, 2, 2))
    for size in ((8, 6), (10, 8)):
        with pytest.raises(ValueError, match="divisible by 4"):
            net(torch.zeros(1, 1, *size), torch.tensor([1]))


@pytest.mark.parametrize(
    "bad",
    [dict(attention=(0,)), dict(attention=(3,)), dict(width=7), dict(blocks=0), dict(width=2), dict(patch=0)],
)
def test_settings_that_make_no_network(bad):
    with pytest.raises(ValueError):
        UNet(**{**dict(width=8, multipliers=(1, 2, 2), attention=(1,)), **bad})


def test_output_is_zero_before_training():
    net = UNet(1, width=8)
    assert (net(torch.randn(2, 1, 8, 8), torch.tensor([3, 4])) == 0).all()


def test_every_parameter_is_used():
    net = randomized(UNet(2, width=8, multipliers=(1, 2), blocks=2, attention=(1,))).double()
    net(torch.randn(2, 2, 8, 8).double(), torch.tensor([3, 400])).square().sum().backward()
    for name, p in net.named_parameters():
        if ".k.bias" not in name:  # adds the same to every score, and softmax takes it out again
            assert p.grad is not None and p.grad.abs().max() > 1e-12, name


def test_time_matters_and_images_of_a_batch_do_not_mix():
    net = randomized(UNet(1, width=8)).eval()
    x = torch.randn(2, 1, 8, 8)
    out = net(x, torch.tensor([10, 10]))
    assert not torch.allclose(out[:1], net(x, torch.tensor([500, 10]))[:1], atol=1e-3)
    assert torch.allclose(out[:1], net(x[:1], torch.tensor([10])), atol=1e-5)


def test_number_of_blocks_and_skips():
    """blocks a level down, blocks + 1 up; every output on the way down is a skip: counted as in Ho et al.'s
    code.
    """
    net = UNet(3, width=32, multipliers=(1, 2, 2), blocks=2, attention=(1,))
    assert [len(level) for level in net.down] == [2, 2, 2] and [len(level) for level in net.up] == [3, 3, 3]
    # conv_in, then two blocks and a downsample a level, the last level without
    skips = [32] * 4 + [64] * 5
    for level in net.up:
        for stage in level:
            assert stage.block.norm1.num_channels - skips.pop() in (32, 64)
    assert skips == []
    attended = [[isinstance(stage.attention, Attention) for stage in level] for level in net.down]
    assert attended == [[False] * 2, [True] * 2, [False] * 2]
    assert isinstance(net.middle[0].attention, Attention)


def test_published_cifar10_network_has_its_published_size():
    """Ho et al.'s CIFAR-10 network: 35.7 million parameters (2020, appendix B); the weights file holds
    35,746,307.
    """
    net = UNet(3, width=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(1,))
    assert sum(p.numel() for p in net.parameters()) == 35_746_307


def test_timestep_embedding():
    t, dim = torch.tensor([1, 10, 999]), 8
    expected = [
        [f(v * 10000 ** (-i / 3)) for f in (math.sin, math.cos) for i in range(4)] for v in t.tolist()
    ]
    assert torch.allclose(timestep_embedding(t, dim), torch.tensor(expected), atol=1e-4)


@pytest.mark.parametrize(
    "channels, groups", [(32, 8), (64, 16), (128, 32), (512, 32), (8, 2), (144, 24), (6, 1), (3, 1)]
)
def test_group_norm(channels, groups):
    norm = GroupNorm(channels)
    assert norm.num_groups == groups and norm.eps == 1e-6


def test_a_norm_of_16_bits_is_exact_to_their_rounding():
    norm, x = randomized(GroupNorm(8)), torch.randn(2, 8, 4, 4).bfloat16()
    groups = x.double().view(2, 2, -1)  # of 4 channels each
    deviation = (groups.var(2, unbiased=False, keepdim=True) + norm.eps).sqrt()
    h = ((groups - groups.mean(2, keepdim=True)) / deviation).view(2, 8, 4, 4)
    expected = h * norm.weight.view(8, 1, 1) + norm.bias.view(8, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == x.dtype
        assert torch.allclose(norm(x).double(), expected, rtol=2**-8, atol=1e-5)


def test_residual_block_adds_time_between_its_convolutions():
    block = randomized(ResidualBlock(8, 12, emb_dim=5)).eval()
    x, emb = torch.randn(2, 8, 6, 6), torch.randn(2, 5)
    h = F.conv2d(F.silu(block.norm1(x)), block.conv1.weight, block.conv1.bias, padding=1)
    h = h + (F.silu(emb) @ block.time.weight.T + block.time.bias).view(2, 12, 1, 1)
    h = F.conv2d(F.silu(block.norm2(h)), block.conv2.weight, block.conv2.bias, padding=1)
    assert torch.allclose(
        block(x, emb), h + F.conv2d(x, block.shortcut.weight, block.shortcut.bias), atol=1e-5
    )


def test_adagn_scales_and_shifts_what_the_second_norm_gives():
    block = randomized(ResidualBlock(8, 12, emb_dim=5, adagn=True)).eval()
    x, emb = torch.randn(2, 8, 6, 6), torch.randn(2, 5)
    h = F.conv2d(F.silu(block.norm1(x)), block.conv1.weight, block.conv1.bias, padding=1)
    scale, shift = (F.silu(emb) @ block.time.weight.T + block.time.bias).view(2, 2, 12, 1, 1).unbind(1)
    h = F.silu(block.norm2(h) * (1 + scale) + shift)
    h = F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1)
    assert torch.allclose(block(x, emb), h + block.shortcut(x), atol=1e-5)
    assert all(block.adagn for block in UNet(adagn=True).modules() if isinstance(block, ResidualBlock))
    assert not Autoencoder(adagn=True, width=8).middle[0].block.adagn  # which has no time


def test_attention_is_softmax_over_positions():
    attention = randomized(Attention(8))
    x = torch.randn(2, 8, 3, 5)
    h = attention.norm(x).flatten(2)  # (B, C, N)
    q, k, v = (f.weight[:, :, 0, 0] @ h + f.bias[:, None] for f in (attention.q, attention.k, attention.v))
    weights = torch.softmax(q.transpose(1, 2) @ k / 8**0.5, dim=2)  # (B, N, N)
    h = v @ weights.transpose(1, 2)
    expected = x + (attention.out.weight[:, :, 0, 0] @ h + attention.out.bias[:, None]).view(x.shape)
    assert torch.allclose(attention(x), expected, atol=1e-5)


def test_downsample_pads_as_tensorflow_does():
    """Output pixel (i, j) sees rows 2i..2i+2 and columns 2j..2j+2, zero beyond the right and bottom edge."""
    down = randomized(UNet(1, width=4, multipliers=(1, 1), attention=()).downsample[0])
    x = torch.randn(1, 4, 4, 4)
    padded = torch.zeros(1, 4, 5, 5)
    padded[..., :4, :4] = x
    for i in range(2):
        for j in range(2):
            patch = padded[0, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            expected = (down.conv.weight * patch).sum(dim=(1, 2, 3)) + down.conv.bias
            assert torch.allclose(down(x)[0, :, i, j], expected, atol=1e-6)


def test_upsample_repeats_pixels_before_its_convolution():
    up = randomized(UNet(1, width=4, multipliers=(1, 1), attention=()).upsample[0])
    x = torch.randn(1, 4, 3, 3)
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.allclose(up(x), F.conv2d(repeated, up.conv.weight, up.conv.bias, padding=1), atol=1e-6)


def test_channels_last_gives_the_same_numbers():
    net = randomized(UNet(1, width=8)).eval()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    assert torch.allclose(
        net(x, t), copy.deepcopy(net).to(memory_format=torch.channels_last)(x, t), atol=1e-4
    )


def test_ema_is_its_recursion():
    net = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(net, decay=0.9)
    average = net.weight.item()
    for step in range(200):
        net.weight.data.fill_(float(step))
        ema.update(net, step)
        d = min(0.9, (1 + step) / (10 + step))
        average = d * average + (1 - d) * step
        assert ema.net.weight.item() == pytest.approx(average, rel=1e-4)
    assert not ema.net.weight.requires_grad and not ema.net.training


# conditional networks

SMALL = dict(channels=2, width=8, multipliers=(1, 2), blocks=1, attention=(1,))


def inputs(B=4):
    g = torch.Generator().manual_seed(1)
    return torch.randn(B, 2, 8, 8, generator=g), torch.randint(1, 1001, (B,), generator=g)


def test_conditional_unet_with_a_zero_embedding_is_the_unet_bit_for_bit():
    unet, net = randomized(UNet(**SMALL)), ConditionalUNet(num_classes=3, **SMALL)
    missing, unexpected = net.load_state_dict(unet.state_dict(), strict=False)
    assert missing == ["label_embedding.weight"] and not unexpected
    x, t = inputs()
    y = torch.tensor([0, 1, 2, 3])  # 3 is the null label
    assert torch.equal(net(x, t, y), unet(x, t))  # as it is made
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x, t, y), unet(x, t))
    net.label_embedding.weight.data.normal_()
    assert not torch.allclose(net(x, t, y), unet(x, t))
    net.label_embedding.weight.data.zero_()
    assert torch.equal(net(x, t, y), unet(x, t))


def test_each_label_moves_its_own_images_and_null_is_no_label():
    net = randomized(ConditionalUNet(3, **SMALL))
    x, t = inputs()
    y = torch.tensor([0, 1, 2, 1])
    assert net.null(y).tolist() == [3] * 4
    assert torch.equal(net(x, t), net(x, t, net.null(y)))
    changed = (net(x, t, torch.tensor([0, 2, 2, 1])) - net(x, t, y)).abs().amax((1, 2, 3))
    assert changed[1] > 1e-3 and changed[[0, 2, 3]].max() < 1e-5


def test_label_embedding_is_added_to_the_time_embedding():
    net = randomized(ConditionalUNet(3, **SMALL))
    _, t = inputs()
    y = torch.tensor([2, 0, 3, 1])
    emb, context = net.embed(t, y)
    assert (
        torch.allclose(emb, UNet.embed(net, t, None)[0] + net.label_embedding.weight[y]) and context is None
    )


CAPTIONS = torch.tensor(  # END is 1, PAD is 0
    [[5, 6, 7, 1, 0, 0], [7, 6, 5, 1, 0, 0], [2, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
)


def text_unet():
    """As it is made, but for the layers that start at zero."""
    torch.manual_seed(0)
    net = TextUNet(vocabulary=8, max_tokens=6, text_width=32, text_layers=2, **SMALL)
    for p in net.parameters():
        if not p.any():
            p.data.normal_(0, 0.1)
    return net


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_padding_tells_a_text_unet_nothing(mode):
    net = getattr(text_unet(), mode)()
    x, t = inputs()
    with torch.no_grad() if mode == "eval" else torch.enable_grad():
        whole = net(x, t, CAPTIONS)
        for i, length in enumerate((4, 4, 2, 1)):
            alone = net(x[i : i + 1], t[i : i + 1], CAPTIONS[i : i + 1, :length])
            assert torch.allclose(whole[i : i + 1], alone, atol=1e-5)
        net.token_embedding.weight.data[PAD] += 3.0
        assert torch.allclose(net(x, t, CAPTIONS), whole, atol=1e-5)


def test_words_and_their_order_matter():
    net = text_unet()
    x, t = inputs(1)
    out = [net(x, t, caption[None]) for caption in CAPTIONS]
    for i in range(4):
        for j in range(i):
            assert (out[i] - out[j]).abs().max() > 1e-3


def test_each_word_is_mixed_with_those_beside_it():
    torch.manual_seed(0)
    net = TextUNet(vocabulary=8, max_tokens=6, text_width=32, text_layers=0, text_kernel=3, **SMALL)
    tokens, _ = net.embed(torch.ones(4, dtype=torch.long), CAPTIONS)[1]
    position, weight = net.position_embedding.weight, net.beside.weight  # (6, 32), (32, 32, 3)
    for caption, found in zip(CAPTIONS, tokens, strict=True):
        words = caption[caption != PAD]
        h = net.token_embedding.weight[words] + position[: len(words)]
        beside = F.pad(h, (0, 0, 1, 1))  # nothing stands before the first and after the last
        mixed = sum(beside[k : k + len(words)] @ weight[:, :, k].T for k in range(3)) + net.beside.bias
        assert torch.allclose(found[: len(words)], F.layer_norm(h + mixed, (32,)), atol=1e-5)


def test_empty_caption_is_the_null_condition():
    net = text_unet()
    x, t = inputs()
    assert torch.equal(net.null(CAPTIONS), CAPTIONS[3:].expand(4, -1))
    assert torch.allclose(net(x, t), net(x, t, net.null(CAPTIONS)), atol=1e-6)


def test_the_last_token_joins_the_time_embedding_and_all_are_context():
    net = text_unet()
    _, t = inputs()
    emb, (tokens, real) = net.embed(t, CAPTIONS)
    assert tokens.shape == (4, 6, 32) and real.sum(1).tolist() == [4, 4, 2, 1]
    last = torch.stack([tokens[0, 3], tokens[1, 3], tokens[2, 1], tokens[3, 0]])
    assert torch.allclose(emb, UNet.embed(net, t, None)[0] + net.text_to_emb(last), atol=1e-6)


def test_what_joins_the_time_embedding_is_made_of_words_from_the_start():
    torch.manual_seed(0)
    net = TextUNet(vocabulary=102, max_tokens=13, **SMALL)
    captions = torch.cat([torch.arange(2, 98).view(8, 12), torch.ones(8, 1, dtype=torch.long)], dim=1)
    tokens, _ = net.embed(torch.ones(8, dtype=torch.long), captions)[1]
    alike = torch.corrcoef(tokens[:, -1]) - torch.eye(8)  # of END after captions that share no word
    assert alike.mean() < 0.5


def test_with_places_attention_reads_where_each_position_is():
    """Half a period, then a whole one, of sines and cosines over the height and the width, written out."""
    torch.manual_seed(0)
    layer, plain = Attention(8, places=True), Attention(8)
    for weight in layer.parameters():
        weight.data.normal_()
    plain.load_state_dict({name: w for name, w in layer.state_dict().items() if "place" not in name})
    x, height, width = torch.randn(2, 8, 3, 4), 3, 4
    codes = torch.empty(8, height, width)
    for i in range(height):
        for j in range(width):
            angles = [math.pi * (i / (height - 1) - 0.5), math.pi * (j / (width - 1) - 0.5)]
            half, whole = ([f(k * a) for f in (math.sin, math.cos) for a in angles] for k in (1, 2))
            codes[:, i, j] = torch.tensor(half + whole)
    weight, bias = layer.place.weight[:, :, 0, 0], layer.place.bias
    read = layer.norm(x) + torch.einsum("ck,khw->chw", weight, codes) + bias[:, None, None]
    plain.norm = torch.nn.Identity()
    assert torch.allclose(layer(x) - x, plain(read) - read, atol=1e-4)
    same = torch.ones(1, 8, 3, 4)  # attention alone returns the same at every place
    assert layer(same).std((2, 3)).max() > 0.1 and plain(same).std((2, 3)).max() < 1e-4


def test_context_is_further_keys_and_values():
    """softmax over H W + L keys, written out, padding left out of the sum."""
    layer = randomized(Attention(8, context_dim=5))
    x, tokens = torch.randn(2, 8, 2, 3), torch.randn(2, 4, 5)
    real = torch.tensor([[True, True, True, False], [True, False, False, False]])
    out = layer(x, (tokens, real))
    for i in range(2):
        h = layer.norm(x[i : i + 1])
        q, k, v = (f(h)[0].flatten(1).T for f in (layer.q, layer.k, layer.v))  # (HW, C)
        k_text, v_text = layer.context(tokens[i][real[i]]).chunk(2, dim=-1)
        weights = F.softmax(q @ torch.cat([k, k_text]).T / math.sqrt(8), dim=1)  # (HW, HW + L)
        mixed = (weights @ torch.cat([v, v_text])).T.reshape(1, 8, 2, 3)
        assert torch.allclose(out[i], (x[i : i + 1] + layer.out(mixed))[0], atol=1e-5)


def test_every_attention_layer_has_the_context():
    net = text_unet()
    layers = [m for m in net.modules() if isinstance(m, Attention)]
    assert len(layers) == 4 and all(m.context is not None for m in layers)  # one down, middle, two up
    x, t = inputs()
    net(x, t, CAPTIONS).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_classifier_is_the_way_down_pooled():
    net = randomized(Classifier(3, **SMALL))
    x, t = inputs()
    assert net(x, t).shape == (4, 3)
    names = {name.split(".")[0] for name, _ in net.named_parameters()}
    assert names == {"time_mlp", "conv_in", "down", "downsample", "middle", "norm_out", "head"}
    assert not torch.allclose(net(x, t), net(x, t + 300))  # it knows the noise level
    h, _ = net.encode(x, *net.embed(t, None))
    assert torch.allclose(net(x, t), net.head(F.silu(net.norm_out(h)).flatten(2).mean(2)), atol=1e-6)
    wide = net(torch.randn(4, 2, 16, 24), t)  # pooled, so any size
    assert wide.shape == (4, 3)
